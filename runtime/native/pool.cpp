// The device path: slots on a device, blocks scattered into them, attention over them, and what a step leaves behind.
#include "context.h"
#include "pool.h"
#include "stream.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

static size_t align(size_t n) { return (n + 255)/256*256; }

static ggml_backend_t main_queue(const kvcast_context & kv) {
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
        bytes += align(ggml_backend_buft_get_alloc_size(type, t));
    }
    ggml_backend_buffer_ptr buffer(ggml_backend_buft_alloc_buffer(type, bytes));
    if (!buffer) {
        return false;
    }
    ggml_backend_buffer_clear(buffer.get(), 0);
    char * at = (char *) ggml_backend_buffer_get_base(buffer.get());
    for (auto * t : tensors) {
        ggml_backend_tensor_alloc(buffer.get(), t, at);
        at += align(ggml_backend_buft_get_alloc_size(type, t));
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

std::unique_ptr<kvcast_pool> kvcast::make_pool(const kvcast_context & kv, int n_blocks, int staging_share, std::string & why_not) {
    const auto & info  = kv.info;
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
    pool->n_slots       = n_blocks*info.n_layer*info.n_head_kv;
    pool->n_staging     = std::max(1, pool->n_slots/staging_share);
    pool->k_block_bytes = KVCAST_BLOCK*ggml_row_size(k_type, info.head_dim_k);
    pool->v_block_bytes = KVCAST_BLOCK*ggml_row_size(v_type, info.head_dim_v);
    pool->tensors.reset(ggml_init({ 32*ggml_tensor_overhead(), nullptr, true }));
    pool->queue.reset(ggml_backend_dev_init(pool->device, nullptr));

    auto * ctx  = pool->tensors.get();
    auto * type = ggml_backend_dev_buffer_type(pool->device);
    size_t bytes = 0;
    pool->k = ggml_new_tensor_2d(ctx, k_type, info.head_dim_k, (int64_t) pool->n_slots*KVCAST_BLOCK);
    pool->v = ggml_new_tensor_2d(ctx, v_type, info.head_dim_v, (int64_t) pool->n_slots*KVCAST_BLOCK);
    bool good = pool->queue && place(*pool, type, {pool->k, pool->v}, bytes);
    pool->pool_bytes = bytes;

    for (auto & s : pool->staged) {
        s.k     = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, pool->k_block_bytes/2, pool->n_staging);
        s.v     = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, pool->v_block_bytes/2, pool->n_staging);
        s.slots = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, pool->n_staging);
        good = good && place(*pool, type, {s.k, s.v, s.slots}, bytes);
        pool->staging_bytes += bytes;

        const size_t n_host = ggml_nbytes(s.k) + ggml_nbytes(s.v) + ggml_nbytes(s.slots);
        s.host = host_memory(*pool, n_host);
        good = good && s.host;
    }

    pool->new_k = ggml_new_tensor_2d(ctx, k_type, info.head_dim_k, (int64_t) info.n_head_kv*info.n_layer);
    pool->new_v = ggml_new_tensor_2d(ctx, v_type, info.head_dim_v, (int64_t) info.n_head_kv*info.n_layer);
    pool->q     = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (int64_t) info.head_dim_k*info.n_head, info.n_layer);
    pool->taps  = ggml_new_tensor_1d(ctx, GGML_TYPE_F32, (int64_t) n_blocks*info.n_layer*info.n_head);
    good = good && place(*pool, type, {pool->new_k, pool->new_v, pool->q, pool->taps}, bytes);
    pool->rows  = ggml_new_tensor_1d(ctx, GGML_TYPE_I64, (int64_t) info.n_head_kv*info.n_layer);
    pool->new_rows = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, (int64_t) info.n_head_kv*info.n_layer);
    pool->masks = ggml_new_tensor_1d(ctx, GGML_TYPE_F16, (int64_t) n_blocks*info.n_layer*KVCAST_BLOCK*kv.group());
    size_t in_bytes = 0;
    good = good && place(*pool, type, {pool->rows, pool->new_rows, pool->masks}, in_bytes);
    pool->masks_at = align(ggml_nbytes(pool->rows)) + align(ggml_nbytes(pool->new_rows));
    const size_t inbox_bytes = pool->masks_at + ggml_nbytes(pool->masks);
    pool->sent     = host_memory(*pool, inbox_bytes);
    pool->received = host_memory(*pool, bytes);
    good = good && pool->sent && pool->received;
    if (!good) {
        why_not = "the device has no memory left for the pool of " + std::to_string(n_blocks*KVCAST_BLOCK) + " tokens; take a smaller budget";
        return nullptr;
    }
    pool->tap_bytes = bytes + in_bytes;
    pool->inbox  = alias(*pool, pool->rows, GGML_TYPE_I8, inbox_bytes, 1);
    pool->outbox = alias(*pool, pool->new_k, GGML_TYPE_I8, bytes, 1);
    pool->k_raw  = alias(*pool, pool->k, GGML_TYPE_F16, pool->k_block_bytes/2, pool->n_slots);
    pool->v_raw  = alias(*pool, pool->v, GGML_TYPE_F16, pool->v_block_bytes/2, pool->n_slots);
    const auto words = [&](ggml_tensor * t) {
        auto * view = alias(*pool, t, GGML_TYPE_I32, ggml_row_size(t->type, t->ne[0])/sizeof(int32_t), t->ne[1]);
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

const float * kvcast_pool::query(int layer) const {
    return received_at(q) + layer_rank[layer]*q->ne[0];
}

// ---- the graph

void kvcast::begin_pool_graph(kvcast_context & kv) {
    kv.pool->attention.assign(kv.info.n_layer, nullptr);
    kv.pool->n_on_device = -1;
}

bool kvcast::send_inbox(kvcast_context & kv, int32_t new_cell) {
    auto & pool = *kv.pool;
    const auto & info = kv.info;
    const int32_t new_block = new_cell/KVCAST_BLOCK;
    const int ring = pool.n_sink + new_block%pool.n_window;
    const int n_fixed = pool.n_sink + pool.n_window;

    auto * rows = (int64_t *) pool.sent;
    auto * new_rows = (int32_t *) (pool.sent + align(ggml_nbytes(pool.rows)));
    for (int row = 0; row < info.n_layer*info.n_head_kv; ++row) {
        const int layer = row/info.n_head_kv;
        const int n = kv.n_listed[row];
        const int32_t * table = &kv.blocks[(size_t) row*info.n_blocks];
        // layers with the same slots share a mask
        const auto like = std::find(pool.layer_slots.begin(), pool.layer_slots.end(), pool.layer_slots[layer]) - pool.layer_slots.begin();
        if (n < n_fixed || n > pool.layer_slots[layer] || n != kv.n_listed[like*info.n_head_kv] ||
                table[ring] != new_block || *std::min_element(table, table + n) < 0) {
            kv.fail("the pool's table of layer " + std::to_string(kv.model_layers[layer]) + ", KV head " + std::to_string(row % info.n_head_kv) +
                " is not that of the step");
            return false;
        }
        const int64_t slot = pool.layer_first[layer] + (int64_t) (row%info.n_head_kv)*pool.layer_slots[layer] + ring;
        rows[row] = slot*KVCAST_BLOCK + new_cell%KVCAST_BLOCK;
        new_rows[row] = (int32_t) rows[row];
    }

    const ggml_fp16_t zero = ggml_fp32_to_fp16(0.0f), never = ggml_fp32_to_fp16(-INFINITY);
    for (const auto & [n_slots, offset] : pool.mask_at) {
        const int layer = std::find(pool.layer_slots.begin(), pool.layer_slots.end(), n_slots) - pool.layer_slots.begin();
        const int32_t * table = &kv.blocks[(size_t) layer*info.n_head_kv*info.n_blocks];
        const int n = kv.n_listed[layer*info.n_head_kv];
        const size_t n_cells = (size_t) n_slots*KVCAST_BLOCK;
        auto * mask = (ggml_fp16_t *) (pool.sent + pool.masks_at + offset);
        // critical blocks are complete, see kvcast_pool_scatter
        auto & n_made = pool.mask_n[n_slots];
        for (int g = 0; g < kv.group(); ++g) {
            auto * row = mask + g*n_cells;
            if (n_made != n) {
                std::fill_n(row, n*KVCAST_BLOCK, zero);
                std::fill(row + n*KVCAST_BLOCK, row + n_cells, never);
            }
            for (int i = 0; i < n_fixed*KVCAST_BLOCK; ++i) {
                row[i] = kv.cell_pos[table[i/KVCAST_BLOCK]*KVCAST_BLOCK + i%KVCAST_BLOCK] > kv.q_pos[0] ? never : zero;
            }
        }
        n_made = n;
    }
    ggml_backend_tensor_set_async(main_queue(kv), pool.inbox, pool.sent, 0, pool.inbox_used);
    pool.new_cell  = new_cell;
    pool.step_open = true;
    return true;
}

static ggml_tensor * flat(ggml_context * ctx, ggml_tensor * t, int64_t ne0, int64_t ne1) {
    return ggml_reshape_2d(ctx, ggml_is_contiguous(t) ? t : ggml_cont(ctx, t), ne0, ne1);
}

// Has an operation write its result, which is contiguous, into memory of ours.
static ggml_tensor * into(ggml_tensor * result, ggml_tensor * memory, size_t offset) {
    result->view_src  = memory;
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
        const int64_t n_rows  = std::count_if(pool.layer_slots.begin(), pool.layer_slots.end(), is_like)*info.n_head_kv;
        const int64_t n_cells = n_slots*KVCAST_BLOCK;
        const int layer = std::find(pool.layer_slots.begin(), pool.layer_slots.end(), n_slots) - pool.layer_slots.begin(); // the first of them
        auto * k = ggml_view_3d(ctx, pool.k, info.head_dim_k, n_cells, n_rows, pool.k->nb[1], n_cells*pool.k->nb[1],
            (size_t) pool.layer_first[layer]*KVCAST_BLOCK*pool.k->nb[1]);
        auto * q = ggml_view_3d(ctx, pool.q, info.head_dim_k, kv.group(), n_rows, info.head_dim_k*sizeof(float),
            info.head_dim_k*kv.group()*sizeof(float), pool.layer_rank[layer]*pool.q->nb[1]);
        auto * mask = ggml_view_2d(ctx, pool.masks, n_cells, kv.group(), n_cells*sizeof(ggml_fp16_t), mask_offset);
        auto * logits = ggml_mul_mat(ctx, k, q);
        ggml_prec_set_acc(logits, GGML_PREC_F32);
        auto * probs  = ggml_soft_max_ext(ctx, logits, mask, scale, 0.0f);
        auto * shares = kvcast::block_sums(ctx, probs, pool.device, pool.tap_factor);
        ggml_build_forward_expand(gf, into(shares, pool.taps, (size_t) pool.layer_first[layer]*kv.group()*sizeof(float)));
    }
}

