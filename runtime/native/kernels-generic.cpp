// Whatever the compiler targets by default: SSE2 on x86-64, NEON on arm64. Also chooses among the others.
#include "kernels-impl.h"

#include <cstdlib>

namespace kvcast {

const kernels kernels_generic = {"generic", attend, score, estimate, topk};

const kernels & best_kernels() {
    const char * forced = getenv("KVCAST_KERNELS");
    const auto may = [&](const kernels & k) { return !forced || strcmp(forced, k.name) == 0; };
#if defined(KVCAST_X86)
    __builtin_cpu_init();
    if (may(kernels_avx512) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma")) {
        return kernels_avx512;
    }
    if (may(kernels_avx2) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        return kernels_avx2;
    }
#else
    (void) may;
#endif
    return kernels_generic;
}

} // namespace kvcast
