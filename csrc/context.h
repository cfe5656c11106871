// What a layer is given when a batch of tokens passes through the model.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "session.h"
#include "team.h"

namespace terse {

// Consecutive new tokens of one session: rows [first, first + count) of the batch.
struct Run {
    Session* session;
    int first;
    int count;
};

// What a sparse feed-forward layer chose for a token in one of its groups.
struct Choice {
    std::int32_t index = 0;   // in [0, choices)
    std::int32_t active = 0;  // of the units that it stands for, how many the ReLU let through
};

struct Batch {
    std::vector<Run> runs;
    std::vector<std::int32_t> tokens;
    std::vector<std::int32_t> positions;  // of each row
    std::vector<Choice*> touched;         // where each row's choices, zero before, are noted; null or empty: nowhere

    int rows() const { return static_cast<int>(tokens.size()); }
    Choice* noted(int row) const { return touched.empty() ? nullptr : touched[index(row)]; }
};

// Rows [rows][hidden_size] of a batch or of a whole source. Both are the same where a model has one residual stream.
struct Streams {
    float* first;
    float* second;

    // Those of a block of a source, whose positions are its rows.
    Streams at(const Batch& block, int size) const {
        const std::size_t offset = index(block.positions.front()) * index(size);
        return {first + offset, second + offset};
    }
};

// Floats that the layers need, found out while the model is built: for each row, each run, each worker.
struct Sizes {
    std::size_t hidden = 0;    // row: inside a feed-forward layer, or in the middle of a layer of two steps
    std::size_t logits = 0;    // row: of a controller
    std::size_t chosen = 0;    // row: units that a controller chooses
    std::size_t frame = 0;     // row: of a convolution, with its padding
    std::size_t past = 0;      // run: frames of a convolution's past
    std::size_t gated = 0;     // worker: inputs of a multiplicative layer
    std::size_t recurrent = 0;  // row: inside the recurrent branch
    std::size_t quantised = 0;  // bytes of a row that an int8 matrix is multiplied by
    std::size_t segments = 0;   // such a row has at most
    std::size_t second = 0;     // row: the second stream
};

inline void at_least(std::size_t& size, std::size_t needed) { size = std::max(size, needed); }

// Rows of a whole source that is read.
struct SourceRows {
    Buffer first;    // the stream, [length][hidden_size]
    Buffer second;   // the second one, if there are two
    Buffer queries;  // of one layer of attention among the source's tokens, [length][hidden_size]
};

// Where a call computes. Allocated once for the largest batch.
struct Workspace {
    Workspace(const Sizes& sizes, int hidden_size, int capacity, int rows, int runs, int workers, bool poison);

    int rows;      // at most in a batch
    int runs;      // at most in a batch
    int capacity;  // positions that a row can attend to, in whole panels

    Buffer x;       // the residual stream, [rows][hidden_size], as the next six
    Buffer normed;
    Buffer q, k, v;
    Buffer merged;      // heads side by side
    Buffer branch;      // of the recurrent branch
    Buffer hidden;      // [rows][sizes.hidden]
    Buffer logits;      // [rows][sizes.logits]
    Buffer frames;      // [rows and past][sizes.frame]
    Buffer recurrent;   // [rows][sizes.recurrent]
    Buffer second;      // the second stream, [rows][sizes.second]
    SourceRows* source = nullptr;  // that is read at the moment
    std::vector<std::int32_t> chosen;  // [rows][sizes.chosen]
    std::vector<Buffer> own_normed;    // of each worker: one row
    std::vector<Buffer> own_gated;     // of each worker: [sizes.gated]
    std::vector<Buffer> own_scores;    // of each worker: [kQueries][capacity]
    std::vector<Buffer> own_partial;   // of each worker: [hidden_size]
    std::vector<Buffer> own_quantised;  // of each worker: [kQuantisedRows][sizes.quantised] bytes
    std::vector<Buffer> own_scales;     // of each worker: [kQuantisedRows][sizes.segments]
};

constexpr int kQueries = 12;        // rows whose attention is computed together
constexpr int kQuantisedRows = 48;  // rows that are quantised before an int8 matrix is read

struct Context {
    Worker& worker;
    const Batch& batch;
    Workspace& work;

    int rows() const { return batch.rows(); }
    float* gated() const { return work.own_gated[index(worker.index())].data(); }
    float* scores() const { return work.own_scores[index(worker.index())].data(); }
    std::int8_t* quantised() const {
        return reinterpret_cast<std::int8_t*>(work.own_quantised[index(worker.index())].data());
    }
    float* scales() const { return work.own_scales[index(worker.index())].data(); }
    float* partial(int of) const { return work.own_partial[index(of)].data(); }
};

}  // namespace terse