ggml_tensor * kvcast::build_pool_attention(kvcast_context & kv, ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * v, float scale, int layer) {
    auto & pool = *kv.pool;
    const auto & info = kv.info;
    const int64_t n_slots = pool.layer_slots[layer];
    const int64_t n_cells = n_slots*KVCAST_BLOCK;
    auto * mask = ggml_view_2d(ctx, pool.masks, n_cells, kv.group(), n_cells*sizeof(ggml_fp16_t), pool.mask_at.at((int) n_slots));
    const auto of = [&](ggml_tensor * rows) {
        return ggml_view_1d(ctx, rows, info.n_head_kv, (size_t) layer*info.n_head_kv*sizeof(int64_t));
    };

    // the new token goes into the window
    k = flat(ctx, k, info.head_dim_k, info.n_head_kv);
    v = flat(ctx, v, info.head_dim_v, info.n_head_kv);
    ggml_build_forward_expand(gf, ggml_cpy(ctx, flat(ctx, q, pool.q->ne[0], 1), ggml_view_1d(ctx, pool.q, pool.q->ne[0],
        pool.layer_rank[layer]*pool.q->nb[1])));
    const auto of_layer = [&](ggml_tensor * written) {
        return ggml_view_3d(ctx, written, written->ne[0], n_cells, info.n_head_kv, written->nb[1], n_cells*written->nb[1],
            (size_t) pool.layer_first[layer]*KVCAST_BLOCK*written->nb[1]);
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

    return ggml_reshape_2d(ctx, out, (int64_t) info.head_dim_v*info.n_head, 1);
}

// ---- the API

int32_t kvcast_pool_plan(kvcast_context * kv, const int32_t * n_slots, int32_t n_sink, int32_t n_window) {
    auto & pool = *kv->pool;
    int first = 0;
    for (int il = 0; il < kv->info.n_layer; ++il) {
        if (n_slots[il] < n_sink + n_window || n_slots[il] > kv->info.n_blocks || n_slots[il]%16 != 0) {
            return 1;
        }
        first += n_slots[il]*kv->info.n_head_kv;
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
            mask_bytes += (size_t) n_slots[il]*KVCAST_BLOCK*kv->group()*sizeof(ggml_fp16_t);
        }
        pool.layer_slots[il] = n_slots[il];
        pool.layer_first[il] = first;
        pool.layer_rank[il]  = rank;
        first += n_slots[il]*kv->info.n_head_kv;
    }
    pool.inbox_used = pool.masks_at + mask_bytes;
    pool.n_sink   = n_sink;
    pool.n_window = n_window;
    pool.plan++;
    std::fill(kv->blocks.begin(), kv->blocks.end(), -1);
    std::fill(kv->n_listed.begin(), kv->n_listed.end(), 0);
    return 0;
}

