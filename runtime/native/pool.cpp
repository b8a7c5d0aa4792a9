// The device path: slots on a device, blocks scattered into them, attention over them, and what a step leaves behind.
#include "context.h"
#include "pool.h"
#include "prefill_stream.h"
#include "sizes.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

using kvcast::pool_align;

ggml_backend_t kvcast::main_queue(const kvcast_context & kv) {
    auto * sched = kv.ctx->get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        auto * backend = ggml_backend_sched_get_backend(sched, i);
        if (ggml_backend_get_device(backend) == kv.pool->device) {
            return backend;
        }
    }
    return nullptr;
}

// ---- making it

// Puts tensors that were made without data one after another into a buffer of their own.
static bool place(kvcast_pool & pool, ggml_backend_buffer_type_t type, const std::vector<ggml_tensor *> & tensors, size_t & bytes) {
    bytes = 0;
    for (auto * t : tensors) {
        bytes += pool_align(ggml_backend_buft_get_alloc_size(type, t));
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(type, bytes));
    if (!buffer) {
        return false;
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
    char * at = (char *) ggml_backend_buffer_get_base(buffer.get());
    for (auto * t : tensors) {
        ggml_backend_tensor_alloc(buffer.get(), t, at);
        at += pool_align(ggml_backend_buft_get_alloc_size(type, t));
    }
    pool.buffers.push_back(std::move(buffer));
    return true;
}

static uint8_t * host_memory(kvcast_pool & pool, size_t bytes) {
    auto buffer = kvcast::host_buffer(pool.device, bytes);
    if (!buffer) {
        return nullptr;
    }
    pool.buffers.push_back(std::move(buffer));
    return (uint8_t *) ggml_backend_buffer_get_base(pool.buffers.back().get());
}

static ggml_tensor * alias(const kvcast_pool & pool, const ggml_tensor * of, ggml_type type, int64_t ne0, int64_t ne1) {
    auto * t = ggml_new_tensor_2d(pool.tensors.get(), type, ne0, ne1);
    ggml_backend_tensor_alloc(of->buffer, t, of->data);
    return t;
}

kvcast::pool_groups kvcast::make_pool_tensors(kvcast_pool & pool, const kvcast_info & info, int n_blocks, int staging_share) {
    const auto k_type = (ggml_type) info.type_k;
    const auto v_type = (ggml_type) info.type_v;
    const int64_t n_rows = (int64_t) info.n_layer * info.n_head_kv;
    const int64_t n_slots = n_blocks * n_rows, n_staging = std::max<int64_t>(1, n_slots / staging_share);
    pool.n_slots = (int) n_slots;
    pool.n_staging = (int) n_staging;
    pool.k_block_bytes = KVCAST_BLOCK * ggml_row_size(k_type, info.head_dim_k);
    pool.v_block_bytes = KVCAST_BLOCK * ggml_row_size(v_type, info.head_dim_v);
    pool.tensors.reset(ggml_init({32 * ggml_tensor_overhead(), nullptr, true}));

    auto * ctx = pool.tensors.get();
    pool.k = ggml_new_tensor_2d(ctx, k_type, info.head_dim_k, n_slots * KVCAST_BLOCK);
    pool.v = ggml_new_tensor_2d(ctx, v_type, info.head_dim_v, n_slots * KVCAST_BLOCK);
    for (auto & s : pool.staged) {
        s.k = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, pool.k_block_bytes / 2, n_staging);
        s.v = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, pool.v_block_bytes / 2, n_staging);
        s.slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_staging);
    }
    pool.new_k = ggml_new_tensor_2d(ctx, k_type, info.head_dim_k, n_rows);
    pool.new_v = ggml_new_tensor_2d(ctx, v_type, info.head_dim_v, n_rows);
    pool.q = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (int64_t) info.head_dim_k * info.n_head, info.n_layer);
    pool.taps = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, (int64_t) n_blocks * info.n_layer * info.n_head);
    pool.rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n_rows);
    pool.new_rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n_rows);
    pool.masks = ggml_new_tensor_1d(ctx, GGML_TYPE_F16, (int64_t) n_blocks * info.n_layer * KVCAST_BLOCK * (info.n_head / info.n_head_kv));

    const auto staged = [&](int i) { return std::vector<ggml_tensor *>{pool.staged[i].k, pool.staged[i].v, pool.staged[i].slots}; };
    return {{pool.k, pool.v}, {staged(0), staged(1)}, {pool.new_k, pool.new_v, pool.q, pool.taps}, {pool.rows, pool.new_rows, pool.masks}};
}

