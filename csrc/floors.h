// How fast this machine can read and multiply: what no decoder can beat.
#pragma once

#include <cstddef>
#include <cstdint>

#include "team.h"

namespace terse {

class Floors {
public:
    explicit Floors(int threads);

    // Seconds in which the team reads `count` floats once, each worker its own part from beginning to end.
    double read(const float* data, std::size_t count);

    // Seconds in which the team reads records of `record` floats in a given order.
    double read_records(const float* data, std::size_t record, const std::int32_t* order, int count);

    // Seconds for `rounds` rounds of multiply-adds in registers, and how many there were.
    struct Multiplied {
        double seconds;
        double multiply_adds;
    };
    Multiplied multiply(int rounds);

private:
    Team team_;
};

}  // namespace terse
