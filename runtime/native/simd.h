// Vectors of this instruction set, and rows of the store as floats. Included by kernels-impl.h: local to each file.
#include "kernels.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int BLOCK = 16;

inline void widen_f16(const uint16_t * x, float * y, int n) {
    int i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        _mm512_storeu_ps(y + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) (x + i))));
    }
#elif defined(__F16C__)
    for (; i + 8 <= n; i += 8) {
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (x + i))));
    }
#elif defined(__ARM_NEON)
    for (; i + 4 <= n; i += 4) {
        vst1q_f32(y + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x + i))));
    }
#endif
    for (; i < n; ++i) {
        // shift exponent and mantissa into place, rebias by a multiplication; inf and nan do not occur in a KV cache
        const uint32_t h = x[i];
        const uint32_t u = (h & 0x7fffu) << 13;
        float f;
        memcpy(&f, &u, 4);
        f *= 0x1p112f;
        y[i] = (h & 0x8000u) ? -f : f;
    }
}

// 16 rows as floats: dst [16][r.n]; cell(j) is the j-th one's
template <class F>
inline void widen_rows(const kvcast::rows & r, F cell, float * dst) {
    for (int j = 0; j < BLOCK; ++j) {
        const char * src = r.data + (size_t) cell(j) * r.row_bytes;
        if (r.to_float) {
            r.to_float(src, dst + j * r.n, r.n);
        } else {
            widen_f16((const uint16_t *) src, dst + j * r.n, r.n);
        }
    }
}

// exp of x <= 0, relative error below 2e-7; exact zero far below
inline float exp_neg(float x) {
    const float shifted = x * 1.44269504f + 12582912.0f; // rounds x/ln2 to an integer in the low mantissa bits
    const float n = shifted - 12582912.0f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits; // the shift drops what is above the low bits
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000;
    float scale;
    memcpy(&scale, &bits, 4);
    return x > -87.0f ? p * scale : 0.0f;
}

// a vector of W floats; W = 1 where the compiler has no vector types
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#elif defined(__GNUC__)
constexpr int W = 4;
#else
constexpr int W = 1;
#endif
#if defined(__GNUC__)
typedef float vf __attribute__((vector_size(4 * W), aligned(4), may_alias));
#else
typedef float vf;
#endif

inline const vf & load(const float * p) { return *(const vf *) p; }

// bit j: the bits of x[j], as an integer, are above t; j < W
inline uint32_t above(const float * x, int32_t t) {
#if defined(__AVX512F__)
    return _mm512_cmpgt_epi32_mask(_mm512_loadu_si512(x), _mm512_set1_epi32(t));
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_loadu_si256((const __m256i *) x), _mm256_set1_epi32(t))));
#else
    uint32_t mask = 0;
    for (int j = 0; j < W; ++j) {
        int32_t b;
        memcpy(&b, x + j, sizeof(b));
        mask |= (uint32_t) (b > t) << j;
    }
    return mask;
#endif
}

inline int lowest(uint32_t mask) {
#if defined(__GNUC__)
    return __builtin_ctz(mask);
#else
    return mask & 1 ? 0 : 1 + lowest(mask >> 1);
#endif
}

// W codes as floats
inline vf widen_codes(const int8_t * p) {
#if defined(__AVX512F__)
    return (vf) _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *) p)));
#elif defined(__AVX2__)
    return (vf) _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) p)));
#elif defined(__GNUC__)
    return vf{(float) p[0], (float) p[1], (float) p[2], (float) p[3]};
#else
    return (float) *p;
#endif
}

// 2^x within 3 %: right but for a factor at whole x, and linear between them, as a float's bits are; (nearly) zero far below and for nan,
// a large number far above
inline vf exp2_linear(vf x) {
    const vf low = vf{} - 126.0f, high = vf{} + 100.0f;
    x = x > low ? x : low;
    x = x < high ? x : high;
    const vf bits = x * 8388608.0f + 1064866805.0f; // 2^23*(x + 127 - .058)
#if defined(__GNUC__)
    typedef int32_t vi __attribute__((vector_size(4 * W)));
    return (vf) __builtin_convertvector(bits, vi);
#else
    const int32_t i = (int32_t) bits;
    float y;
    memcpy(&y, &i, sizeof(y));
    return y;
#endif
}

