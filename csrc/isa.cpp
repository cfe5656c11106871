#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace terse {
namespace {

Isa choose_isa() {
    const std::vector<Isa> supported = supported_isas();
    const char* const value = std::getenv("TERSE_ISA");
    const std::string_view wanted = value == nullptr ? "" : value;
    if (wanted.empty()) {
        return supported.back();
    }
    std::string allowed;
    for (const Isa isa : supported) {
        if (name(isa) == wanted) {
            return isa;
        }
        allowed.append(allowed.empty() ? "" : ", ").append(name(isa));
    }
    throw std::invalid_argument("TERSE_ISA=" + std::string(wanted) +
                                " is not an instruction set that this CPU and build have; unset it or use one of: " +
                                allowed);
}

}  // namespace

std::string_view name(Isa isa) {
    switch (isa) {
        case Isa::scalar: return "scalar";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::neon: return "neon";
    }
    return "unknown";
}

std::vector<Isa> supported_isas() {
    std::vector<Isa> isas{Isa::scalar};
#if defined(__x86_64__)
    // These builtins also ask whether the operating system saves the wide registers.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        isas.push_back(Isa::avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512vnni")) {
            isas.push_back(Isa::avx512);
        }
    }
#elif defined(__aarch64__)
    isas.push_back(Isa::neon);
#endif
    return isas;
}

Isa active_isa() {
    static const Isa isa = choose_isa();
    return isa;
}

}  // namespace terse