std::unique_ptr<kvcast_pool> kvcast::make_pool(const kvcast_context & kv, int n_blocks, int staging_share, std::string & why_not) {
    const auto & info = kv.info;
    const auto & model = kv.ctx->get_model();
    auto pool = std::make_unique<kvcast_pool>();

    pool->device = model.dev_layer(kv.model_layers[0]);
    for (const auto il : kv.model_layers) {
        if (model.dev_layer(il) != pool->device) {
            why_not = "the layers lie on several devices, and the device path needs them on one (n_gpu_layers=-1, one GPU)";
            return nullptr;
        }
    }
    const auto k_type = (ggml_type) info.type_k;
    const auto v_type = (ggml_type) info.type_v;
    for (const auto & [type, dim] : {std::pair{k_type, info.head_dim_k}, {v_type, info.head_dim_v}}) {
        if (ggml_row_size(type, dim) % sizeof(int32_t) != 0) { // new rows are read back as whole words
            why_not = std::string("heads of ") + std::to_string(dim) + " channels do not fit the device path's pool as " +
                    ggml_type_name(type) + "; use an f16 cache (type_k=1, type_v=1)";
            return nullptr;
        }
    }
    const auto groups = make_pool_tensors(*pool, info, n_blocks, staging_share);
    pool->queue.reset(ggml_backend_dev_init(pool->device, nullptr));

    auto * type = ggml_backend_dev_buffer_type(pool->device);
    size_t bytes = 0, in_bytes = 0;
    bool good = pool->queue && place(*pool, type, groups.slots, bytes);
    pool->pool_bytes = bytes;
    for (int i = 0; i < 2; ++i) {
        auto & s = pool->staged[i];
        good = good && place(*pool, type, groups.staging[i], bytes);
        pool->staging_bytes += bytes;
        s.host = host_memory(*pool, ggml_nbytes(s.k) + ggml_nbytes(s.v) + ggml_nbytes(s.slots));
        good = good && s.host;
    }
    good = good && place(*pool, type, groups.outbox, bytes) && place(*pool, type, groups.inbox, in_bytes);
    pool->masks_at = pool_align(ggml_nbytes(pool->rows)) + pool_align(ggml_nbytes(pool->new_rows));
    const size_t inbox_bytes = pool->masks_at + ggml_nbytes(pool->masks);
    pool->sent = host_memory(*pool, inbox_bytes);
    pool->received = host_memory(*pool, bytes);
    good = good && pool->sent && pool->received;
    if (!good) {
        why_not = "the device has no memory left for the pool of " + std::to_string(n_blocks * KVCAST_BLOCK) +
                " tokens; take a smaller budget";
        return nullptr;
    }
    pool->tap_bytes = bytes + in_bytes;
    pool->inbox = alias(*pool, pool->rows, GGML_TYPE_I8, inbox_bytes, 1);
    pool->outbox = alias(*pool, pool->new_k, GGML_TYPE_I8, bytes, 1);
    pool->k_raw = alias(*pool, pool->k, GGML_TYPE_F16, pool->k_block_bytes / 2, pool->n_slots);
    pool->v_raw = alias(*pool, pool->v, GGML_TYPE_F16, pool->v_block_bytes / 2, pool->n_slots);
    const auto words = [&](ggml_tensor * t) {
        auto * view = alias(*pool, t, GGML_TYPE_I32, ggml_row_size(t->type, t->ne[0]) / sizeof(int32_t), t->ne[1]);
        view->view_src = t; // backends that reorder nodes see what they share
        return view;
    };
    pool->k_words = words(pool->k);
    pool->v_words = words(pool->v);
    pool->layer_slots.assign(info.n_layer, 0);
    pool->layer_first.assign(info.n_layer, 0);
    pool->layer_rank.assign(info.n_layer, 0);
    return pool;
}

const float * kvcast_pool::received_at(const ggml_tensor * t) const {
    return (const float *) (received + ((const char *) t->data - (const char *) outbox->data));
}

const float * kvcast_pool::query(int layer) const { return received_at(q) + layer_rank[layer] * q->ne[0]; }

// ---- the graph

