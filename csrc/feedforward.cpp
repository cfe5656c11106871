#include "feedforward.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>

namespace terse {
namespace {

class DenseFeedForward : public FeedForward {
public:
    DenseFeedForward(Builder& builder, const std::string& name, int size, int width, const std::string& activation)
        : width_(width),
          gelu_(activation == "gelu"),
          up_(builder, name + ".up", size, width, true),
          down_(builder, name + ".down", width, size, true) {
        if (activation == "swiglu") {
            gate_.emplace(builder, name + ".gate", size, width, true);
        }
        at_least(builder.sizes.hidden, index(gate_ ? 2 * width : width));
    }

    void apply(Context& context, const float* x, float* y) const override {
        const int rows = context.rows();
        float* const hidden = context.work.hidden.data();
        MatmulTask task = up_.task(x, up_.inputs, hidden, width_);
        task.relu = !gelu_ && !gate_;
        const Share part = share(context.worker, panels(width_), rows);
        up_.multiply(context, task, part);
        activate(context, x, hidden, part);
        context.worker.barrier();
        task = down_.task(hidden, width_, y, down_.outputs);
        task.add = true;
        down_.multiply(context, task, share(context.worker, panels(down_.outputs), rows));
        context.worker.barrier();
    }

private:
    // A worker's share of the hidden units, which it has just computed itself.
    void activate(Context& context, const float* x, float* hidden, const Share& part) const {
        const int first = part.panels.begin * kPanel;
        const int count = std::min(part.panels.end * kPanel, width_) - first;
        float* const gates = hidden + index(context.rows()) * index(width_);
        if (gate_) {
            gate_->multiply(context, gate_->task(x, gate_->inputs, gates, width_), part);
        }
        for (int row = part.rows.begin; count > 0 && row < part.rows.end; ++row) {
            const std::size_t at = index(row) * index(width_) + index(first);
            if (gate_) {
                kernels().silu_multiply(gates + at, hidden + at, count);
            } else if (gelu_) {
                kernels().gelu(hidden + at, count);
            }
        }
    }

    int width_;
    bool gelu_;
    Matrix up_, down_;
    std::optional<Matrix> gate_;
};

// The hidden units of a sparse layer. A unit is one record: its column of the first matrix beside its row of the
// second, and when they are int8, the scales of both behind them.
struct Units {
    Units(const Builder& builder, const std::string& name, int count, int width) : dtype(builder.dtype), size(width) {
        const std::size_t scales = dtype == Dtype::int8 ? 2 * sizeof(float) : 0;
        stride = (2 * index(width) * size_of(dtype) + scales + 63) / 64 * 64;
        records = static_cast<const char*>(
            builder.tensors.get(name + ".units", Dtype::int8, {count, static_cast<std::int64_t>(stride)}));
    }

    const char* up(int unit) const { return records + index(unit) * stride; }
    const char* down(int unit, int column = 0) const { return up(unit) + index(size + column) * size_of(dtype); }

    float scale(int unit, int which) const {
        if (dtype != Dtype::int8) {
            return 1.0f;
        }
        float value;
        std::copy_n(up(unit) + 2 * index(size) + index(which) * sizeof(float), sizeof(float),
                    reinterpret_cast<char*>(&value));
        return value;
    }

    // With `next`, what that unit's dot product reads is asked for meanwhile; so in `axpy`.
    float dot(int unit, const float* x, const char* next = nullptr) const {
        return scale(unit, 0) * kernels().dot[static_cast<std::size_t>(dtype)](up(unit), x, size, next);
    }

    // y += factor * the unit's row of the second matrix, columns [column, column + n).
    void axpy(int unit, float factor, float* y, int column, int n, const char* next = nullptr) const {
        kernels().axpy[static_cast<std::size_t>(dtype)](down(unit, column), scale(unit, 1) * factor, y, n, next);
    }

    Dtype dtype;
    int size;
    std::size_t stride;
    const char* records;
};

// A controller chooses one of N in each of `groups_` groups; a choice stands for `span_` neighbouring units.
class SparseFeedForward : public FeedForward {
public:
    SparseFeedForward(Builder& builder, const std::string& name, int size, int groups, int choices, int span, int rank,
                      bool scaled)
        : size_(size),
          groups_(groups),
          choices_(choices),
          span_(span),
          scaled_(scaled),
          first_choice_(builder.new_choices(groups)),
          units_(builder, name, groups * choices * span, size),
          bias_(builder.tensors.floats(name + ".bias", {size})),
          logits_(rank == 0 ? Dense(builder, name + ".controller.choose", size, choices, false)
                            : Dense(builder, name + ".controller.up", rank, groups * choices, true)) {
        if (rank > 0) {
            down_.emplace(builder, name + ".controller.down", size, rank, false);
        }
        at_least(builder.sizes.hidden, index(std::max({rank, groups * span, groups})));
        at_least(builder.sizes.logits, index(groups * choices));
        at_least(builder.sizes.chosen, index(groups * span));
    }

