#include "embedding.h"

#include <algorithm>

namespace terse {

Embedding::Embedding(const Options& options, const Tensors& tensors, Dtype dtype, float factor)
    : size_(options.size("hidden_size")), dtype_(dtype), factor_(factor) {
    const int vocab_size = options.size("vocab_size");
    weights_ = tensors.get("embedding.weight", dtype, {vocab_size, size_});
    if (dtype == Dtype::int8) {
        scales_ = tensors.floats("embedding.scales", {vocab_size});
    }
}

void Embedding::apply(Context& context, const float* positions, Streams out) const {
    const Range rows = context.worker.share(context.rows());
    for (int row = rows.begin; row < rows.end; ++row) {
        const std::size_t token = index(context.batch.tokens[index(row)]);
        float* const x = out.first + index(row) * index(size_);
        const float scale = factor_ * (scales_ == nullptr ? 1.0f : scales_[token]);
        const char* const from = static_cast<const char*>(weights_) + token * index(size_) * size_of(dtype_);
        kernels().unpack[static_cast<std::size_t>(dtype_)](from, scale, x, size_);
        if (positions != nullptr) {
            const float* const position = positions + index(context.batch.positions[index(row)]) * index(size_);
            for (int i = 0; i < size_; ++i) {
                x[i] += position[i];
            }
        }
        if (out.second != out.first) {
            std::copy_n(x, size_, out.second + index(row) * index(size_));
        }
    }
}

}  // namespace terse