void kvcast::begin_pool_graph(kvcast_context & kv) {
    kv.pool->attention.assign(kv.info.n_layer, nullptr);
    kv.pool->n_on_device = -1;
}

bool kvcast::send_inbox(kvcast_context & kv, int32_t new_cell) {
    auto & pool = *kv.pool;
    const auto & info = kv.info;
    const int32_t new_block = new_cell / KVCAST_BLOCK;
    const int ring = pool.n_sink + new_block % pool.n_window;
    const int n_fixed = pool.n_sink + pool.n_window;

    auto * rows = (int64_t *) pool.sent;
    auto * new_rows = (int32_t *) (pool.sent + pool_align(ggml_nbytes(pool.rows)));
    for (int row = 0; row < info.n_layer * info.n_head_kv; ++row) {
        const int layer = row / info.n_head_kv;
        const int n = kv.n_listed[row];
        const int32_t * table = &kv.blocks[(size_t) row * info.n_blocks];
        // layers with the same slots share a mask
        const auto like = std::find(pool.layer_slots.begin(), pool.layer_slots.end(), pool.layer_slots[layer]) - pool.layer_slots.begin();
        if (n < n_fixed || n > pool.layer_slots[layer] || n != kv.n_listed[like * info.n_head_kv] || table[ring] != new_block ||
                *std::min_element(table, table + n) < 0) {
            kv.fail("the pool's table of layer " + std::to_string(kv.model_layers[layer]) + ", KV head " +
                    std::to_string(row % info.n_head_kv) + " is not that of the step");
            return false;
        }
        const int64_t slot = pool.layer_first[layer] + (int64_t) (row % info.n_head_kv) * pool.layer_slots[layer] + ring;
        rows[row] = slot * KVCAST_BLOCK + new_cell % KVCAST_BLOCK;
        new_rows[row] = (int32_t) rows[row];
    }

    const ggml_fp16_t zero = ggml_fp32_to_fp16(0.0f), never = ggml_fp32_to_fp16(-INFINITY);
    for (const auto & [n_slots, offset] : pool.mask_at) {
        const int layer = std::find(pool.layer_slots.begin(), pool.layer_slots.end(), n_slots) - pool.layer_slots.begin();
        const int32_t * table = &kv.blocks[(size_t) layer * info.n_head_kv * info.n_blocks];
        const int n = kv.n_listed[layer * info.n_head_kv];
        const size_t n_cells = (size_t) n_slots * KVCAST_BLOCK;
        auto * mask = (ggml_fp16_t *) (pool.sent + pool.masks_at + offset);
        // critical blocks are complete, see kvcast_pool_scatter
        auto & n_made = pool.mask_n[n_slots];
        for (int g = 0; g < kv.group(); ++g) {
            auto * row = mask + g * n_cells;
            if (n_made != n) {
                std::fill_n(row, n * KVCAST_BLOCK, zero);
                std::fill(row + n * KVCAST_BLOCK, row + n_cells, never);
            }
            for (int i = 0; i < n_fixed * KVCAST_BLOCK; ++i) {
                row[i] = kv.cell_pos[table[i / KVCAST_BLOCK] * KVCAST_BLOCK + i % KVCAST_BLOCK] > kv.q_pos[0] ? never : zero;
            }
        }
        n_made = n;
    }
    ggml_backend_tensor_set_async(kvcast::main_queue(kv), pool.inbox, pool.sent, 0, pool.inbox_used);
    pool.new_cell = new_cell;
    pool.step_open = true;
    return true;
}

static ggml_tensor * flat(ggml_context * ctx, ggml_tensor * t, int64_t ne0, int64_t ne1) {
    return ggml_reshape_2d(ctx, ggml_is_contiguous(t) ? t : ggml_cont(ctx, t), ne0, ne1);
}

// Has an operation write its result, which is contiguous, into memory of ours.
static ggml_tensor * into(ggml_tensor * result, ggml_tensor * memory, size_t offset) {
    result->view_src = memory;
    result->view_offs = offset;
    return result;
}