    void apply(Context& context, const float* x, float* y) const override {
        const float* in = x;
        if (down_) {
            down_->apply(context, x, context.rows(), context.work.hidden.data());
            context.worker.barrier();
            in = context.work.hidden.data();
        }
        logits_.apply(context, in, context.rows(), context.work.logits.data());
        context.worker.barrier();
        if (context.rows() == 1) {
            one(context, x, y);
        } else {
            several(context, x, y);
        }
        context.worker.barrier();
    }

private:
    static constexpr int kSoon = 2;  // units that are on their way

    // A group's choice in a row and what its units are multiplied by, which takes the place of the group's logits.
    std::pair<int, float> choose(Context& context, int row, int group) const {
        const float* const logits =
            context.work.logits.data() + (index(row) * index(groups_) + index(group)) * index(choices_);
        const int best = kernels().argmax(logits, choices_);
        float scale = 1.0f;
        if (scaled_) {
            float total = 0.0f;
            for (int i = 0; i < choices_; ++i) {
                total += std::exp(logits[i] - logits[best]);
            }
            scale = 1.0f / total;
        }
        return {best, scale};
    }

    int unit(int group, int choice, int i) const { return (group * choices_ + choice) * span_ + i; }

    // Notes a chosen unit among a row's choices, if these are not null. Several workers may share a group's units.
    void note(Choice* noted, int unit, bool active) const {
        if (noted != nullptr) {
            Choice& choice = noted[first_choice_ + unit / (choices_ * span_)];
            std::atomic_ref(choice.index).store(unit / span_ % choices_, std::memory_order_relaxed);
            std::atomic_ref(choice.active).fetch_add(active, std::memory_order_relaxed);
        }
    }

    // One row: each worker adds up its share of the chosen units, then all add the sums. While a unit is computed, the
    // next ones are on their way: first columns of the first matrix, then, of those that are active, rows of the second.
    void one(Context& context, const float* x, float* y) const {
        const Worker& worker = context.worker;
        const Range slots = worker.share(groups_ * span_);
        std::int32_t* const chosen = context.work.chosen.data() + slots.begin;
        float* const factors = context.work.hidden.data() + slots.begin;
        const int count = slots.end - slots.begin;
        int group = -1;
        int choice = 0;
        float scale = 1.0f;
        for (int i = 0; i < count; ++i) {
            const int slot = slots.begin + i;
            if (slot / span_ != group) {
                group = slot / span_;
                std::tie(choice, scale) = choose(context, 0, group);
            }
            chosen[i] = unit(group, choice, slot % span_);
            factors[i] = scale;
        }
        Choice* const noted = context.batch.noted(0);
        int active = 0;
        for (int i = 0; i < count; ++i) {
            const char* const next = i + kSoon < count ? units_.up(chosen[i + kSoon]) : nullptr;
            const float value = units_.dot(chosen[i], x, next);
            note(noted, chosen[i], !(value <= 0.0f));
            chosen[active] = chosen[i];
            factors[active] = value * factors[i];
            active += !(value <= 0.0f);  // without a branch, which would be guessed wrong half the time; NaN goes on
        }
        float* const partial = context.partial(worker.index());
        std::fill(partial, partial + size_, 0.0f);
        for (int i = 0; i < active; ++i) {
            const char* const next = i + kSoon < active ? units_.down(chosen[i + kSoon]) : nullptr;
            units_.axpy(chosen[i], factors[i], partial, 0, size_, next);
        }
        context.worker.barrier();
        const Range columns = worker.share(size_);
        for (int i = columns.begin; i < columns.end; ++i) {
            y[i] += bias_[i];
        }
        for (int other = 0; other < worker.count(); ++other) {
            const float* const from = context.partial(other);
            for (int i = columns.begin; i < columns.end; ++i) {
                y[i] += from[i];
            }
        }
    }

    // Several rows: a group's units are visited by all rows before the next group's. First the workers share the
    // groups, then the columns of the output.
    void several(Context& context, const float* x, float* y) const {
        const Worker& worker = context.worker;
        const int rows = context.rows();
        std::int32_t* const chosen = context.work.chosen.data();
        float* const active = context.work.hidden.data();  // [rows][groups * span]
        const int slots = groups_ * span_;
        const Range own = worker.share(slots);
        for (int slot = own.begin; slot < own.end; ++slot) {
            const int group = slot / span_;
            for (int row = 0; row < rows; ++row) {
                const auto [choice, scale] = choose(context, row, group);
                const int u = unit(group, choice, slot % span_);
                const float value = units_.dot(u, x + index(row) * index(size_));
                note(context.batch.noted(row), u, !(value <= 0.0f));
                active[index(row) * index(slots) + index(slot)] = value <= 0.0f ? 0.0f : value * scale;
                chosen[index(row) * index(slots) + index(slot)] = u;
            }
        }
        context.worker.barrier();
        const Range columns = worker.share(size_);
        const int count = columns.end - columns.begin;
        float* const out = y + columns.begin;
        for (int row = 0; row < rows; ++row) {
            for (int i = 0; i < count; ++i) {
                out[index(row) * index(size_) + index(i)] += bias_[columns.begin + i];
            }
        }
        for (int slot = 0; slot < slots; ++slot) {
            for (int row = 0; row < rows; ++row) {
                const std::size_t at = index(row) * index(slots) + index(slot);
                if (active[at] != 0.0f) {
                    units_.axpy(chosen[at], active[at], out + index(row) * index(size_), columns.begin, count);
                }
            }
        }
    }

