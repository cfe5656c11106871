#include "qkv.h"

#include <algorithm>
#include <optional>
#include <stdexcept>

namespace terse {
namespace {

std::unique_ptr<Layer> make_layer(Builder& builder, const std::string& name, const std::string& section, int size) {
    const Options& options = builder.options;
    const std::string& kind = options.text(section + ".kind");
    if (kind == "dense") {
        return std::make_unique<Dense>(builder, name, size, size, options.flag(section + ".bias"));
    }
    if (kind == "low_rank") {
        return std::make_unique<LowRank>(builder, name, size, size, options.size(section + ".rank"));
    }
    const int modules = options.size(section + ".qkv_modules");
    if (kind == "multiplicative") {
        return std::make_unique<Multiplicative>(builder, name, size, size, modules);
    }
    if (kind == "multiplicative_modular") {
        return std::make_unique<MultiplicativeModular>(builder, name, size, modules);
    }
    const int width = size / modules;
    const int module_kernel = options.size(section + ".module_kernel");
    if (kind == "locally_connected") {
        return std::make_unique<LocallyConnected>(builder, name, size, modules, module_kernel);
    }
    if (kind == "local_convolution") {
        return std::make_unique<LocalConvolution>(builder, name, width, width, modules, module_kernel,
                                                  options.size(section + ".length_kernel"));
    }
    throw std::invalid_argument("the engine has no attention projection of kind " + kind);
}

// q, k, v and the output by four layers of one sort.
class SeparateProjection : public Projection {
public:
    SeparateProjection(Builder& builder, const std::string& name, const std::string& section, int size)
        : query_(make_layer(builder, name + ".query", section, size)),
          key_(make_layer(builder, name + ".key", section, size)),
          value_(make_layer(builder, name + ".value", section, size)) {
        output_.push_back(make_layer(builder, name + ".out", section, size));
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
    SparseProjection(Builder& builder, const std::string& name, const std::string& section, int size, int modules,
                     int module_kernel, int length_kernel)
        : size_(size),
          width_(size / modules),
          value_input_(read_value_input(builder.options, section)),
          shared_(builder, name + ".shared", size, size, modules),
          query_(builder, name + ".query", width_, width_, modules, module_kernel, length_kernel),
          value_(builder, name + ".value", value_input_ == ValueInput::none ? width_ : 2 * width_, width_, modules, 1,
                 length_kernel, value_input_ != ValueInput::none) {
        if (!builder.options.flag(section + ".share_qk")) {
            key_.emplace(builder, name + ".key", width_, width_, modules, module_kernel, length_kernel, false);
        }
        if (value_input_ == ValueInput::none) {
            value_.share_frames(query_);
        } else {
            at_least(builder.sizes.hidden, 2 * index(size));
        }
        const std::string& output = builder.options.text(section + ".output_layer");
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
    static ValueInput read_value_input(const Options& options, const std::string& section) {
        const std::string& name = options.text(section + ".value_input");
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

std::unique_ptr<Projection> make_projection(Builder& builder, const std::string& name, const std::string& section,
                                            int size) {
    const Options& options = builder.options;
    if (options.text(section + ".kind") != "sparse") {
        return std::make_unique<SeparateProjection>(builder, name, section, size);
    }
    return std::make_unique<SparseProjection>(builder, name, section, size, options.size(section + ".qkv_modules"),
                                              options.size(section + ".module_kernel"),
                                              options.size(section + ".length_kernel"));
}

}  // namespace terse
