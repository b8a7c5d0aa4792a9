// Compiled with -mavx2 -mfma -mf16c.
#include "kernels-impl.h"

const kvcast::kernels kvcast::kernels_avx2 = {"avx2", attend, score, estimate, topk};
