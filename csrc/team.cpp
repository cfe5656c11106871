#include "team.h"

#include <unistd.h>

#include <stdexcept>
#include <string>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace terse {
namespace {

// About a millisecond of spinning, which bridges what Python does between two calls.
constexpr int kSpins = 20000;

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Waits, first spinning and then asleep, until `value` is no longer `old`.
void wait_while(const std::atomic<unsigned>& value, unsigned old) {
    for (int i = 0; i < kSpins; ++i) {
        if (value.load(std::memory_order_acquire) != old) {
            return;
        }
        relax();
    }
    value.wait(old, std::memory_order_acquire);
}

// An exception would leave the other workers at a barrier for ever: it ends the process.
void call(const std::function<void(Worker&)>& work, Worker& worker) noexcept { work(worker); }

}  // namespace

int Worker::count() const { return team_.size(); }

Range Worker::share(int items) const {
    const int size = items / count();
    const int longer = items % count();  // the first ones take one more
    const int begin = index_ * size + (index_ < longer ? index_ : longer);
    return {begin, begin + size + (index_ < longer ? 1 : 0)};
}

void Worker::barrier() { team_.meet(); }

Team::Team(int threads) : size_(threads), process_(::getpid()) {
    if (threads < 1 || threads > 1024) {
        throw std::invalid_argument("threads must lie in [1, 1024], not " + std::to_string(threads));
    }
    try {
        for (int index = 1; index < threads; ++index) {
            threads_.emplace_back([this, index] { serve(index); });
        }
    } catch (const std::exception& error) {
        stop();
        throw std::runtime_error(std::to_string(threads) + " threads cannot be started (" + error.what() +
                                 "); use fewer");
    }
}

bool Team::forked() const { return size_ > 1 && process_ != ::getpid(); }

Team::~Team() {
    if (forked()) {  // there is nothing to join, and a thread that was not joined must not be destroyed
        new std::vector<std::thread>(std::move(threads_));
        return;
    }
    stop();
}

void Team::stop() {
    stopping_.store(true, std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    for (std::thread& thread : threads_) {
        thread.join();
    }
}

void Team::run(const std::function<void(Worker&)>& work) {
    if (forked()) {
        throw std::runtime_error("the engine's threads stayed in the process that was forked; make an engine after the fork");
    }
    const std::lock_guard lock(callers_);
    work_ = &work;
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
    Worker first(*this, 0);
    call(work, first);
    meet();
}

void Team::serve(int index) {
    Worker worker(*this, index);
    for (unsigned round = 0;; ++round) {
        wait_while(round_, round);
        if (stopping_.load(std::memory_order_relaxed)) {
            return;
        }
        call(*work_, worker);
        meet();
    }
}

void Team::meet() {
    if (size_ == 1) {
        return;
    }
    const unsigned meeting = meetings_.load(std::memory_order_relaxed);
    if (waiting_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        waiting_.store(0, std::memory_order_relaxed);
        meetings_.fetch_add(1, std::memory_order_release);
        meetings_.notify_all();
    } else {
        wait_while(meetings_, meeting);
    }
}

}  // namespace terse
