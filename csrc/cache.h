// Keys and values that an attention looks at.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace terse {

// What a position sees of those before it: its own chunk and some before that; without a length of chunks, all.
struct Window {
    int chunk_length = 0;
    int chunks_before = 0;

    bool limited() const { return chunk_length > 0; }
    std::int64_t length() const { return (std::int64_t{chunks_before} + 1) * chunk_length; }
    int begin(int position) const;  // the first that it sees

    bool operator==(const Window&) const = default;
};

// Those of one layer. They lie in panels, so that attention is two matrix products: a head's keys as a matrix whose
// outputs are positions, [positions / 16][head_dim][16], its values as one whose outputs are features,
// [head_dim / 16][capacity][16]. With fewer places than positions, the latest positions are kept: for each head those from
// `first` on, a whole number of panels.
class KeyValues {
public:
    KeyValues(int heads, int head_dim, int capacity, bool poison);

    int capacity() const { return rounded_; }  // in whole panels

    // Of the panel that begins with a position.
    float* keys(int head, int position = 0) const {
        return keys_.data() + static_cast<std::size_t>(head) * key_size() + place(head, position) * width();
    }
    float* values(int head, int position = 0) const {
        return values_.data() + static_cast<std::size_t>(head) * value_size() + place(head, position) * kPanel;
    }

    // Makes room for positions up to `end`; where there is none, gives up those before `begin`, and no others.
    void make_room(int head, int begin, int end);

    // Writes a token's key and value of one head, for which there is room.
    void write(int head, int position, const float* key, const float* value);

    void read_value(int head, int position, float* value) const;

    // Positions [begin, end) of another cache, for which there is room; all that it keeps, where that begins elsewhere.
    void copy(const KeyValues& other, int begin, int end);

    // Positions [begin, end), from a panel's first on, as plain rows, [positions][keys of all heads, values of all heads]:
    // appended to `saved`; taken from there in place of what was kept, up to where the next one's lie.
    void save(int begin, int end, std::vector<float>& saved) const;
    const float* restore(const float* saved, int begin, int end);

private:
    std::size_t width() const { return static_cast<std::size_t>(head_dim_); }
    std::size_t place(int head, int position) const {
        return static_cast<std::size_t>(position - first_[static_cast<std::size_t>(head)]);
    }
    std::size_t key_size() const { return static_cast<std::size_t>(rounded_) * width(); }
    std::size_t value_size() const {
        return static_cast<std::size_t>(rounded_) * static_cast<std::size_t>(panels(head_dim_) * kPanel);
    }

    int heads_, head_dim_;
    int rounded_;
    std::vector<int> first_;  // of each head
    Buffer keys_;
    Buffer values_;
};

}  // namespace terse
