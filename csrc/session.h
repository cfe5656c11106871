// What one sequence remembers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "buffer.h"
#include "cache.h"

namespace terse {

// How the text that a session holds is related to a source.
enum class SourceUse {
    none,    // there is no source
    cross,   // cross-attention looks at it
    prefix,  // it stands before the text, in the same keys and values
};

// How much a model's sequences remember, and what there is to note about their tokens.
struct SessionShape {
    int layers = 0;  // of attention to the sequence itself
    int heads = 0;
    int head_dim = 0;
    int vocab_size = 0;
    int crosses = 0;  // layers of attention to a source
    Window window;    // of attention to the sequence itself: what lies before it is not kept
    SourceUse source = SourceUse::none;
    int choices = 0;  // of a token, in all sparse feed-forward layers
    std::vector<std::size_t> memories;  // floats of each convolution's past frames and of each recurrent carry

    bool operator==(const SessionShape&) const = default;
};

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

    // With room for `capacity` tokens, and for a source of `source_length` where the shape has one.
    Session(const SessionShape& shape, int capacity, bool poison, int source_length = 0);

    Session(const Session& other);  // a fork: a copy that goes its own way; both look at one source
    Session& operator=(const Session&) = delete;

    const SessionShape& shape() const { return shape_; }
    int length() const { return length_; }  // tokens read, less those of a source
    int capacity() const { return capacity_; }
    int longest_run() const;  // as many new tokens as may pass through the model together

    // Longest sequence that can be written, whose last token is not read. A source's text begins with a token that does
    // not count.
    int limit() const { return capacity_ + (shape_.source == SourceUse::none ? 0 : 1); }
    void advance(int tokens) { length_ += tokens; }

    int source_length() const { return source_length_; }
    bool waits_for_source() const { return shape_.source != SourceUse::none && !has_source_; }
    void end_source();  // all of the source has been read

    int prefix() const { return prefix_; }  // tokens of a source that stand before the first
    KeyValues& cache(int layer) { return caches_[static_cast<std::size_t>(layer)]; }
    KeyValues& source(int cross) { return (*source_)[static_cast<std::size_t>(cross)]; }
    float* memory(int slot) { return memories_[static_cast<std::size_t>(slot)].data(); }

    float* logits() { return logits_.data(); }  // of the next token, [vocab_size]

    // What another session of the same model and source remembers, but for the logits. The first `shared` tokens of
    // both are the same.
    void take(const Session& other, int shared);

    // All that it remembers but a source that cross-attention looks at: for each layer the keys and values of the panels
    // that the next token sees, as KeyValues saves them, then the memories, then the logits.
    std::vector<float> save() const;

    // Takes what `save` gave, of as many tokens. Throws std::invalid_argument when it does not fit.
    void restore(const float* saved, std::size_t size, int length);

private:
    int kept_from(int length) const { return shape_.window.begin(prefix_ + length) / kPanel * kPanel; }
    std::size_t saved_size(int length) const;

    SessionShape shape_;
    int capacity_;
    int source_length_;
    int prefix_ = 0;
    int length_ = 0;
    bool has_source_ = false;
    std::atomic<bool> in_use_{false};
    std::vector<KeyValues> caches_;
    std::shared_ptr<std::vector<KeyValues>> source_;  // of each cross-attention; written while the source is read
    std::vector<Buffer> memories_;
    Buffer logits_;
};

}  // namespace terse
