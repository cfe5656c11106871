#include "attention.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace terse {
namespace {

// Of the layers of a cross-attention.
bool has_bias(const Options& options) {
    return options.text("cross_attention.kind") == "sparse" || options.flag("cross_attention.bias");
}

}  // namespace

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

Pattern::Pattern(const Options& options, const std::string& section) {
    const std::string& kind = options.text(section + ".kind");
    if (kind == "local") {
        window_ = {options.size(section + ".chunk_length"), options.size(section + ".chunks_before", 0)};
        chunks_after_ = options.size(section + ".chunks_after", 0);
    } else if (kind == "lsh" || kind == "mixed") {
        shared_ = true;
        exact_length_ = kind == "mixed" ? options.size(section + ".exact_length", 0) : 0;
    } else if (kind != "softmax") {
        throw std::invalid_argument("the engine has no attention pattern " + kind);
    }
}

Range Pattern::causal(int position) const {
    if (shared_ && position >= exact_length_) {
        return {0, std::max(position, 1)};  // the first has nothing but itself
    }
    return {window_.begin(position), position + 1};
}

Range Pattern::bidirectional(int position, int length) const {
    if (!window_.limited()) {
        return {0, length};
    }
    const std::int64_t chunk = position / window_.chunk_length;
    const std::int64_t end = (chunk + chunks_after_ + 1) * window_.chunk_length;
    return {window_.begin(position), static_cast<int>(std::min<std::int64_t>(end, length))};
}

int Pattern::exact(int position, int rows) const {
    return shared_ ? std::clamp(exact_length_ - position, 0, rows) : rows;
}

Heads::Heads(const Options& options)
    : size(options.size("hidden_size")),
      count(options.size("num_attention_heads")),
      width(size / count),
      scale(1.0f / std::sqrt(static_cast<float>(width))) {}

template <typename Attend>
void Heads::apply(Context& context, const Output& output, float* out, const Attend& attend) const {
    Workspace& work = context.work;
    float* const merged = output.empty() ? out : work.merged.data();
    const int runs = static_cast<int>(context.batch.runs.size());
    const Range items = context.worker.share(runs * count);
    for (int i = items.begin; i < items.end; ++i) {
        attend(context.batch.runs[index(i / count)], i % count, merged, output.empty());
    }
    context.worker.barrier();
    const float* in = merged;
    for (const std::unique_ptr<Layer>& layer : output) {  // of two, the first writes where q was
        const bool last = &layer == &output.back();
        float* const to = last ? out : work.q.data();
        layer->apply(context, in, context.rows(), to, last);
        context.worker.barrier();
        in = to;
    }
}

// A few rows at a time: memory for the scores grows with the positions, not with their square.
template <typename Sees>
void Heads::look(Context& context, const KeyValues& cache, int head, const float* queries, int rows, const Sees& sees,
                 bool unit_keys, float* out, bool add) const {
    float* const scores = context.scores();
    const std::ptrdiff_t scores_row = context.work.capacity;
    const Kernels::Matmul matmul = kernels().matmul[static_cast<std::size_t>(Dtype::f32)];
    for (int t = 0; t < rows; t += kQueries) {
        const int some = std::min(kQueries, rows - t);
        int begin = sees(t).begin, end = sees(t).end;  // what any of them sees
        for (int row = 1; row < some; ++row) {
            begin = std::min(begin, sees(t + row).begin);
            end = std::max(end, sees(t + row).end);
        }
        begin = begin / kPanel * kPanel;
        const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(t) * size;

        MatmulTask task{};
        task.weights = cache.keys(head, begin);
        task.x = queries + at;
        task.x_row = size;
        task.inputs = width;
        task.segments = 1;
        task.panel_inputs = index(width);
        task.y = scores;
        task.y_row = scores_row;
        task.outputs = end - begin;
        matmul(task, 0, panels(end - begin), 0, some);
        if (unit_keys) {
            divide_by_lengths(cache.keys(head, begin), end - begin, scores, some, scores_row);
        }
        for (int row = 0; row < some; ++row) {
            float* const weights = scores + row * scores_row;
            const Range seen{sees(t + row).begin - begin, sees(t + row).end - begin};
            std::fill_n(weights, seen.begin, 0.0f);
            kernels().softmax(weights + seen.begin, seen.end - seen.begin);
            std::fill(weights + seen.end, weights + end - begin, 0.0f);
        }
        task.weights = cache.values(head, begin);
        task.x = scores;
        task.x_row = scores_row;
        task.inputs = end - begin;
        task.panel_inputs = index(cache.capacity());
        task.y = out + at;
        task.y_row = size;
        task.outputs = width;
        task.add = add;
        matmul(task, 0, panels(width), 0, some);
    }
}

