// Included by one file per instruction set; everything but the table is local to that file.
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

// 16 rows of block b as floats: dst [16][r.n]
inline void widen_block(const kvcast::rows & r, int32_t b, float * dst) {
    const char * src = r.data + (size_t) b*BLOCK*r.row_bytes;
    for (int j = 0; j < BLOCK; ++j, src += r.row_bytes) {
        if (r.to_float) {
            r.to_float(src, dst + j*r.n, r.n);
        } else {
            widen_f16((const uint16_t *) src, dst + j*r.n, r.n);
        }
    }
}

// exp of x <= 0, relative error below 2e-7; exact zero far below
inline float exp_neg(float x) {
    const float shifted = x*1.44269504f + 12582912.0f; // rounds x/ln2 to an integer in the low mantissa bits
    const float n = shifted - 12582912.0f;
    const float r = (x - n*0.693359375f) + n*2.12194440e-4f;
    float p = 1.0f/720;
    p = p*r + 1.0f/120;
    p = p*r + 1.0f/24;
    p = p*r + 1.0f/6;
    p = p*r + 0.5f;
    p = p*r + 1.0f;
    p = p*r + 1.0f;
    uint32_t bits; // the shift drops what is above the low bits
    memcpy(&bits, &shifted, 4);
    bits = (bits << 23) + 0x3f800000;
    float scale;
    memcpy(&scale, &bits, 4);
    return x > -87.0f ? p*scale : 0.0f;
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
typedef float vf __attribute__((vector_size(4*W), aligned(4), may_alias));
#else
typedef float vf;
#endif

inline const vf & load(const float * p) { return *(const vf *) p; }

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

// 2^x, relative error below 2e-4; (nearly) zero far below, a large number far above
inline vf exp2_rough(vf x) {
#if defined(__AVX512F__)
    x = (vf) _mm512_min_ps((__m512) x, _mm512_set1_ps(100.0f));
    const __m512 n = _mm512_roundscale_ps((__m512) x, 0);
#elif defined(__GNUC__)
    typedef uint32_t vi __attribute__((vector_size(4*W)));
    const vf low = vf{} - 126.0f, high = vf{} + 100.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const vf shifted = x + 12582912.0f; // rounds to an integer in the low mantissa bits
    const vf n = shifted - 12582912.0f;
#else
    return std::exp2(std::fmin(x, 100.0f));
#endif
#if defined(__GNUC__)
    const vf r = x - (vf) n;
    vf p = r*0.05550411f + 0.2422638f;
    p = p*r + 0.6931472f;
    p = p*r + 1.0f;
#if defined(__AVX512F__)
    return (vf) _mm512_scalef_ps((__m512) p, n);
#else
    return p*(vf) (((vi) shifted << 23) + 0x3f800000);
#endif
#endif
}

// Rows as the kernels read them: 16 rows of one block, vector i of row j.
struct f32_rows { // widened by to_float, or by widen_f16 where the machine has no conversion
    const float * data;
    int           n;
    vf operator()(int j, int i) const { return load(data + j*n + i); }
    float one(int j, int i) const { return data[j*n + i]; }
};

#if defined(__AVX512F__) || defined(__F16C__)
constexpr bool HAS_F16_ROWS = true;
struct f16_rows { // straight from the store
    const char * data;
    size_t       row_bytes;
    vf operator()(int j, int i) const {
        const uint16_t * x = (const uint16_t *) (data + j*row_bytes) + i;
#if defined(__AVX512F__)
        return (vf) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) x));
#else
        return (vf) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) x));
#endif
    }
    float one(int j, int i) const {
        float y;
        widen_f16((const uint16_t *) (data + j*row_bytes) + i, &y, 1);
        return y;
    }
};
#else
constexpr bool HAS_F16_ROWS = false;
using f16_rows = f32_rows;
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

