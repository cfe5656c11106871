#include "session.h"

#include <algorithm>
#include <stdexcept>

namespace terse {
namespace {

constexpr int kRun = 128;  // tokens that may always pass through the model together

// Places for `positions` of which a window is kept. It moves once in a window's length: then it is copied.
int places_of(const Window& window, int positions) {
    const std::int64_t needed = 2 * window.length() + kRun + kPanel;
    return window.limited() ? static_cast<int>(std::min<std::int64_t>(needed, positions)) : positions;
}

}  // namespace

Session::Session(const SessionShape& shape, int capacity, bool poison, int source_length)
    : shape_(shape), capacity_(capacity), source_length_(source_length), logits_(index(shape.vocab_size), poison) {
    const int positions = capacity + (shape.source == SourceUse::prefix ? source_length : 0);
    const int places = places_of(shape.window, positions);
    for (int layer = 0; layer < shape.layers; ++layer) {
        caches_.emplace_back(shape.heads, shape.head_dim, places, poison);
    }
    source_ = std::make_shared<std::vector<KeyValues>>();
    for (int cross = 0; cross < shape.crosses; ++cross) {
        source_->emplace_back(shape.heads, shape.head_dim, source_length, poison);
    }
    for (const std::size_t size : shape.memories) {
        memories_.emplace_back(size);  // zeros stand before the first token
    }
}

Session::Session(const Session& other)
    : shape_(other.shape_),
      capacity_(other.capacity_),
      source_length_(other.source_length_),
      has_source_(other.has_source_),
      source_(other.source_),
      logits_(other.logits_.size()) {
    for (const KeyValues& cache : other.caches_) {
        caches_.emplace_back(shape_.heads, shape_.head_dim, cache.capacity(), false);
    }
    for (const Buffer& memory : other.memories_) {
        memories_.emplace_back(memory.size());
    }
    prefix_ = other.prefix_;
    take(other, -prefix_);
    std::copy_n(other.logits_.data(), logits_.size(), logits_.data());
}

int Session::longest_run() const { return shape_.window.limited() ? kRun : capacity_ + source_length_; }

void Session::end_source() {
    has_source_ = true;
    prefix_ = shape_.source == SourceUse::prefix ? source_length_ : 0;
}

void Session::take(const Session& other, int shared) {
    for (std::size_t i = 0; i < caches_.size(); ++i) {
        caches_[i].copy(other.caches_[i], prefix_ + shared, prefix_ + other.length_);
    }
    for (std::size_t i = 0; i < memories_.size(); ++i) {
        std::copy_n(other.memories_[i].data(), memories_[i].size(), memories_[i].data());
    }
    length_ = other.length_;
}

std::size_t Session::saved_size(int length) const {
    const int kept = prefix_ + length - kept_from(length);
    std::size_t size = index(2 * shape_.layers * shape_.heads) * index(shape_.head_dim) * index(kept);
    for (const std::size_t memory : shape_.memories) {
        size += memory;
    }
    return size + index(shape_.vocab_size);
}

std::vector<float> Session::save() const {
    std::vector<float> saved;
    saved.reserve(saved_size(length_));
    for (const KeyValues& cache : caches_) {
        cache.save(kept_from(length_), prefix_ + length_, saved);
    }
    for (const Buffer& memory : memories_) {
        saved.insert(saved.end(), memory.data(), memory.data() + memory.size());
    }
    saved.insert(saved.end(), logits_.data(), logits_.data() + logits_.size());
    return saved;
}

void Session::restore(const float* saved, std::size_t size, int length) {
    if (length < 0 || length > capacity_) {
        throw std::invalid_argument("a session of " + std::to_string(length) + " tokens does not fit a capacity of " +
                                    std::to_string(capacity_));
    }
    if (size != saved_size(length)) {
        throw std::invalid_argument("the saved session has " + std::to_string(size) + " numbers, but " +
                                    std::to_string(length) + " tokens of this model need " +
                                    std::to_string(saved_size(length)) + "; it was saved from another model");
    }
    for (KeyValues& cache : caches_) {
        saved = cache.restore(saved, kept_from(length), prefix_ + length);
    }
    for (Buffer& memory : memories_) {
        std::copy_n(saved, memory.size(), memory.data());
        saved += memory.size();
    }
    std::copy_n(saved, logits_.size(), logits_.data());
    length_ = length;
}

}  // namespace terse
