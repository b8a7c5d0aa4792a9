// The host path's graph nodes: attention over listed and chosen blocks (sparse mode), block scores beside flash attention (history mode).
#include "context.h"
#include "kvcast-graph.h"
#include "pool.h"
#include "prefill_stream.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

using kvcast::task;
using kvcast::thread_scratch;

namespace {

void keep_trace(const kvcast_context & kv, const ggml_tensor * q, int layer) {
    const auto & info = kv.info;
    float * dst = const_cast<float *>(kv.trace_q.data()) + (size_t) layer * info.max_taps * info.n_head * info.head_dim_k;
    for (int64_t t = 0; t < q->ne[2]; ++t) {
        for (int h = 0; h < info.n_head; ++h, dst += info.head_dim_k) {
            memcpy(dst, (const char *) q->data + t * q->nb[2] + h * q->nb[1], sizeof(float) * info.head_dim_k);
        }
    }
}

// ---- sparse

// to [block of the list] += factor * share of a cell: of a part of a row's cells, to whose blocks the list has come down to
void add_cells(const kvcast_context & kv, size_t row, const kvcast_layer::part & part, const float * shares, float factor, float * to) {
    const int32_t * list = &kv.blocks[row * kv.info.n_blocks];
    const int32_t * cells = &kv.summary->cells[row][(size_t) part.begin * KVCAST_BLOCK];
    const int32_t * block = list + kv.n_listed[row];
    block = std::lower_bound(block, block + kv.summary->n_chosen[row], cells[0] / KVCAST_BLOCK);
    for (int i = 0; i < (part.end - part.begin) * KVCAST_BLOCK; ++i) {
        block += *block != cells[i] / KVCAST_BLOCK; // each holds at least one
        to[block - list] += factor * shares[i];
    }
}

void merge_head(kvcast_layer & layer, ggml_tensor * dst, int head) {
    auto & kv = *layer.kv;
    const auto & info = kv.info;
    const int group = kv.group();
    const size_t row = (size_t) layer.id * info.n_head_kv + head;
    const int n = kv.n_listed[row] + (kv.summary ? kv.summary->n_chosen[row] : 0);
    const int dv = info.head_dim_v;

    size_t first = 0;
    while (layer.parts[first].head != head) {
        ++first;
    }
    const size_t last = first + layer.n_parts[head];

    float * scores = &kv.scores[row * info.n_blocks];
    memset(scores, 0, sizeof(float) * n);

    for (int g = 0; g < group; ++g) {
        const int iq = head * group + g;
        float m = -INFINITY;
        for (size_t p = first; p < last; ++p) {
            m = std::fmax(m, kv.part_max[p * group + g]);
        }
        float sum = 0;
        float * out = (float *) dst->data + (size_t) iq * dv;
        memset(out, 0, sizeof(float) * dv);
        for (size_t p = first; p < last; ++p) {
            const float w = expf(kv.part_max[p * group + g] - m);
            const float * part = &kv.part_out[(p * group + g) * dv];
            sum += w * kv.part_sum[p * group + g];
            for (int i = 0; i < dv; ++i) {
                out[i] += w * part[i];
            }
        }
        for (int i = 0; i < dv; ++i) {
            out[i] /= sum;
        }
        kv.lse[(size_t) layer.id * info.max_taps * info.n_head + iq] = m + logf(sum);

        float * per_head = kv.trace_scores.empty()
                ? nullptr
                : &kv.trace_scores[((size_t) layer.id * info.max_taps * info.n_head + iq) * info.n_blocks];
        if (per_head) {
            memset(per_head, 0, sizeof(float) * n);
        }
        for (size_t p = first; p < last; ++p) {
            const auto & part = layer.parts[p];
            const float w = expf(kv.part_max[p * group + g] - m) / sum;
            const int size = part.end - part.begin;
            if (part.cells) {
                float * sum_of_group = kv.cell_scores(head) + (size_t) part.begin * group * KVCAST_BLOCK;
                float * s = sum_of_group + (size_t) g * size * KVCAST_BLOCK;
                for (int i = 0; i < size * KVCAST_BLOCK; ++i) {
                    s[i] *= w;
                }
                if (per_head) {
                    add_cells(kv, row, part, s, 1.0f, per_head);
                }
                for (int i = 0; g > 0 && i < size * KVCAST_BLOCK; ++i) {
                    sum_of_group[i] += s[i];
                }
                continue;
            }
            const float * s = &kv.part_block_sum[((size_t) head * info.n_blocks + part.begin) * group + (size_t) g * size];
            for (int i = 0; i < size; ++i) {
                scores[part.begin + i] += w * s[i] / group;
                if (per_head) {
                    per_head[part.begin + i] = w * s[i];
                }
            }
        }
    }
    for (size_t p = first; p < last; ++p) {
        const auto & part = layer.parts[p];
        if (part.cells) {
            add_cells(kv, row, part, kv.cell_scores(head) + (size_t) part.begin * group * KVCAST_BLOCK, 1.0f / group, scores);
        }
    }
}

void op_attend(ggml_tensor * dst, int /*ith*/, int nth, void * userdata) {
    auto & layer = *static_cast<kvcast_layer *>(userdata);
    auto & kv = *layer.kv;
    const auto & info = kv.info;
    const int group = kv.group();
    const ggml_tensor * q = dst->src[0];

    if (kv.abort) {
        return; // the step's result is thrown away
    }
    if (kv.summary) {
        kvcast::select_blocks(layer, kvcast::queries(q), dst->src[1], nth);
    }
    while (true) {
        const int p = layer.next.fetch_add(1, std::memory_order_relaxed);
        if (p >= (int) layer.parts.size()) {
            return;
        }
        if (p == 0) {
            layer.begin_us = ggml_time_us();
        }
        const auto & part = layer.parts[p];
        const int size = part.end - part.begin;
        while (kv.summary && !layer.chosen[part.head].load(std::memory_order_acquire)) {
            std::this_thread::yield(); // another thread is at it
        }
        const size_t n_work = (size_t) group * size * KVCAST_BLOCK + KVCAST_BLOCK * std::max(info.head_dim_k, info.head_dim_v);
        float * work = thread_scratch(n_work + group * info.head_dim_k);
        float * queries = work + n_work;
        kvcast::pack_queries(kvcast::queries(q), part.head, group, 0, 1, layer.scale, queries);
        int32_t q_pos[kvcast::MAX_GROUP];
        std::fill_n(q_pos, group, kv.q_pos[0]);

        task t = kv.task_of(kvcast::head_rows(dst->src[1], part.head), queries, q_pos, group, work);
        t.v = kvcast::head_rows(dst->src[2], part.head);
        const size_t row = (size_t) layer.id * info.n_head_kv + part.head;
        t.blocks = &kv.blocks[row * info.n_blocks + part.begin];
        t.cells = part.cells ? &kv.summary->cells[row][(size_t) part.begin * KVCAST_BLOCK] : nullptr;
        t.n_blocks = size;
        t.max = &kv.part_max[(size_t) p * group];
        t.sum = &kv.part_sum[(size_t) p * group];
        t.out = &kv.part_out[(size_t) p * group * info.head_dim_v];
        t.block_sum = part.cells ? kv.cell_scores(part.head) + (size_t) part.begin * group * KVCAST_BLOCK
                                 : &kv.part_block_sum[((size_t) part.head * info.n_blocks + part.begin) * group];
        kv.kernels->attend(t);

        if (layer.parts_done[part.head].fetch_add(1, std::memory_order_acq_rel) + 1 == layer.n_parts[part.head]) {
            merge_head(layer, dst, part.head);
            kvcast::complete_share(layer, info.n_head_kv, q, 1);
        }
    }
}

// ---- history

void op_score(ggml_tensor * dst, int /*ith*/, int /*nth*/, void * userdata) {
    auto & layer = *static_cast<kvcast_layer *>(userdata);
    auto & kv = *layer.kv;
    const auto & info = kv.info;
    const int group = kv.group();
    const int n = kv.n_used_blocks;
    const ggml_tensor * q = dst->src[0];

    if (kv.abort) {
        return;
    }
    while (true) {
        const int p = layer.next.fetch_add(1, std::memory_order_relaxed);
        if (p >= (int) layer.parts.size()) {
            return;
        }
        const auto & part = layer.parts[p];
        const int n_q = (part.end - part.begin) * group;
        const size_t n_work = (size_t) KVCAST_BLOCK * (info.head_dim_k + n_q);
        float * work = thread_scratch(n_work + n_q * ((size_t) info.head_dim_k + 2 * n));
        float * queries = work + n_work;
        float * block_sum = queries + (size_t) n_q * info.head_dim_k;
        float * block_max = block_sum + (size_t) n_q * n;
        kvcast::pack_queries(kvcast::queries(q), part.head, group, part.begin, part.end, layer.scale, queries);
        std::vector<int32_t> q_pos(n_q);
        for (int i = 0; i < n_q; ++i) {
            q_pos[i] = kv.q_pos[part.begin + i / group];
        }

        task t = kv.task_of(kvcast::head_rows(dst->src[1], part.head), queries, q_pos.data(), n_q, work);
        t.blocks = kv.all_blocks.data();
        t.n_blocks = n;
        t.block_sum = block_sum;
        t.block_max = block_max;
        kv.kernels->score(t);

        for (int it = part.begin; it < part.end; ++it) {
            const size_t tap = (size_t) layer.id * info.max_taps + it;
            float * scores = &kv.history_scores[(tap * info.n_head_kv + part.head) * info.n_blocks];
            memset(scores, 0, sizeof(float) * info.n_blocks);
            for (int g = 0; g < group; ++g) {
                const size_t row = (size_t) (it - part.begin) * group + g;
                const float * s = block_sum + row * n;
                const float * x = block_max + row * n;
                float * per_head = kv.trace_scores.empty() ? nullptr
                                                           : &kv.trace_scores[(tap * info.n_head + part.head * group + g) * info.n_blocks];
                kv.lse[tap * info.n_head + part.head * group + g] = kvcast::add_shares(s, x, n, 1.0f / group, scores, per_head);
            }
        }
        if (layer.parts_done[part.head].fetch_add(1, std::memory_order_acq_rel) + 1 == layer.n_parts[part.head]) {
            kvcast::complete_share(layer, info.n_head_kv, q, (int) q->ne[2]);
        }
    }
}

// Scores that a GPU made: sums over the query heads of a group, [n_blocks of the batch * n_tokens, n_head_kv].
void op_collect(ggml_tensor * dst, int ith, int nth, void * userdata) {
    auto & layer = *static_cast<kvcast_layer *>(userdata);
    auto & kv = *layer.kv;
    const auto & info = kv.info;
    const ggml_tensor * sums = dst->src[0];
    const ggml_tensor * q = dst->src[1];
    const int64_t n_taps = q->ne[2];
    const int64_t n = sums->ne[0] / n_taps;
    const float weight = kv.sum_factor / kv.group();
    for (int64_t row = ith; row < n_taps * info.n_head_kv; row += nth) {
        const float * src = (const float *) sums->data + (row % info.n_head_kv) * sums->ne[0] + row / info.n_head_kv * n;
        float * dst_row = &kv.history_scores[((size_t) layer.id * info.max_taps * info.n_head_kv + row) * info.n_blocks];
        for (int64_t b = 0; b < n; ++b) {
            dst_row[b] = src[b] * weight;
        }
        std::fill(dst_row + n, dst_row + info.n_blocks, 0.0f);
    }
    kvcast::complete_share(layer, nth, q, (int) n_taps);
}

// The scores of a history batch on the GPU that runs the layer; the keys are brought there as for its attention.
ggml_tensor * score_on_gpu(
        kvcast_context & kv, ggml_context * ctx, ggml_tensor * q, ggml_tensor * k, ggml_tensor * mask, float scale, int il) {
    auto * sched = kv.ctx->get_sched();
    ggml_backend_t backend = nullptr;
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        auto * b = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(b) == kv.ctx->get_model().dev_layer(il)) {
            backend = b;
        }
    }
    const auto there = [&](ggml_tensor * t) {
        ggml_backend_sched_set_tensor_backend(sched, t, backend);
        return t;
    };
    const int64_t n = k->ne[2] / KVCAST_BLOCK * q->ne[2]; // sums of one query head
    q = there(ggml_cont(ctx, ggml_permute(ctx, q, 0, 2, 1, 3)));
    auto * logits = there(ggml_mul_mat(ctx, ggml_permute(ctx, k, 0, 2, 1, 3), q));
    ggml_prec_set_acc(logits, GGML_PREC_F32);
    auto * probs = there(ggml_soft_max_ext(ctx, logits, mask, scale, 0.0f));
    auto * sums = there(kvcast::block_sums(ctx, probs, ggml_backend_get_device(backend), kv.sum_factor));
    const auto of_group = [&](int g) {
        return ggml_view_2d(ctx, sums, n, kv.info.n_head_kv, kv.group() * n * sizeof(float), g * n * sizeof(float));
    };
    auto * sum = of_group(0);
    for (int g = 1; g < kv.group(); ++g) {
        sum = there(ggml_add(ctx, sum, of_group(g)));
    }
    return kv.group() > 1 ? sum : there(ggml_cont(ctx, sum));
}

} // namespace