// dst[4*g + j] from the lanes of quads[g]
inline void store_sums(const vf * quads, float * dst) {
#if defined(__AVX512F__)
    const __m512 lo = _mm512_add_ps(_mm512_shuffle_f32x4((__m512) quads[0], (__m512) quads[1], 0x88), _mm512_shuffle_f32x4((__m512) quads[0], (__m512) quads[1], 0xdd));
    const __m512 hi = _mm512_add_ps(_mm512_shuffle_f32x4((__m512) quads[2], (__m512) quads[3], 0x88), _mm512_shuffle_f32x4((__m512) quads[2], (__m512) quads[3], 0xdd));
    _mm512_storeu_ps(dst, _mm512_add_ps(_mm512_shuffle_f32x4(lo, hi, 0x88), _mm512_shuffle_f32x4(lo, hi, 0xdd)));
#elif defined(__AVX__)
    for (int g = 0; g < 4; ++g) {
        _mm_storeu_ps(dst + 4*g, _mm_add_ps(_mm256_castps256_ps128((__m256) quads[g]), _mm256_extractf128_ps((__m256) quads[g], 1)));
    }
#else
    memcpy(dst, quads, sizeof(float)*BLOCK);
#endif
}

constexpr int R = W == 1 ? 1 : 4;            // rows at once
constexpr int Q = W == 16 ? 4 : 2;           // queries that share the reading of a row: R*Q sums stay in registers

// dst[q*dst_stride + j] = queries[q] . rows[j], j < 16, q < NQ
template <int NQ, class Rows>
inline void dots(const float * queries, const Rows & rows, int n, float * dst, int dst_stride) {
    const int n_vec = n/W*W;
    vf quads[NQ][BLOCK/R];
    for (int j0 = 0; j0 < BLOCK; j0 += R) {
        vf sum[NQ][R] = {};
        for (int i = 0; i < n_vec; i += W) {
            vf row[R];
            for (int j = 0; j < R; ++j) {
                row[j] = rows(j0 + j, i);
            }
            for (int q = 0; q < NQ; ++q) {
                const vf x = load(queries + q*n + i);
                for (int j = 0; j < R; ++j) {
                    sum[q][j] += x*row[j];
                }
            }
        }
        for (int q = 0; q < NQ; ++q) {
            quads[q][j0/R] = add_4(sum[q]);
        }
    }
    for (int q = 0; q < NQ; ++q) {
        float * d = dst + q*dst_stride;
        store_sums(quads[q], d);
        for (int i = n_vec; i < n; ++i) {
            for (int j = 0; j < BLOCK; ++j) {
                d[j] += queries[q*n + i]*rows.one(j, i);
            }
        }
    }
}

// out[q][i] += sum over 16 rows of p[q*p_stride + j]*rows[j][i], q < NQ
template <int NQ, class Rows>
inline void accumulate(const float * p, int p_stride, const Rows & rows, int n, float * out) {
    constexpr int C = 4; // vectors at once
    int i = 0;
    for (; i + C*W <= n; i += C*W) {
        vf acc[NQ][C];
        for (int q = 0; q < NQ; ++q) {
            for (int c = 0; c < C; ++c) {
                acc[q][c] = load(out + q*n + i + c*W);
            }
        }
        for (int j = 0; j < BLOCK; ++j) {
            for (int c = 0; c < C; ++c) {
                const vf row = rows(j, i + c*W);
                for (int q = 0; q < NQ; ++q) {
                    acc[q][c] += p[q*p_stride + j]*row;
                }
            }
        }
        for (int q = 0; q < NQ; ++q) {
            memcpy(out + q*n + i, acc[q], sizeof(acc[q]));
        }
    }
    for (; i < n; ++i) {
        for (int q = 0; q < NQ; ++q) {
            for (int j = 0; j < BLOCK; ++j) {
                out[q*n + i] += p[q*p_stride + j]*rows.one(j, i);
            }
        }
    }
}

// f(count, first) over the queries in runs of at most Q, the count a compile-time constant
template <class F>
inline void for_query_runs(int n_q, F && f) {
    int iq = 0;
    for (; iq + Q <= n_q; iq += Q) {
        f(std::integral_constant<int, Q>(), iq);
    }
    switch (n_q - iq) {
        case 3: f(std::integral_constant<int, Q < 3 ? 1 : 3>(), iq); break;
        case 2: f(std::integral_constant<int, Q < 2 ? 1 : 2>(), iq); break;
        case 1: f(std::integral_constant<int, 1>(), iq); break;
        default: break;
    }
}

