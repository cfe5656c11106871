// A decoder: its layers over weights that somebody else owns. It holds no state and may serve many at once.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "attention.h"
#include "feedforward.h"
#include "layers.h"

namespace terse {

class Model {
public:
    // Throws std::invalid_argument when a tensor or an option is missing or unfit. `tensors` must outlive the model.
    Model(const Options& options, const Tensors& tensors);

    int hidden_size() const { return hidden_size_; }
    int vocab_size() const { return shape_.vocab_size; }
    int max_positions() const { return max_positions_; }
    const SessionShape& session_shape() const { return shape_; }
    const Sizes& sizes() const { return sizes_; }

    // Passes a batch through all blocks; all workers call it together. The sessions' lengths do not change.
    void forward(Context& context) const;

    // The logits of some rows, [last - first][vocab_size].
    void logits(Context& context, int first, int last, float* out) const;

private:
    struct Block {
        Block(Builder& builder, const std::string& name, int index, const Rotary* rotary);

        Attention attention;
        Norm feed_forward_norm;
        std::unique_ptr<FeedForward> feed_forward;
        std::optional<Norm> recurrent_norm;
        std::optional<RecurrentBranch> recurrent;
    };

    void embed(Context& context) const;

    int hidden_size_, max_positions_;
    Dtype dtype_;
    SessionShape shape_;
    Sizes sizes_;
    const void* embedding_;  // [vocab_size][hidden_size]
    const float* embedding_scales_ = nullptr;
    float embedding_scale_;
    const float* positions_ = nullptr;  // [max_positions][hidden_size]
    std::unique_ptr<Rotary> rotary_;
    std::vector<std::unique_ptr<Block>> blocks_;
    std::unique_ptr<Norm> norm_;
    std::unique_ptr<Layer> head_;
};

}  // namespace terse
