// State behind the C API (kvcast.h), shared by the files here.
#pragma once

#include "kernels.h"
#include "kvcast.h"

#include "ggml-backend.h"

#include <atomic>
#include <limits>
#include <memory>
#include <string>
#include <vector>

class llama_kv_cache;
struct kvcast_pool;
struct kvcast_stream;
struct ggml_context;
struct ggml_tensor;
struct llama_ubatch;

struct kvcast_context;

// a mode of graphs only: dense, with K and V streamed to the GPU
constexpr int KVCAST_STREAM = 4;

namespace kvcast {
constexpr int32_t NEVER = std::numeric_limits<int32_t>::max(); // position of an empty cell
constexpr int64_t MIN_ON_GPU = 32;                             // tokens for which ggml too brings host memory to a GPU
} // namespace kvcast

// Of the store's keys, what lets the attention to any block be estimated from a small part of the bytes: for every KV head
// the `n_channels` channels that move the logits most, as 8-bit codes of every key, and the mean key of every block. A step
// looks at the `n_probed` of them that its own query weighs most. After Double Sparsity (arXiv 2408.07092: channels chosen
// offline) and SparQ (arXiv 2312.04985: by the query), with block means for the rest.
// A code c of channel i stands for center[i] + scale[i]*c.
struct kvcast_summary {
    int n_channels = 0;
    int n_probed = 0;
    int n_blocks = 0; // of the cache, rounded up to what the kernels read at once

    // per row (layer and KV head)
    std::vector<int8_t> codes;     // [row][n_channels][n_blocks*16]
    std::vector<int8_t> means;     // [row][n_blocks/16][head_dim][16]
    std::vector<int32_t> channels; // [row][n_channels]
    std::vector<float> center;     // [row][head_dim]
    std::vector<float> scale;      // [row][head_dim]
    std::vector<float> spread;     // [row][head_dim] deviation of a key from the mean of its block
    std::vector<float> q_power;    // [row][head_dim] mean square of recent queries
    std::vector<int> n_done;       // [row] blocks summarised; 0: channels are not chosen either

    // the step, written by the caller: see kvcast.h
    std::vector<int32_t> n_topk;
    std::vector<float> weights;
    int topk_begin = 0;
    int topk_end = 0;
    int grain = KVCAST_BLOCK;

    std::vector<int32_t> n_chosen;           // [row] blocks behind the listed ones: those chosen, or that hold a chosen token
    std::vector<std::vector<int32_t>> cells; // [row] with a grain below a block: those chosen, ascending
    std::vector<float> pieces;               // the same: estimates of the layer that runs, [n_head_kv][n_blocks*16/grain]
    std::vector<int32_t> threshold;          // [row] of the last choice: a hint to the next
    std::vector<int> pause;                  // [row] steps from one choice to the next, less one
    std::vector<int> wait;                   // [row] steps until the next choice
    std::vector<float> estimates;            // [row][cache blocks]
    std::vector<float> rest_to_chosen;       // [row] estimates of what is not attended to / of the chosen blocks
    std::vector<float> shares;               // [row]

    float * pieces_of(int head) { return &pieces[(size_t) head * n_blocks * (KVCAST_BLOCK / grain)]; }
};

// Userdata of one layer's graph nodes. Nodes run one after another, so everything but the counters is written by one thread.
struct kvcast_layer {
    kvcast_context * kv = nullptr;
    int id = 0;         // among the served layers
    int il = 0;         // of the model
    void * k = nullptr; // rows of the store
    void * v = nullptr;
    float scale = 1.0f; // of the logits
    bool plain = false; // the hook met it, and nothing but the mask is added to its logits

    // a contiguous part of one KV head's list, or of its chosen cells, 16 for one; history: some tokens of a batch, for one KV head;
    // verify: blocks of one KV head, for all tokens
    struct part {
        int head;
        int begin;
        int end;
        bool cells = false;
    };

    std::vector<part> parts;
    std::vector<int> n_parts;                       // [n_head_kv]
    std::atomic<int> next{0};                       // next part to take
    std::unique_ptr<std::atomic<int>[]> parts_done; // [n_head_kv]
    std::atomic<int> n_done{0};                     // shares of the work
    int64_t begin_us = 0;

    // choosing blocks: chunks of blocks of one KV head, chunk by chunk, head by head
    std::vector<int> selecting_heads; // heads that choose in this step
    std::atomic<int> next_chunk{0};
    std::unique_ptr<std::atomic<int>[]> chunks_done; // [n_head_kv]
    std::unique_ptr<std::atomic<bool>[]> chosen;     // [n_head_kv] the list is complete
    std::atomic<int> heads_done{0};
    int64_t select_begin_us = 0;
};

struct kvcast_context {
    llama_context * ctx = nullptr;
    const llama_kv_cache * cache = nullptr;
    kvcast_info info = {};
    const kvcast::kernels * kernels = nullptr;
    int mode = KVCAST_DENSE;

    // what the caller writes and reads: layouts in kvcast.h
    std::vector<int32_t> blocks;
    std::vector<int32_t> n_listed;
    std::vector<float> scores;
    std::vector<float> history_scores;
    std::vector<float> lse;
    std::vector<float> trace_q;
    std::vector<float> trace_scores;

    // the step
    std::vector<int32_t> cell_pos;      // [n_cells], INT32_MAX: nothing there
    std::vector<int32_t> block_max_pos; // [n_blocks], INT32_MAX when a cell of it is not to be attended
    size_t n_known = 0;                 // used cells that cell_pos knows of
    bool known = false;
    int n_used_blocks = 0;           // one past the last block with a used cell
    std::vector<int32_t> q_pos;      // [n_taps]
    std::vector<int32_t> all_blocks; // 0, 1, 2, ...

