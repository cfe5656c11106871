// A decoder, with an encoder if it has a source: layers over weights that somebody else owns. It holds no state and may
// serve many at once.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "attention.h"
#include "embedding.h"
#include "encoder.h"
#include "feedforward.h"
#include "layers.h"
#include "stack.h"

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

    // Places that attention may look at: those of a text, and of a source before it.
    int max_places() const;

    // Of the session that a source is read with. Null: the model reads none.
    const SessionShape* encoder_shape() const { return encoder_ ? &encoder_->session_shape() : nullptr; }

    // How the encoder reads a source; and what the decoder then does with each block of its encoded streams.
    const std::vector<Stage>& source_stages() const { return source_stages_; }
    void decode_source(Context& context, Streams encoded) const;

    // Passes a batch through all layers; all workers call it together. The sessions' lengths do not change.
    void forward(Context& context) const;

    // The logits of some rows, [last - first][vocab_size].
    void logits(Context& context, int first, int last, float* out) const;

private:
    void add_blocks(Builder& builder);
    void add_reversible_blocks(Builder& builder);

    int hidden_size_, max_positions_;
    SessionShape shape_;
    Sizes sizes_;
    std::optional<Embedding> embedding_;
    const float* positions_ = nullptr;  // [max_positions][hidden_size]
    std::unique_ptr<Rotary> rotary_;
    std::unique_ptr<Encoder> encoder_;
    std::vector<Stage> source_stages_;
    bool source_swapped_ = false;  // whether its streams have changed places behind the last stage
    Stack decoder_;
    std::vector<const CrossAttention*> crosses_;  // of the decoder
    std::unique_ptr<Norm> norm_;
    std::unique_ptr<Layer> head_;
};

}  // namespace terse