    int size_, groups_, choices_, span_;
    bool scaled_;
    int first_choice_;
    Units units_;
    const float* bias_;
    Dense logits_;
    std::optional<Dense> down_;
};

}  // namespace

std::unique_ptr<FeedForward> make_feed_forward(Builder& builder, const std::string& name, int size) {
    const Options& options = builder.options;
    const std::string& kind = options.text("feed_forward.kind");
    const int width = options.size("feed_forward.intermediate_size");
    if (kind == "dense") {
        return std::make_unique<DenseFeedForward>(builder, name, size, width, options.text("feed_forward.activation"));
    }
    if (kind == "sparse") {
        const int block = options.size("feed_forward.ff_block_size");
        return std::make_unique<SparseFeedForward>(builder, name, size, width / block, block, 1,
                                                   options.size("feed_forward.controller_rank"),
                                                   options.flag("feed_forward.multiply_by_controller"));
    }
    if (kind == "block" || kind == "switch") {
        const int experts = options.size("feed_forward.num_experts");
        return std::make_unique<SparseFeedForward>(builder, name, size, 1, experts, width / experts, 0,
                                                   kind == "switch");
    }
    throw std::invalid_argument("the engine has no feed-forward layer of kind " + kind);
}

RecurrentBranch::RecurrentBranch(Builder& builder, const std::string& name, int size, int width, int layers)
    : width_(width),
      down_(builder, name + ".down", size, width, true),
      up_(builder, name + ".up", width, size, true) {
    for (int i = 0; i < layers; ++i) {
        gates_.emplace_back(builder, name + ".layers." + std::to_string(i) + ".gates", width, 3 * width, true);
        carries_.push_back(builder.new_memory(index(width)));
    }
    at_least(builder.sizes.recurrent, index(4 * width));
}

void RecurrentBranch::apply(Context& context, const float* x) const {
    const int rows = context.rows();
    float* const hidden = context.work.recurrent.data();        // [rows][width]
    float* const gates = hidden + index(rows) * index(width_);  // [rows][3 * width]
    down_.apply(context, x, rows, hidden);
    context.worker.barrier();
    for (std::size_t layer = 0; layer < gates_.size(); ++layer) {
        gates_[layer].apply(context, hidden, rows, gates);
        context.worker.barrier();
        const Range units = context.worker.share(width_);
        for (const Run& run : context.batch.runs) {
            float* const carry = run.session->memory(carries_[layer]);
            for (int row = run.first; row < run.first + run.count; ++row) {
                const float* const gate = gates + index(row) * index(3 * width_);
                float* const h = hidden + index(row) * index(width_);
                for (int i = units.begin; i < units.end; ++i) {
                    const float reset = 1.0f / (1.0f + std::exp(-gate[i]));
                    const float forget = 1.0f / (1.0f + std::exp(-gate[width_ + i]));
                    carry[i] = forget * carry[i] + (1.0f - forget) * gate[2 * width_ + i];
                    h[i] = reset * carry[i] + (1.0f - reset) * h[i] * 1.7320508f;  // the highway, scaled by sqrt(3)
                }
            }
        }
        context.worker.barrier();
    }
    up_.apply(context, hidden, rows, context.work.branch.data());
    context.worker.barrier();
}

FeedForwardLayer::FeedForwardLayer(Builder& builder, const std::string& name)
    : size_(builder.options.size("hidden_size")),
      norm_(builder, name + ".feed_forward_norm", size_),
      feed_forward_(make_feed_forward(builder, name + ".feed_forward", size_)) {
    if (const int layers = builder.options.size("sru.num_layers", 0)) {
        recurrent_norm_.emplace(builder, name + ".recurrent_norm", size_);
        recurrent_.emplace(builder, name + ".recurrent", size_, builder.options.size("sru.size"), layers);
    }
}

void FeedForwardLayer::apply(Context& context, const float* in, float* out) const {
    if (recurrent_) {
        recurrent_->apply(context, recurrent_norm_->apply(context, in));
    }
    feed_forward_->apply(context, norm_.apply(context, in), out);
    if (recurrent_) {
        const Range part = context.worker.share(context.rows() * size_);
        for (int i = part.begin; i < part.end; ++i) {
            out[i] += context.work.branch.data()[i];
        }
        context.worker.barrier();
    }
}

}  // namespace terse
