#include "cache.h"

#include <algorithm>

namespace terse {

int Window::begin(int position) const {
    if (!limited()) {
        return 0;
    }
    const std::int64_t chunk = position / chunk_length;
    return static_cast<int>(std::max<std::int64_t>((chunk - chunks_before) * chunk_length, 0));
}

KeyValues::KeyValues(int heads, int head_dim, int capacity, bool poison)
    : heads_(heads),
      head_dim_(head_dim),
      rounded_(panels(capacity) * kPanel),
      first_(index(heads)),
      keys_(index(heads) * key_size(), poison),
      values_(index(heads) * value_size(), poison) {}

void KeyValues::make_room(int head, int begin, int end) {
    int& first = first_[index(head)];
    if (end - first <= rounded_) {
        return;
    }
    const int given_up = (begin - first) / kPanel * kPanel;
    float* const key_panels = keys(head, first);
    std::copy(key_panels + index(given_up) * width(), key_panels + key_size(), key_panels);
    for (int panel = 0; panel < panels(head_dim_); ++panel) {
        float* const rows = values(head, first) + index(panel) * index(rounded_) * kPanel;
        std::copy(rows + index(given_up) * kPanel, rows + index(rounded_) * kPanel, rows);
    }
    first += given_up;
}

void KeyValues::write(int head, int position, const float* key, const float* value) {
    float* const key_panel = keys(head, position / kPanel * kPanel) + position % kPanel;
    float* const value_rows = values(head, position);
    for (int i = 0; i < head_dim_; ++i) {
        key_panel[i * kPanel] = key[i];
        value_rows[index(i / kPanel) * index(rounded_) * kPanel + index(i % kPanel)] = value[i];
    }
}

void KeyValues::read_value(int head, int position, float* value) const {
    const float* const rows = values(head, position);
    for (int i = 0; i < head_dim_; ++i) {
        value[i] = rows[index(i / kPanel) * index(rounded_) * kPanel + index(i % kPanel)];
    }
}

void KeyValues::copy(const KeyValues& other, int begin, int end) {
    for (int head = 0; head < heads_; ++head) {
        const int first = other.first_[index(head)];
        const int from = first_[index(head)] == first ? std::max(begin, first) : first;
        first_[index(head)] = first;
        if (from >= end) {
            continue;
        }
        const int panel_begin = from / kPanel * kPanel;  // whole panels of keys
        const std::size_t keys_copied = index(panels(end) * kPanel - panel_begin) * width();
        std::copy_n(other.keys(head, panel_begin), keys_copied, keys(head, panel_begin));
        for (int panel = 0; panel < panels(head_dim_); ++panel) {
            const float* const rows = other.values(head, from) + index(panel) * index(other.rounded_) * kPanel;
            std::copy_n(rows, index(end - from) * kPanel,
                        values(head, from) + index(panel) * index(rounded_) * kPanel);
        }
    }
}

void KeyValues::save(int begin, int end, std::vector<float>& saved) const {
    for (int position = begin; position < end; ++position) {
        for (int head = 0; head < heads_; ++head) {
            const float* const panel = keys(head, position / kPanel * kPanel) + position % kPanel;
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

const float* KeyValues::restore(const float* saved, int begin, int end) {
    const int row = heads_ * head_dim_;
    for (int head = 0; head < heads_; ++head) {
        first_[index(head)] = end > rounded_ ? begin : 0;
    }
    for (int position = begin; position < end; ++position, saved += 2 * row) {
        for (int head = 0; head < heads_; ++head) {
            write(head, position, saved + head * head_dim_, saved + row + head * head_dim_);
        }
    }
    return saved;
}

}  // namespace terse