// f(rows) for one block: in place when the store is f16 and the machine converts, widened into `wide` otherwise
template <class F>
inline void with_block(const kvcast::rows & r, int32_t b, float * wide, F && f) {
    if (HAS_F16_ROWS && !r.to_float) {
#if defined(__AVX512F__) || defined(__F16C__)
        f(f16_rows{r.data + (size_t) b*BLOCK*r.row_bytes, r.row_bytes});
#endif
    } else {
        widen_block(r, b, wide);
        f(f32_rows{wide, r.n});
    }
}

inline void mask16(const kvcast::task & t, int32_t b, int iq, float * logits) {
    if (t.block_max_pos[b] > t.q_pos[iq]) {
        for (int j = 0; j < BLOCK; ++j) {
            if (t.cell_pos[b*BLOCK + j] > t.q_pos[iq]) {
                logits[j] = -INFINITY;
            }
        }
    }
}

inline float max16(const float * x) {
    float m = x[0];
    for (int j = 1; j < BLOCK; ++j) {
        m = x[j] > m ? x[j] : m;
    }
    return m;
}

// x[j] = exp(x[j] - m); returns their sum
inline float exp16(float * x, float m) {
    float s = 0;
#pragma omp simd reduction(+:s)
    for (int j = 0; j < BLOCK; ++j) {
        x[j] = exp_neg(x[j] - m);
        s += x[j];
    }
    return s;
}

void attend(const kvcast::task & t) {
    const int stride = t.n_blocks*BLOCK;
    float * logits = t.work;                   // [n_q][n_blocks*16]
    float * wide   = t.work + t.n_q*stride;    // one block of rows

    for (int ib = 0; ib < t.n_blocks; ++ib) {
        with_block(t.k, t.blocks[ib], wide, [&](const auto & rows) {
            for_query_runs(t.n_q, [&](auto count, int iq) {
                dots<count>(t.q + iq*t.k.n, rows, t.k.n, logits + iq*stride + ib*BLOCK, stride);
            });
        });
        for (int iq = 0; iq < t.n_q; ++iq) {
            mask16(t, t.blocks[ib], iq, logits + iq*stride + ib*BLOCK);
        }
    }

    for (int iq = 0; iq < t.n_q; ++iq) {
        float * l = logits + iq*stride;
        float m = -INFINITY;
        for (int ib = 0; ib < t.n_blocks; ++ib) {
            const float mb = max16(l + ib*BLOCK);
            m = mb > m ? mb : m;
        }
        float sum = 0;
        for (int ib = 0; ib < t.n_blocks; ++ib) {
            const float s = m == -INFINITY ? 0.0f : exp16(l + ib*BLOCK, m);
            t.block_sum[iq*t.n_blocks + ib] = s;
            sum += s;
        }
        t.max[iq] = m;
        t.sum[iq] = sum;
        if (m == -INFINITY) {
            memset(l, 0, sizeof(float)*stride);
        }
    }

    memset(t.out, 0, sizeof(float)*t.n_q*t.v.n);
    for (int ib = 0; ib < t.n_blocks; ++ib) {
        with_block(t.v, t.blocks[ib], wide, [&](const auto & rows) {
            for_query_runs(t.n_q, [&](auto count, int iq) {
                accumulate<count>(logits + iq*stride + ib*BLOCK, stride, rows, t.v.n, t.out + iq*t.v.n);
            });
        });
    }
}

