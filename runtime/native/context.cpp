#include "context.h"
#include "kvcast-grammar.h"
#include "kvcast-graph.h"
#include "pool.h"
#include "stream.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <set>

static constexpr int32_t NEVER = std::numeric_limits<int32_t>::max();

kvcast_context::kvcast_context() = default;
kvcast_context::~kvcast_context() = default;

static thread_local std::string grammar_error, grammar_error_asked;
void kvcast_grammar_failed(const char * what) { grammar_error = what; }
const char * kvcast_grammar_error(void) {
    grammar_error_asked.swap(grammar_error);
    grammar_error.clear();
    return grammar_error_asked.c_str();
}

const char * kvcast_version(void) {
    return KVCAST_VERSION;
}

// ---- refusal

// The cache of the layers that attend to everything, nullptr where there is none that we know.
static const llama_kv_cache * store_of(const llama_context & ctx) {
    const auto * memory = ctx.get_memory();
    const auto * both   = dynamic_cast<const llama_kv_cache_iswa *>(memory);
    return both ? both->get_base() : dynamic_cast<const llama_kv_cache *>(memory);
}

static std::string why_not(llama_context & ctx) {
    const auto & model   = ctx.get_model();
    const auto & hparams = model.hparams;
    const auto & cparams = ctx.get_cparams();

    if (llama_model_is_recurrent(&model) || llama_model_is_hybrid(&model)) {
        return "the model has recurrent layers, which keep no KV cache";
    }
    if (hparams.is_mla()) {
        return "the model uses multi-head latent attention";
    }
    if (cparams.n_seq_max > 1) {
        return "the context holds several sequences (n_seq_max > 1)";
    }
    if (!cparams.flash_attn) {
        return "flash attention is off, so V is stored transposed";
    }
    if (!cparams.causal_attn) {
        return "attention is not causal";
    }
    if (hparams.f_max_alibi_bias > 0.0f || hparams.attn_soft_cap) {
        return "the model adds a bias or a soft cap to the attention logits";
    }
    const auto * cache = store_of(ctx);
    if (!cache) {
        return "the context has no plain KV cache";
    }
    const auto ids = cache->get_layer_ids();
    if (ids.empty()) {
        return "all layers are sliding-window layers, which leaves nothing to choose";
    }
    if (hparams.n_head(ids[0]) > kvcast::MAX_GROUP*hparams.n_head_kv(ids[0])) {
        return "more than " + std::to_string(kvcast::MAX_GROUP) + " query heads share a KV head";
    }
    for (const auto il : ids) {
        if (hparams.n_head(il) != hparams.n_head(ids[0]) || hparams.n_head_kv(il) != hparams.n_head_kv(ids[0]) ||
                hparams.n_embd_head_k(il) != hparams.n_embd_head_k(ids[0]) || hparams.n_embd_head_v(il) != hparams.n_embd_head_v(ids[0])) {
            return "the layers differ in their number or size of heads";
        }
        if (!ggml_backend_buffer_is_host(cache->get_k_storage(il)->buffer)) {
            return "the KV cache is not in host memory (offload_kqv must be off)";
        }
    }
    const auto * both = dynamic_cast<const llama_kv_cache_iswa *>(ctx.get_memory());
    if (ids.size() + (both ? both->get_swa()->get_layer_ids().size() : 0) != hparams.n_layer()) {
        return "some layers keep no KV cache of their own";
    }
    if (cache->get_size() % KVCAST_BLOCK != 0) {
        return "the number of cells is not a multiple of " + std::to_string(KVCAST_BLOCK);
    }
    return "";
}

// ---- pinned memory

// nullptr: none of the backends that compute has it
static void * backend_function(const kvcast_context & kv, const char * name) {
    auto * sched = kv.ctx->get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(sched); ++i) {
        auto * device = ggml_backend_get_device(ggml_backend_sched_get_backend(sched, i));
        if (auto * fn = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), name)) {
            return fn;
        }
    }
    return nullptr;
}

