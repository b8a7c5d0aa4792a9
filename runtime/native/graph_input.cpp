// The input of a graph whose attention is ours: where its tokens go, when it can be used again, and what a step does before it.
#include "context.h"
#include "kvcast-graph.h"
#include "pool.h"
#include "prefill_stream.h"

#include "llama-context.h"
#include "llama-kv-cache-iswa.h"

#include <type_traits>

namespace {

const llama_kv_cache_context & store_of(const llama_kv_cache_context & mctx) { return mctx; }
const llama_kv_cache_context & store_of(const llama_kv_cache_iswa_context & mctx) { return *mctx.get_base(); }

// Base: llm_graph_input_attn_kv, or llm_graph_input_attn_kv_iswa where sliding-window layers have a cache of their own.
template <class Base>
class attn_input : public Base {
  public:
    explicit attn_input(const Base & base) : Base(base) {}

    // with a pool, and of a single token in sparse mode
    void use_pool() {
        pooled = true;
        plan = cparams.kvcast->pool->plan;
        kvcast::begin_pool_graph(*cparams.kvcast);
    }

    void set_input(const llama_ubatch * ubatch) override {
        Base::set_input(ubatch);
        auto & kv = *cparams.kvcast;
        if (!pooled) {
            GGML_ASSERT(ggml_backend_buffer_is_host(self_k_idxs->buffer));
            const auto * cells = (const int64_t *) self_k_idxs->data;
            if (kv.mode != KVCAST_DENSE) {
                kv.begin_step(*ubatch, cells);
            }
            if (kv.stream) {
                kvcast::begin_stream(kv, cells, ubatch->n_tokens);
            }
            return;
        }
        // the graph does not write to the store, so nobody asked where
        alignas(64) int64_t cell = 0;
        ggml_context_ptr ctx(ggml_init({ggml_tensor_overhead(), nullptr, true}));
        ggml_backend_buffer_ptr buffer(ggml_backend_cpu_buffer_from_ptr(&cell, sizeof(cell)));
        auto * idxs = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I64, 1);
        ggml_backend_tensor_alloc(buffer.get(), idxs, &cell);
        store_of(*mctx).set_input_k_idxs(idxs, ubatch);
        kv.begin_step(*ubatch, &cell, true);
    }

    bool can_reuse(const llm_graph_params & params) override {
        const bool sparse = params.cparams.kvcast_mode == KVCAST_SPARSE && params.ubatch.n_tokens == 1;
        const auto * pool = params.cparams.kvcast->pool.get();
        if (!sparse || pooled != (pool != nullptr)) {
            const auto * stream = params.cparams.kvcast->stream.get();
            return !pooled && Base::can_reuse(params) && (!stream || kvcast::stream_is_current(*stream));
        }
        // our nodes read the cells that they are told to: the padded number of cells, and the mask, play no part
        if constexpr (std::is_same_v<Base, llm_graph_input_attn_kv>) {
            mctx = static_cast<const llama_kv_cache_context *>(params.mctx);
        } else if (!Base::can_reuse(params)) { // looks at masks that are in use: those of the other layers
            return false;
        }
        return pool ? plan == pool->plan : self_k_idxs->ne[0] == params.ubatch.n_tokens;
    }

  private:
    using Base::cparams;
    using Base::mctx;
    using Base::self_k_idxs;

    bool pooled = false;
    uint64_t plan = 0; // of the pool, whose addresses the graph holds
};

} // namespace

template <class Base>
static std::unique_ptr<Base> wrapped(const Base & inp, const kvcast_context & kv, int mode, int64_t n_tokens) {
    auto made = std::make_unique<attn_input<Base>>(inp);
    if (kv.pool && mode == KVCAST_SPARSE && n_tokens == 1) {
        made->use_pool();
    }
    return made;
}

std::unique_ptr<llm_graph_input_attn_kv> kvcast_attn_input(
        std::unique_ptr<llm_graph_input_attn_kv> inp, kvcast_context * kv, int mode, int64_t n_tokens) {
    return wrapped(*inp, *kv, mode, n_tokens);
}

std::unique_ptr<llm_graph_input_attn_kv_iswa> kvcast_attn_input(
        std::unique_ptr<llm_graph_input_attn_kv_iswa> inp, kvcast_context * kv, int mode, int64_t n_tokens) {
    return wrapped(*inp, *kv, mode, n_tokens);
}