// Rows as the kernels read them: 16 rows of one block, vector i of row j.
struct f32_rows { // widened by to_float, or by widen_f16 where the machine has no conversion
    const float * data;
    int n;
    vf operator()(int j, int i) const { return load(data + j * n + i); }
    float one(int j, int i) const { return data[j * n + i]; }
};

#if defined(__AVX512F__) || defined(__F16C__)
constexpr bool HAS_F16_ROWS = true;
struct f16_rows { // straight from the store
    const char * data;
    size_t row_bytes;
    vf operator()(int j, int i) const {
        const uint16_t * x = (const uint16_t *) (data + j * row_bytes) + i;
#if defined(__AVX512F__)
        return (vf) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x));
#else
        return (vf) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x));
#endif
    }
    float one(int j, int i) const {
        float y;
        widen_f16((const uint16_t *) (data + j * row_bytes) + i, &y, 1);
        return y;
    }
};
struct f16_cells { // the same of 16 cells anywhere
    const char * cell[BLOCK];
    vf operator()(int j, int i) const { return f16_rows{cell[j], 0}(0, i); }
    float one(int j, int i) const { return f16_rows{cell[j], 0}.one(0, i); }
};
#else
constexpr bool HAS_F16_ROWS = false;
#endif

// the sums of the elements of 4 vectors, as 4 partial sums in each 128-bit lane (W = 4: complete; W = 1: nothing to do)
inline vf add_4(const vf * a) {
#if defined(__AVX512F__)
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps((__m512) a[0], (__m512) a[1]), _mm512_unpackhi_ps((__m512) a[0], (__m512) a[1]));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps((__m512) a[2], (__m512) a[3]), _mm512_unpackhi_ps((__m512) a[2], (__m512) a[3]));
    return (vf) _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))),
            _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y))));
#elif defined(__AVX__)
    const __m256 x = _mm256_add_ps(_mm256_unpacklo_ps((__m256) a[0], (__m256) a[1]), _mm256_unpackhi_ps((__m256) a[0], (__m256) a[1]));
    const __m256 y = _mm256_add_ps(_mm256_unpacklo_ps((__m256) a[2], (__m256) a[3]), _mm256_unpackhi_ps((__m256) a[2], (__m256) a[3]));
    return (vf) _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y))),
            _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y))));
#elif defined(__GNUC__)
    float parts[4][4], sums[4];
    memcpy(parts, a, sizeof(parts));
    for (int j = 0; j < 4; ++j) {
        sums[j] = (parts[j][0] + parts[j][1]) + (parts[j][2] + parts[j][3]);
    }
    return load(sums);
#else
    return a[0];
#endif
}

// the sums of each 4 of the 4*W numbers in 4 vectors, in their order
inline vf sums_of_4(const vf * a) {
#if defined(__AVX512F__)
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (vf) _mm512_permutexvar_ps(order, (__m512) add_4(a));
#elif defined(__AVX2__)
    return (vf) _mm256_permutevar8x32_ps((__m256) add_4(a), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
#else
    float x[4 * W], sums[W];
    memcpy(x, a, sizeof(x));
    for (int i = 0; i < W; ++i) {
        sums[i] = (x[4 * i] + x[4 * i + 1]) + (x[4 * i + 2] + x[4 * i + 3]);
    }
    vf y;
    memcpy(&y, sums, sizeof(y));
    return y;
#endif
}

// dst[4*g + j] from the lanes of quads[g]
inline void store_sums(const vf * quads, float * dst) {
#if defined(__AVX512F__)
    const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4((__m512) quads[0], (__m512) quads[1], 0x88),
            _mm512_shuffle_f32x4((__m512) quads[0], (__m512) quads[1], 0xdd));
    const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4((__m512) quads[2], (__m512) quads[3], 0x88),
            _mm512_shuffle_f32x4((__m512) quads[2], (__m512) quads[3], 0xdd));
    _mm512_storeu_ps(dst, _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd)));
#elif defined(__AVX__)
    for (int g = 0; g < 4; ++g) {
        _mm_storeu_ps(dst + 4 * g, _mm_add_ps(_mm256_castps256_ps128((__m256) quads[g]), _mm256_extractf128_ps((__m256) quads[g], 1)));
    }
#else
    memcpy(dst, quads, sizeof(float) * BLOCK);
#endif
}

} // namespace