void kvcast_context::pin_store() {
    using register_fn = bool (*)(void *, size_t);
    const auto pin = (register_fn) backend_function(*this, "ggml_backend_register_host_buffer");
    if (!pin) {
        return;
    }
#ifdef _WIN32
    _putenv_s("GGML_CUDA_REGISTER_HOST", "1"); // ggml's CUDA backend pins only where this is set
#else
    setenv("GGML_CUDA_REGISTER_HOST", "1", 0);
#endif
    std::set<ggml_backend_buffer_t> buffers;
    for (const auto il : cache->get_layer_ids()) {
        buffers.insert(cache->get_k_storage(il)->buffer);
    }
    for (auto * buffer : buffers) {
        void * base = ggml_backend_buffer_get_base(buffer);
        const size_t size = ggml_backend_buffer_get_size(buffer);
        if (!pin(base, size)) {
            unpin_store();
            info.pinned_bytes = -1;
            return;
        }
        pinned.push_back(base);
        info.pinned_bytes += size;
    }
}

void kvcast_context::unpin_store() {
    using unregister_fn = void (*)(void *);
    const auto unpin = (unregister_fn) backend_function(*this, "ggml_backend_unregister_host_buffer");
    for (void * base : pinned) {
        unpin(base);
    }
    pinned.clear();
}

// ---- life cycle

// Has a graph of one token built, without memory for it: the hooks must meet every served layer, and with plain attention.
static std::string why_not_hooked(kvcast_context & kv) {
    auto & cparams = const_cast<llama_cparams &>(kv.ctx->get_cparams());
    const auto memory = kv.ctx->get_memory()->init_full();
    cparams.kvcast      = &kv;
    cparams.kvcast_mode = KVCAST_HISTORY;
    kv.ctx->graph_reserve(1, 1, 1, memory.get(), true);
    cparams.kvcast      = nullptr;
    cparams.kvcast_mode = KVCAST_DENSE;
    kv.info.kq_scale = kv.layers[0]->scale;
    for (const auto & layer : kv.layers) {
        if (!layer->plain) {
            return "the family '" + kv.ctx->get_model().arch_name() + "' adds sinks or a bias to its attention, or builds it in a way of its own";
        }
        if (layer->scale != kv.info.kq_scale) {
            return "the layers scale their attention differently";
        }
    }
    return "";
}

kvcast_layer * kvcast_context::layer_of(int il) const {
    const auto at = std::lower_bound(model_layers.begin(), model_layers.end(), il);
    return at != model_layers.end() && *at == il ? layers[at - model_layers.begin()].get() : nullptr;
}

