#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "kernels.h"

namespace terse {

void forbid_repeats(const std::vector<std::int32_t>& tokens, int size, float* scores) {
    if (size == 0 || tokens.size() < static_cast<std::size_t>(size)) {
        return;
    }
    const std::ptrdiff_t before = size - 1;
    const auto tail = tokens.end() - before;
    for (auto first = tokens.begin(); first + before != tokens.end(); ++first) {
        if (std::equal(tail, tokens.end(), first)) {
            scores[first[before]] = kNever;
        }
    }
}

Sampler::Sampler(const Sampling& sampling, int vocab_size)
    : sampling_(sampling), state_(sampling.seed), scores_(static_cast<std::size_t>(vocab_size)) {
    if (sampling.repetition_penalty != 1.0f) {
        seen_.resize(scores_.size());
    }
    if (sampling.top_k > 0 || sampling.top_p < 1.0f) {
        order_.resize(scores_.size());
    }
}

void Sampler::see(std::int32_t token) {
    if (token < 0 || static_cast<std::size_t>(token) >= scores_.size()) {
        throw std::invalid_argument("the token " + std::to_string(token) + " is not in [0, " +
                                    std::to_string(scores_.size()) + ")");
    }
    if (!seen_.empty()) {
        seen_[static_cast<std::size_t>(token)] = 1;
    }
    if (sampling_.no_repeat_ngram_size > 0) {
        tokens_.push_back(token);
    }
}

std::int32_t Sampler::next(const float* logits, const std::uint8_t* allowed) {
    if (!filter(logits, allowed)) {
        return -1;
    }
    const int size = static_cast<int>(scores_.size());
    if (sampling_.temperature == 0.0f) {
        return kernels().argmax(scores_.data(), size);
    }
    double total = 0;
    for (const float p : scores_) {
        total += p;
    }
    const double level = uniform() * total;
    double sum = 0;
    std::int32_t token = 0;
    for (std::int32_t i = 0; i < size; ++i) {
        const float p = scores_[static_cast<std::size_t>(i)];
        if (p > 0.0f) {
            token = i;  // of probability above 0, even where rounding lifts the level to the total
            sum += p;
            if (sum > level) {
                break;
            }
        }
    }
    return token;
}

bool Sampler::distribution(const float* logits, float* probabilities) {
    if (!filter(logits, nullptr)) {
        return false;
    }
    if (sampling_.temperature == 0.0f) {
        std::fill_n(probabilities, scores_.size(), 0.0f);
        probabilities[kernels().argmax(scores_.data(), static_cast<int>(scores_.size()))] = 1.0f;
    } else {
        std::copy(scores_.begin(), scores_.end(), probabilities);
    }
    return true;
}

bool Sampler::filter(const float* logits, const std::uint8_t* allowed) {
    const std::size_t size = scores_.size();
    bool has_nan = false;
    for (std::size_t i = 0; i < size; ++i) {
        has_nan |= logits[i] != logits[i];
        scores_[i] = logits[i];
    }
    for (std::size_t i = 0; i < seen_.size(); ++i) {
        if (seen_[i] != 0) {
            penalise(scores_[i], sampling_.repetition_penalty);
        }
    }
    for (std::size_t i = 0; allowed != nullptr && i < size; ++i) {
        scores_[i] = allowed[i] != 0 ? scores_[i] : kNever;
    }
    float largest = scores_[static_cast<std::size_t>(kernels().argmax(scores_.data(), static_cast<int>(size)))];
    if (has_nan || !std::isfinite(largest)) {
        failure_ = Finish::not_finite;
        return false;
    }
    if (!tokens_.empty()) {
        forbid_repeats(tokens_, sampling_.no_repeat_ngram_size, scores_.data());
        largest = scores_[static_cast<std::size_t>(kernels().argmax(scores_.data(), static_cast<int>(size)))];
        if (largest == kNever) {
            failure_ = Finish::repeats;
            return false;
        }
    }
    if (sampling_.temperature == 0.0f) {
        return true;
    }
    for (float& score : scores_) {
        score = (score - largest) / sampling_.temperature;
    }
    keep_largest();
    keep_likely();
    if (sampling_.min_p > 0.0f) {
        const float least = std::log(sampling_.min_p);
        for (float& score : scores_) {
            score = score < least ? kNever : score;
        }
    }
    kernels().softmax(scores_.data(), static_cast<int>(size));
    for (float& score : scores_) {
        score = score < 1e-37f ? 0.0f : score;  // e^-87, where the kernel's exponential ends
    }
    return true;
}

// Top-k: what is as large as the k-th stays.
void Sampler::keep_largest() {
    const std::size_t k = static_cast<std::size_t>(sampling_.top_k);
    if (k == 0 || k >= scores_.size()) {
        return;
    }
    for (std::size_t i = 0; i < order_.size(); ++i) {
        order_[i] = static_cast<std::int32_t>(i);
    }
    const auto larger = [this](std::int32_t a, std::int32_t b) {
        return scores_[static_cast<std::size_t>(a)] > scores_[static_cast<std::size_t>(b)];
    };
    std::nth_element(order_.begin(), order_.begin() + sampling_.top_k - 1, order_.end(), larger);
    const float least = scores_[static_cast<std::size_t>(order_[k - 1])];
    for (float& score : scores_) {
        score = score < least ? kNever : score;
    }
}

// Top-p: from the likeliest on, of equals the first id first, tokens stay until they have that probability together.
void Sampler::keep_likely() {
    if (sampling_.top_p >= 1.0f) {
        return;
    }
    double total = 0;
    std::size_t count = 0;
    for (std::size_t i = 0; i < scores_.size(); ++i) {
        if (scores_[i] > kNever) {
            order_[count++] = static_cast<std::int32_t>(i);
            total += std::exp(static_cast<double>(scores_[i]));
        }
    }
    const auto end = order_.begin() + static_cast<std::ptrdiff_t>(count);
    const auto later = [this](std::int32_t a, std::int32_t b) {
        const float x = scores_[static_cast<std::size_t>(a)];
        const float y = scores_[static_cast<std::size_t>(b)];
        return x < y || (x == y && a > b);
    };
    std::make_heap(order_.begin(), end, later);
    auto rest = end;
    for (double before = 0; rest != order_.begin() && (rest == end || before < sampling_.top_p * total);) {
        std::pop_heap(order_.begin(), rest, later);
        --rest;
        before += std::exp(static_cast<double>(scores_[static_cast<std::size_t>(*rest)]));
    }
    for (auto gone = order_.begin(); gone != rest; ++gone) {
        scores_[static_cast<std::size_t>(*gone)] = kNever;
    }
}

// SplitMix64: 53 random bits, in [0, 1).
double Sampler::uniform() {
    std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

StopStrings::StopStrings(std::vector<std::string> stops, const std::vector<std::string>& pieces)
    : stops_(std::move(stops)), pieces_(pieces) {
    for (const std::string& stop : stops_) {
        longest_ = std::max(longest_, stop.size());
    }
}

bool StopStrings::push(std::int32_t token) {
    if (stops_.empty()) {
        return false;
    }
    tail_ += pieces_[static_cast<std::size_t>(token)];
    for (const std::string& stop : stops_) {
        if (tail_.find(stop) != std::string::npos) {
            return true;
        }
    }
    if (tail_.size() >= longest_) {
        tail_.erase(0, tail_.size() - (longest_ - 1));
    }
    return false;
}

}  // namespace terse