void score(const kvcast::task & t) {
    float * wide   = t.work;
    float * logits = t.work + BLOCK*t.k.n; // [n_q][16]

    for (int ib = 0; ib < t.n_blocks; ++ib) {
        with_block(t.k, t.blocks[ib], wide, [&](const auto & rows) {
            for_query_runs(t.n_q, [&](auto count, int iq) {
                dots<count>(t.q + iq*t.k.n, rows, t.k.n, logits + iq*BLOCK, BLOCK);
            });
        });
        for (int iq = 0; iq < t.n_q; ++iq) {
            float * l = logits + iq*BLOCK;
            mask16(t, t.blocks[ib], iq, l);
            const float m = max16(l);
            t.block_max[iq*t.n_blocks + ib] = m;
            t.block_sum[iq*t.n_blocks + ib] = m == -INFINITY ? 0.0f : exp16(l, m);
        }
    }
}

// sums[j] += over queries and the cells of block b0 + j: 2^logit, in lanes; NC: channels, 0 when not known at compile time
template <int NC>
inline void estimate_blocks(const kvcast::estimate_task & t, int b0, const float * base, vf * sums) {
    const int n_channels = NC ? NC : t.n_channels;
    for (int j = 0; j < BLOCK; ++j) {
        for (int v = 0; v < BLOCK/W; ++v) {
            vf codes[NC ? NC : kvcast::MAX_CHANNELS];
            for (int i = 0; i < n_channels; ++i) {
                codes[i] = widen_codes(t.channels[i] + (size_t) (b0 + j)*BLOCK + v*W);
            }
            for (int q = 0; q < t.n_q; ++q) {
                vf x[2] = {}; // two chains
                x[0] += base[q*BLOCK + j];
                for (int i = 0; i < n_channels; ++i) {
                    x[i%2] += t.channel_q[q*n_channels + i]*codes[i];
                }
                sums[j] += exp2_rough(x[0] + x[1]);
            }
        }
    }
}

void estimate(const kvcast::estimate_task & t) {
    constexpr int V = BLOCK/W; // vectors in a block
    float base[kvcast::MAX_GROUP*BLOCK]; // [n_q][16 blocks]: what the means say

    for (int b0 = t.begin; b0 < t.end; b0 += BLOCK) {
        const int8_t * means = t.means + (size_t) b0*t.dim;
#if defined(__GNUC__)
        if (b0 + 2*BLOCK < t.end) { // many short streams: the hardware does not foresee them
            for (int i = 0; i < t.dim*BLOCK; i += 64) {
                __builtin_prefetch(means + 2*t.dim*BLOCK + i);
            }
            for (int i = 0; i < t.n_channels; ++i) {
                for (int j = 0; j < BLOCK*BLOCK; j += 64) {
                    __builtin_prefetch(t.channels[i] + (size_t) (b0 + 2*BLOCK)*BLOCK + j);
                }
            }
        }
#endif
        for_query_runs(t.n_q, [&](auto count, int iq) {
            vf acc[count][V];
            for (int q = 0; q < count; ++q) {
                for (int v = 0; v < V; ++v) {
                    acc[q][v] = vf{} + t.offset[iq + q];
                }
            }
            for (int i = 0; i < t.dim; ++i) {
                for (int v = 0; v < V; ++v) {
                    const vf codes = widen_codes(means + i*BLOCK + v*W);
                    for (int q = 0; q < count; ++q) {
                        acc[q][v] += t.mean_q[(iq + q)*t.dim + i]*codes;
                    }
                }
            }
            for (int q = 0; q < count; ++q) {
                memcpy(base + (iq + q)*BLOCK, acc[q], sizeof(acc[q]));
            }
        });
        vf sums[BLOCK] = {};
        switch (t.n_channels) {
            case  8: estimate_blocks< 8>(t, b0, base, sums); break;
            case 16: estimate_blocks<16>(t, b0, base, sums); break;
            default: estimate_blocks< 0>(t, b0, base, sums); break;
        }
        vf quads[BLOCK/R];
        for (int j = 0; j < BLOCK/R; ++j) {
            quads[j] = add_4(sums + R*j);
        }
        float totals[BLOCK];
        store_sums(quads, totals);
        memcpy(t.out + b0, totals, sizeof(float)*(t.end - b0 < BLOCK ? t.end - b0 : BLOCK));
    }
}

} // namespace