static kvcast_context * attach(llama_context * ctx, const kvcast_params & params, char * error, int32_t n_error) {
    const std::string why = why_not(*ctx);
    if (!why.empty() || params.max_taps < 1) {
        snprintf(error, n_error, "%s", why.empty() ? "max_taps must be at least 1" : why.c_str());
        return nullptr;
    }
    const auto & hparams = ctx->get_model().hparams;
    const auto * cache   = store_of(*ctx);
    const auto   ids     = cache->get_layer_ids();
    const auto * k       = cache->get_k_storage(ids[0]);

    auto kv = std::make_unique<kvcast_context>();
    kv->ctx     = ctx;
    kv->cache   = cache;
    kv->kernels = &kvcast::best_kernels();
    kv->model_layers.assign(ids.begin(), ids.end());

    auto & info = kv->info;
    info.n_layer     = (int32_t) ids.size();
    info.n_head      = hparams.n_head(ids[0]);
    info.n_head_kv   = hparams.n_head_kv(ids[0]);
    info.head_dim_k  = hparams.n_embd_head_k(ids[0]);
    info.head_dim_v  = hparams.n_embd_head_v(ids[0]);
    info.n_cells     = cache->get_size();
    info.n_blocks    = info.n_cells/KVCAST_BLOCK;
    info.max_taps    = params.max_taps;
    info.type_k      = cache->type_k();
    info.type_v      = cache->type_v();
    info.k_row_bytes = (int64_t) k->nb[1];
    info.v_row_bytes = (int64_t) ggml_row_size(cache->type_v(), hparams.n_embd_v_gqa(ids[0]));

    const size_t rows  = (size_t) info.n_layer*info.n_head_kv;
    const size_t taps  = (size_t) info.n_layer*info.max_taps;
    const size_t group = info.n_head/info.n_head_kv;

    kv->blocks        .resize(rows*info.n_blocks);
    kv->n_listed      .resize(rows);
    kv->scores        .resize(rows*info.n_blocks);
    kv->history_scores.resize(taps*info.n_head_kv*info.n_blocks);
    kv->lse           .resize(taps*info.n_head);
    if (params.trace & KVCAST_TRACE_HEAD) {
        kv->trace_q     .resize(taps*info.n_head*info.head_dim_k);
        kv->trace_scores.resize(taps*info.n_head*info.n_blocks);
    }
    kv->cell_pos     .resize(info.n_cells,  NEVER);
    kv->block_max_pos.resize(info.n_blocks, NEVER);
    kv->all_blocks   .resize(info.n_blocks);
    for (int b = 0; b < info.n_blocks; ++b) {
        kv->all_blocks[b] = b;
    }
    for (int il = 0; il < info.n_layer; ++il) {
        auto layer = std::make_unique<kvcast_layer>();
        layer->kv = kv.get();
        layer->id = il;
        layer->il = ids[il];
        layer->k  = cache->get_k_storage(ids[il])->data;
        // the cache shows V only as a view made in a graph's context
        ggml_context_ptr scratch(ggml_init({ 2*ggml_tensor_overhead(), nullptr, true }));
        layer->v  = cache->get_v(scratch.get(), ids[il], info.n_cells, llama_kv_cache::slot_info{})->data;
        layer->n_parts.resize(info.n_head_kv);
        layer->parts_done = std::make_unique<std::atomic<int>[]>(info.n_head_kv);
        layer->chunks_done = std::make_unique<std::atomic<int>[]>(info.n_head_kv);
        layer->chosen = std::make_unique<std::atomic<bool>[]>(info.n_head_kv);
        kv->layers.push_back(std::move(layer));
    }
    kv->part_block_sum.resize((size_t) info.n_head_kv*group*info.n_blocks);
    if (const std::string not_met = why_not_hooked(*kv); !not_met.empty()) {
        snprintf(error, n_error, "%s", not_met.c_str());
        return nullptr;
    }

    if (params.summary) {
        kv->summary = std::make_unique<kvcast_summary>();
        auto & s = *kv->summary;
        const int dim = info.head_dim_k;
        s.n_channels = std::min(std::max(8, dim/4), dim);
        s.n_probed   = std::min({std::max(4, dim/8), dim, kvcast::MAX_CHANNELS});
        s.n_blocks   = (info.n_blocks + 15)/16*16;
        s.codes    .resize(rows*s.n_channels*s.n_blocks*KVCAST_BLOCK);
        s.means    .resize(rows*dim*s.n_blocks);
        s.channels .resize(rows*s.n_channels);
        s.center   .resize(rows*dim);
        s.scale    .resize(rows*dim);
        s.spread   .resize(rows*dim);
        s.q_power  .resize(rows*dim, 1.0f);
        s.n_done   .resize(rows);
        s.n_free   .resize(rows);
        s.pause    .resize(rows);
        s.wait     .resize(rows);
        s.weights  .resize(rows*info.n_blocks, 1.0f);
        s.estimates.resize(rows*info.n_blocks);
        s.rest_to_chosen.resize(rows);
        s.shares   .resize(rows, 1.0f);
    }

    if (params.pool_blocks > 0) {
        if (params.pool_blocks%16 != 0 || params.pool_blocks > info.n_blocks || params.staging_share < 1) {
            snprintf(error, n_error, "the pool's %d blocks per layer are not a multiple of 16 within the cache", params.pool_blocks);
            return nullptr;
        }
        std::string refused;
        kv->pool = kvcast::make_pool(*kv, params.pool_blocks, params.staging_share, refused);
        if (!kv->pool) {
            snprintf(error, n_error, "%s", refused.c_str());
            return nullptr;
        }
    }

    const auto bytes = [](const auto & v) { return (int64_t) (v.size()*sizeof(v[0])); };
    info.scratch_bytes = bytes(kv->blocks) + bytes(kv->n_listed) + bytes(kv->scores) + bytes(kv->history_scores) + bytes(kv->lse) +
        bytes(kv->trace_q) + bytes(kv->trace_scores) + bytes(kv->cell_pos) + bytes(kv->block_max_pos) + bytes(kv->all_blocks) +
        bytes(kv->part_block_sum);
    if (kv->summary) {
        const auto & s = *kv->summary;
        info.summary_bytes = bytes(s.codes) + bytes(s.means) + bytes(s.weights) + bytes(s.estimates);
        info.scratch_bytes += info.summary_bytes;
    }

    kv->pin_store();
    kv->stream = kvcast::make_stream(*kv);

    ctx->set_abort_callback([](void * user) { return static_cast<kvcast_context *>(user)->stops(); }, kv.get());
    const_cast<llama_cparams &>(ctx->get_cparams()).kvcast = kv.get();
    kvcast_set_mode(kv.get(), KVCAST_DENSE);

    return kv.release();
}

