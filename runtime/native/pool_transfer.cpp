// Blocks into the pool, and what a step leaves there out of it: the part of kvcast.h for a pool.
#include "context.h"
#include "pool.h"
#include "prefill_stream.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

int32_t kvcast_pool_plan(kvcast_context * kv, const int32_t * n_slots, int32_t n_sink, int32_t n_window) {
    auto & pool = *kv->pool;
    int first = 0;
    for (int il = 0; il < kv->info.n_layer; ++il) {
        if (n_slots[il] < n_sink + n_window || n_slots[il] > kv->info.n_blocks || n_slots[il] % 16 != 0) {
            return 1;
        }
        first += n_slots[il] * kv->info.n_head_kv;
    }
    if (first > pool.n_slots || n_sink < 0 || n_window < 1) {
        return 1;
    }
    std::vector<int> order(kv->info.n_layer); // layers with the same slots lie together
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return n_slots[a] < n_slots[b]; });
    first = 0;
    pool.mask_at.clear();
    pool.mask_n.clear();
    size_t mask_bytes = 0;
    for (int rank = 0; rank < kv->info.n_layer; ++rank) {
        const int il = order[rank];
        if (pool.mask_at.emplace(n_slots[il], mask_bytes).second) {
            mask_bytes += (size_t) n_slots[il] * KVCAST_BLOCK * kv->group() * sizeof(ggml_fp16_t);
        }
        pool.layer_slots[il] = n_slots[il];
        pool.layer_first[il] = first;
        pool.layer_rank[il] = rank;
        first += n_slots[il] * kv->info.n_head_kv;
    }
    pool.inbox_used = pool.masks_at + mask_bytes;
    pool.n_sink = n_sink;
    pool.n_window = n_window;
    pool.plan++;
    std::fill(kv->blocks.begin(), kv->blocks.end(), -1);
    std::fill(kv->n_listed.begin(), kv->n_listed.end(), 0);
    return 0;
}

uint8_t * kvcast_staging(kvcast_context * kv, int32_t buffer) { return kv->pool->staged[buffer].host; }

int64_t * kvcast_staging_slots(kvcast_context * kv, int32_t buffer) {
    auto & pool = *kv->pool;
    return (int64_t *) (pool.staged[buffer].host + pool.n_staging * (pool.k_block_bytes + pool.v_block_bytes));
}

void kvcast_pool_upload(kvcast_context * kv, int32_t buffer, int32_t n) {
    auto & pool = *kv->pool;
    auto & s = pool.staged[buffer];
    if (s.scattering) {
        ggml_backend_synchronize(kvcast::main_queue(*kv));
        s.scattering = false;
    }
    ggml_backend_tensor_set_async(pool.queue.get(), s.k, s.host, 0, n * pool.k_block_bytes);
    ggml_backend_tensor_set_async(pool.queue.get(), s.v, s.host + pool.n_staging * pool.k_block_bytes, 0, n * pool.v_block_bytes);
    ggml_backend_tensor_set_async(pool.queue.get(), s.slots, kvcast_staging_slots(kv, buffer), 0, n * sizeof(int64_t));
    ggml_backend_synchronize(pool.queue.get());
}

int32_t kvcast_pool_scatter(kvcast_context * kv, int32_t buffer, int32_t n) {
    auto & pool = *kv->pool;
    auto & s = pool.staged[buffer];
    if (n < 0 || n > pool.n_staging) {
        return 1;
    }
    if (n == 0) {
        return 0;
    }
    auto * queue = kvcast::main_queue(*kv);
    if (pool.scatters.size() >= 64) { // a long fill
        ggml_backend_synchronize(queue);
        pool.scatters.clear();
    }
    ggml_context_ptr ctx(ggml_init({16 * ggml_tensor_overhead() + ggml_graph_overhead_custom(8, false), nullptr, true}));
    auto * gf = ggml_new_graph_custom(ctx.get(), 8, false);
    const auto in_place = [](ggml_tensor * view) {
        ggml_backend_view_init(view); // no allocator sees this graph
        return view;
    };
    auto * slots = in_place(ggml_view_1d(ctx.get(), s.slots, n, 0));
    for (auto [to, from] : {std::pair{pool.k_raw, s.k}, {pool.v_raw, s.v}}) {
        auto * rows = in_place(ggml_view_2d(ctx.get(), from, from->ne[0], n, from->nb[1], 0));
        ggml_build_forward_expand(gf, in_place(ggml_set_rows(ctx.get(), to, rows, slots)));
    }
    pool.scatters.push_back(std::move(ctx));
    s.scattering = true;
    return ggml_backend_graph_compute_async(queue, gf) == GGML_STATUS_SUCCESS ? 0 : 1;
}

