// Batches that check drafts: a token and its draft attend to the whole store, whose keys and values are read once for all of them.
#include "context.h"

#include <algorithm>
#include <cmath>
#include <cstring>

using kvcast::task;
using kvcast::thread_scratch;

namespace {

// Adds what a query got of some blocks to what it got of others: each relative to its own maximum.
void add_part(float max, float sum, const float * out, int dv, float & to_max, float & to_sum, float * to_out) {
    if (sum == 0.0f) {
        return; // all of it lies behind the query
    }
    const float m = std::fmax(max, to_max);
    const float w = expf(max - m), to_w = expf(to_max - m);
    for (int i = 0; i < dv; ++i) {
        to_out[i] = to_w * to_out[i] + w * out[i];
    }
    to_sum = to_w * to_sum + w * sum;
    to_max = m;
}

// The last thread at a head: its attention and scores, from those of its parts.
void finish_head(kvcast_layer & layer, ggml_tensor * dst, int head, int n_tokens) {
    auto & kv = *layer.kv;
    const auto & info = kv.info;
    const int group = kv.group(), n_q = n_tokens * group, n = kv.n_used_blocks, dv = info.head_dim_v;
    const size_t first = (size_t) head * layer.n_parts[head];
    for (int it = 0; it < n_tokens; ++it) {
        const size_t tap = (size_t) layer.id * info.max_taps + it;
        float * scores = &kv.history_scores[(tap * info.n_head_kv + head) * info.n_blocks];
        memset(scores, 0, sizeof(float) * info.n_blocks);
        for (int g = 0; g < group; ++g) {
            const int iq = it * group + g, h = head * group + g;
            float * out = (float *) dst->data + ((size_t) it * info.n_head + h) * dv;
            memset(out, 0, sizeof(float) * dv);
            float max = -INFINITY, sum = 0.0f;
            for (size_t p = first; p < first + layer.n_parts[head]; ++p) {
                add_part(kv.part_max[p * n_q + iq], kv.part_sum[p * n_q + iq], &kv.part_out[(p * n_q + iq) * dv], dv, max, sum, out);
            }
            for (int i = 0; i < dv; ++i) {
                out[i] /= sum;
            }
            const size_t row = ((size_t) head * n_q + iq) * n;
            float * per_head = kv.trace_scores.empty() ? nullptr : &kv.trace_scores[(tap * info.n_head + h) * info.n_blocks];
            kv.lse[tap * info.n_head + h] = kvcast::add_shares(&kv.verify_sum[row], &kv.verify_max[row], n, 1.0f / group, scores, per_head);
        }
    }
}

} // namespace

void kvcast::op_verify(ggml_tensor * dst, int /*ith*/, int /*nth*/, void * userdata) {
    constexpr int CHUNK = 32; // blocks whose logits lie near
    auto & layer = *static_cast<kvcast_layer *>(userdata);
    auto & kv = *layer.kv;
    const auto & info = kv.info;
    const ggml_tensor * q = dst->src[0];
    const int group = kv.group(), n_tokens = (int) q->ne[2], n_q = n_tokens * group, n = kv.n_used_blocks;
    const int dk = info.head_dim_k, dv = info.head_dim_v;

    if (kv.abort) {
        return;
    }
    while (true) {
        const size_t p = layer.next.fetch_add(1, std::memory_order_relaxed);
        if (p >= layer.parts.size()) {
            return;
        }
        const auto & part = layer.parts[p];
        const size_t n_work = (size_t) n_q * CHUNK * KVCAST_BLOCK + KVCAST_BLOCK * std::max(dk, dv);
        float * work = thread_scratch(n_work + (size_t) n_q * (dk + dv + CHUNK + 2));
        float * queries = work + n_work;
        float * out = queries + (size_t) n_q * dk;
        float * block_sum = out + (size_t) n_q * dv;
        float * max = block_sum + (size_t) n_q * CHUNK;
        float * sum = max + n_q;
        kvcast::pack_queries(kvcast::queries(q), part.head, group, 0, n_tokens, layer.scale, queries);
        std::vector<int32_t> q_pos(n_q);
        for (int i = 0; i < n_q; ++i) {
            q_pos[i] = kv.q_pos[i / group];
        }
        std::fill_n(&kv.part_max[p * n_q], n_q, -INFINITY);
        std::fill_n(&kv.part_sum[p * n_q], n_q, 0.0f);
        std::fill_n(&kv.part_out[p * n_q * dv], (size_t) n_q * dv, 0.0f);

        task t = kv.task_of(kvcast::head_rows(dst->src[1], part.head), queries, q_pos.data(), n_q, work);
        t.v = kvcast::head_rows(dst->src[2], part.head);
        t.max = max;
        t.sum = sum;
        t.out = out;
        t.block_sum = block_sum;
        for (int b = part.begin; b < part.end; b += CHUNK) {
            t.blocks = &kv.all_blocks[b];
            t.n_blocks = std::min(CHUNK, part.end - b);
            kv.kernels->attend(t);
            for (int iq = 0; iq < n_q; ++iq) {
                const size_t at = p * n_q + iq, row = ((size_t) part.head * n_q + iq) * n + b;
                add_part(max[iq], sum[iq], out + (size_t) iq * dv, dv, kv.part_max[at], kv.part_sum[at], &kv.part_out[at * dv]);
                memcpy(&kv.verify_sum[row], block_sum + (size_t) iq * t.n_blocks, sizeof(float) * t.n_blocks);
                std::fill_n(&kv.verify_max[row], t.n_blocks, max[iq]);
            }
        }
        if (layer.parts_done[part.head].fetch_add(1, std::memory_order_acq_rel) + 1 == layer.n_parts[part.head]) {
            finish_head(layer, dst, part.head, n_tokens);
            kvcast::complete_share(layer, info.n_head_kv, q, n_tokens);
        }
    }
}
