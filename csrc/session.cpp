#include "session.h"

#include <algorithm>
#include <stdexcept>

namespace terse {
namespace {

std::size_t index(int i) { return static_cast<std::size_t>(i); }

}  // namespace

Session::Session(const SessionShape& shape, int capacity, bool poison)
    : shape_(shape),
      capacity_(capacity),
      rounded_(panels(capacity) * kPanel),
      keys_(index(shape.layers * shape.heads) * key_size(), poison),
      values_(index(shape.layers * shape.heads) * value_size(), poison),
      logits_(index(shape.vocab_size), poison) {
    for (const std::size_t size : shape.memories) {
        memories_.emplace_back(size);  // zeros stand before the first token
    }
}

Session::Session(const Session& other) : Session(other.shape_, other.capacity_, false) {
    const std::vector<float> saved = other.save();
    restore(saved.data(), saved.size(), other.length_);
}

void Session::append(int layer, int head, int position, const float* key, const float* value) {
    const int width = shape_.head_dim;
    float* const key_panel = keys(layer, head) + index(position / kPanel) * index(width * kPanel) + position % kPanel;
    float* const value_rows = values(layer, head) + index(position) * kPanel;
    for (int i = 0; i < width; ++i) {
        key_panel[i * kPanel] = key[i];
        value_rows[index(i / kPanel) * index(rounded_) * kPanel + index(i % kPanel)] = value[i];
    }
}

std::size_t Session::saved_size(int length) const {
    std::size_t size = index(2 * shape_.layers * shape_.heads) * index(shape_.head_dim) * index(length);
    for (const std::size_t memory : shape_.memories) {
        size += memory;
    }
    return size + index(shape_.vocab_size);
}

std::vector<float> Session::save() const {
    std::vector<float> saved;
    saved.reserve(saved_size(length_));
    for (int layer = 0; layer < shape_.layers; ++layer) {
        for (int position = 0; position < length_; ++position) {
            for (int head = 0; head < shape_.heads; ++head) {
                const float* const panel = keys(layer, head) +
                                           index(position / kPanel) * index(shape_.head_dim * kPanel) +
                                           position % kPanel;
                for (int i = 0; i < shape_.head_dim; ++i) {
                    saved.push_back(panel[i * kPanel]);
                }
            }
            for (int head = 0; head < shape_.heads; ++head) {
                const float* const rows = values(layer, head) + index(position) * kPanel;
                for (int i = 0; i < shape_.head_dim; ++i) {
                    saved.push_back(rows[index(i / kPanel) * index(rounded_) * kPanel + index(i % kPanel)]);
                }
            }
        }
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
    const int width = shape_.heads * shape_.head_dim;
    for (int layer = 0; layer < shape_.layers; ++layer) {
        for (int position = 0; position < length; ++position, saved += 2 * width) {
            for (int head = 0; head < shape_.heads; ++head) {
                append(layer, head, position, saved + head * shape_.head_dim, saved + width + head * shape_.head_dim);
            }
        }
    }
    for (Buffer& memory : memories_) {
        std::copy_n(saved, memory.size(), memory.data());
        saved += memory.size();
    }
    std::copy_n(saved, logits_.size(), logits_.data());
    length_ = length;
}

}  // namespace terse