int32_t kvcast_collect(kvcast_context * kv) {
    if (kv->stream) {
        kvcast::finish_stream(*kv);
    }
    if (!kv->pool || !kv->pool->step_open) {
        return kv->stream && kv->abort ? 2 : 0;
    }
    auto & pool = *kv->pool;
    const auto & info = kv->info;
    pool.step_open = false;
    const int64_t begin = ggml_time_us();
    ggml_backend_tensor_get_async(kvcast::main_queue(*kv), pool.outbox, pool.received, 0, ggml_nbytes(pool.outbox));
    kv->ctx->synchronize();
    kv->stats.device_us += ggml_time_us() - begin;
    pool.scatters.clear();
    for (auto & s : pool.staged) {
        s.scattering = false;
    }

    if (pool.n_on_device < 0) {
        pool.n_on_device = 0;
        for (auto * node : pool.attention) {
            auto * backend = ggml_backend_sched_get_tensor_backend(kv->ctx->get_sched(), node);
            pool.n_on_device += backend && ggml_backend_get_device(backend) == pool.device;
        }
    }
    pool.seen_pos = kv->q_pos[0];
    pool.seen_blocks = kv->n_used_blocks;
    pool.seen_cell_pos = kv->cell_pos;
    pool.seen_block_max_pos = kv->block_max_pos;
    for (int il = 0; il < info.n_layer; ++il) {
        const auto & layer = *kv->layers[il];
        memcpy((char *) layer.k + pool.new_cell * info.k_row_bytes, (const char *) pool.received_at(pool.new_k) + il * info.k_row_bytes,
                info.k_row_bytes);
        memcpy((char *) layer.v + pool.new_cell * info.v_row_bytes, (const char *) pool.received_at(pool.new_v) + il * info.v_row_bytes,
                info.v_row_bytes);
        if (!kv->trace_q.empty()) {
            memcpy(&kv->trace_q[(size_t) il * info.max_taps * info.n_head * info.head_dim_k], pool.query(il), pool.q->nb[1]);
        }
    }
    if (kv->callback) {
        kvcast_take_taps(kv, kv->n_listed.data());
    }
    for (int il = 0; il < info.n_layer; ++il) {
        const float * scores = &kv->scores[(size_t) il * info.n_head_kv * info.n_blocks];
        if (kv->callback &&
                kv->callback(kv->callback_user, kv->model_layers[il], kv->q_pos[0], scores, 1, info.n_head_kv, info.n_blocks) != 0) {
            return 1;
        }
    }
    return kv->abort ? 2 : 0;
}

void kvcast_take_taps(kvcast_context * kv, const int32_t * n_listed) {
    const auto & pool = *kv->pool;
    const auto & info = kv->info;
    const int group = kv->group();
    const float weight = pool.tap_factor / group;
    for (int il = 0; il < info.n_layer; ++il) {
        const int n_slots = pool.layer_slots[il];
        const float * taps = pool.received_at(pool.taps) + (size_t) pool.layer_first[il] * group;
        for (int h = 0; h < info.n_head_kv; ++h, taps += (size_t) group * n_slots) {
            const size_t row = (size_t) il * info.n_head_kv + h;
            float * scores = &kv->scores[row * info.n_blocks];
            std::fill_n(scores, n_listed[row], 0.0f);
            for (int g = 0; g < group; ++g) {
                for (int i = 0; i < n_listed[row]; ++i) {
                    scores[i] += taps[g * n_slots + i] * weight;
                }
            }
        }
    }
}