kvcast_context * kvcast_attach(llama_context * ctx, kvcast_params params, char * error, int32_t n_error) {
    try {
        return attach(ctx, params, error, n_error);
    } catch (const std::exception &) { // bad_alloc, length_error
        snprintf(error, n_error, "host memory ran out for what is kept beside the KV cache (calibrate='off' and a smaller context need less)");
        return nullptr;
    }
}

void kvcast_detach(kvcast_context * kv) {
    if (!kv) {
        return;
    }
    kv->ctx->synchronize();
    auto & cparams = const_cast<llama_cparams &>(kv->ctx->get_cparams());
    if (kv->stream) {
        kvcast::release_stream(*kv);
        kv->stream      = nullptr;
        cparams.cb_eval = nullptr;
    }
    kvcast_set_mode(kv, KVCAST_DENSE);
    kv->unpin_store();
    cparams.kvcast = nullptr;
    kv->ctx->set_abort_callback(nullptr, nullptr);
    delete kv;
}

void kvcast_set_mode(kvcast_context * kv, int32_t mode) {
    if (kv->mode == KVCAST_DENSE && mode != KVCAST_DENSE) {
        kv->known = false; // dense batches do not pass through begin_step
    }
    kv->mode = mode;
    auto & cparams = const_cast<llama_cparams &>(kv->ctx->get_cparams());
    cparams.kvcast_mode = mode == KVCAST_DENSE && kv->stream ? KVCAST_STREAM : mode;
    if (kv->stream) {
        cparams.cb_eval           = mode == KVCAST_SPARSE ? nullptr : kvcast::stream_callback;
        cparams.cb_eval_user_data = kv;
    }
}

// ---- the tables of a step

void kvcast_context::fail(const std::string & why) {
    if (error.empty()) {
        error = why;
    }
    abort = true;
}

bool kvcast_context::stops() {
    if (watch && kvcast_watch_stops(watch)) {
        abort = true;
    }
    return abort;
}

void kvcast_context::update_cells(const llama_ubatch & ubatch, const int64_t * idxs) {
    const auto & cells = cache->get_cells(0);

    if (known && cells.get_used() == n_known + ubatch.n_tokens) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            cell_pos[idxs[i]] = ubatch.pos[i];
        }
    } else {
        for (int c = 0; c < info.n_cells; ++c) {
            cell_pos[c] = cells.is_empty(c) ? NEVER : cells.pos_get(c);
        }
        for (int b = 0; b < info.n_blocks; ++b) {
            block_max_pos[b] = *std::max_element(&cell_pos[b*KVCAST_BLOCK], &cell_pos[b*KVCAST_BLOCK] + KVCAST_BLOCK);
        }
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const int64_t b = idxs[i]/KVCAST_BLOCK;
        block_max_pos[b] = *std::max_element(&cell_pos[b*KVCAST_BLOCK], &cell_pos[b*KVCAST_BLOCK] + KVCAST_BLOCK);
    }
    n_known = cells.get_used();
    known   = true;
    n_used_blocks = (int) (cells.used_max_p1() + KVCAST_BLOCK - 1)/KVCAST_BLOCK;
}

