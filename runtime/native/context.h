// State behind the C API (kvcast.h), shared by context.cpp (life cycle, per-step tables) and attention.cpp (graph nodes).
#pragma once

#include "kernels.h"
#include "kvcast.h"

#include <atomic>
#include <memory>
#include <string>
#include <vector>

class  llama_kv_cache;
struct ggml_tensor;
struct llama_ubatch;

struct kvcast_context;

// Userdata of one layer's graph node. Nodes run one after another, so everything but the counters is written by one thread.
struct kvcast_layer {
    kvcast_context * kv = nullptr;
    int              id = 0; // layer of the model
    float            scale = 1.0f; // of the logits

    // a contiguous part of one KV head's list; scores: a group of queries of one KV head
    struct part {
        int head;
        int begin;
        int end;
    };

    std::vector<part>                   parts;
    std::vector<int>                    n_parts;      // [n_head_kv]
    std::atomic<int>                    next{0};      // next part to take
    std::unique_ptr<std::atomic<int>[]> parts_done;   // [n_head_kv]
    std::atomic<int>                    heads_done{0};
    int64_t                             begin_us = 0;
};

struct kvcast_context {
    llama_context        * ctx   = nullptr;
    const llama_kv_cache * cache = nullptr;
    kvcast_info            info  = {};
    const kvcast::kernels * kernels = nullptr;
    int                    mode  = KVCAST_DENSE;

    // what the caller writes and reads: layouts in kvcast.h
    std::vector<int32_t> blocks;
    std::vector<int32_t> n_listed;
    std::vector<float>   scores;
    std::vector<float>   history_scores;
    std::vector<float>   lse;
    std::vector<float>   trace_q;
    std::vector<float>   trace_scores;

    // the step
    std::vector<int32_t> cell_pos;       // [n_cells], INT32_MAX: nothing there
    std::vector<int32_t> block_max_pos;  // [n_blocks], INT32_MAX when a cell of it is not to be attended
    size_t               n_known = 0;    // used cells that cell_pos knows of
    bool                 known   = false;
    int                  n_used_blocks = 0; // one past the last block with a used cell
    std::vector<int32_t> q_pos;          // [n_taps]
    std::vector<int32_t> all_blocks;     // 0, 1, 2, ...

    std::vector<std::unique_ptr<kvcast_layer>> layers;

    // results of the parts of the layer that runs, see kvcast_layer::part
    std::vector<float> part_max;
    std::vector<float> part_sum;
    std::vector<float> part_out;
    std::vector<float> part_block_sum;   // [n_head_kv][group*n_blocks], a part's rows start at group*begin

    kvcast_attention_callback callback = nullptr;
    void *                    callback_user = nullptr;

    std::atomic<bool> abort{false};
    std::string       error;
    kvcast_stats      stats = {};

    int group() const { return info.n_head/info.n_head_kv; }

    // before the graph runs; cells: indices of the cells that the tokens of the batch go to
    void begin_step(const llama_ubatch & ubatch, const int64_t * cells);
    void fail(const std::string & why);

private:
    void update_cells(const llama_ubatch & ubatch, const int64_t * cells);
    bool check_lists(int32_t new_block);
    void plan_sparse();
    void plan_history(int n_taps);
};
