// Attention among tokens of a source that hash to the same bucket: layers/lsh.py outside training.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cache.h"
#include "options.h"

namespace terse {

class HashedAttention {
public:
    HashedAttention(const Options& options, const std::string& section);

    // One head of a whole source. Its rows at `x`, `stride` floats apart, are queries and keys; the outputs replace them.
    void apply(const KeyValues& cache, int head, float* x, std::ptrdiff_t stride, int length) const;

private:
    struct Sorted;

    // The bucket of each token in each round, [rounds][length].
    std::vector<std::int32_t> hash(int head, const float* x, std::ptrdiff_t stride, int length) const;
    Sorted sort(const std::int32_t* buckets, int length) const;
    void look(const Sorted& sorted, const KeyValues& keys, int chunk, const float* x, std::ptrdiff_t stride, float* y,
              float* logsumexp) const;

    int heads_, width_;
    int chunk_length_, chunks_before_, chunks_after_;
    int rounds_;
    int num_buckets_;  // 0: two for each chunk
};

}  // namespace terse