bool kvcast_context::check_lists(int32_t new_block) {
    for (int row = 0; row < info.n_layer*info.n_head_kv; ++row) {
        const int32_t * list = &blocks[(size_t) row*info.n_blocks];
        const int n = n_listed[row];
        bool good = n >= 1 && n_attended(row) <= info.n_blocks;
        bool has_new = false;
        for (int i = 0; good && i < n; ++i) {
            good = list[i] >= 0 && list[i] < n_used_blocks && (i == 0 || list[i] > list[i - 1]);
            has_new |= list[i] == new_block;
        }
        if (!good || !has_new) {
            fail("the block list of layer " + std::to_string(model_layers[row/info.n_head_kv]) + ", KV head " + std::to_string(row % info.n_head_kv) +
                (good ? " lacks the block of the new token" : " is empty, not ascending or names a block that holds nothing"));
            return false;
        }
    }
    if (summary) {
        const auto & s = *summary;
        const int n_range = s.free_end - s.free_begin;
        for (size_t row = 0; row < s.n_free.size(); ++row) {
            if (s.n_free[row] == 0) {
                continue;
            }
            int n_inside = 0;
            for (int i = 0; i < n_listed[row]; ++i) {
                n_inside += blocks[row*info.n_blocks + i] >= s.free_begin && blocks[row*info.n_blocks + i] < s.free_end;
            }
            if (s.free_begin < 0 || s.free_end >= n_used_blocks || s.n_free[row] < 0 || s.n_free[row] > n_range - n_inside) {
                fail("layer " + std::to_string(model_layers[row/info.n_head_kv]) + ", KV head " + std::to_string(row % info.n_head_kv) + " cannot choose " +
                    std::to_string(s.n_free[row]) + " blocks of [" + std::to_string(s.free_begin) + ", " + std::to_string(s.free_end) + ")");
                return false;
            }
        }
    }
    return true;
}

// Cuts the lists into parts of about equal size, several for each thread, so that uneven threads end together.
void kvcast_context::plan_sparse() {
    const int n_threads = (int) ctx->n_threads();
    size_t n_parts_max = 0;
    for (auto & layer : layers) {
        std::vector<int> n(info.n_head_kv);
        int total = 0;
        for (int h = 0; h < info.n_head_kv; ++h) {
            n[h] = n_attended((size_t) layer->id*info.n_head_kv + h);
            total += n[h];
        }
        const int size = std::clamp(total/(4*n_threads), 4, 64);
        layer->parts.clear();
        layer->choosers.clear();
        for (int h = 0; h < info.n_head_kv; ++h) {
            const size_t row = (size_t) layer->id*info.n_head_kv + h;
            const bool chooses = summary && summary->n_free[row] > 0 && summary->wait[row] == 0;
            layer->chosen[h] = !chooses;
            if (chooses) {
                layer->choosers.push_back(h);
            } else if (summary && summary->wait[row] > 0) {
                summary->wait[row]--;
            }
            const int n_parts = (n[h] + size - 1)/size;
            for (int i = 0; i < n_parts; ++i) {
                layer->parts.push_back({h, (int) ((int64_t) n[h]*i/n_parts), (int) ((int64_t) n[h]*(i + 1)/n_parts)});
            }
            layer->n_parts[h] = n_parts;
            stats.blocks_read += n[h];
        }
        n_parts_max = std::max(n_parts_max, layer->parts.size());
    }
    if (part_max.size() < n_parts_max*group()) {
        part_max.resize(n_parts_max*group());
        part_sum.resize(n_parts_max*group());
        part_out.resize(n_parts_max*group()*info.head_dim_v);
    }
    stats.n_steps++;
}

