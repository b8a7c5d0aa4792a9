// The device path: a pool of block slots beside the compute (pool.cpp).
#pragma once

#include "kvcast.h"

#include "ggml-cpp.h"
#include "llama-graph.h"

#include <map>
#include <vector>

struct kvcast_context;

// A slot holds one block of one KV head: 16 rows of K and of V. A layer's slots lie together, head by head: first the sink's,
// then the ring of the window (block b at n_sink + b % n_window), then those of the critical blocks.
struct kvcast_pool {
    ggml_backend_dev_t device = nullptr;
    ggml_backend_ptr queue; // for uploads beside the compute
    ggml_context_ptr tensors;
    std::vector<ggml_backend_buffer_ptr> buffers;

    ggml_tensor * k = nullptr; // [head_dim_k, n_slots*16], of the cache's type
    ggml_tensor * v = nullptr;
    ggml_tensor * k_raw = nullptr; // the same bytes as F16 [k_block_bytes/2, n_slots]
    ggml_tensor * v_raw = nullptr;
    ggml_tensor * k_words = nullptr; // the same bytes as I32, a row of K a row
    ggml_tensor * v_words = nullptr;

    struct staging {
        uint8_t * host = nullptr;  // K of n_staging blocks, V of them, their slots
        ggml_tensor * k = nullptr; // F16 [k_block_bytes/2, n_staging]
        ggml_tensor * v = nullptr;
        ggml_tensor * slots = nullptr; // I64 [n_staging]
        bool scattering = false;       // the compute queue may still read it
    } staged[2];

    std::vector<ggml_context_ptr> scatters; // graphs that backends may still look at, until the queue is synchronised

    // read by the graph, sent before the step in one piece, `inbox`: what a backend's scheduler would copy tensor by tensor
    ggml_tensor * inbox = nullptr;
    ggml_tensor * rows = nullptr;     // I64 [n_head_kv*n_layer], rows of the pool where the new K and V go
    ggml_tensor * new_rows = nullptr; // I32, the same, for reading them
    ggml_tensor * masks = nullptr;    // F16: by number of slots of a layer [n_slots*16, group], every row the same: its cells
    std::map<int, size_t> mask_at;    // offsets of those in `masks`, by number of slots
    std::map<int, int> mask_n;        // slots in use that those on the host were made for
    size_t masks_at = 0;              // offset of `masks` in the inbox
    size_t inbox_used = 0;            // bytes
    uint8_t * sent = nullptr;         // the inbox on the host

    // written by the graph, read back after the step: one piece of memory, `outbox`
    ggml_tensor * outbox = nullptr;
    ggml_tensor * new_k = nullptr; // [head_dim_k, n_head_kv*n_layer], of the cache's type
    ggml_tensor * new_v = nullptr;
    ggml_tensor * q = nullptr;    // F32 [head_dim_k*n_head, n_layer], by rank
    ggml_tensor * taps = nullptr; // F32: of every layer [n_slots, n_head] attention probabilities, by rank
    uint8_t * received = nullptr; // the outbox on the host
    float tap_factor = 1.0f;      // makes sums over a block of the taps

    int n_slots = 0;
    int n_staging = 0;
    int64_t k_block_bytes = 0;
    int64_t v_block_bytes = 0;
    int64_t pool_bytes = 0;
    int64_t staging_bytes = 0;
    int64_t tap_bytes = 0;

    // the plan: which slots are whose
    int n_sink = 0;
    int n_window = 0;
    std::vector<int> layer_slots; // per KV head
    std::vector<int> layer_first; // its first slot: layers by rank
    std::vector<int> layer_rank;  // by their number of slots
    uint64_t plan = 0;            // counts the plans: graphs hold their addresses

    std::vector<ggml_tensor *> attention; // nodes of the last graph, one a layer
    int n_on_device = 0;                  // of them, -1: not counted yet
    bool step_open = false;               // a step ran whose results have not been collected
    int32_t new_cell = -1;
    int32_t seen_pos = -1;              // position of the query in `received`
    int seen_blocks = 0;                // n_used_blocks then
    std::vector<int32_t> seen_cell_pos; // cell_pos then: kvcast_score_store runs while the next step writes its own
    std::vector<int32_t> seen_block_max_pos;

    const float * received_at(const ggml_tensor * t) const;
    const float * query(int layer) const; // [n_head][head_dim_k]
};

namespace kvcast {

// bytes that a tensor takes in one of the pool's buffers
inline size_t pool_align(size_t n) { return (n + 255) / 256 * 256; }
// nullptr and a reason on refusal
std::unique_ptr<kvcast_pool> make_pool(const kvcast_context & kv, int n_blocks, int staging_share, std::string & why_not);
// the backend of the context that computes on the pool's device
ggml_backend_t main_queue(const kvcast_context & kv);
// a graph over the pool is about to be built
void begin_pool_graph(kvcast_context & kv);
// sends the inbox; false when the table is not fit for the step
bool send_inbox(kvcast_context & kv, int32_t new_cell);
ggml_tensor * build_pool_attention(kvcast_context & kv, ggml_context * ctx, ggml_cgraph * gf, ggml_tensor * q, ggml_tensor * k,
        ggml_tensor * v, float scale, int layer);

} // namespace kvcast
