// What a meeting of threads costs, by our team and by OpenMP: entering a team, and a barrier within it.
//
//   g++ -std=c++20 -O2 -fopenmp -Icsrc benchmarks/team.cpp csrc/team.cpp -o build/team && build/team 2
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <omp.h>

#include "team.h"

namespace {

constexpr int kBarriers = 2000;
constexpr int kRounds = 51;

template <typename Work>
double microseconds(const Work& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
}

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

}  // namespace

int main(int count, char** arguments) {
    const int threads = count > 1 ? std::atoi(arguments[1]) : 2;
    terse::Team team(threads);
    std::vector<double> our_entry, their_entry, our_barrier, their_barrier;
    for (int round = 0; round < kRounds; ++round) {  // before OpenMP starts its threads, which spin for a while as well
        our_entry.push_back(microseconds([&] { team.run([](terse::Worker&) {}); }));
        our_barrier.push_back(microseconds([&] {
            team.run([](terse::Worker& worker) {
                for (int i = 0; i < kBarriers; ++i) {
                    worker.barrier();
                }
            });
        }));
    }
    omp_set_num_threads(threads);
    for (int round = 0; round < kRounds; ++round) {
        their_entry.push_back(microseconds([] {
#pragma omp parallel
            asm volatile("");
        }));
        their_barrier.push_back(microseconds([] {
#pragma omp parallel
            for (int i = 0; i < kBarriers; ++i) {
#pragma omp barrier
            }
        }));
    }
    std::printf("%d threads, microseconds     ours  OpenMP\n", threads);
    std::printf("entering                 %8.2f %7.2f\n", median(our_entry), median(their_entry));
    std::printf("a barrier                %8.3f %7.3f\n", median(our_barrier) / kBarriers, median(their_barrier) / kBarriers);
}
