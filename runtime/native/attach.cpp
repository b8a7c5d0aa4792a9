// Attaching to a context: whether it can be served, and what is allocated for it.
#include "context.h"
#include "pool.h"
#include "prefill_stream.h"
#include "sizes.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <set>

kvcast_context::kvcast_context() = default;
kvcast_context::~kvcast_context() = default;

// ---- refusal

// The cache of the layers that attend to everything, nullptr where there is none that we know.
static const llama_kv_cache * store_of(const llama_context & ctx) {
    const auto * memory = ctx.get_memory();
    const auto * both = dynamic_cast<const llama_kv_cache_iswa *>(memory);
    return both ? both->get_base() : dynamic_cast<const llama_kv_cache *>(memory);
}

static std::string why_not(llama_context & ctx) {
    const auto & model = ctx.get_model();
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
    if (hparams.n_head(ids[0]) > kvcast::MAX_GROUP * hparams.n_head_kv(ids[0])) {
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
    cparams.kvcast = &kv;
    cparams.kvcast_mode = KVCAST_HISTORY;
    kv.ctx->graph_reserve(1, 1, 1, memory.get(), true);
    cparams.kvcast = nullptr;
    cparams.kvcast_mode = KVCAST_DENSE;
    kv.info.kq_scale = kv.layers[0]->scale;
    for (const auto & layer : kv.layers) {
        if (!layer->plain) {
            return "the family '" + kv.ctx->get_model().arch_name() +
                    "' adds sinks or a bias to its attention, or builds it in a way of its own";
        }
        if (layer->scale != kv.info.kq_scale) {
            return "the layers scale their attention differently";
        }
    }
    return "";
}

static kvcast_context * attach(llama_context * ctx, const kvcast_params & params, char * error, int32_t n_error) {
    const std::string why = why_not(*ctx);
    if (!why.empty() || params.max_taps < 1) {
        snprintf(error, n_error, "%s", why.empty() ? "max_taps must be at least 1" : why.c_str());
        return nullptr;
    }
    const auto & hparams = ctx->get_model().hparams;
    const auto * cache = store_of(*ctx);
    const auto ids = cache->get_layer_ids();
    const auto * k = cache->get_k_storage(ids[0]);

    auto kv = std::make_unique<kvcast_context>();
    kv->ctx = ctx;
    kv->cache = cache;
    kv->kernels = &kvcast::best_kernels();
    kv->model_layers.assign(ids.begin(), ids.end());

    auto & info = kv->info;
    info.n_layer = (int32_t) ids.size();
    info.n_head = hparams.n_head(ids[0]);
    info.n_head_kv = hparams.n_head_kv(ids[0]);
    info.head_dim_k = hparams.n_embd_head_k(ids[0]);
    info.head_dim_v = hparams.n_embd_head_v(ids[0]);
    info.n_cells = cache->get_size();
    info.n_blocks = info.n_cells / KVCAST_BLOCK;
    info.max_taps = params.max_taps;
    info.type_k = cache->type_k();
    info.type_v = cache->type_v();
    info.k_row_bytes = (int64_t) k->nb[1];
    info.v_row_bytes = (int64_t) ggml_row_size(cache->type_v(), hparams.n_embd_v_gqa(ids[0]));

    const auto allocate = [](auto & array, size_t n) { array.resize(n); };
    kvcast::for_each_array(*kv, params, allocate);
    std::fill(kv->cell_pos.begin(), kv->cell_pos.end(), kvcast::NEVER);
    std::fill(kv->block_max_pos.begin(), kv->block_max_pos.end(), kvcast::NEVER);
    for (int b = 0; b < info.n_blocks; ++b) {
        kv->all_blocks[b] = b;
    }
    for (int il = 0; il < info.n_layer; ++il) {
        auto layer = std::make_unique<kvcast_layer>();
        layer->kv = kv.get();
        layer->id = il;
        layer->il = ids[il];
        layer->k = cache->get_k_storage(ids[il])->data;
        // the cache shows V only as a view made in a graph's context
        ggml_context_ptr scratch(ggml_init({2 * ggml_tensor_overhead(), nullptr, true}));
        layer->v = cache->get_v(scratch.get(), ids[il], info.n_cells, llama_kv_cache::slot_info{})->data;
        layer->n_parts.resize(info.n_head_kv);
        layer->parts_done = std::make_unique<std::atomic<int>[]>(info.n_head_kv);
        layer->chunks_done = std::make_unique<std::atomic<int>[]>(info.n_head_kv);
        layer->chosen = std::make_unique<std::atomic<bool>[]>(info.n_head_kv);
        kv->layers.push_back(std::move(layer));
    }
    if (const std::string not_met = why_not_hooked(*kv); !not_met.empty()) {
        snprintf(error, n_error, "%s", not_met.c_str());
        return nullptr;
    }

    if (params.summary) {
        kv->summary = std::make_unique<kvcast_summary>();
        auto & s = *kv->summary;
        kvcast::for_each_array(s, info, allocate);
        for (auto * ones : {&s.q_power, &s.weights, &s.shares}) {
            std::fill(ones->begin(), ones->end(), 1.0f);
        }
    }

    if (params.pool_blocks > 0) {
        if (params.pool_blocks % 16 != 0 || params.pool_blocks > info.n_blocks || params.staging_share < 1) {
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

    const auto counting = [](int64_t & bytes) {
        return [&bytes](const auto & array, size_t) { bytes += array.size() * sizeof(array[0]); };
    };
    kvcast::for_each_array(*kv, params, counting(info.scratch_bytes));
    if (kv->summary) {
        kvcast::for_each_array(*kv->summary, info, counting(info.summary_bytes));
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
        snprintf(error, n_error,
                "host memory ran out for what is kept beside the KV cache (calibrate='off' and a smaller context need less)");
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
        kv->stream = nullptr;
        cparams.cb_eval = nullptr;
    }
    kvcast_set_mode(kv, KVCAST_DENSE);
    kv->unpin_store();
    cparams.kvcast = nullptr;
    kv->ctx->set_abort_callback(nullptr, nullptr);
    delete kv;
}
