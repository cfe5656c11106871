#include "floors.h"

#include <chrono>
#include <vector>

#include "kernels.h"

namespace terse {
namespace {

// Seconds that a team takes for some work; its result is kept so that the compiler cannot leave it out.
template <typename Work>
double seconds(Team& team, const Work& work) {
    std::vector<float> results(static_cast<std::size_t>(team.size()));
    const auto start = std::chrono::steady_clock::now();
    team.run([&](Worker& worker) { results[static_cast<std::size_t>(worker.index())] = work(worker); });
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    volatile float kept = 0;
    for (const float result : results) {
        kept = kept + result;
    }
    return taken.count();
}

}  // namespace

Floors::Floors(int threads) : team_(threads) {
    kernels();  // an instruction set that is not there is refused here, and not in the midst of the team's work
}

double Floors::read(const float* data, std::size_t count) {
    constexpr std::size_t block = 4096;
    const int blocks = static_cast<int>(count / block);
    return seconds(team_, [&](const Worker& worker) {
        const Range range = worker.share(blocks);
        const std::size_t length = static_cast<std::size_t>(range.end - range.begin) * block;
        return kernels().sum(data + static_cast<std::size_t>(range.begin) * block, length, nullptr);
    });
}

double Floors::read_records(const float* data, std::size_t record, const std::int32_t* order, int count) {
    return seconds(team_, [&](const Worker& worker) {
        const Range range = worker.share(count);
        float total = 0;
        for (int i = range.begin; i < range.end; ++i) {
            const int soon = i + 2;
            const float* const next = soon < range.end ? data + static_cast<std::size_t>(order[soon]) * record : nullptr;
            total += kernels().sum(data + static_cast<std::size_t>(order[i]) * record, record, next);
        }
        return total;
    });
}

Floors::Multiplied Floors::multiply(int rounds) {
    const double taken = seconds(team_, [&](const Worker&) { return kernels().multiply_adds(rounds); });
    return {taken, static_cast<double>(rounds) * kernels().multiply_adds_of_a_round * team_.size()};
}

}  // namespace terse
