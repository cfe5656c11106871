// Instruction sets that kernels are compiled for, and the one that this process uses.
#pragma once

#include <string_view>
#include <vector>

namespace terse {

enum class Isa {
    scalar,
    avx2,    // with FMA
    avx512,  // F, BW, DQ, VL and VNNI
    neon,
};

std::string_view name(Isa isa);

// What both this build and this CPU have, the slowest first.
std::vector<Isa> supported_isas();

// The fastest supported one, or the one that TERSE_ISA names; decided at the first call.
// Throws std::invalid_argument when TERSE_ISA names one that is unknown or not supported.
Isa active_isa();

}  // namespace terse