uint8_t * kvcast_staging(kvcast_context * kv, int32_t buffer) { return kv->pool->staged[buffer].host; }

int64_t * kvcast_staging_slots(kvcast_context * kv, int32_t buffer) {
    auto & pool = *kv->pool;
    return (int64_t *) (pool.staged[buffer].host + pool.n_staging*(pool.k_block_bytes + pool.v_block_bytes));
}

void kvcast_pool_upload(kvcast_context * kv, int32_t buffer, int32_t n) {
    auto & pool = *kv->pool;
    auto & s    = pool.staged[buffer];
    if (s.scattering) {
        ggml_backend_synchronize(main_queue(*kv));
        s.scattering = false;
    }
    ggml_backend_tensor_set_async(pool.queue.get(), s.k, s.host, 0, n*pool.k_block_bytes);
    ggml_backend_tensor_set_async(pool.queue.get(), s.v, s.host + pool.n_staging*pool.k_block_bytes, 0, n*pool.v_block_bytes);
    ggml_backend_tensor_set_async(pool.queue.get(), s.slots, kvcast_staging_slots(kv, buffer), 0, n*sizeof(int64_t));
    ggml_backend_synchronize(pool.queue.get());
}

int32_t kvcast_pool_scatter(kvcast_context * kv, int32_t buffer, int32_t n) {
    auto & pool = *kv->pool;
    auto & s    = pool.staged[buffer];
    if (n < 0 || n > pool.n_staging) {
        return 1;
    }
    if (n == 0) {
        return 0;
    }
    auto * queue = main_queue(*kv);
    if (pool.scatters.size() >= 64) { // a long fill
        ggml_backend_synchronize(queue);
        pool.scatters.clear();
    }
    ggml_context_ptr ctx(ggml_init({ 16*ggml_tensor_overhead() + ggml_graph_overhead_custom(8, false), nullptr, true }));
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
    ggml_backend_tensor_get_async(main_queue(*kv), pool.outbox, pool.received, 0, ggml_nbytes(pool.outbox));
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
    pool.seen_pos    = kv->q_pos[0];
    pool.seen_blocks = kv->n_used_blocks;
    pool.seen_cell_pos      = kv->cell_pos;
    pool.seen_block_max_pos = kv->block_max_pos;
    for (int il = 0; il < info.n_layer; ++il) {
        const auto & layer = *kv->layers[il];
        memcpy((char *) layer.k + pool.new_cell*info.k_row_bytes, (const char *) pool.received_at(pool.new_k) + il*info.k_row_bytes, info.k_row_bytes);
        memcpy((char *) layer.v + pool.new_cell*info.v_row_bytes, (const char *) pool.received_at(pool.new_v) + il*info.v_row_bytes, info.v_row_bytes);
        if (!kv->trace_q.empty()) {
            memcpy(&kv->trace_q[(size_t) il*info.max_taps*info.n_head*info.head_dim_k], pool.query(il), pool.q->nb[1]);
        }
    }
    if (kv->callback) {
        kvcast_take_taps(kv, kv->n_listed.data());
    }
    for (int il = 0; il < info.n_layer; ++il) {
        const float * scores = &kv->scores[(size_t) il*info.n_head_kv*info.n_blocks];
        if (kv->callback && kv->callback(kv->callback_user, kv->model_layers[il], kv->q_pos[0], scores, 1, info.n_head_kv, info.n_blocks) != 0) {
            return 1;
        }
    }
    return kv->abort ? 2 : 0;
}

