// Compiled with -mavx512f and friends.
#include "kernels-impl.h"

const kvcast::kernels kvcast::kernels_avx512 = {"avx512", attend, score, estimate, topk};
