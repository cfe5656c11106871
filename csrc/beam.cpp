#include "beam.h"

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace terse {

bool BeamSearch::Candidate::operator<(const Candidate& other) const {
    if (total != other.total) {
        return total > other.total;
    }
    return beam != other.beam ? beam < other.beam : token < other.token;
}

BeamSearch::BeamSearch(const Session& session, const Search& search, std::vector<std::int32_t> before,
                       std::vector<std::int32_t> stop_ids, int runs)
    : search_(search),
      before_(std::move(before)),
      stop_ids_(stop_ids.begin(), stop_ids.end()),
      start_(session.length()),
      looked_at_(std::max<std::size_t>(2, 1 + stop_ids_.size()) * index(search.num_beams)),
      slots_(index(search.num_beams)),
      batches_(index((search.num_beams + runs - 1) / runs)) {
    for (Slot& slot : slots_) {
        slot.session = std::make_unique<Session>(session);
        slot.scores.resize(index(session.shape().vocab_size));
        slot.text.reserve(index(search.max_tokens));
        slot.tokens.reserve(before_.size() + index(search.max_tokens));
        slot.candidates.reserve(looked_at_ + 1);
    }
    beams_.push_back({0.0, 0});
}

void BeamSearch::rank(const Worker& worker) {
    for (int beam = worker.index(); beam < static_cast<int>(beams_.size()); beam += worker.count()) {
        rank(beam);
    }
}

void BeamSearch::rank(int beam) {
    Slot& slot = slots_[index(beams_[index(beam)].slot)];
    float* const scores = slot.scores.data();
    const float* const logits = slot.session->logits();
    const int size = static_cast<int>(slot.scores.size());
    const int best = kernels().argmax(logits, size);
    slot.candidates.clear();
    slot.finite = std::isfinite(logits[best]) && std::none_of(logits, logits + size, [](float x) { return x != x; });
    if (!slot.finite) {
        return;
    }
    std::copy_n(logits, size, scores);
    kernels().softmax(scores, size);
    const float shift = std::log(scores[best]) - logits[best];
    for (int i = 0; i < size; ++i) {
        scores[i] = logits[i] + shift;
    }
    slot.tokens.assign(before_.begin(), before_.end());
    slot.tokens.insert(slot.tokens.end(), slot.text.begin(), slot.text.end());
    forbid_repeats(slot.tokens, search_.no_repeat_ngram_size, scores);
    if (search_.repetition_penalty != 1.0f) {
        std::sort(slot.tokens.begin(), slot.tokens.end());
        const auto last = std::unique(slot.tokens.begin(), slot.tokens.end());
        std::for_each(slot.tokens.begin(), last, [&](std::int32_t token) {
            penalise(scores[token], search_.repetition_penalty);
        });
    }
    const double total = beams_[index(beam)].total;
    std::vector<Candidate>& kept = slot.candidates;  // a heap, the least likely first
    for (std::int32_t token = 0; token < size; ++token) {
        const Candidate candidate{total + scores[token], beam, token};
        if (scores[token] == kNever || (kept.size() == looked_at_ && !(candidate < kept.front()))) {
            continue;
        }
        kept.push_back(candidate);
        std::push_heap(kept.begin(), kept.end());
        if (kept.size() > looked_at_) {
            std::pop_heap(kept.begin(), kept.end());
            kept.pop_back();
        }
    }
}

void BeamSearch::choose() {
    if (length_ > 0) {
        for (const Beam& beam : beams_) {
            slots_[index(beam.slot)].session->advance(1);
        }
    }
    ++length_;
    candidates_.clear();
    for (const Beam& beam : beams_) {
        const Slot& slot = slots_[index(beam.slot)];
        if (!slot.finite) {
            return fail(Finish::not_finite);
        }
        candidates_.insert(candidates_.end(), slot.candidates.begin(), slot.candidates.end());
    }
    std::sort(candidates_.begin(), candidates_.end());
    candidates_.resize(std::min(candidates_.size(), looked_at_));
    going_.clear();
    for (std::size_t rank = 0; rank < candidates_.size(); ++rank) {
        const Candidate& candidate = candidates_[rank];
        const bool stops = stop_ids_.contains(candidate.token);
        if (stops || length_ == search_.max_tokens) {
            if (rank < slots_.size()) {
                end(candidate.total, slots_[index(beams_[index(candidate.beam)].slot)], candidate.token,
                    stops ? Finish::eos : Finish::length);
            }
        } else if (going_.size() < slots_.size()) {
            going_.push_back(candidate);
        }
    }
    std::stable_sort(ended_.begin(), ended_.end(), [](const Found& a, const Found& b) { return a.score > b.score; });
    ended_.resize(std::min(ended_.size(), slots_.size()), {});
    const bool full = ended_.size() == slots_.size();
    if (going_.empty() || (full && (search_.early_stopping || score(going_.front().total) <= ended_.back().score))) {
        if (ended_.empty()) {
            return fail(Finish::repeats);
        }
        done_ = true;
        return;
    }
    follow();
}

void BeamSearch::end(double total, const Slot& slot, std::int32_t token, Finish finish) {
    ended_.push_back({score(total), slot.text, finish});
    ended_.back().tokens.push_back(token);
}

double BeamSearch::score(double total) const {
    return total / std::pow(static_cast<double>(length_), search_.length_penalty);
}

void BeamSearch::fail(Finish finish) {
    ended_.assign(1, {0.0, {}, finish});
    done_ = true;
}

// Of a beam's continuations the first keeps its slot; the others take those of beams that end here.
void BeamSearch::follow() {
    std::vector<int> owners(slots_.size(), -1);  // which continuation takes a slot
    std::vector<int> places(going_.size(), -1);
    copies_.clear();
    for (std::size_t i = 0; i < going_.size(); ++i) {
        const int slot = beams_[index(going_[i].beam)].slot;
        if (owners[index(slot)] < 0) {
            owners[index(slot)] = static_cast<int>(i);
            places[i] = slot;
        }
    }
    int unused = 0;
    for (std::size_t i = 0; i < going_.size(); ++i) {
        if (places[i] >= 0) {
            continue;
        }
        while (owners[index(unused)] >= 0) {
            ++unused;
        }
        owners[index(unused)] = static_cast<int>(i);
        places[i] = unused;
        const int from = beams_[index(going_[i].beam)].slot;
        const std::vector<std::int32_t>& text = slots_[index(from)].text;
        std::vector<std::int32_t>& old = slots_[index(unused)].text;
        const auto end = old.begin() + static_cast<std::ptrdiff_t>(std::min(old.size(), text.size()));
        const auto differs = std::mismatch(old.begin(), end, text.begin()).first;
        copies_.push_back({from, unused, start_ + static_cast<int>(differs - old.begin())});
        old = text;
    }
    beams_.clear();
    for (Batch& batch : batches_) {
        batch.runs.clear();
        batch.tokens.clear();
        batch.positions.clear();
    }
    for (std::size_t i = 0; i < going_.size(); ++i) {
        Slot& slot = slots_[index(places[i])];
        slot.text.push_back(going_[i].token);
        beams_.push_back({going_[i].total, places[i]});
        Batch& batch = batches_[i % batches_.size()];
        batch.runs.push_back({slot.session.get(), batch.rows(), 1});
        batch.tokens.push_back(going_[i].token);
        batch.positions.push_back(start_ + length_ - 1);
    }
}

void BeamSearch::take(const Worker& worker) {
    const Range part = worker.share(static_cast<int>(copies_.size()));
    for (int i = part.begin; i < part.end; ++i) {
        const Copy& copy = copies_[index(i)];
        slots_[index(copy.to)].session->take(*slots_[index(copy.from)].session, copy.shared);
    }
}

}  // namespace terse