void kvcast_take_taps(kvcast_context * kv, const int32_t * n_listed) {
    const auto & pool = *kv->pool;
    const auto & info = kv->info;
    const int group = kv->group();
    const float weight = pool.tap_factor/group;
    for (int il = 0; il < info.n_layer; ++il) {
        const int n_slots = pool.layer_slots[il];
        const float * taps = pool.received_at(pool.taps) + (size_t) pool.layer_first[il]*group;
        for (int h = 0; h < info.n_head_kv; ++h, taps += (size_t) group*n_slots) {
            const size_t row = (size_t) il*info.n_head_kv + h;
            float * scores = &kv->scores[row*info.n_blocks];
            std::fill_n(scores, n_listed[row], 0.0f);
            for (int g = 0; g < group; ++g) {
                for (int i = 0; i < n_listed[row]; ++i) {
                    scores[i] += taps[g*n_slots + i]*weight;
                }
            }
        }
    }
}

void kvcast_score_store(kvcast_context * kv, int32_t layer, int32_t head, float * scores) {
    const auto & pool = *kv->pool;
    const auto & info = kv->info;
    const int group = kv->group(), dim = info.head_dim_k, n = pool.seen_blocks;
    std::vector<float> queries(group*dim), work(KVCAST_BLOCK*(dim + group)), sum(group*n), max(group*n);
    const std::vector<int32_t> q_pos(group, pool.seen_pos);
    kvcast::pack_queries(kvcast::queries(pool.query(layer), dim), head, group, 0, 1, kv->layers[layer]->scale, queries.data());
    kvcast::task t = kv->task_of(kvcast::keys_of(*kv, layer, head), queries.data(), q_pos.data(), group, work.data());
    t.cell_pos      = pool.seen_cell_pos.data();
    t.block_max_pos = pool.seen_block_max_pos.data();
    t.blocks    = kv->all_blocks.data();
    t.n_blocks  = n;
    t.block_sum = sum.data();
    t.block_max = max.data();
    kv->kernels->score(t);
    std::fill_n(scores, info.n_blocks, 0.0f);
    for (int g = 0; g < group; ++g) {
        kvcast::add_shares(&sum[g*n], &max[g*n], n, 1.0f/group, scores, nullptr);
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
            const size_t row = (size_t) il*info.n_head_kv + h;
            for (int s = 0; s < kv->n_listed[row]; ++s) {
                const int32_t block = kv->blocks[row*info.n_blocks + s];
                const int64_t slot  = pool.layer_first[il] + (int64_t) h*pool.layer_slots[il] + s;
                if (block < 0) {
                    continue; // empty: a step over it would be refused
                }
                bool same = block < info.n_blocks;
                for (int j = 0; same && j < KVCAST_BLOCK; ++j) {
                    const int64_t cell = (int64_t) block*KVCAST_BLOCK + j;
                    if (kv->cell_pos[cell] > pool.seen_pos) {
                        continue; // not attended to either
                    }
                    const int64_t kb = pool.k_block_bytes/KVCAST_BLOCK, vb = pool.v_block_bytes/KVCAST_BLOCK;
                    same = memcmp(&k[slot*pool.k_block_bytes + j*kb], k_store + cell*info.k_row_bytes + h*kb, kb) == 0 &&
                           memcmp(&v[slot*pool.v_block_bytes + j*vb], v_store + cell*info.v_row_bytes + h*vb, vb) == 0;
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
    info.device        = ggml_backend_dev_name(pool.device);
    info.n_slots       = pool.n_slots;
    info.n_staging     = pool.n_staging;
    info.k_block_bytes = pool.k_block_bytes;
    info.v_block_bytes = pool.v_block_bytes;
    info.pool_bytes    = pool.pool_bytes;
    info.staging_bytes = pool.staging_bytes;
    info.tap_bytes     = pool.tap_bytes;
    info.n_on_device   = pool.n_on_device;
    return info;
}
