// Attention: a projection times a pattern.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "cache.h"
#include "layers.h"
#include "lsh.h"
#include "qkv.h"

namespace terse {

// Cosines and sines of the rotary positions.
class Rotary {
public:
    Rotary(int positions, int head_dim, double theta);
    void rotate(float* x, int position) const;  // one head of one row

private:
    int half_;
    Buffer cosines_, sines_;  // [positions][head_dim / 2]
};

// Which positions a row looks at, and as what.
class Pattern {
public:
    Pattern(const Options& options, const std::string& section);

    Range causal(int position) const;                     // up to the position
    Range bidirectional(int position, int length) const;  // of so many
    const Window& window() const { return window_; }      // of the positions before one

    // The mean of query and key is both.
    bool shared() const { return shared_; }

    // What decoding makes of LSH: of rows from `position` on, those that look at keys as they are, with scaled queries.
    // Later ones look at keys of length 1, and not at themselves.
    int exact(int position, int rows) const;

    // Whether a source of so many tokens is hashed.
    bool hashes(int length) const { return shared_ && length > exact_length_; }

private:
    bool shared_ = false;
    int exact_length_ = 0;  // positions below it are exact
    Window window_;
    int chunks_after_ = 0;  // that a row looks at besides the window, its own chunk included
};

// What all attention layers share.
struct Heads {
    explicit Heads(const Options& options);

    int size, count, width;
    float scale;  // of a query

    // Calls `attend(run, head, out, add)` for each head of each run, shared by the workers; then what follows the merged
    // heads, which adds to `out`, for all workers to see.
    template <typename Attend>
    void apply(Context& context, const Output& output, float* out, const Attend& attend) const;

    // Some rows of one head: each looks at the positions `sees(row)`. Keys may be divided by their lengths.
    template <typename Sees>
    void look(Context& context, const KeyValues& cache, int head, const float* queries, int rows, const Sees& sees,
              bool unit_keys, float* out, bool add) const;

    void scale_queries(float* queries, int rows) const;  // of one head

private:
    void divide_by_lengths(const float* keys, int count, float* scores, int rows, std::ptrdiff_t scores_row) const;
};

// Attention of tokens to those before them and to themselves.
class CausalAttention : public Sublayer {
public:
    CausalAttention(Builder& builder, const std::string& norm, const std::string& name, int layer, const Rotary* rotary);
    void apply(Context& context, const float* in, float* out) const override;

private:
    void attend(Context& context, const Run& run, int head, float* out, bool add) const;
    void write(Context& context, const Run& run, int head) const;

    Heads heads_;
    Pattern pattern_;
    int layer_;
    const Rotary* rotary_;
    Norm norm_;
    std::unique_ptr<Projection> projection_;
};

// Attention of all tokens of a source to one another: all are prepared before the first is applied.
class BidirectionalAttention : public Sublayer {
public:
    BidirectionalAttention(Builder& builder, const std::string& norm, const std::string& name, const Rotary* rotary);
    void prepare(Context& context, const float* in) const override;
    void apply(Context& context, const float* in, float* out) const override;

private:
    Heads heads_;
    Pattern pattern_;
    std::optional<HashedAttention> hashed_;
    const Rotary* rotary_;
    Norm norm_;
    std::unique_ptr<Projection> projection_;
};

// Attention of a text's tokens to all of its source.
class CrossAttention : public Sublayer {
public:
    CrossAttention(Builder& builder, const std::string& norm, const std::string& name, int cross);
    void apply(Context& context, const float* in, float* out) const override;

    // Makes the keys and values of a source's encoded rows, once for all tokens of a text.
    void read(Context& context, const float* encoded) const;

private:
    Heads heads_;
    int cross_;
    Norm norm_;
    std::vector<std::unique_ptr<Layer>> query_;  // of two, the first writes where k is
    Dense key_, value_;
    Output output_;
};

}  // namespace terse
