// From tokens to vectors.
#pragma once

#include "layers.h"

namespace terse {

// The vectors of a model's tokens, which its encoder and its decoder share.
class Embedding {
public:
    Embedding(const Options& options, const Tensors& tensors, Dtype dtype, float factor);

    // Writes the rows of a batch into both streams. `positions` [max_positions][hidden_size] are added, unless null.
    void apply(Context& context, const float* positions, Streams out) const;

private:
    int size_;
    Dtype dtype_;
    float factor_;
    const void* weights_;  // [vocab_size][hidden_size]
    const float* scales_ = nullptr;
};

}  // namespace terse
