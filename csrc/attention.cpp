#include "attention.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace terse {
namespace {

using Output = std::vector<std::unique_ptr<Layer>>;

std::unique_ptr<Layer> make_layer(Builder& builder, const std::string& name, int size) {
    const Options& options = builder.options;
    const std::string& kind = options.text("attention.kind");
    if (kind == "dense") {
        return std::make_unique<Dense>(builder, name, size, size, options.flag("attention.bias"));
    }
    if (kind == "low_rank") {
        return std::make_unique<LowRank>(builder, name, size, size, options.size("attention.rank"));
    }
    const int modules = options.size("attention.qkv_modules");
    if (kind == "multiplicative") {
        return std::make_unique<Multiplicative>(builder, name, size, size, modules);
    }
    if (kind == "multiplicative_modular") {
        return std::make_unique<MultiplicativeModular>(builder, name, size, modules);
    }
    const int width = size / modules;
    const int module_kernel = options.size("attention.module_kernel");
    if (kind == "locally_connected") {
        return std::make_unique<LocallyConnected>(builder, name, size, modules, module_kernel);
    }
    if (kind == "local_convolution") {
        return std::make_unique<LocalConvolution>(builder, name, width, width, modules, module_kernel,
                                                  options.size("attention.length_kernel"));
    }
    throw std::invalid_argument("the engine has no attention projection of kind " + kind);
}

// q, k, v and the output by four layers of one sort.
class SeparateProjection : public Projection {
public:
    SeparateProjection(Builder& builder, const std::string& name, int size)
        : query_(make_layer(builder, name + ".query", size)),
          key_(make_layer(builder, name + ".key", size)),
          value_(make_layer(builder, name + ".value", size)) {
        output_.push_back(make_layer(builder, name + ".out", size));
    }

    void qkv(Context& context, const float* x) const override {
        query_->apply(context, x, context.rows(), context.work.q.data());
        key_->apply(context, x, context.rows(), context.work.k.data());
        value_->apply(context, x, context.rows(), context.work.v.data());
        context.worker.barrier();
    }

    const Output& output() const override { return output_; }

private:
    std::unique_ptr<Layer> query_, key_, value_;
    Output output_;
};

enum class ValueInput { none, fixed, original };

// The paper's sparse QKV: a multiplicative layer that q, k and v share, then a convolution for each.
class SparseProjection : public Projection {
public:
    SparseProjection(Builder& builder, const std::string& name, int size, int modules, int module_kernel,
                     int length_kernel)
        : size_(size),
          width_(size / modules),
          value_input_(read_value_input(builder.options)),
          shared_(builder, name + ".shared", size, size, modules),
          query_(builder, name + ".query", width_, width_, modules, module_kernel, length_kernel),
          value_(builder, name + ".value", value_input_ == ValueInput::none ? width_ : 2 * width_, width_, modules, 1,
                 length_kernel, value_input_ != ValueInput::none) {
        if (!builder.options.flag("attention.share_qk")) {
            key_.emplace(builder, name + ".key", width_, width_, modules, module_kernel, length_kernel, false);
        }
        if (value_input_ == ValueInput::none) {
            value_.share_frames(query_);
        } else {
            builder.sizes.hidden = std::max(builder.sizes.hidden, 2 * index(size));
        }
        const std::string& output = builder.options.text("attention.output_layer");
        if (output == "mult" || output == "multconv") {
            output_.push_back(std::make_unique<Multiplicative>(builder, name + ".out_mult", size, size, modules));
        }
        if (output == "conv" || output == "multconv") {
            output_.push_back(std::make_unique<LocalConvolution>(builder, name + ".out_conv", width_, width_, modules,
                                                                 module_kernel, length_kernel));
        }
    }

    void qkv(Context& context, const float* x) const override {
        Workspace& work = context.work;
        query_.recall(context);
        for (const Run& run : context.batch.runs) {
            shared_.apply(context, x + index(run.first) * index(size_), run.count,
                          query_.frame(context, run) + query_.pad(), query_.frame_size(), false);
        }
        context.worker.barrier();
        query_.convolve(context, work.q.data(), false);
        (key_ ? *key_ : query_).convolve(context, work.k.data(), false);
        query_.remember(context);
        if (value_input_ == ValueInput::none) {
            value_.convolve(context, work.v.data(), false, query_.pad());
        } else {
            write_value_input(context, x);
            context.worker.barrier();
            value_.apply(context, work.hidden.data(), context.rows(), work.v.data());
        }
        context.worker.barrier();
    }

    const Output& output() const override { return output_; }

private:
    static ValueInput read_value_input(const Options& options) {
        const std::string& name = options.text("attention.value_input");
        return name == "none" ? ValueInput::none : name == "fixed" ? ValueInput::fixed : ValueInput::original;
    }

    // Rows of the shared layer's output u and of x: a module of each in turn, or one after the other.
    void write_value_input(Context& context, const float* x) const {
        const int piece = value_input_ == ValueInput::fixed ? width_ : size_;
        for (const Run& run : context.batch.runs) {
            const Range rows = context.worker.share(run.count);
            for (int t = rows.begin; t < rows.end; ++t) {
                const float* const u = query_.frame(context, run) + t * query_.frame_size() + query_.pad();
                const float* const from = x + index(run.first + t) * index(size_);
                float* out = context.work.hidden.data() + index(run.first + t) * index(2 * size_);
                for (int i = 0; i < size_; i += piece) {
                    out = std::copy_n(u + i, piece, out);
                    out = std::copy_n(from + i, piece, out);
                }
            }
        }
    }