void kvcast_context::plan_history(int n_taps) {
    const int size = 8; // queries that share one widening of K
    for (auto & layer : layers) {
        layer->parts.clear();
        for (int h = 0; h < info.n_head_kv; ++h) {
            for (int i = 0; i < n_taps; i += size) {
                layer->parts.push_back({h, i, std::min(n_taps, i + size)});
            }
            layer->n_parts[h] = (n_taps + size - 1)/size;
        }
    }
}

void kvcast_context::begin_step(const llama_ubatch & ubatch, const int64_t * cells, bool pooled) {
    if (ubatch.n_tokens > (mode == KVCAST_SPARSE ? 1u : (uint32_t) info.max_taps)) {
        if (mode == KVCAST_HISTORY) {
            fail("a batch in history mode has " + std::to_string(ubatch.n_tokens) + " tokens, more than max_taps");
        }
        known = false;
        return;
    }
    update_cells(ubatch, cells);
    q_pos.assign(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    if (pooled) {
        if (pool->step_open) {
            fail("the results of the step before were not collected (kvcast_collect)");
        } else if (kvcast::send_inbox(*this, (int32_t) cells[0])) {
            stats.n_steps++;
            for (const int n : n_listed) {
                stats.blocks_read += n;
            }
        }
        return;
    }
    if (mode == KVCAST_SPARSE) {
        if (!check_lists((int32_t) (cells[0]/KVCAST_BLOCK))) {
            return;
        }
        plan_sparse();
    } else {
        plan_history((int) ubatch.n_tokens);
    }
    for (auto & layer : layers) {
        layer->next = 0;
        layer->n_done = 0;
        layer->next_chunk = 0;
        layer->heads_chosen = 0;
        for (int h = 0; h < info.n_head_kv; ++h) {
            layer->parts_done[h] = 0;
            layer->chunks_done[h] = 0;
        }
    }
}

// ---- the rest of the API

kvcast_info  kvcast_get_info (const kvcast_context * kv) { return kv->info; }
const int32_t * kvcast_model_layers(const kvcast_context * kv) { return kv->model_layers.data(); }
kvcast_stats kvcast_get_stats(const kvcast_context * kv) { return kv->stats; }
void kvcast_reset_stats(kvcast_context * kv) { kv->stats = {}; }

void kvcast_invalidate(kvcast_context * kv, int32_t first_cell) {
    kv->known = false;
    if (kv->pool) {
        kv->pool->step_open = false;
    }
    if (kv->stream) {
        kvcast::release_stream(*kv);
    }
    if (kv->summary) {
        for (auto & n : kv->summary->n_done) {
            n = std::min(n, first_cell/KVCAST_BLOCK);
        }
    }
}
void kvcast_abort(kvcast_context * kv) { kv->abort = true; }
void kvcast_set_watch(kvcast_context * kv, kvcast_watch * watch) { kv->watch = watch; }
void kvcast_clear_abort(kvcast_context * kv) { kv->abort = false; kv->error.clear(); }
const char * kvcast_last_error(const kvcast_context * kv) { return kv->error.c_str(); }

void kvcast_set_attention_callback(kvcast_context * kv, kvcast_attention_callback fn, void * user) {
    kv->callback      = fn;
    kv->callback_user = user;
}

int32_t * kvcast_blocks  (kvcast_context * kv) { return kv->blocks.data(); }
int32_t * kvcast_n_listed(kvcast_context * kv) { return kv->n_listed.data(); }

const float * kvcast_scores        (const kvcast_context * kv) { return kv->scores.data(); }
const float * kvcast_history_scores(const kvcast_context * kv) { return kv->history_scores.data(); }
const float * kvcast_lse           (const kvcast_context * kv) { return kv->lse.data(); }
const float * kvcast_trace_q       (const kvcast_context * kv) { return kv->trace_q.empty() ? nullptr : kv->trace_q.data(); }
const float * kvcast_trace_scores  (const kvcast_context * kv) { return kv->trace_scores.empty() ? nullptr : kv->trace_scores.data(); }

const void * kvcast_k_data(const kvcast_context * kv, int32_t layer) {
    return kv->layers[layer]->k;
}

const void * kvcast_v_data(const kvcast_context * kv, int32_t layer) {
    return kv->layers[layer]->v;
}