// Scores [rows][scores_row] of keys in panels, as if each key had length 1: sqrt(mean(key^2) + 1e-6) sqrt(width).
void Heads::divide_by_lengths(const float* keys, int count, float* scores, int rows, std::ptrdiff_t scores_row) const {
    for (int first = 0; first < count; first += kPanel, keys += width * kPanel) {
        float squares[kPanel] = {};
        for (int i = 0; i < width; ++i) {
            for (int lane = 0; lane < kPanel; ++lane) {
                squares[lane] += keys[i * kPanel + lane] * keys[i * kPanel + lane];
            }
        }
        const int lanes = std::min(kPanel, count - first);
        for (int lane = 0; lane < lanes; ++lane) {
            const float factor = scale / std::sqrt(squares[lane] / static_cast<float>(width) + 1e-6f);
            for (int row = 0; row < rows; ++row) {
                scores[row * scores_row + first + lane] *= factor;
            }
        }
    }
}

void Heads::scale_queries(float* queries, int rows) const {
    for (int t = 0; t < rows; ++t) {
        for (int i = 0; i < width; ++i) {
            queries[t * size + i] *= scale;
        }
    }
}

CausalAttention::CausalAttention(Builder& builder, const std::string& norm, const std::string& name, int layer,
                                 const Rotary* rotary)
    : heads_(builder.options),
      pattern_(builder.options, "attention_pattern"),
      layer_(layer),
      rotary_(rotary),
      norm_(builder, norm, heads_.size),
      projection_(make_projection(builder, name + ".projection", "attention", heads_.size)) {}

void CausalAttention::apply(Context& context, const float* in, float* out) const {
    projection_->qkv(context, norm_.apply(context, in));
    heads_.apply(context, projection_->output(), out, [&](const Run& run, int head, float* merged, bool add) {
        attend(context, run, head, merged, add);
    });
}

// One head of one run: its new keys and values are written, then the queries look at them and at earlier ones.
void CausalAttention::attend(Context& context, const Run& run, int head, float* out, bool add) const {
    write(context, run, head);
    const KeyValues& cache = run.session->cache(layer_);
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(run.first) * heads_.size + head * heads_.width;
    float* const queries = context.work.q.data() + at;
    const int position = run.session->prefix() + context.batch.positions[index(run.first)];
    const int exact = pattern_.exact(position, run.count);
    heads_.scale_queries(queries, exact);
    for (const bool unit_keys : {false, true}) {
        const int from = unit_keys ? exact : 0;
        const int to = unit_keys ? run.count : exact;
        const std::ptrdiff_t offset = static_cast<std::ptrdiff_t>(from) * heads_.size;
        const auto sees = [&](int row) { return pattern_.causal(position + from + row); };
        heads_.look(context, cache, head, queries + offset, to - from, sees, unit_keys, out + at + offset, add);
    }
}

void CausalAttention::write(Context& context, const Run& run, int head) const {
    Workspace& work = context.work;
    KeyValues& cache = run.session->cache(layer_);
    const int first = run.session->prefix() + context.batch.positions[index(run.first)];
    cache.make_room(head, pattern_.window().begin(first), first + run.count);
    for (int t = 0; t < run.count; ++t) {
        const std::size_t at = index(run.first + t) * index(heads_.size) + index(head * heads_.width);
        const int position = run.session->prefix() + context.batch.positions[index(run.first + t)];
        float* const query = work.q.data() + at;
        float* const key = work.k.data() + at;
        if (rotary_ != nullptr) {
            rotary_->rotate(query, position);
            rotary_->rotate(key, position);
        }
        if (pattern_.shared()) {
            for (int i = 0; i < heads_.width; ++i) {
                query[i] = key[i] = (query[i] + key[i]) / 2;
            }
        }
        cache.write(head, position, key, work.v.data() + at);
    }
}

BidirectionalAttention::BidirectionalAttention(Builder& builder, const std::string& norm, const std::string& name,
                                               const Rotary* rotary)
    : heads_(builder.options),
      pattern_(builder.options, "encoder_attention_pattern"),
      rotary_(rotary),
      norm_(builder, norm, heads_.size),
      projection_(make_projection(builder, name + ".projection", "encoder_attention", heads_.size)) {
    if (pattern_.shared()) {
        hashed_.emplace(builder.options, "encoder_attention_pattern");
    }
}

void BidirectionalAttention::prepare(Context& context, const float* in) const {
    Workspace& work = context.work;
    const bool hashes = pattern_.hashes(context.batch.runs.front().session->capacity());
    const float scale = hashes ? 1.0f : heads_.scale;
    projection_->qkv(context, norm_.apply(context, in));
    const Range heads = context.worker.share(heads_.count);
    for (const Run& run : context.batch.runs) {
        for (int t = 0; t < run.count; ++t) {
            const int position = context.batch.positions[index(run.first + t)];
            const std::size_t at = index(run.first + t) * index(heads_.size);
            float* const queries = work.source->queries.data() + index(position) * index(heads_.size);
            for (int head = heads.begin; rotary_ != nullptr && head < heads.end; ++head) {
                rotary_->rotate(work.q.data() + at + index(head * heads_.width), position);
                rotary_->rotate(work.k.data() + at + index(head * heads_.width), position);
            }
            for (int i = heads.begin * heads_.width; i < heads.end * heads_.width; ++i) {
                float& query = work.q.data()[at + index(i)];
                float& key = work.k.data()[at + index(i)];
                if (pattern_.shared()) {
                    query = key = (query + key) / 2;
                }
                queries[i] = query * scale;
            }
            for (int head = heads.begin; head < heads.end; ++head) {
                const std::size_t of_head = at + index(head * heads_.width);
                run.session->cache(0).write(head, position, work.k.data() + of_head, work.v.data() + of_head);
            }
        }
    }
    context.worker.barrier();
}