    int size_, width_;
    ValueInput value_input_;
    Multiplicative shared_;
    LocalConvolution query_, value_;
    std::optional<LocalConvolution> key_;  // none: q is k
    Output output_;
};

}  // namespace

std::unique_ptr<Projection> make_projection(Builder& builder, const std::string& name, int size) {
    const Options& options = builder.options;
    if (options.text("attention.kind") != "sparse") {
        return std::make_unique<SeparateProjection>(builder, name, size);
    }
    return std::make_unique<SparseProjection>(builder, name, size, options.size("attention.qkv_modules"),
                                              options.size("attention.module_kernel"),
                                              options.size("attention.length_kernel"));
}

Rotary::Rotary(int positions, int head_dim, double theta)
    : half_(head_dim / 2), cosines_(index(positions) * index(half_)), sines_(index(positions) * index(half_)) {
    for (int i = 0; i < half_; ++i) {
        // In float, as the training form has it.
        const float frequency = std::pow(static_cast<float>(theta), -static_cast<float>(i) / static_cast<float>(half_));
        for (int position = 0; position < positions; ++position) {
            const float angle = static_cast<float>(position) * frequency;
            cosines_.data()[position * half_ + i] = std::cos(angle);
            sines_.data()[position * half_ + i] = std::sin(angle);
        }
    }
}

void Rotary::rotate(float* x, int position) const {
    const float* const cosines = cosines_.data() + index(position) * index(half_);
    const float* const sines = sines_.data() + index(position) * index(half_);
    for (int i = 0; i < half_; ++i) {
        const float first = x[i];
        const float second = x[i + half_];
        x[i] = first * cosines[i] - second * sines[i];
        x[i + half_] = second * cosines[i] + first * sines[i];
    }
}

Attention::Attention(Builder& builder, const std::string& name, int layer, const Rotary* rotary)
    : layer_(layer),
      size_(builder.options.size("hidden_size")),
      heads_(builder.options.size("num_attention_heads")),
      head_dim_(size_ / heads_),
      rotary_(rotary),
      norm_(builder, name + ".attention_norm", size_),
      projection_(make_projection(builder, name + ".attention.projection", size_)) {}

void Attention::apply(Context& context) const {
    Workspace& work = context.work;
    projection_->qkv(context, norm_.apply(context, work.x.data()));
    const Output& output = projection_->output();
    float* const out = output.empty() ? work.x.data() : work.merged.data();
    const int runs = static_cast<int>(context.batch.runs.size());
    const Range items = context.worker.share(runs * heads_);
    for (int i = items.begin; i < items.end; ++i) {
        attend(context, context.batch.runs[index(i / heads_)], i % heads_, out, output.empty());
    }
    context.worker.barrier();
    const float* in = out;
    for (const std::unique_ptr<Layer>& layer : output) {  // of two, the first writes where q was
        const bool last = &layer == &output.back();
        float* const to = last ? work.x.data() : work.q.data();
        layer->apply(context, in, context.rows(), to, last);
        context.worker.barrier();
        in = to;
    }
}

// One head of one run: its new keys and values are appended, then a few queries at a time look at all of them.
void Attention::attend(Context& context, const Run& run, int head, float* out, bool add) const {
    Workspace& work = context.work;
    Session& session = *run.session;
    const std::ptrdiff_t offset = head * head_dim_;
    const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim_));
    for (int t = 0; t < run.count; ++t) {
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(run.first + t) * size_ + offset;
        const int position = context.batch.positions[index(run.first + t)];
        float* const query = work.q.data() + at;
        float* const key = work.k.data() + at;
        if (rotary_ != nullptr) {
            rotary_->rotate(query, position);
            rotary_->rotate(key, position);
        }
        for (int i = 0; i < head_dim_; ++i) {
            query[i] *= scale;
        }
        session.append(layer_, head, position, key, work.v.data() + at);
    }
    float* const scores = context.scores();
    for (int t = 0; t < run.count; t += kQueries) {
        const int count = std::min(kQueries, run.count - t);
        const int start = context.batch.positions[index(run.first + t)] + 1;  // positions that the first row sees
        const int length = start + count - 1;
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(run.first + t) * size_ + offset;

        MatmulTask task{};
        task.weights = session.keys(layer_, head);
        task.x = work.q.data() + at;
        task.x_row = size_;
        task.inputs = head_dim_;
        task.segments = 1;
        task.panel_inputs = index(head_dim_);
        task.y = scores;
        task.y_row = work.capacity;
        task.outputs = length;
        const Kernels::Matmul matmul = kernels().matmul[static_cast<std::size_t>(Dtype::f32)];
        matmul(task, 0, panels(length), 0, count);
        for (int row = 0; row < count; ++row) {
            float* const weights = scores + row * work.capacity;
            kernels().softmax(weights, start + row);
            std::fill(weights + start + row, weights + length, 0.0f);
        }
        task.weights = session.values(layer_, head);
        task.x = scores;
        task.x_row = work.capacity;
        task.inputs = length;
        task.panel_inputs = index(panels(session.capacity()) * kPanel);
        task.y = out + at;
        task.y_row = size_;
        task.outputs = head_dim_;
        task.add = add;
        matmul(task, 0, panels(head_dim_), 0, count);
    }
}

}  // namespace terse
