#include "lsh.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "context.h"

namespace terse {
namespace {

constexpr float kHidden = -1e9f;  // score of what fills up the last chunk
constexpr float kSelf = -1e5f;    // of the token itself

// In (0, 1], by SplitMix64.
double uniform(std::uint64_t counter) {
    std::uint64_t z = (counter + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return static_cast<double>((z >> 11) + 1) * 0x1p-53;
}

// The numbers of `fixed_normals`, by Box-Muller.
float normal(std::uint64_t place) {
    const double radius = std::sqrt(-2.0 * std::log(uniform(2 * place)));
    return static_cast<float>(radius * std::cos(2.0 * std::numbers::pi * uniform(2 * place + 1)));
}

// As `bucket_factors` has them.
std::vector<int> bucket_factors(int num_buckets) {
    if (num_buckets <= 128) {
        return {num_buckets};
    }
    const int first = 1 << static_cast<int>(std::ceil(std::log2(num_buckets) / 2));
    return {first, 2 * (num_buckets / (2 * first))};
}

// Of length 1: x / sqrt(mean(x^2) + 1e-6) / sqrt(n).
void unit_key(const float* x, int n, float* key) {
    float squares = 0.0f;
    for (int i = 0; i < n; ++i) {
        squares += x[i] * x[i];
    }
    const float factor = 1.0f / std::sqrt((squares / static_cast<float>(n) + 1e-6f) * static_cast<float>(n));
    for (int i = 0; i < n; ++i) {
        key[i] = x[i] * factor;
    }
}

// The place of the largest of [x; -x], the first of equal ones.
int largest_of_both(const float* x, int n) {
    int place = 0;
    float largest = x[0];
    for (const float sign : {1.0f, -1.0f}) {
        for (int i = 0; i < n; ++i) {
            if (sign * x[i] > largest) {
                largest = sign * x[i];
                place = sign > 0 ? i : n + i;
            }
        }
    }
    return place;
}

}  // namespace

// The tokens of one round in the order of their buckets, in whole chunks. The keys begin with
// the last chunks and end with the first ones, as far as windows reach, so that each window is one piece.
struct HashedAttention::Sorted {
    int chunks;
    int window;                          // chunks that a chunk sees
    std::vector<std::int32_t> at_query;  // position of each token, -1 for none, [chunks * chunk_length]
    std::vector<std::int32_t> at_key;    // [(chunks + window - 1) * chunk_length]
};

HashedAttention::HashedAttention(const Options& options, const std::string& section)
    : heads_(options.size("num_attention_heads")),
      width_(options.size("hidden_size") / heads_),
      chunk_length_(options.size(section + ".chunk_length")),
      chunks_before_(options.size(section + ".chunks_before", 0)),
      chunks_after_(options.size(section + ".chunks_after", 0)),
      rounds_(options.size(section + ".num_hashes")),
      num_buckets_(options.size(section + ".num_buckets", 0)) {}

std::vector<std::int32_t> HashedAttention::hash(int head, const float* x, std::ptrdiff_t stride,
                                                int length) const {
    const int count = num_buckets_ != 0 ? num_buckets_ : 2 * std::max(1, length / chunk_length_);
    const std::vector<int> factors = bucket_factors(count);
    int rotated = 0;
    for (const int factor : factors) {
        rotated += factor / 2;
    }
    std::vector<float> rotation(index(panels(rotated) * kPanel) * index(width_));
    std::vector<float> y(index(kQueries) * index(panels(rotated) * kPanel));
    std::vector<std::int32_t> buckets(index(rounds_) * index(length));
    for (int round = 0; round < rounds_; ++round) {
        const std::uint64_t first = index(round * heads_ + head) * index(width_) * index(rotated);
        for (int i = 0; i < width_; ++i) {
            for (int j = 0; j < rotated; ++j) {
                const std::size_t panel = index(j / kPanel) * index(width_) * kPanel;
                rotation[panel + index(i * kPanel + j % kPanel)] = normal(first + index(i) * index(rotated) + index(j));
            }
        }
        MatmulTask task{};
        task.weights = rotation.data();
        task.x_row = stride;
        task.inputs = width_;
        task.panel_inputs = index(width_);
        task.y = y.data();
        task.y_row = panels(rotated) * kPanel;
        task.outputs = rotated;
        for (int t = 0; t < length; t += kQueries) {
            const int some = std::min(kQueries, length - t);
            task.x = x + t * stride;
            kernels().matmul[static_cast<std::size_t>(Dtype::f32)](task, 0, panels(rotated), 0, some);
            for (int row = 0; row < some; ++row) {
                const float* part = y.data() + row * task.y_row;
                std::int32_t& bucket = buckets[index(round) * index(length) + index(t + row)];
                int step = 1;
                for (const int factor : factors) {
                    bucket += step * largest_of_both(part, factor / 2);
                    step *= factor;
                    part += factor / 2;
                }
            }
        }
    }
    return buckets;
}

HashedAttention::Sorted HashedAttention::sort(const std::int32_t* buckets, int length) const {
    Sorted sorted;
    sorted.chunks = (length + chunk_length_ - 1) / chunk_length_;
    sorted.at_query.assign(index(sorted.chunks * chunk_length_), -1);
    for (int t = 0; t < length; ++t) {
        sorted.at_query[index(t)] = t;
    }
    std::stable_sort(sorted.at_query.begin(), sorted.at_query.begin() + length,
                     [&](std::int32_t one, std::int32_t other) { return buckets[one] < buckets[other]; });
    const int before = std::min(chunks_before_, sorted.chunks - 1);
    const int after = std::min(chunks_after_, sorted.chunks - 1 - before);
    sorted.window = before + 1 + after;
    for (int chunk = -before; chunk < sorted.chunks + after; ++chunk) {
        const auto from = sorted.at_query.begin() + (chunk + sorted.chunks) % sorted.chunks * chunk_length_;
        sorted.at_key.insert(sorted.at_key.end(), from, from + chunk_length_);
    }
    return sorted;
}

// The tokens of a chunk look at their window: rows of `y` [length][width], and of each the logarithm of the sum of its
// weights.
void HashedAttention::look(const Sorted& sorted, const KeyValues& keys, int chunk, const float* x,
                           std::ptrdiff_t stride, float* y, float* logsumexp) const {
    const Kernels::Matmul matmul = kernels().matmul[static_cast<std::size_t>(Dtype::f32)];
    const int first = chunk * chunk_length_;
    const int begin = first / kPanel * kPanel;
    const int count = first + sorted.window * chunk_length_ - begin;
    std::vector<float> scores(index(kQueries) * index(panels(count) * kPanel));
    std::vector<float> rows(index(kQueries) * index(width_));
    for (int t = 0; t < chunk_length_; t += kQueries) {
        const std::int32_t* const at_query = sorted.at_query.data() + first + t;
        int some = std::min(kQueries, chunk_length_ - t);
        while (some > 0 && at_query[some - 1] < 0) {
            --some;
        }
        for (int row = 0; row < some; ++row) {
            std::copy_n(x + at_query[row] * stride, width_, rows.data() + row * width_);
        }
        MatmulTask task{};
        task.weights = keys.keys(0, begin);
        task.x = rows.data();
        task.x_row = width_;
        task.inputs = width_;
        task.panel_inputs = index(width_);
        task.y = scores.data();
        task.y_row = panels(count) * kPanel;
        task.outputs = count;
        matmul(task, 0, panels(count), 0, some);
        for (int row = 0; row < some; ++row) {
            float* const weights = scores.data() + row * task.y_row;
            std::fill_n(weights, first - begin, kHidden);
            for (int i = first - begin; i < count; ++i) {
                const std::int32_t at_key = sorted.at_key[index(begin + i)];
                weights[i] = at_key < 0 ? kHidden : at_key == at_query[row] ? kSelf : weights[i];
            }
            const auto place = std::max_element(weights, weights + count) - weights;
            const float largest = weights[place];
            kernels().softmax(weights, count);
            logsumexp[at_query[row]] = largest - std::log(weights[place]);
        }
        task.weights = keys.values(0, begin);
        task.x = scores.data();
        task.x_row = task.y_row;
        task.inputs = count;
        task.panel_inputs = index(keys.capacity());
        task.y = rows.data();
        task.y_row = width_;
        task.outputs = width_;
        matmul(task, 0, panels(width_), 0, some);
        for (int row = 0; row < some; ++row) {
            std::copy_n(rows.data() + row * width_, width_, y + at_query[row] * width_);
        }
    }
}

void HashedAttention::apply(const KeyValues& cache, int head, float* x, std::ptrdiff_t stride, int length) const {
    const std::vector<std::int32_t> buckets = hash(head, x, stride, length);
    std::vector<float> sum(index(length) * index(width_)), total(index(length)), largest(index(length), -INFINITY);
    std::vector<float> y(index(length) * index(width_)), logsumexp(index(length));
    std::vector<float> key(index(width_)), value(index(width_));
    for (int round = 0; round < rounds_; ++round) {
        const Sorted sorted = sort(buckets.data() + index(round) * index(length), length);
        KeyValues keys(1, width_, static_cast<int>(sorted.at_key.size()), false);
        for (int place = 0; place < static_cast<int>(sorted.at_key.size()); ++place) {
            const int at = sorted.at_key[index(place)];
            if (at >= 0) {
                cache.read_value(head, at, value.data());
                unit_key(x + at * stride, width_, key.data());
                keys.write(0, place, key.data(), value.data());
            }
        }
        for (int chunk = 0; chunk < sorted.chunks; ++chunk) {
            look(sorted, keys, chunk, x, stride, y.data(), logsumexp.data());
        }
        for (int t = 0; t < length; ++t) {  // weights exp(logsumexp) of the rounds, less the largest so far
            const std::size_t at = index(t);
            const float most = std::max(largest[at], logsumexp[at]);
            const float old = std::exp(largest[at] - most), now = std::exp(logsumexp[at] - most);
            total[at] = total[at] * old + now;
            largest[at] = most;
            for (int i = 0; i < width_; ++i) {
                float& element = sum[at * index(width_) + index(i)];
                element = element * old + y[at * index(width_) + index(i)] * now;
            }
        }
    }
    for (int t = 0; t < length; ++t) {
        for (int i = 0; i < width_; ++i) {
            x[t * stride + i] = sum[index(t) * index(width_) + index(i)] / total[index(t)];
        }
    }
}

}  // namespace terse
