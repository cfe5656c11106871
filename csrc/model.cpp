#include "model.h"

#include <cmath>
#include <stdexcept>

namespace terse {
namespace {

Dtype read_dtype(const std::string& name) {
    if (name == "f32") {
        return Dtype::f32;
    }
    if (name == "bf16") {
        return Dtype::bf16;
    }
    if (name == "int8") {
        return Dtype::int8;
    }
    throw std::invalid_argument("the engine has no dtype " + name);
}

std::unique_ptr<Layer> make_head(Builder& builder, int size, int vocab_size) {
    const Options& options = builder.options;
    if (options.text("head.kind") == "multiplicative") {
        return std::make_unique<Multiplicative>(builder, "head", size, vocab_size, options.size("head.head_modules"));
    }
    return std::make_unique<Dense>(builder, "head", size, vocab_size, !options.flag("head.tied"));
}

}  // namespace

Model::Block::Block(Builder& builder, const std::string& name, int index, const Rotary* rotary)
    : attention(builder, name, index, rotary),
      feed_forward_norm(builder, name + ".feed_forward_norm", builder.options.size("hidden_size")),
      feed_forward(make_feed_forward(builder, name + ".feed_forward", builder.options.size("hidden_size"))) {
    if (const int layers = builder.options.size("sru.num_layers", 0)) {
        const int size = builder.options.size("hidden_size");
        recurrent_norm.emplace(builder, name + ".recurrent_norm", size);
        recurrent.emplace(builder, name + ".recurrent", size, builder.options.size("sru.size"), layers);
    }
}

Model::Model(const Options& options, const Tensors& tensors)
    : hidden_size_(options.size("hidden_size")),
      max_positions_(options.size("max_position_embeddings")),
      dtype_(read_dtype(options.text("dtype"))) {
    Builder builder{tensors, options, dtype_, sizes_, shape_.memories};
    shape_.layers = options.size("num_hidden_layers");
    shape_.heads = options.size("num_attention_heads");
    shape_.head_dim = hidden_size_ / shape_.heads;
    shape_.vocab_size = options.size("vocab_size");
    embedding_ = tensors.get("embedding.weight", dtype_, {shape_.vocab_size, hidden_size_});
    if (dtype_ == Dtype::int8) {
        embedding_scales_ = tensors.floats("embedding.scales", {shape_.vocab_size});
    }
    const bool tied = options.text("head.kind") == "dense" && options.flag("head.tied");
    embedding_scale_ = tied ? std::sqrt(static_cast<float>(hidden_size_)) : 1.0f;
    const std::string& position = options.text("position");
    if (position == "rotary") {
        rotary_ = std::make_unique<Rotary>(max_positions_, shape_.head_dim, options.number("rope_theta"));
    } else {
        positions_ = tensors.floats("position.weight", {max_positions_, hidden_size_});
    }
    for (int i = 0; i < shape_.layers; ++i) {
        blocks_.push_back(std::make_unique<Block>(builder, "blocks." + std::to_string(i), i, rotary_.get()));
    }
    norm_ = std::make_unique<Norm>(builder, "norm", hidden_size_);
    head_ = make_head(builder, hidden_size_, shape_.vocab_size);
}

void Model::forward(Context& context) const {
    embed(context);
    context.worker.barrier();
    float* const x = context.work.x.data();
    for (const std::unique_ptr<Block>& block : blocks_) {
        block->attention.apply(context);
        if (block->recurrent) {
            block->recurrent->apply(context, block->recurrent_norm->apply(context, x));
        }
        block->feed_forward->apply(context, block->feed_forward_norm.apply(context, x));
        if (block->recurrent) {
            const Range part = context.worker.share(context.rows() * hidden_size_);
            for (int i = part.begin; i < part.end; ++i) {
                x[i] += context.work.branch.data()[i];
            }
            context.worker.barrier();
        }
    }
}

void Model::embed(Context& context) const {
    const Range rows = context.worker.share(context.rows());
    for (int row = rows.begin; row < rows.end; ++row) {
        const std::size_t token = index(context.batch.tokens[index(row)]);
        float* const x = context.work.x.data() + index(row) * index(hidden_size_);
        const float scale = embedding_scale_ * (embedding_scales_ == nullptr ? 1.0f : embedding_scales_[token]);
        const char* const from = static_cast<const char*>(embedding_) + token * index(hidden_size_) * size_of(dtype_);
        kernels().unpack[static_cast<std::size_t>(dtype_)](from, scale, x, hidden_size_);
        if (positions_ != nullptr) {
            const float* const position = positions_ + index(context.batch.positions[index(row)]) * index(hidden_size_);
            for (int i = 0; i < hidden_size_; ++i) {
                x[i] += position[i];
            }
        }
    }
}

void Model::logits(Context& context, int first, int last, float* out) const {
    const Range rows = context.worker.share(last - first);
    float* const normed = context.work.normed.data();
    for (int row = rows.begin; row < rows.end; ++row) {
        norm_->row(context.work.x.data() + index(first + row) * index(hidden_size_),
                   normed + index(row) * index(hidden_size_));
    }
    context.worker.barrier();
    head_->apply(context, normed, last - first, out);
    context.worker.barrier();
}

}  // namespace terse
