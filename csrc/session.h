// What one sequence remembers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace terse {

// How much a model's sequences remember.
struct SessionShape {
    int layers = 0;
    int heads = 0;
    int head_dim = 0;
    int vocab_size = 0;
    std::vector<std::size_t> memories;  // floats of each convolution's past frames and of each recurrent carry

    bool operator==(const SessionShape&) const = default;
};

// Keys and values lie in panels, so that attention is two matrix products: a head's keys as a matrix whose outputs are
// positions, [positions / 16][head_dim][16], its values as one whose outputs are features, [head_dim / 16][capacity][16].
class Session {
public:
    // Claims a session for as long as it lives. Throws std::invalid_argument when another thread has it.
    class Use {
    public:
        explicit Use(Session& session) : session_(&session) {
            if (session.in_use_.exchange(true)) {
                throw std::invalid_argument("the session is in use; give each text and each thread one of its own");
            }
        }
        Use(Use&& other) noexcept : session_(std::exchange(other.session_, nullptr)) {}
        ~Use() {
            if (session_ != nullptr) {
                session_->in_use_.store(false);
            }
        }

    private:
        Session* session_;
    };

    Session(const SessionShape& shape, int capacity, bool poison);

    Session(const Session& other);  // a fork: a copy that goes its own way
    Session& operator=(const Session&) = delete;

    const SessionShape& shape() const { return shape_; }
    int length() const { return length_; }  // tokens read
    int capacity() const { return capacity_; }
    void advance(int tokens) { length_ += tokens; }

    float* keys(int layer, int head) const { return keys_.data() + head_offset(layer, head, key_size()); }
    float* values(int layer, int head) const { return values_.data() + head_offset(layer, head, value_size()); }
    float* memory(int slot) { return memories_[static_cast<std::size_t>(slot)].data(); }

    // Writes a token's key and value of one head.
    void append(int layer, int head, int position, const float* key, const float* value);

    float* logits() { return logits_.data(); }  // of the next token, [vocab_size]

    // All that it remembers, as plain rows: for each layer keys and values [length][heads * head_dim], then the
    // memories, then the logits.
    std::vector<float> save() const;

    // Takes what `save` gave, of as many tokens. Throws std::invalid_argument when it does not fit.
    void restore(const float* saved, std::size_t size, int length);

private:
    std::size_t key_size() const { return static_cast<std::size_t>(rounded_) * static_cast<std::size_t>(shape_.head_dim); }
    std::size_t value_size() const {
        return static_cast<std::size_t>(rounded_) * static_cast<std::size_t>(panels(shape_.head_dim) * kPanel);
    }
    std::size_t head_offset(int layer, int head, std::size_t size) const {
        return static_cast<std::size_t>(layer * shape_.heads + head) * size;
    }
    std::size_t saved_size(int length) const;

    SessionShape shape_;
    int capacity_;
    int rounded_;  // capacity in whole panels
    int length_ = 0;
    std::atomic<bool> in_use_{false};
    Buffer keys_;
    Buffer values_;
    std::vector<Buffer> memories_;
    Buffer logits_;
};

}  // namespace terse
