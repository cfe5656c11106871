#include "model.h"

#include <cmath>
#include <stdexcept>
#include <utility>

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

Model::Model(const Options& options, const Tensors& tensors)
    : hidden_size_(options.size("hidden_size")), max_positions_(options.size("max_position_embeddings")) {
    const std::string& kind = options.text("kind");
    const Dtype dtype = read_dtype(options.text("dtype"));
    Builder builder{tensors, options, dtype, sizes_, shape_};
    shape_.heads = options.size("num_attention_heads");
    shape_.head_dim = hidden_size_ / shape_.heads;
    shape_.vocab_size = options.size("vocab_size");
    shape_.window = Pattern(options, "attention_pattern").window();
    const bool tied = options.text("head.kind") == "dense" && options.flag("head.tied");
    embedding_.emplace(options, tensors, dtype, tied ? std::sqrt(static_cast<float>(hidden_size_)) : 1.0f);
    shape_.source = kind == "terraformer" ? SourceUse::prefix : kind == "seq2seq" ? SourceUse::cross : SourceUse::none;
    const std::string& position = options.text("position");
    if (position == "rotary") {
        rotary_ = std::make_unique<Rotary>(max_places(), shape_.head_dim, options.number("rope_theta"));
    } else if (position != "none") {
        positions_ = tensors.floats("position.weight", {max_positions_, hidden_size_});
    }
    if (shape_.source != SourceUse::none) {
        encoder_ = std::make_unique<Encoder>(options, tensors, dtype, sizes_, *embedding_);
        source_swapped_ = encoder_->add_stages(source_stages_);
    }
    if (shape_.source == SourceUse::prefix) {
        sizes_.second = index(hidden_size_);
        add_reversible_blocks(builder);
    } else {
        add_blocks(builder);
    }
    norm_ = std::make_unique<Norm>(builder, "norm", hidden_size_);
    head_ = make_head(builder, hidden_size_, shape_.vocab_size);
}

void Model::add_blocks(Builder& builder) {
    const int count = builder.options.size(encoder_ ? "num_decoder_layers" : "num_hidden_layers");
    for (int i = 0; i < count; ++i) {
        const std::string block = "blocks." + std::to_string(i);
        decoder_.add(std::make_unique<CausalAttention>(builder, block + ".attention_norm", block + ".attention",
                                                       shape_.layers++, rotary_.get()));
        if (encoder_) {
            auto cross =
                std::make_unique<CrossAttention>(builder, block + ".cross_norm", block + ".cross", shape_.crosses++);
            crosses_.push_back(cross.get());
            decoder_.add(std::move(cross));
        }
        decoder_.add(std::make_unique<FeedForwardLayer>(builder, block));
    }
}

void Model::add_reversible_blocks(Builder& builder) {
    const int attentions = builder.options.size("num_attention_layers");
    const int count = builder.options.size("num_decoder_layers") * (attentions + 1);
    for (int i = 0; i < count; ++i) {
        const std::string name = "decoder.layers." + std::to_string(i);
        if (i % (attentions + 1) < attentions) {
            decoder_.add(std::make_unique<CausalAttention>(builder, name + ".norm", name + ".attention",
                                                           shape_.layers++, rotary_.get()),
                         true);
        } else {
            decoder_.add(std::make_unique<FeedForwardLayer>(builder, name), true);
        }
    }
}

int Model::max_places() const { return shape_.source == SourceUse::prefix ? 2 * max_positions_ : max_positions_; }

void Model::decode_source(Context& context, Streams encoded) const {
    if (source_swapped_) {
        std::swap(encoded.first, encoded.second);
    }
    if (shape_.source == SourceUse::prefix) {
        decoder_.apply(context, encoded);
    }
    for (const CrossAttention* const cross : crosses_) {
        cross->read(context, encoded.first);
    }
}

void Model::forward(Context& context) const {
    float* const x = context.work.x.data();
    const bool two_streams = shape_.source == SourceUse::prefix;
    Streams streams{x, two_streams ? context.work.second.data() : x};
    embedding_->apply(context, positions_, streams);
    context.worker.barrier();
    streams = decoder_.apply(context, streams);
    if (two_streams) {
        average(context, streams, x, hidden_size_);
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
