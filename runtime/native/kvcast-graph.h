// What the patched llama.cpp calls: two hooks in the common attention builder (patches/README.md).
#pragma once

#include "llama-graph.h"

#include <memory>

struct kvcast_context;

// Wraps the input of a graph in history or sparse mode: fills the per-step tables, decides on reuse.
std::unique_ptr<llm_graph_input_attn_kv> kvcast_attn_input(std::unique_ptr<llm_graph_input_attn_kv> inp);

// Sparse mode: the attention output [head_dim_v*n_head, n_tokens] over the listed blocks.
// History mode: adds the score node to gf and returns nullptr, as does a batch that is dense: llama.cpp goes on as always.
// q [head_dim_k, n_head, n_tokens] F32; k, v: views of the cache [head_dim, n_head_kv, n_kv], token-major
ggml_tensor * kvcast_build_attn(kvcast_context * kv, ggml_context * ctx, ggml_cgraph * gf, int mode,
        ggml_tensor * q, ggml_tensor * k, ggml_tensor * v, float kq_scale, int il);
