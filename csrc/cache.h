// Keys and values that an attention looks at.
#pragma once

#include <cstddef>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace terse {

// Those of one layer. They lie in panels, so that attention is two matrix products: a head's keys as a matrix whose
// outputs are positions, [positions / 16][head_dim][16], its values as one whose outputs are features,
// [head_dim / 16][capacity][16].
class KeyValues {
public:
    KeyValues(int heads, int head_dim, int capacity, bool poison);

    int capacity() const { return rounded_; }  // in whole panels

    float* keys(int head) const { return keys_.data() + static_cast<std::size_t>(head) * key_size(); }
    float* values(int head) const { return values_.data() + static_cast<std::size_t>(head) * value_size(); }

    // Writes a token's key and value of one head.
    void write(int head, int position, const float* key, const float* value);

    void read_value(int head, int position, float* value) const;

    // Positions [begin, end) of another cache, which may have another capacity.
    void copy(const KeyValues& other, int begin, int end);

    // The first positions as plain rows, [length][keys of all heads, values of all heads]: appended to `saved`; taken
    // from there, up to where the next one's lie.
    void save(int length, std::vector<float>& saved) const;
    const float* restore(const float* saved, int length);

private:
    std::size_t key_size() const { return static_cast<std::size_t>(rounded_) * static_cast<std::size_t>(head_dim_); }
    std::size_t value_size() const {
        return static_cast<std::size_t>(rounded_) * static_cast<std::size_t>(panels(head_dim_) * kPanel);
    }

    int heads_, head_dim_;
    int rounded_;
    Buffer keys_;
    Buffer values_;
};

}  // namespace terse
