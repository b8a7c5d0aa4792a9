// What the patched llama.cpp calls: three hooks in the common attention builders (patches/README.md).
#pragma once

#include "llama-graph.h"

#include <memory>

struct kvcast_context;

// Wraps the input of a graph in history or sparse mode: fills the per-step tables, decides on reuse.
std::unique_ptr<llm_graph_input_attn_kv> kvcast_attn_input(
        std::unique_ptr<llm_graph_input_attn_kv> inp, kvcast_context * kv, int mode, int64_t n_tokens);
std::unique_ptr<llm_graph_input_attn_kv_iswa> kvcast_attn_input(
        std::unique_ptr<llm_graph_input_attn_kv_iswa> inp, kvcast_context * kv, int mode, int64_t n_tokens);

// Both of the following: il is the model's layer; nullptr for layers that are not served, which are llama.cpp's own.

// Device path, sparse mode: the attention output over the pool; K and V of the step go there instead of to the store (they are
// brought to the store after the step, kvcast_collect). Everything else: nullptr, llama.cpp goes on as always.
// q [head_dim_k, n_head, n_tokens], k, v [head_dim, n_head_kv, n_tokens]: of the step, F32
ggml_tensor * kvcast_build_pooled(kvcast_context * kv, ggml_context * ctx, ggml_cgraph * gf, int mode, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * v, float kq_scale, int il);

// Batches of many tokens on a GPU build: K and V of the step go to the layer's buffer on the device, and k, v become views of that, as
// llama.cpp's own of the cache. false: llama.cpp goes on as always.
// cells: I64 [n_tokens], where the tokens go
bool kvcast_build_streamed(kvcast_context * kv, ggml_context * ctx, ggml_cgraph * gf, int mode, ggml_tensor * k_cur, ggml_tensor * v_cur,
        ggml_tensor * cells, int64_t n_kv, int il, ggml_tensor *& k, ggml_tensor *& v);

// Sparse mode: the attention output [head_dim_v*n_head, n_tokens] over the listed blocks.
// History mode: adds the score node to gf and returns nullptr, as does a batch that is dense: llama.cpp goes on as always.
// q [head_dim_k, n_head, n_tokens] F32; k, v: views of the cache [head_dim, n_head_kv, n_kv], token-major; mask [n_kv, n_tokens];
// plain: nothing but the mask is added to the logits (a context whose layers have more is not attached to)
ggml_tensor * kvcast_build_attn(kvcast_context * kv, ggml_context * ctx, ggml_cgraph * gf, int mode, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * v, ggml_tensor * mask, bool plain, float kq_scale, int il);
