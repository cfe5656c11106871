// The likeliest text, by following several beginnings side by side. Which are followed, and which text is chosen, is
// that of beam.py.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_set>
#include <vector>

#include "context.h"
#include "sampler.h"
#include "session.h"

namespace terse {

struct Search {
    int num_beams = 1;
    double length_penalty = 1.0;
    bool early_stopping = false;
    int no_repeat_ngram_size = 0;
    float repetition_penalty = 1.0f;
    int max_tokens = 1;
};

// A text that has come to its end.
struct Found {
    double score;
    std::vector<std::int32_t> tokens;
    Finish finish;
};

// Each beam has a session of its own. Those of cross-attention look at one source; a source that precedes the text is
// copied for each beam once. What a beam takes over from another is copied only from where their texts differ.
class BeamSearch {
public:
    // `session` has read what precedes the text, of which `before` are the tokens that must not be repeated. `runs`
    // sessions at most are handed out together.
    BeamSearch(const Session& session, const Search& search, std::vector<std::int32_t> before,
               std::vector<std::int32_t> stop_ids, int runs);

    // A step, by all workers together with barriers between: the likeliest tokens after each beam; which beams go on;
    // what one takes over from another. Then each batch is to be read.
    void rank(const Worker& worker);
    void choose();  // by one worker
    void take(const Worker& worker);
    const std::vector<Batch>& batches() const { return batches_; }

    bool done() const { return done_; }
    const Found& best() const { return ended_.front(); }

private:
    struct Beam {
        double total;  // the logarithm of its text's probability
        int slot;
    };
    struct Candidate {
        double total;
        int beam;
        std::int32_t token;

        bool operator<(const Candidate& other) const;  // whether it is the likelier one; of equals the first
    };
    struct Copy {
        int from, to;
        int shared;  // tokens of both sessions that are the same
    };
    struct Slot {
        std::unique_ptr<Session> session;
        std::vector<std::int32_t> text;
        std::vector<float> scores;
        std::vector<std::int32_t> tokens;  // all that must not be repeated
        std::vector<Candidate> candidates;
        bool finite = true;
    };

    void rank(int beam);
    void end(double total, const Slot& slot, std::int32_t token, Finish finish);
    void follow();
    void fail(Finish finish);
    double score(double total) const;

    Search search_;
    std::vector<std::int32_t> before_;
    std::unordered_set<std::int32_t> stop_ids_;
    int start_;  // tokens that the sessions have read before the texts
    std::size_t looked_at_;
    int length_ = 0;  // of the texts
    bool done_ = false;
    std::vector<Slot> slots_;
    std::vector<Beam> beams_;  // the likeliest first
    std::vector<Candidate> candidates_, going_;
    std::vector<Copy> copies_;
    std::vector<Batch> batches_;
    std::vector<Found> ended_;  // the best first
};

}  // namespace terse
