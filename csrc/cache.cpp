#include "cache.h"

#include <algorithm>

namespace terse {
namespace {

std::size_t index(int i) { return static_cast<std::size_t>(i); }

}  // namespace

KeyValues::KeyValues(int heads, int head_dim, int capacity, bool poison)
    : heads_(heads),
      head_dim_(head_dim),
      rounded_(panels(capacity) * kPanel),
      keys_(index(heads) * key_size(), poison),
      values_(index(heads) * value_size(), poison) {}

void KeyValues::write(int head, int position, const float* key, const float* value) {
    float* const key_panel = keys(head) + index(position / kPanel) * index(head_dim_ * kPanel) + position % kPanel;
    float* const value_rows = values(head) + index(position) * kPanel;
    for (int i = 0; i < head_dim_; ++i) {
        key_panel[i * kPanel] = key[i];
        value_rows[index(i / kPanel) * index(rounded_) * kPanel + index(i % kPanel)] = value[i];
    }
}

void KeyValues::read_value(int head, int position, float* value) const {
    const float* const rows = values(head) + index(position) * kPanel;
    for (int i = 0; i < head_dim_; ++i) {
        value[i] = rows[index(i / kPanel) * index(rounded_) * kPanel + index(i % kPanel)];
    }
}

void KeyValues::copy(const KeyValues& other, int begin, int end) {
    if (begin >= end) {
        return;
    }
    const std::size_t first = index(begin / kPanel * kPanel) * index(head_dim_);  // whole panels of keys
    const std::size_t keys_copied = index(panels(end) * kPanel) * index(head_dim_) - first;
    for (int head = 0; head < heads_; ++head) {
        std::copy_n(other.keys(head) + first, keys_copied, keys(head) + first);
        for (int panel = 0; panel < panels(head_dim_); ++panel) {
            const float* const from = other.values(head) + index(panel) * index(other.rounded_) * kPanel;
            float* const to = values(head) + index(panel) * index(rounded_) * kPanel;
            std::copy(from + index(begin) * kPanel, from + index(end) * kPanel, to + index(begin) * kPanel);
        }
    }
}

void KeyValues::save(int length, std::vector<float>& saved) const {
    for (int position = 0; position < length; ++position) {
        for (int head = 0; head < heads_; ++head) {
            const float* const panel =
                keys(head) + index(position / kPanel) * index(head_dim_ * kPanel) + position % kPanel;
            for (int i = 0; i < head_dim_; ++i) {
                saved.push_back(panel[i * kPanel]);
            }
        }
        for (int head = 0; head < heads_; ++head) {
            saved.resize(saved.size() + index(head_dim_));
            read_value(head, position, saved.data() + saved.size() - head_dim_);
        }
    }
}

const float* KeyValues::restore(const float* saved, int length) {
    const int width = heads_ * head_dim_;
    for (int position = 0; position < length; ++position, saved += 2 * width) {
        for (int head = 0; head < heads_; ++head) {
            write(head, position, saved + head * head_dim_, saved + width + head * head_dim_);
        }
    }
    return saved;
}

}  // namespace terse
