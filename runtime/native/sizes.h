// What is allocated for a context, stated once: attaching goes through it to allocate, kvcast_sizes_of to count.
#pragma once

#include "context.h"
#include "pool.h"

#include <algorithm>

namespace kvcast {

// f(array, n elements) for every array of kv, whose info and summary (or none) are set
template <class F>
void for_each_array(kvcast_context & kv, const kvcast_params & params, F && f) {
    const auto & info = kv.info;
    const size_t rows = (size_t) info.n_layer * info.n_head_kv;
    const size_t taps = (size_t) info.n_layer * info.max_taps;
    f(kv.blocks, rows * info.n_blocks);
    f(kv.n_listed, rows);
    f(kv.scores, rows * info.n_blocks);
    f(kv.history_scores, taps * info.n_head_kv * info.n_blocks);
    f(kv.lse, taps * info.n_head);
    f(kv.trace_q, params.trace & KVCAST_TRACE_HEAD ? taps * info.n_head * info.head_dim_k : 0);
    f(kv.trace_scores, params.trace & KVCAST_TRACE_SCORES ? taps * info.n_head * info.n_blocks : 0);
    f(kv.cell_pos, info.n_cells);
    f(kv.block_max_pos, info.n_blocks);
    f(kv.all_blocks, info.n_blocks);
    f(kv.part_block_sum, (size_t) info.n_head * info.n_blocks);
}

// the same of a summary, whose numbers of channels and blocks it sets
template <class F>
void for_each_array(kvcast_summary & s, const kvcast_info & info, F && f) {
    const int dim = info.head_dim_k;
    const size_t rows = (size_t) info.n_layer * info.n_head_kv;
    s.n_channels = std::min(std::max(8, dim / 4), dim);
    s.n_probed = std::min({std::max(4, dim / 8), dim, MAX_CHANNELS});
    s.n_blocks = (info.n_blocks + 15) / 16 * 16;
    f(s.codes, rows * s.n_channels * s.n_blocks * KVCAST_BLOCK);
    f(s.means, rows * dim * s.n_blocks);
    f(s.channels, rows * s.n_channels);
    f(s.center, rows * dim);
    f(s.scale, rows * dim);
    f(s.spread, rows * dim);
    f(s.q_power, rows * dim);
    f(s.n_done, rows);
    f(s.n_topk, rows);
    f(s.n_chosen, rows);
    f(s.threshold, rows);
    f(s.cells, rows);
    f(s.pieces, (size_t) info.n_head_kv * s.n_blocks * KVCAST_BLOCK); // enough for any grain
    f(s.pause, rows);
    f(s.wait, rows);
    f(s.weights, rows * info.n_blocks);
    f(s.estimates, rows * info.n_blocks);
    f(s.rest_to_chosen, rows);
    f(s.shares, rows);
}

// Makes a pool's tensors, without memory. Each group of them lies in one buffer on the device: the slots, the two staging buffers, what a
// step leaves (outbox) and what it is sent (inbox).
struct pool_groups {
    std::vector<ggml_tensor *> slots;
    std::vector<ggml_tensor *> staging[2];
    std::vector<ggml_tensor *> outbox;
    std::vector<ggml_tensor *> inbox;
};
pool_groups make_pool_tensors(kvcast_pool & pool, const kvcast_info & info, int n_blocks, int staging_share);

} // namespace kvcast