void kvcast::complete_share(kvcast_layer & layer, int n, const ggml_tensor * q, int n_taps) {
    auto & kv = *layer.kv;
    const auto & info = kv.info;
    if (layer.n_done.fetch_add(1, std::memory_order_acq_rel) + 1 < n) {
        return;
    }
    if (!kv.trace_q.empty()) {
        keep_trace(kv, q, layer.id);
    }
    if (kv.summary && kv.mode != KVCAST_SPARSE) {
        kv.note_queries(layer.id, q);
    }
    const float * scores = kv.history_scores.data() + (size_t) layer.id * info.max_taps * info.n_head_kv * info.n_blocks;
    if (kv.mode == KVCAST_SPARSE) {
        if (kv.summary) {
            kv.estimate_shares(layer.id);
        }
        kv.stats.attention_us += ggml_time_us() - layer.begin_us;
        scores = kv.scores.data() + (size_t) layer.id * info.n_head_kv * info.n_blocks;
    }
    if (kv.callback && kv.callback(kv.callback_user, layer.il, kv.q_pos.back(), scores, n_taps, info.n_head_kv, info.n_blocks) != 0) {
        kv.fail("an attention callback failed");
    }
}

ggml_tensor * kvcast::block_sums(ggml_context * ctx, ggml_tensor * probs, ggml_backend_dev_t device, float & factor) {
    auto * means = ggml_pool_1d(ctx, probs, GGML_OP_POOL_AVG, KVCAST_BLOCK, KVCAST_BLOCK, 0);
    factor = KVCAST_BLOCK;
    // a CPU pools on one thread; a GPU spends a whole block of threads on each short row that it sums
    if (ggml_backend_dev_type(device) != GGML_BACKEND_DEVICE_TYPE_CPU && ggml_backend_dev_supports_op(device, means)) {
        return means;
    }
    factor = 1.0f;
    return ggml_sum_rows(ctx, ggml_reshape_2d(ctx, probs, KVCAST_BLOCK, ggml_nelements(probs) / KVCAST_BLOCK));
}