void kvcast_score_store(kvcast_context * kv, int32_t layer, int32_t head, float * scores) {
    const auto & pool = *kv->pool;
    const auto & info = kv->info;
    const int group = kv->group(), dim = info.head_dim_k, n = pool.seen_blocks;
    std::vector<float> queries(group * dim), work(KVCAST_BLOCK * (dim + group)), sum(group * n), max(group * n);
    const std::vector<int32_t> q_pos(group, pool.seen_pos);
    kvcast::pack_queries(kvcast::queries(pool.query(layer), dim), head, group, 0, 1, kv->layers[layer]->scale, queries.data());
    kvcast::task t = kv->task_of(kvcast::keys_of(*kv, layer, head), queries.data(), q_pos.data(), group, work.data());
    t.cell_pos = pool.seen_cell_pos.data();
    t.block_max_pos = pool.seen_block_max_pos.data();
    t.blocks = kv->all_blocks.data();
    t.n_blocks = n;
    t.block_sum = sum.data();
    t.block_max = max.data();
    kv->kernels->score(t);
    std::fill_n(scores, info.n_blocks, 0.0f);
    for (int g = 0; g < group; ++g) {
        kvcast::add_shares(&sum[g * n], &max[g * n], n, 1.0f / group, scores, nullptr);
    }
}

int64_t kvcast_pool_verify(kvcast_context * kv) {
    auto & pool = *kv->pool;
    const auto & info = kv->info;
    kv->ctx->synchronize();
    std::vector<uint8_t> k(ggml_nbytes(pool.k)), v(ggml_nbytes(pool.v));
    ggml_backend_tensor_get(pool.k, k.data(), 0, k.size());
    ggml_backend_tensor_get(pool.v, v.data(), 0, v.size());
    int64_t n_wrong = 0;
    for (int il = 0; il < info.n_layer; ++il) {
        const auto * k_store = (const uint8_t *) kvcast_k_data(kv, il);
        const auto * v_store = (const uint8_t *) kvcast_v_data(kv, il);
        for (int h = 0; h < info.n_head_kv; ++h) {
            const size_t row = (size_t) il * info.n_head_kv + h;
            for (int s = 0; s < kv->n_listed[row]; ++s) {
                const int32_t block = kv->blocks[row * info.n_blocks + s];
                const int64_t slot = pool.layer_first[il] + (int64_t) h * pool.layer_slots[il] + s;
                if (block < 0) {
                    continue; // empty: a step over it would be refused
                }
                bool same = block < info.n_blocks;
                for (int j = 0; same && j < KVCAST_BLOCK; ++j) {
                    const int64_t cell = (int64_t) block * KVCAST_BLOCK + j;
                    if (kv->cell_pos[cell] > pool.seen_pos) {
                        continue; // not attended to either
                    }
                    const int64_t kb = pool.k_block_bytes / KVCAST_BLOCK, vb = pool.v_block_bytes / KVCAST_BLOCK;
                    same = memcmp(&k[slot * pool.k_block_bytes + j * kb], k_store + cell * info.k_row_bytes + h * kb, kb) == 0 &&
                            memcmp(&v[slot * pool.v_block_bytes + j * vb], v_store + cell * info.v_row_bytes + h * vb, vb) == 0;
                }
                n_wrong += !same;
            }
        }
    }
    return n_wrong;
}

struct kvcast_pool_info kvcast_get_pool_info(const kvcast_context * kv) {
    kvcast_pool_info info = {};
    if (!kv->pool) {
        return info;
    }
    const auto & pool = *kv->pool;
    info.device = ggml_backend_dev_name(pool.device);
    info.n_slots = pool.n_slots;
    info.n_staging = pool.n_staging;
    info.k_block_bytes = pool.k_block_bytes;
    info.v_block_bytes = pool.v_block_bytes;
    info.pool_bytes = pool.pool_bytes;
    info.staging_bytes = pool.staging_bytes;
    info.tap_bytes = pool.tap_bytes;
    info.n_on_device = pool.n_on_device;
    return info;
}
