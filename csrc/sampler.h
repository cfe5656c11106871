// From logits to the next token. The steps and their order are those of sampling.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace terse {

struct Sampling {
    float temperature = 0.8f;
    int top_k = 0;
    float top_p = 1.0f;
    float min_p = 0.0f;
    float repetition_penalty = 1.0f;
    int no_repeat_ngram_size = 0;
    std::uint64_t seed = 0;
};

// Why a text ends: a stop string, a stop token, enough tokens; logits with NaN or no finite largest; no token that would
// not repeat an n-gram.
enum class Finish { no, stop, eos, length, not_finite, repeats };

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Forbids the tokens that would end, after these, a sequence of `size` tokens that already stands among them.
void forbid_repeats(const std::vector<std::int32_t>& tokens, int size, float* scores);

// The repetition penalty.
inline void penalise(float& score, float penalty) { score = score > 0.0f ? score / penalty : score * penalty; }

class Sampler {
public:
    Sampler(const Sampling& sampling, int vocab_size);

    // Counts a token of the prompt or of the text for the repetition penalty and the n-grams.
    // Throws std::invalid_argument when there is no such token.
    void see(std::int32_t token);

    std::size_t vocab_size() const { return scores_.size(); }

    // Draws a token, of those whose `allowed` is not 0 if it is given; or gives -1: then `failure` says why.
    std::int32_t next(const float* logits, const std::uint8_t* allowed = nullptr);
    Finish failure() const { return failure_; }

    // The distribution that `next` draws from; false when there is none.
    bool distribution(const float* logits, float* probabilities);

private:
    bool filter(const float* logits, const std::uint8_t* allowed);  // leaves the probabilities in scores_
    void keep_largest();
    void keep_likely();
    double uniform();

    Sampling sampling_;
    std::uint64_t state_;
    std::vector<std::uint8_t> seen_;    // empty: no penalty
    std::vector<std::int32_t> tokens_;  // empty: n-grams may be repeated
    std::vector<float> scores_;
    std::vector<std::int32_t> order_;
    Finish failure_ = Finish::no;
};

// Whether a text that comes in tokens has come to a stop string.
class StopStrings {
public:
    // `pieces` are the bytes of each token; it must outlive this.
    StopStrings(std::vector<std::string> stops, const std::vector<std::string>& pieces);
    bool push(std::int32_t token);

private:
    std::vector<std::string> stops_;
    const std::vector<std::string>& pieces_;
    std::string tail_;  // as much of the text as may be the beginning of a stop string
    std::size_t longest_ = 0;
};

}  // namespace terse
