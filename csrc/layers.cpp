#include "layers.h"

#include <algorithm>

namespace terse {
namespace {

const Kernels::Matmul& matmul(Dtype dtype) { return kernels().matmul[static_cast<std::size_t>(dtype)]; }

// Rows that a wide multiplicative layer gates before it reads its weights.
constexpr int kTogether = 8;

}  // namespace

Workspace::Workspace(const Sizes& sizes, int hidden_size, int positions, int max_rows, int max_runs, int workers,
                     bool poison)
    : rows(max_rows), runs(max_runs), capacity(panels(positions) * kPanel) {
    const std::size_t n = index(max_rows);
    for (Buffer* const buffer : {&x, &normed, &q, &k, &v, &merged, &branch}) {
        *buffer = Buffer(n * index(hidden_size), poison);
    }
    second = Buffer(n * sizes.second, poison);
    hidden = Buffer(n * sizes.hidden, poison);
    logits = Buffer(n * sizes.logits, poison);
    frames = Buffer(n * sizes.frame + index(max_runs) * sizes.past);  // zeros beside the modules
    recurrent = Buffer(n * sizes.recurrent, poison);
    chosen.resize(n * sizes.chosen);
    for (int i = 0; i < workers; ++i) {
        own_normed.emplace_back(index(hidden_size), poison);
        own_gated.emplace_back(sizes.gated, poison);
        own_scores.emplace_back(index(kQueries * capacity), poison);
        own_partial.emplace_back(index(hidden_size), poison);
        own_quantised.emplace_back(index(kQuantisedRows) * sizes.quantised / sizeof(float) + 1);
        own_scales.emplace_back(index(kQuantisedRows) * sizes.segments);
    }
}

Share share(const Worker& worker, int panels, int rows) {
    if (panels >= 2 * worker.count() || panels >= rows) {
        return {worker.share(panels), {0, rows}};
    }
    return {{0, panels}, worker.share(rows)};
}

Matrix::Matrix(const Builder& builder, const std::string& name, int inputs_, int outputs_, bool has_bias, int segments_)
    : dtype(builder.dtype), inputs(inputs_), outputs(outputs_), segments(segments_) {
    const std::int64_t count = panels(outputs);
    if (dtype == Dtype::int8) {
        weights = builder.tensors.get(name + ".panels", dtype, {count, segments * quads(inputs), kPanel, 4});
        scale = builder.tensors.floats(name + ".scales", {count * kPanel});
        sums = builder.tensors.floats(name + ".sums", {segments, count * kPanel});
        at_least(builder.sizes.quantised, index(segments * quads(inputs) * 4));
        at_least(builder.sizes.segments, index(segments));
    } else {
        weights = builder.tensors.get(name + ".panels", dtype, {count, inputs * segments, kPanel});
    }
    if (has_bias) {
        bias = builder.tensors.floats(name + ".bias", {count * kPanel});
    }
}

MatmulTask Matrix::task(const float* x, std::ptrdiff_t x_row, float* y, std::ptrdiff_t y_row) const {
    MatmulTask task{};
    task.weights = weights;
    task.scale = scale;
    task.bias = bias;
    task.x = x;
    task.x_row = x_row;
    task.inputs = inputs;
    task.segments = segments;
    task.panel_inputs = index(segments * (dtype == Dtype::int8 ? 4 * quads(inputs) : inputs));
    task.y = y;
    task.y_row = y_row;
    task.outputs = outputs;
    return task;
}

void Matrix::multiply(Context& context, MatmulTask task, const Share& part) const {
    if (dtype != Dtype::int8) {
        matmul(dtype)(task, part.panels.begin, part.panels.end, part.rows.begin, part.rows.end);
        return;
    }
    std::int8_t* const quantised = context.quantised();
    float* const scales = context.scales();
    const int depth = 4 * quads(inputs);
    for (int first = part.rows.begin; first < part.rows.end; first += kQuantisedRows) {
        const int rows = std::min(kQuantisedRows, part.rows.end - first);
        for (int i = 0; i < rows * segments; ++i) {
            const float* const x = task.x + (first + i / segments) * task.x_row + i % segments * task.x_segment;
            scales[i] = kernels().quantise(x, inputs, quantised + index(i) * index(depth));
        }
        MatmulTask some = task;
        some.quantised = {quantised, scales, sums};
        some.y = task.y + first * task.y_row;
        matmul(dtype)(some, part.panels.begin, part.panels.end, 0, rows);
    }
}

Norm::Norm(const Builder& builder, const std::string& name, int n)
    : gain(builder.tensors.floats(name + ".weight", {n})),
      eps(static_cast<float>(builder.options.number("norm_eps"))),
      size(n) {
    if (builder.options.text("norm") == "layer_norm") {
        bias = builder.tensors.floats(name + ".bias", {n});
    }
}

void Norm::row(const float* x, float* y) const {
    if (bias == nullptr) {
        kernels().rms_norm(x, gain, eps, y, size);
    } else {
        kernels().layer_norm(x, gain, bias, eps, y, size);
    }
}

const float* Norm::apply(Context& context, const float* x) const {
    if (context.rows() == 1) {
        float* const y = context.work.own_normed[index(context.worker.index())].data();
        row(x, y);
        return y;
    }
    float* const y = context.work.normed.data();
    const Range rows = context.worker.share(context.rows());
    for (int r = rows.begin; r < rows.end; ++r) {
        row(x + index(r) * index(size), y + index(r) * index(size));
    }
    context.worker.barrier();
    return y;
}

void Dense::apply(Context& context, const float* x, int rows, float* y, bool add) const {
    MatmulTask task = matrix_.task(x, matrix_.inputs, y, matrix_.outputs);
    task.add = add;
    matrix_.multiply(context, task, share(context.worker, panels(matrix_.outputs), rows));
}

LowRank::LowRank(const Builder& builder, const std::string& name, int inputs, int outputs, int rank)
    : down_(builder, name + ".0", inputs, rank, true), up_(builder, name + ".1", rank, outputs, true) {
    at_least(builder.sizes.hidden, index(rank));
}

void LowRank::apply(Context& context, const float* x, int rows, float* y, bool add) const {
    float* const middle = context.work.hidden.data();
    down_.apply(context, x, rows, middle);
    context.worker.barrier();
    up_.apply(context, middle, rows, y, add);
    context.worker.barrier();
}

Multiplicative::Multiplicative(const Builder& builder, const std::string& name, int inputs, int outputs, int modules,
                               bool bias)
    : gates_(builder.tensors.floats(name + ".modules_weight", {modules, inputs})),
      features_(builder, name + ".features_weight", inputs, outputs / modules, false),
      bias_(bias ? builder.tensors.floats(name + ".bias", {outputs}) : nullptr),
      inputs_(inputs),
      modules_(modules),
      width_(outputs / modules) {
    at_least(builder.sizes.gated, index(wide() ? kTogether : 1) * index(modules) * index(inputs));
}

void Multiplicative::apply(Context& context, const float* x, int rows, float* y, bool add) const {
    apply(context, x, rows, y, modules_ * width_, add);
}

// A row is gated once for each module; the gated rows are then the input of one matrix. Where the modules are many and
// narrow, the workers share the modules or the rows. Where they are few and wide, they share the panels, and several
// rows are gated before each weight is read.
void Multiplicative::apply(Context& context, const float* x, int rows, float* y, std::ptrdiff_t y_row, bool add) const {
    const Worker& worker = context.worker;
    Range of_rows{0, rows};
    Range of_modules{0, modules_};
    Range of_panels{0, panels(width_)};
    int step = 1;
    if (wide()) {
        of_panels = worker.share(of_panels.end);
        step = y_row == modules_ * width_ ? kTogether : 1;
    } else if (rows >= 2 * worker.count()) {
        of_rows = worker.share(rows);
    } else {
        of_modules = worker.share(modules_);
    }
    const int count = of_modules.end - of_modules.begin;
    float* const gated = context.gated();
    for (int first = of_rows.begin; first < of_rows.end; first += step) {
        const int together = std::min(step, of_rows.end - first);
        for (int i = 0; i < together * count; ++i) {
            const int module = of_modules.begin + i % count;
            kernels().multiply(x + index(first + i / count) * index(inputs_), gates_ + index(module) * index(inputs_),
                               gated + index(i) * index(inputs_), inputs_);
        }
        float* const out = y + first * y_row + of_modules.begin * width_;
        MatmulTask task = features_.task(gated, inputs_, out, width_);
        task.add = add;
        features_.multiply(context, task, {of_panels, {0, together * count}});
        if (bias_ == nullptr) {
            continue;
        }
        const int begin = of_panels.begin * kPanel;
        const int end = std::min(of_panels.end * kPanel, width_);
        for (int i = 0; i < together * count; ++i) {
            const float* const bias = bias_ + index(of_modules.begin + i % count) * index(width_);
            for (int o = begin; o < end; ++o) {
                out[index(i) * index(width_) + index(o)] += bias[o];
            }
        }
    }
}

LocalConvolution::LocalConvolution(Builder& builder, const std::string& name, int module_in, int module_out,
                                   int modules, int module_kernel, int length_kernel, bool has_memory)
    : kernel_(builder, name + ".kernel", module_kernel * module_in, module_out, true, length_kernel),
      module_in_(module_in),
      module_out_(module_out),
      modules_(modules),
      past_(length_kernel - 1),
      pad_(module_kernel / 2 * module_in),
      frame_(modules * module_in + 2 * pad_) {
    at_least(builder.sizes.frame, static_cast<std::size_t>(frame_));
    at_least(builder.sizes.past, static_cast<std::size_t>(frame_) * index(past_));
    if (has_memory) {
        memory_ = builder.new_memory(static_cast<std::size_t>(frame_) * index(past_));
    }
}

void LocalConvolution::apply(Context& context, const float* x, int, float* y, bool add) const {
    recall(context);
    write(context, x);
    context.worker.barrier();
    convolve(context, y, add);
    remember(context);
    context.worker.barrier();
}

float* LocalConvolution::frame(const Context& context, const Run& run) const {
    const int before = run.first + static_cast<int>(&run - context.batch.runs.data() + 1) * past_;
    return context.work.frames.data() + before * frame_;
}

void LocalConvolution::recall(Context& context) const {
    for (const Run& run : context.batch.runs) {
        const Range part = context.worker.share(past_ * static_cast<int>(frame_));
        float* const past = frame(context, run) - past_ * frame_;
        std::copy(run.session->memory(memory_) + part.begin, run.session->memory(memory_) + part.end,
                  past + part.begin);
        const Range rows = context.worker.share(run.count);  // another layer may have left something beside the modules
        for (int t = rows.begin; t < rows.end; ++t) {
            float* const at = frame(context, run) + t * frame_;
            std::fill(at, at + pad_, 0.0f);
            std::fill(at + frame_ - pad_, at + frame_, 0.0f);
        }
    }
}

void LocalConvolution::write(Context& context, const float* x) const {
    const std::ptrdiff_t size = modules_ * module_in_;
    for (const Run& run : context.batch.runs) {
        const Range rows = context.worker.share(run.count);
        for (int t = rows.begin; t < rows.end; ++t) {
            const float* const from = x + (run.first + t) * size;
            std::copy(from, from + size, frame(context, run) + t * frame_ + pad_);
        }
    }
}

void LocalConvolution::convolve(Context& context, float* y, bool add, int skip) const {
    for (const Run& run : context.batch.runs) {
        Range tokens{0, run.count};
        Share part{{0, panels(module_out_)}, {0, modules_}};
        if (run.count >= 2 * context.worker.count()) {
            tokens = context.worker.share(run.count);
        } else {
            part = share(context.worker, part.panels.end, modules_);
        }
        for (int t = tokens.begin; t < tokens.end; ++t) {
            const float* const first = frame(context, run) + (t - past_) * frame_ + skip;
            float* const out = y + static_cast<std::ptrdiff_t>(run.first + t) * modules_ * module_out_;
            MatmulTask task = kernel_.task(first, module_in_, out, module_out_);
            task.x_segment = frame_;
            task.add = add;
            kernel_.multiply(context, task, part);
        }
    }
}

void LocalConvolution::remember(Context& context) const {
    for (const Run& run : context.batch.runs) {
        const Range part = context.worker.share(past_ * static_cast<int>(frame_));
        const float* const last = frame(context, run) + (run.count - past_) * frame_;
        std::copy(last + part.begin, last + part.end, run.session->memory(memory_) + part.begin);
    }
}

Modules::Modules(const Builder& builder, const std::string& name, const float* bias, int modules, int inputs,
                 int outputs, int input_step)
    : bias_(bias),
      outputs_(outputs),
      input_step_(input_step) {
    for (int module = 0; module < modules; ++module) {
        matrices_.emplace_back(builder, name + ".weight." + std::to_string(module), inputs, outputs, false);
    }
}

void Modules::apply(Context& context, const float* x, int rows, std::ptrdiff_t x_row, float* y, bool add) const {
    const std::ptrdiff_t y_row = static_cast<std::ptrdiff_t>(matrices_.size()) * outputs_;
    const Range modules = context.worker.share(static_cast<int>(matrices_.size()));
    for (int m = modules.begin; m < modules.end; ++m) {
        const Matrix& matrix = matrices_[index(m)];
        float* const out = y + m * outputs_;
        MatmulTask task = matrix.task(x + m * input_step_, x_row, out, y_row);
        task.add = add;
        matrix.multiply(context, task, {{0, panels(outputs_)}, {0, rows}});
        for (int row = 0; row < rows; ++row) {
            for (int i = 0; i < outputs_; ++i) {
                out[row * y_row + i] += bias_[m * outputs_ + i];
            }
        }
    }
}

LocallyConnected::LocallyConnected(const Builder& builder, const std::string& name, int size, int modules,
                                   int module_kernel)
    : size_(size),
      width_(size / modules),
      pad_(module_kernel / 2 * width_),
      padded_(size + 2 * pad_),
      modules_(builder, name, builder.tensors.floats(name + ".bias", {modules, width_}), modules,
               module_kernel * width_, width_, width_) {
    at_least(builder.sizes.hidden, index(padded_));
}

// The modules stand in a circle: each row is written with the last ones before it and the first ones behind it.
void LocallyConnected::apply(Context& context, const float* x, int rows, float* y, bool add) const {
    float* const circle = context.work.hidden.data();
    const Range own = context.worker.share(rows);
    for (int row = own.begin; row < own.end; ++row) {
        const float* const in = x + index(row) * index(size_);
        float* const out = circle + index(row) * index(padded_);
        for (int i = 0; i < padded_; ++i) {
            const int from = (i - pad_) % size_;
            out[i] = in[from < 0 ? from + size_ : from];
        }
    }
    context.worker.barrier();
    modules_.apply(context, circle, rows, padded_, y, add);
    context.worker.barrier();
}

MultiplicativeModular::MultiplicativeModular(const Builder& builder, const std::string& name, int size, int modules)
    : size_(size),
      first_(builder, name, size, size, modules, false),
      second_(builder, name + ".mixing", builder.tensors.floats(name + ".mixing.bias", {size}), modules,
              size / modules, size / modules, size / modules) {
    at_least(builder.sizes.hidden, index(size));
}

void MultiplicativeModular::apply(Context& context, const float* x, int rows, float* y, bool add) const {
    float* const middle = context.work.hidden.data();
    first_.apply(context, x, rows, middle);
    context.worker.barrier();
    second_.apply(context, middle, rows, size_, y, add);
    context.worker.barrier();
}

}  // namespace terse