// A second look at all layers' keys, those with the same number of slots in one go: many small operations beside the attention of
// each layer cost more than the attention itself.
static void build_taps(kvcast_context & kv, ggml_context * ctx, ggml_cgraph * gf, float scale) {
    auto & pool = *kv.pool;
    const auto & info = kv.info;
    for (const auto & [n_slots, mask_offset] : pool.mask_at) {
        const auto is_like = [&](int n) { return n == n_slots; };
        const int64_t n_rows = std::count_if(pool.layer_slots.begin(), pool.layer_slots.end(), is_like) * info.n_head_kv;
        const int64_t n_cells = n_slots * KVCAST_BLOCK;
        const int layer = std::find(pool.layer_slots.begin(), pool.layer_slots.end(), n_slots) -
                pool.layer_slots.begin(); // the first of them
        auto * k = ggml_view_3d(ctx, pool.k, info.head_dim_k, n_cells, n_rows, pool.k->nb[1], n_cells * pool.k->nb[1],
                (size_t) pool.layer_first[layer] * KVCAST_BLOCK * pool.k->nb[1]);
        auto * q = ggml_view_3d(ctx, pool.q, info.head_dim_k, kv.group(), n_rows, info.head_dim_k * sizeof(float),
                info.head_dim_k * kv.group() * sizeof(float), pool.layer_rank[layer] * pool.q->nb[1]);
        auto * mask = ggml_view_2d(ctx, pool.masks, n_cells, kv.group(), n_cells * sizeof(ggml_fp16_t), mask_offset);
        auto * logits = ggml_mul_mat(ctx, k, q);
        ggml_prec_set_acc(logits, GGML_PREC_F32);
        auto * probs = ggml_soft_max_ext(ctx, logits, mask, scale, 0.0f);
        auto * shares = kvcast::block_sums(ctx, probs, pool.device, pool.tap_factor);
        ggml_build_forward_expand(gf, into(shares, pool.taps, (size_t) pool.layer_first[layer] * kv.group() * sizeof(float)));
    }
}

ggml_tensor * kvcast::build_pool_attention(kvcast_context & kv, ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * v, float scale, int layer) {
    auto & pool = *kv.pool;
    const auto & info = kv.info;
    const int64_t n_slots = pool.layer_slots[layer];
    const int64_t n_cells = n_slots * KVCAST_BLOCK;
    auto * mask = ggml_view_2d(ctx, pool.masks, n_cells, kv.group(), n_cells * sizeof(ggml_fp16_t), pool.mask_at.at((int) n_slots));
    const auto of = [&](ggml_tensor * rows) {
        return ggml_view_1d(ctx, rows, info.n_head_kv, (size_t) layer * info.n_head_kv * sizeof(int64_t));
    };

    // the new token goes into the window
    k = flat(ctx, k, info.head_dim_k, info.n_head_kv);
    v = flat(ctx, v, info.head_dim_v, info.n_head_kv);
    ggml_build_forward_expand(gf,
            ggml_cpy(
                    ctx, flat(ctx, q, pool.q->ne[0], 1), ggml_view_1d(ctx, pool.q, pool.q->ne[0], pool.layer_rank[layer] * pool.q->nb[1])));
    const auto of_layer = [&](ggml_tensor * written) {
        return ggml_view_3d(ctx, written, written->ne[0], n_cells, info.n_head_kv, written->nb[1], n_cells * written->nb[1],
                (size_t) pool.layer_first[layer] * KVCAST_BLOCK * written->nb[1]);
    };
    k = of_layer(ggml_set_rows(ctx, pool.k, k, of(pool.rows)));
    v = of_layer(ggml_set_rows(ctx, pool.v, v, of(pool.rows)));

    auto * queries = ggml_permute(ctx, q, 0, 2, 1, 3);
    auto * out = ggml_flash_attn_ext(ctx, queries, k, v, ggml_view_2d(ctx, mask, n_cells, 1, mask->nb[1], 0), scale, 0.0f, 0.0f);
    ggml_prec_set_acc(out, GGML_PREC_F32);
    pool.attention[layer] = out;
    ggml_build_forward_expand(gf, out);

    // when all are there: how attention was spread over the slots, and the new rows, the very bytes that are in the pool
    if (layer == info.n_layer - 1) {
        build_taps(kv, ctx, gf, scale);
        ggml_build_forward_expand(gf, into(ggml_get_rows(ctx, pool.k_words, pool.new_rows), pool.new_k, 0));
        ggml_build_forward_expand(gf, into(ggml_get_rows(ctx, pool.v_words, pool.new_rows), pool.new_v, 0));
    }

    return ggml_reshape_2d(ctx, out, (int64_t) info.head_dim_v * info.n_head, 1);
}
