// Attention: a projection times the causal softmax.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "layers.h"

namespace terse {

// Makes q, k and v [rows][hidden_size] from the normalised rows, and the output from the merged heads.
class Projection {
public:
    virtual ~Projection() = default;

    // All workers see q, k and v when it returns.
    virtual void qkv(Context& context, const float* x) const = 0;

    // What follows the merged heads; it adds to the residual stream. Null: they are added themselves.
    virtual const std::vector<std::unique_ptr<Layer>>& output() const = 0;
};

std::unique_ptr<Projection> make_projection(Builder& builder, const std::string& name, int size);

// Cosines and sines of the rotary positions.
class Rotary {
public:
    Rotary(int positions, int head_dim, double theta);
    void rotate(float* x, int position) const;  // one head of one row

private:
    int half_;
    Buffer cosines_, sines_;  // [positions][head_dim / 2]
};

class Attention {
public:
    Attention(Builder& builder, const std::string& name, int layer, const Rotary* rotary);

    // Adds to the residual stream, for all workers to see.
    void apply(Context& context) const;

private:
    void attend(Context& context, const Run& run, int head, float* out, bool add) const;

    int layer_, size_, heads_, head_dim_;
    const Rotary* rotary_;
    Norm norm_;
    std::unique_ptr<Projection> projection_;
};

}  // namespace terse