float * kvcast::thread_scratch(size_t n) {
    static thread_local std::vector<float> buffer;
    if (buffer.size() < n) {
        buffer.resize(n);
    }
    return buffer.data();
}

float kvcast::add_shares(const float * sum, const float * max, int n, float weight, float * shares, float * own) {
    const float m = *std::max_element(max, max + n);
    float total = 0;
    for (int b = 0; b < n; ++b) {
        total += sum[b] > 0.0f ? sum[b] * expf(max[b] - m) : 0.0f;
    }
    const float lse = m + logf(total);
    for (int b = 0; b < n; ++b) {
        const float share = sum[b] > 0.0f ? sum[b] * expf(max[b] - lse) : 0.0f;
        shares[b] += weight * share;
        if (own) {
            own[b] = share;
        }
    }
    return lse;
}

task kvcast_context::task_of(const kvcast::rows & k, const float * q, const int32_t * q_pos, int n_q, float * work) const {
    task t = {};
    t.k = k;
    t.cell_pos = cell_pos.data();
    t.block_max_pos = block_max_pos.data();
    t.q = q;
    t.q_pos = q_pos;
    t.n_q = n_q;
    t.work = work;
    return t;
}

ggml_tensor * kvcast_build_pooled(kvcast_context * kv, ggml_context * ctx, ggml_cgraph * gf, int mode, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * v, float kq_scale, int il) {
    auto * layer = kv && kv->pool && mode == KVCAST_SPARSE && q->ne[2] == 1 ? kv->layer_of(il) : nullptr;
    if (!layer) {
        return nullptr;
    }
    layer->scale = kq_scale;
    return kvcast::build_pool_attention(*kv, ctx, gf, q, k, v, kq_scale, layer->id);
}

