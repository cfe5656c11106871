// Reads a whole source, each of whose tokens sees all others.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"
#include "embedding.h"
#include "layers.h"
#include "session.h"
#include "stack.h"

namespace terse {

class Encoder {
public:
    // `embedding` must outlive the encoder.
    Encoder(const Options& options, const Tensors& tensors, Dtype dtype, Sizes& sizes, const Embedding& embedding);

    // Of the session that a source is read with; its one cache serves all layers in turn.
    const SessionShape& session_shape() const { return shape_; }

    // What the consecutive blocks of a source go through; says whether the streams have changed places at the end. Memory
    // grows with the source's length, not with its square.
    bool add_stages(std::vector<Stage>& stages) const;

private:
    void finish(Context& context, Streams streams) const;

    int size_;
    const Embedding& embedding_;
    const float* positions_ = nullptr;  // [max_positions][hidden_size]
    std::unique_ptr<Rotary> rotary_;
    SessionShape shape_;
    Stack stack_;
    std::unique_ptr<Layer> out_;  // of the mean of two streams
    std::optional<Norm> norm_;
};

}  // namespace terse
