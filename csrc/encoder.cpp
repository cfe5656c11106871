#include "encoder.h"

#include <algorithm>

#include "feedforward.h"

namespace terse {

Encoder::Encoder(const Options& options, const Tensors& tensors, Dtype dtype, Sizes& sizes, const Embedding& embedding)
    : size_(options.size("hidden_size")), embedding_(embedding) {
    const bool two_streams = options.text("kind") == "terraformer";
    Builder builder{tensors, options, dtype, sizes, shape_};
    shape_.layers = 1;
    shape_.heads = options.size("num_attention_heads");
    shape_.head_dim = size_ / shape_.heads;
    const std::string& position = options.text("encoder_position");
    const int max_positions = options.size("max_position_embeddings");
    if (position == "rotary") {
        rotary_ = std::make_unique<Rotary>(max_positions, shape_.head_dim, options.number("rope_theta"));
    } else {
        positions_ = tensors.floats("encoder_position.weight", {max_positions, size_});
    }
    for (int i = 0; i < options.size("num_encoder_layers"); ++i) {
        if (two_streams) {
            const std::string attention = "encoder.layers." + std::to_string(2 * i);
            stack_.add(std::make_unique<BidirectionalAttention>(builder, attention + ".norm", attention + ".attention",
                                                                rotary_.get()),
                       true);
            stack_.add(std::make_unique<FeedForwardLayer>(builder, "encoder.layers." + std::to_string(2 * i + 1)),
                       options.flag("swap_twice"));
        } else {
            const std::string block = "encoder_blocks." + std::to_string(i);
            stack_.add(std::make_unique<BidirectionalAttention>(builder, block + ".attention_norm",
                                                                block + ".attention", rotary_.get()));
            stack_.add(std::make_unique<FeedForwardLayer>(builder, block));
        }
    }
    if (!two_streams || !options.flag("reversible_encoder")) {
        norm_.emplace(builder, "encoder_norm", size_);
        if (two_streams) {
            out_ = std::make_unique<Dense>(builder, "encoder_out", size_, size_, true);
        }
    }
}

bool Encoder::add_stages(std::vector<Stage>& stages) const {
    stages.push_back([this](Context& context, Streams streams) {
        embedding_.apply(context, positions_, streams);
        context.worker.barrier();
    });
    const bool swapped = stack_.add_stages(stages);
    if (norm_) {
        stages.push_back([this](Context& context, Streams streams) { finish(context, streams); });
    }
    return swapped;
}

// What follows the layers, unless both streams are handed on as they are: their places do not matter.
void Encoder::finish(Context& context, Streams streams) const {
    const float* x = streams.first;
    if (out_) {
        average(context, streams, context.work.x.data(), size_);
        out_->apply(context, context.work.x.data(), context.rows(), context.work.q.data());
        context.worker.barrier();
        x = context.work.q.data();
    }
    const float* const normed = norm_->apply(context, x);
    context.worker.barrier();
    const Range rows = context.worker.share(context.rows());
    for (float* const stream : {streams.first, streams.second}) {
        std::copy(normed + index(rows.begin) * index(size_), normed + index(rows.end) * index(size_),
                  stream + index(rows.begin) * index(size_));
    }
    context.worker.barrier();
}

}  // namespace terse