ggml_tensor * kvcast_build_attn(kvcast_context * kv, ggml_context * ctx, ggml_cgraph * gf, int mode, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * v, ggml_tensor * mask, bool plain, float kq_scale, int il) {
    const int64_t n_tokens = q->ne[2];
    auto * layer = kv->layer_of(il);
    if (!layer || mode == KVCAST_STREAM || n_tokens > (mode == KVCAST_SPARSE ? 1 : kv->info.max_taps)) {
        return nullptr;
    }
    layer->scale = kq_scale;
    layer->plain = plain && q->ne[0] == kv->info.head_dim_k && q->ne[1] == kv->info.n_head && k->ne[1] == kv->info.n_head_kv;
    ggml_tensor * args[] = {q, k, v};
    if (mode == KVCAST_SPARSE) {
        return ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0] * q->ne[1], n_tokens, 1, 1, args, 3, op_attend, GGML_N_TASKS_MAX, layer);
    }
    if (mode == KVCAST_VERIFY) {
        return ggml_custom_4d(ctx, GGML_TYPE_F32, v->ne[0] * q->ne[1], n_tokens, 1, 1, args, 3, kvcast::op_verify, GGML_N_TASKS_MAX, layer);
    }
    const bool on_gpu = ggml_backend_dev_type(kv->ctx->get_model().dev_layer(il)) == GGML_BACKEND_DEVICE_TYPE_GPU;
    if (on_gpu && n_tokens >= kvcast::MIN_ON_GPU && kv->scores_on_gpu()) {
        ggml_tensor * made[] = {score_on_gpu(*kv, ctx, q, k, mask, kq_scale, il), q};
        ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, made, 2, op_collect, GGML_N_TASKS_MAX, layer));
        return nullptr;
    }
    ggml_build_forward_expand(gf, ggml_custom_4d(ctx, GGML_TYPE_F32, 1, 1, 1, 1, args, 2, op_score, GGML_N_TASKS_MAX, layer));
    return nullptr;
}
