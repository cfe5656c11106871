// What makes the queries, keys and values of an attention, and its output.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "layers.h"

namespace terse {

using Output = std::vector<std::unique_ptr<Layer>>;

// Makes q, k and v [rows][hidden_size] from the normalised rows, and the output from the merged heads.
class Projection {
public:
    virtual ~Projection() = default;

    // All workers see q, k and v when it returns.
    virtual void qkv(Context& context, const float* x) const = 0;

    // What follows the merged heads; it adds to a stream. Empty: they are added themselves.
    virtual const Output& output() const = 0;
};

// The projection that a section of the configuration names.
std::unique_ptr<Projection> make_projection(Builder& builder, const std::string& name, const std::string& section,
                                            int size);

}  // namespace terse
