// Threads that run one function together and meet at barriers.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace terse {

class Team;

// A part of a loop: [begin, end).
struct Range {
    int begin;
    int end;
};

// One thread of a team, inside `Team::run`.
class Worker {
public:
    Worker(Team& team, int index) : team_(team), index_(index) {}

    int index() const { return index_; }
    int count() const;

    // This worker's share of `items`; the shares differ by one at most.
    Range share(int items) const;

    // Returns when all workers have called it; what they wrote before is visible after it.
    void barrier();

private:
    Team& team_;
    int index_;
};

// `threads` workers, of which the caller of `run` is the first. The others spin for a moment between two runs and
// then sleep. Runs of several callers follow one another.
class Team {
public:
    // Throws std::invalid_argument for a number out of range, std::runtime_error when the system has no such number.
    explicit Team(int threads);
    ~Team();
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Calls `work` once on every worker and returns when all have finished; what it throws ends the process. Throws
    // std::runtime_error in a forked process, which has none of the team's threads.
    void run(const std::function<void(Worker&)>& work);

private:
    friend class Worker;

    void serve(int index);
    void meet();
    void stop();

    bool forked() const;

    int size_;
    long process_;  // that the threads live in
    std::mutex callers_;
    const std::function<void(Worker&)>* work_ = nullptr;
    alignas(64) std::atomic<unsigned> round_{0};    // grows by one when a run starts
    alignas(64) std::atomic<int> waiting_{0};       // workers at the barrier
    alignas(64) std::atomic<unsigned> meetings_{0};  // grows by one when a barrier opens
    std::atomic<bool> stopping_{false};
    std::vector<std::thread> threads_;
};

}  // namespace terse