void BidirectionalAttention::apply(Context& context, const float*, float* out) const {
    float* const all = context.work.source->queries.data();
    Session& session = *context.batch.runs.front().session;
    const bool hashes = pattern_.hashes(session.capacity());
    if (hashes && context.batch.positions.front() == 0) {  // with the first block, all of the source
        const Range heads = context.worker.share(heads_.count);
        for (int head = heads.begin; head < heads.end; ++head) {
            float* const x = all + head * heads_.width;
            hashed_->apply(session.cache(0), head, x, heads_.size, session.capacity());
        }
        context.worker.barrier();
    }
    heads_.apply(context, projection_->output(), out, [&](const Run& run, int head, float* merged, bool add) {
        const int position = context.batch.positions[index(run.first)];
        const std::size_t offset = index(head * heads_.width);
        const float* const queries = all + index(position) * index(heads_.size) + offset;
        float* const to = merged + index(run.first) * index(heads_.size) + offset;
        if (!hashes) {
            const auto sees = [&](int row) { return pattern_.bidirectional(position + row, session.capacity()); };
            heads_.look(context, session.cache(0), head, queries, run.count, sees, false, to, add);
            return;
        }
        for (int t = 0; t < run.count; ++t) {
            for (int i = 0; i < heads_.width; ++i) {
                float& y = to[t * heads_.size + i];
                y = queries[t * heads_.size + i] + (add ? y : 0.0f);
            }
        }
    });
}

CrossAttention::CrossAttention(Builder& builder, const std::string& norm, const std::string& name, int cross)
    : heads_(builder.options),
      cross_(cross),
      norm_(builder, norm, heads_.size),
      key_(builder, name + ".projection.key", heads_.size, heads_.size, has_bias(builder.options)),
      value_(builder, name + ".projection.value", heads_.size, heads_.size, has_bias(builder.options)) {
    const Options& options = builder.options;
    const std::string projection = name + ".projection";
    const int size = heads_.size;
    if (options.text("cross_attention.kind") == "sparse") {
        const int modules = options.size("cross_attention.qkv_modules");
        query_.push_back(std::make_unique<Multiplicative>(builder, projection + ".query.shared", size, size, modules));
        query_.push_back(std::make_unique<LocalConvolution>(
            builder, projection + ".query.convolution", size / modules, size / modules, modules,
            options.size("cross_attention.module_kernel"), options.size("cross_attention.length_kernel")));
    } else {
        query_.push_back(std::make_unique<Dense>(builder, projection + ".query", size, size, has_bias(options)));
        output_.push_back(std::make_unique<Dense>(builder, projection + ".out", size, size, has_bias(options)));
    }
}

void CrossAttention::apply(Context& context, const float* in, float* out) const {
    Workspace& work = context.work;
    const float* x = norm_.apply(context, in);
    for (const std::unique_ptr<Layer>& layer : query_) {
        float* const to = (layer == query_.back() ? work.q : work.k).data();
        layer->apply(context, x, context.rows(), to);
        context.worker.barrier();
        x = to;
    }
    heads_.apply(context, output_, out, [&](const Run& run, int head, float* merged, bool add) {
        const std::size_t first = index(run.first) * index(heads_.size) + index(head * heads_.width);
        float* const queries = work.q.data() + first;
        heads_.scale_queries(queries, run.count);
        const auto sees = [&](int) { return Range{0, run.session->source_length()}; };
        heads_.look(context, run.session->source(cross_), head, queries, run.count, sees, false, merged + first, add);
    });
}

void CrossAttention::read(Context& context, const float* encoded) const {
    Workspace& work = context.work;
    key_.apply(context, encoded, context.rows(), work.k.data());
    value_.apply(context, encoded, context.rows(), work.v.data());
    context.worker.barrier();
    const Range heads = context.worker.share(heads_.count);
    for (const Run& run : context.batch.runs) {
        for (int t = 0; t < run.count; ++t) {
            const int position = context.batch.positions[index(run.first + t)];
            for (int head = heads.begin; head < heads.end; ++head) {
                const std::size_t at = index(run.first + t) * index(heads_.size) + index(head * heads_.width);
                run.session->source(cross_).write(head, position, work.k.data() + at, work.v.data() + at);
            }
        }
    }
    context.worker.barrier();
}

}  // namespace terse