    std::vector<std::unique_ptr<kvcast_layer>> layers; // served
    std::vector<int32_t> model_layers;                 // of them, in the model

    // results of the parts of the layer that runs, see kvcast_layer::part
    std::vector<float> part_max;
    std::vector<float> part_sum;
    std::vector<float> part_out;
    std::vector<float> part_block_sum; // [n_head_kv][group*n_blocks], a part's rows start at group*begin
    std::vector<float> part_cell_sum;  // [n_head_kv][group*n_cells_max], likewise, of cells
    int n_cells_max = 0;               // cells that a row chooses, at most

    // of a verify batch and the layer that runs: what each query gives each block, relative to a maximum [n_head_kv][n_q][n_used_blocks]
    std::vector<float> verify_sum;
    std::vector<float> verify_max;

    std::unique_ptr<kvcast_summary> summary; // nullptr: none
    std::unique_ptr<kvcast_pool> pool;       // nullptr: attention in place (the host path)
    std::unique_ptr<kvcast_stream> stream;   // nullptr: large batches as in stock llama.cpp

    float sum_factor = 1.0f; // of block sums of the last history graph on a GPU

    std::vector<void *> pinned; // buffers of the store that are registered with the device

    kvcast_attention_callback callback = nullptr;
    void * callback_user = nullptr;

    std::atomic<bool> abort{false};
    kvcast_watch * watch = nullptr; // not ours
    std::string error;
    kvcast_stats stats = {};

    kvcast_context();
    ~kvcast_context();

    int group() const { return info.n_head / info.n_head_kv; }
    // of large history batches; other types want rows that lie together, and traces are kept on the host
    bool scores_on_gpu() const { return info.type_k == GGML_TYPE_F16 && trace_q.empty(); }
    kvcast_layer * layer_of(int il) const; // nullptr when the model's layer is not served

    // before the graph runs; cells: indices of the cells that the tokens of the batch go to
    void begin_step(const llama_ubatch & ubatch, const int64_t * cells, bool pooled = false);
    void fail(const std::string & why);
    // asked by the thread of llama_decode, between two nodes
    bool stops();
    // blocks of a row in a sparse step: those listed by the caller and those that it chooses, or the tokens in place of so many
    int n_attended(size_t row) const { return n_listed[row] + (summary ? summary->n_topk[row] : 0); }
    // whether a row chooses tokens, not blocks
    bool chooses_cells(size_t row) const { return summary && summary->grain < KVCAST_BLOCK && summary->n_topk[row] > 0; }
    // where the scores of a head's cells lie, of the layer that runs: [group][n of the part] behind group*begin
    float * cell_scores(int head) { return &part_cell_sum[(size_t) head * group() * n_cells_max]; }

    // what the kernels need to know of every block of a layer, for n_q packed queries
    kvcast::task task_of(const kvcast::rows & k, const float * q, const int32_t * q_pos, int n_q, float * work) const;

    // of a layer, before choosing: which channels to keep, from a sample of its keys and the recent queries
    void prepare_summary(int layer);
    void note_queries(int layer, const ggml_tensor * q);
    void estimate_shares(int layer);

    // registers the store with the GPU, so that copies need no detour
    void pin_store();
    void unpin_store();

  private:
    void update_cells(const llama_ubatch & ubatch, const int64_t * cells);
    bool check_lists(int32_t new_block);
    void plan_sparse();
    void plan_history(int n_taps);
    void plan_verify(int n_tokens);
};

namespace kvcast {

// What each block of a row got, of probabilities [n_blocks*16, ...] that lie together: [n_blocks, ...], sums of 16 or, where a device is
// better at that, their means; `factor` makes sums of it.
ggml_tensor * block_sums(ggml_context * ctx, ggml_tensor * probs, ggml_backend_dev_t device, float & factor);

// of a step, by token and query head
struct queries {
    const char * data;
    size_t head_bytes;
    size_t token_bytes;
    int dim;

    explicit queries(const ggml_tensor * q);
    queries(const float * q, int dim) : data((const char *) q), head_bytes(sizeof(float) * dim), token_bytes(0), dim(dim) {}
};

// floats of this thread, `n` at least; the content is lost at the next call
float * thread_scratch(size_t n);
// What a query's blocks got, from the sums and maxima of the kernels: weight * share is added to shares [n], the share is written
// to own [n] (or nullptr). Returns the log-sum-exp.
float add_shares(const float * sum, const float * max, int n, float weight, float * shares, float * own);
// The thread that completes the last of a layer's n shares of work reports the layer.
void complete_share(kvcast_layer & layer, int n, const ggml_tensor * q, int n_taps);
// the attention node of a verify batch (verify.cpp)
void op_verify(ggml_tensor * dst, int ith, int nth, void * layer);
// K of one head in the store
rows keys_of(const kvcast_context & kv, int layer, int head);
// K or V of one head, of a view of the cache [head_dim, n_head_kv, n_cells]
rows head_rows(const ggml_tensor * t, int head);
// queries [begin, end) of the group of a KV head, scaled: dst [(end - begin)*group][head_dim]
void pack_queries(const queries & q, int head, int group, int begin, int end, float scale, float * dst);
// Every KV head of a layer chooses its n_topk blocks (summary.cpp). Called by all threads of the attention node; returns when
// there is nothing left to take up: a head's list is complete when layer.chosen says so.
void select_blocks(kvcast_layer & layer, const queries & q, const ggml_tensor * k, int n_threads);
// Of a row whose blocks are estimated: its best n_topk blocks, or as many tokens, in place of those of the step before (selection.cpp).
void select_row(kvcast_context & kv, int layer, int head);

} // namespace kvcast
