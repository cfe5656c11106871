// Floats on cache lines of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>

namespace terse {

inline std::size_t index(int i) { return static_cast<std::size_t>(i); }

// Fresh memory is zero, and costs nothing before it is touched. With `poison` it is NaN instead, for a test that wants
// to see reads of what was never written.
class Buffer {
public:
    Buffer() = default;

    explicit Buffer(std::size_t size, bool poison = false) : size_(size), memory_(std::calloc(size * 4 + 64, 1)) {
        if (memory_ == nullptr) {
            throw std::bad_alloc();
        }
        const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(memory_.get());
        data_ = reinterpret_cast<float*>((address + 63) & ~std::uintptr_t{63});
        for (std::size_t i = 0; poison && i < size; ++i) {
            data_[i] = std::numeric_limits<float>::quiet_NaN();
        }
    }

    float* data() const { return data_; }
    std::size_t size() const { return size_; }

private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };

    std::size_t size_ = 0;
    std::unique_ptr<void, Free> memory_;
    float* data_ = nullptr;
};

}  // namespace terse
