// Included by one file per instruction set; everything but the table is local to that file.
#include "kernels.h"
#include "simd.h"
#include "topk.h"

#include <cmath>
#include <cstring>

namespace {

constexpr int R = W == 1 ? 1 : 4;  // rows at once
constexpr int Q = W == 16 ? 4 : 2; // queries that share the reading of a row: R*Q sums stay in registers

// dst[q*dst_stride + j] = queries[q] . rows[j], j < 16, q < NQ
template <int NQ, class Rows>
inline void dots(const float * queries, const Rows & rows, int n, float * dst, int dst_stride) {
    const int n_vec = n / W * W;
    vf quads[NQ][BLOCK / R];
    for (int j0 = 0; j0 < BLOCK; j0 += R) {
        vf sum[NQ][R] = {};
        for (int i = 0; i < n_vec; i += W) {
            vf row[R];
            for (int j = 0; j < R; ++j) {
                row[j] = rows(j0 + j, i);
            }
            for (int q = 0; q < NQ; ++q) {
                const vf x = load(queries + q * n + i);
                for (int j = 0; j < R; ++j) {
                    sum[q][j] += x * row[j];
                }
            }
        }
        for (int q = 0; q < NQ; ++q) {
            quads[q][j0 / R] = add_4(sum[q]);
        }
    }
    for (int q = 0; q < NQ; ++q) {
        float * d = dst + q * dst_stride;
        store_sums(quads[q], d);
        for (int i = n_vec; i < n; ++i) {
            for (int j = 0; j < BLOCK; ++j) {
                d[j] += queries[q * n + i] * rows.one(j, i);
            }
        }
    }
}

// out[q][i] += sum over 16 rows of p[q*p_stride + j]*rows[j][i], q < NQ
template <int NQ, class Rows>
inline void accumulate(const float * p, int p_stride, const Rows & rows, int n, float * out) {
    constexpr int C = 4; // vectors at once
    int i = 0;
    for (; i + C * W <= n; i += C * W) {
        vf acc[NQ][C];
        for (int q = 0; q < NQ; ++q) {
            for (int c = 0; c < C; ++c) {
                acc[q][c] = load(out + q * n + i + c * W);
            }
        }
        for (int j = 0; j < BLOCK; ++j) {
            for (int c = 0; c < C; ++c) {
                const vf row = rows(j, i + c * W);
                for (int q = 0; q < NQ; ++q) {
                    acc[q][c] += p[q * p_stride + j] * row;
                }
            }
        }
        for (int q = 0; q < NQ; ++q) {
            memcpy(out + q * n + i, acc[q], sizeof(acc[q]));
        }
    }
    for (; i < n; ++i) {
        for (int q = 0; q < NQ; ++q) {
            for (int j = 0; j < BLOCK; ++j) {
                out[q * n + i] += p[q * p_stride + j] * rows.one(j, i);
            }
        }
    }
}

// f(count, first) over the queries in runs of at most N, 4 or fewer, the count a compile-time constant
template <int N, class F>
inline void for_runs(int n_q, F && f) {
    constexpr int THREE = N < 3 ? 1 : 3, TWO = N < 2 ? 1 : 2; // what cannot be left over is not compiled either
    int iq = 0;
    for (; iq + N <= n_q; iq += N) {
        f(std::integral_constant<int, N>(), iq);
    }
    switch (n_q - iq) {
        case 3:
            f(std::integral_constant<int, THREE>(), iq);
            break;
        case 2:
            f(std::integral_constant<int, TWO>(), iq);
            break;
        case 1:
            f(std::integral_constant<int, 1>(), iq);
            break;
        default:
            break;
    }
}

// f(rows) for one block: in place when the store is f16, the machine converts and few queries read it; widened into `wide` otherwise
template <class F>
inline void with_block(const kvcast::rows & r, int32_t b, int n_q, float * wide, F && f) {
    if (HAS_F16_ROWS && !r.to_float && n_q < 4 * Q) {
#if defined(__AVX512F__) || defined(__F16C__)
        f(f16_rows{r.data + (size_t) b * BLOCK * r.row_bytes, r.row_bytes});
#endif
    } else {
        widen_rows(r, [b](int j) { return b * BLOCK + j; }, wide);
        f(f32_rows{wide, r.n});
    }
}

// the same for 16 cells anywhere; those of the next 16 (nullptr: there are none) are asked for beforehand
template <class F>
inline void with_cells(const kvcast::rows & r, const int32_t * cells, [[maybe_unused]] const int32_t * next, float * wide, F && f) {
    if (HAS_F16_ROWS && !r.to_float) {
#if defined(__AVX512F__) || defined(__F16C__)
        f16_cells rows;
        for (int j = 0; j < BLOCK; ++j) {
            rows.cell[j] = r.data + (size_t) cells[j] * r.row_bytes;
#if defined(__GNUC__)
            for (int i = 0; next && i < 2 * r.n; i += 64) {
                __builtin_prefetch(r.data + (size_t) next[j] * r.row_bytes + i);
            }
#endif
        }
        f(rows);
#endif
    } else {
        widen_rows(r, [cells](int j) { return cells[j]; }, wide);
        f(f32_rows{wide, r.n});
    }
}

// f(rows) for the ib-th of a task's blocks, or of its runs of 16 cells
template <class F>
inline void with_rows(const kvcast::rows & r, const kvcast::task & t, int ib, float * wide, F && f) {
    if (t.cells) {
        const int32_t * cells = t.cells + ib * BLOCK;
        with_cells(r, cells, ib + 1 < t.n_blocks ? cells + BLOCK : nullptr, wide, f);
    } else {
        with_block(r, t.blocks[ib], t.n_q, wide, f);
    }
}

inline void mask16(const kvcast::task & t, int32_t b, int iq, float * logits) {
    if (t.block_max_pos[b] > t.q_pos[iq]) {
        for (int j = 0; j < BLOCK; ++j) {
            if (t.cell_pos[b * BLOCK + j] > t.q_pos[iq]) {
                logits[j] = -INFINITY;
            }
        }
    }
}

inline void mask_cells(const kvcast::task & t, const int32_t * cells, int iq, float * logits) {
    for (int j = 0; j < BLOCK; ++j) {
        if (t.cell_pos[cells[j]] > t.q_pos[iq]) {
            logits[j] = -INFINITY;
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
#pragma omp simd reduction(+ : s)
    for (int j = 0; j < BLOCK; ++j) {
        x[j] = exp_neg(x[j] - m);
        s += x[j];
    }
    return s;
}

void attend(const kvcast::task & t) {
    const int stride = t.n_blocks * BLOCK;
    float * logits = t.work;                // [n_q][n_blocks*16]
    float * wide = t.work + t.n_q * stride; // one block of rows

    for (int ib = 0; ib < t.n_blocks; ++ib) {
        with_rows(t.k, t, ib, wide, [&](const auto & rows) {
            for_runs<Q>(t.n_q,
                    [&](auto count, int iq) { dots<count>(t.q + iq * t.k.n, rows, t.k.n, logits + iq * stride + ib * BLOCK, stride); });
        });
        for (int iq = 0; iq < t.n_q; ++iq) {
            float * l = logits + iq * stride + ib * BLOCK;
            if (t.cells) {
                mask_cells(t, t.cells + ib * BLOCK, iq, l);
            } else {
                mask16(t, t.blocks[ib], iq, l);
            }
        }
    }

    for (int iq = 0; iq < t.n_q; ++iq) {
        float * l = logits + iq * stride;
        float m = -INFINITY;
        for (int ib = 0; ib < t.n_blocks; ++ib) {
            const float mb = max16(l + ib * BLOCK);
            m = mb > m ? mb : m;
        }
        float sum = 0;
        for (int ib = 0; ib < t.n_blocks; ++ib) {
            const float s = m == -INFINITY ? 0.0f : exp16(l + ib * BLOCK, m);
            if (!t.cells) {
                t.block_sum[iq * t.n_blocks + ib] = s;
            }
            sum += s;
        }
        t.max[iq] = m;
        t.sum[iq] = sum;
        if (m == -INFINITY) {
            memset(l, 0, sizeof(float) * stride);
        }
        if (t.cells) {
            memcpy(t.block_sum + iq * stride, l, sizeof(float) * stride);
        }
    }

    memset(t.out, 0, sizeof(float) * t.n_q * t.v.n);
    for (int ib = 0; ib < t.n_blocks; ++ib) {
        with_rows(t.v, t, ib, wide, [&](const auto & rows) {
            for_runs<Q>(t.n_q, [&](auto count, int iq) {
                accumulate<count>(logits + iq * stride + ib * BLOCK, stride, rows, t.v.n, t.out + iq * t.v.n);
            });
        });
    }
}

void score(const kvcast::task & t) {
    float * wide = t.work;
    float * logits = t.work + BLOCK * t.k.n; // [n_q][16]

    for (int ib = 0; ib < t.n_blocks; ++ib) {
        with_block(t.k, t.blocks[ib], t.n_q, wide, [&](const auto & rows) {
            for_runs<Q>(t.n_q, [&](auto count, int iq) { dots<count>(t.q + iq * t.k.n, rows, t.k.n, logits + iq * BLOCK, BLOCK); });
        });
        for (int iq = 0; iq < t.n_q; ++iq) {
            float * l = logits + iq * BLOCK;
            mask16(t, t.blocks[ib], iq, l);
            const float m = max16(l);
            t.block_max[iq * t.n_blocks + ib] = m;
            t.block_sum[iq * t.n_blocks + ib] = m == -INFINITY ? 0.0f : exp16(l, m);
        }
    }
}

// sums[j] = over queries and the cells of block b0 + j: 2^logit, in lanes; NC: channels, 0 when not known at compile time
// GRAIN: of what else is wanted, sums of so many cells; 16: nothing
template <int NC, int GRAIN>
inline void estimate_blocks(const kvcast::estimate_task & t, int b0, const float * base, vf * sums) {
    constexpr int V = BLOCK / W; // vectors in a block
    const int n_channels = NC ? NC : t.n_channels;
    vf quad[4] = {}; // vectors that are not in pieces yet
    for (int j = 0; j < BLOCK; ++j) {
        vf of_cells[V] = {};
        for_runs<4>(t.n_q, [&](auto count, int iq) {
            vf x[count][V];
            for (int q = 0; q < count; ++q) {
                for (int v = 0; v < V; ++v) {
                    x[q][v] = vf{} + base[(iq + q) * BLOCK + j];
                }
            }
            for (int i = 0; i < n_channels; ++i) {
                for (int v = 0; v < V; ++v) {
                    const vf codes = widen_codes(t.channels[i] + (size_t) (b0 + j) * BLOCK + v * W);
                    for (int q = 0; q < count; ++q) {
                        x[q][v] += t.channel_q[(iq + q) * n_channels + i] * codes;
                    }
                }
            }
            for (int q = 0; q < count; ++q) {
                for (int v = 0; v < V; ++v) {
                    of_cells[v] += exp2_linear(x[q][v]);
                }
            }
        });
        for (int v = 0; v < V; ++v) {
            sums[j] += of_cells[v];
            const int at = j * V + v;
            if (GRAIN == 1) {
                memcpy(t.pieces + (size_t) b0 * BLOCK + at * W, &of_cells[v], sizeof(vf));
            } else if (GRAIN == 4) {
                quad[at % 4] = of_cells[v];
                if (at % 4 == 3) {
                    const vf pieces = sums_of_4(quad);
                    memcpy(t.pieces + (size_t) b0 * (BLOCK / 4) + at / 4 * W, &pieces, sizeof(pieces));
                }
            }
        }
    }
}

template <int GRAIN>
inline void estimate_blocks(const kvcast::estimate_task & t, int b0, const float * base, vf * sums) {
    switch (t.n_channels) {
        case 8:
            return estimate_blocks<8, GRAIN>(t, b0, base, sums);
        case 16:
            return estimate_blocks<16, GRAIN>(t, b0, base, sums);
        default:
            return estimate_blocks<0, GRAIN>(t, b0, base, sums);
    }
}

void estimate(const kvcast::estimate_task & t) {
    constexpr int V = BLOCK / W;           // vectors in a block
    float base[kvcast::MAX_GROUP * BLOCK]; // [n_q][16 blocks]: what the means say

    for (int b0 = t.begin; b0 < t.end; b0 += BLOCK) {
        const int8_t * means = t.means + (size_t) b0 * t.dim;
#if defined(__GNUC__)
        if (b0 + 2 * BLOCK < t.end) { // many short streams: the hardware does not foresee them
            for (int i = 0; i < t.dim * BLOCK; i += 64) {
                __builtin_prefetch(means + 2 * t.dim * BLOCK + i);
            }
            for (int i = 0; i < t.n_channels; ++i) {
                for (int j = 0; j < BLOCK * BLOCK; j += 64) {
                    __builtin_prefetch(t.channels[i] + (size_t) (b0 + 2 * BLOCK) * BLOCK + j);
                }
            }
        }
#endif
        for_runs<Q>(t.n_q, [&](auto count, int iq) {
            vf acc[count][V];
            for (int q = 0; q < count; ++q) {
                for (int v = 0; v < V; ++v) {
                    acc[q][v] = vf{} + t.offset[iq + q];
                }
            }
            for (int i = 0; i < t.dim; ++i) {
                for (int v = 0; v < V; ++v) {
                    const vf codes = widen_codes(means + i * BLOCK + v * W);
                    for (int q = 0; q < count; ++q) {
                        acc[q][v] += t.mean_q[(iq + q) * t.dim + i] * codes;
                    }
                }
            }
            for (int q = 0; q < count; ++q) {
                memcpy(base + (iq + q) * BLOCK, acc[q], sizeof(acc[q]));
            }
        });
        vf sums[BLOCK] = {};
        switch (t.grain) {
            case 1:
                estimate_blocks<1>(t, b0, base, sums);
                break;
            case 4:
                estimate_blocks<4>(t, b0, base, sums);
                break;
            default:
                estimate_blocks<BLOCK>(t, b0, base, sums);
                break;
        }
        vf quads[BLOCK / R];
        for (int j = 0; j < BLOCK / R; ++j) {
            quads[j] = add_4(sums + R * j);
        }
        float totals[BLOCK];
        store_sums(quads, totals);
        memcpy(t.out + b0, totals, sizeof(float) * (t.end - b0 < BLOCK ? t.end - b0 : BLOCK));
    }
}

} // namespace
