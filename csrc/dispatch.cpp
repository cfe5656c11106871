// Chooses among the kernels that were compiled.
#include "kernels.h"

namespace terse {

extern const Kernels kernels_scalar;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#elif defined(__aarch64__)
extern const Kernels kernels_neon;
#endif

const Kernels& kernels_of(Isa isa) {
    switch (isa) {
#if defined(__x86_64__)
        case Isa::avx2: return kernels_avx2;
        case Isa::avx512: return kernels_avx512;
#elif defined(__aarch64__)
        case Isa::neon: return kernels_neon;
#endif
        default: return kernels_scalar;
    }
}

const Kernels& kernels() {
    static const Kernels& chosen = kernels_of(active_isa());
    return chosen;
}

}  // namespace terse
