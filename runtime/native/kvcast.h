// kvcast: block-sparse attention over llama.cpp's KV cache in host memory. C API, usable from any binding.
//
// A kvcast context is attached to a llama_context whose KV cache lies in host memory (offload_kqv = false) and which uses
// flash attention. The caller owns the loop: choose a mode, write the block lists, call llama_decode(), read the scores.
// Nothing here is thread safe unless it says so: all calls, and llama_decode(), come from one thread at a time.
#pragma once

#include "llama.h"

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KVCAST_BLOCK 16 // cells per block

struct kvcast_context;
struct kvcast_watch;

enum kvcast_mode {
    KVCAST_DENSE = 0,   // stock llama.cpp
    KVCAST_HISTORY = 1, // stock attention; beside it the block scores of up to max_taps queries
    KVCAST_SPARSE = 2,  // batches of one token attend to the listed blocks; larger batches are dense
    KVCAST_VERIFY = 3,  // as history, but the attention too is kvcast's: K and V are read once for all tokens of a batch. History where a
                        // layer is not the CPU's
};

enum kvcast_trace {
    KVCAST_TRACE_NONE = 0,
    KVCAST_TRACE_HEAD = 1,   // keep the queries
    KVCAST_TRACE_SCORES = 2, // keep the scores of every query head
};

// Served are the layers that attend to the whole context; sliding-window layers beside them are llama.cpp's own. Layers are numbered
// among the served ones, 0 to n_layer - 1; kvcast_model_layers says which of the model's they are.

// Called when a layer's attention of a history or sparse step is complete, from a compute thread; layer: the model's.
// scores: [n_taps][n_head_kv][stride] floats, group means; in a sparse step in the order of the layer's block lists.
// Anything but 0 aborts the step: llama_decode() returns 2 and the step's tokens leave the cache.
typedef int (*kvcast_attention_callback)(
        void * user, int32_t layer, int32_t pos, const float * scores, int32_t n_taps, int32_t n_head_kv, int32_t stride);

struct kvcast_params {
    int32_t max_taps;      // largest batch in history mode
    int32_t trace;         // enum kvcast_trace
    int32_t summary;       // 1: keep a summary of the keys, so that a step can choose blocks by its own query
    int32_t pool_blocks;   // 0: attention in place, on the CPU. Else the device path: block slots per layer and KV head in the
                           // mean, a multiple of 16, on the device that computes the layers
    int32_t staging_share; // one upload can carry the pool's slots divided by this
};

struct kvcast_info {
    int32_t n_layer; // served
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim_k;
    int32_t head_dim_v;
    int32_t n_cells;
    int32_t n_blocks; // blocks of the whole cache: the stride of every per-block array
    int32_t max_taps;
    int32_t type_k; // enum ggml_type
    int32_t type_v;
    float kq_scale;      // logit = kq_scale * q.k
    int64_t k_row_bytes; // bytes of K of one cell of one layer, all heads
    int64_t v_row_bytes;
    int64_t scratch_bytes; // host memory held by kvcast itself, summary included
    int64_t summary_bytes;
    int64_t pinned_bytes; // of the cache, in memory that the GPU copies from directly; 0: no such device, -1: it refused
};

struct kvcast_pool_info {
    const char * device; // name, NULL without a pool
    int32_t n_slots;     // in all: layers x KV heads x pool_blocks
    int32_t n_staging;
    int64_t k_block_bytes;
    int64_t v_block_bytes;
    int64_t pool_bytes; // on the device: the slots, both staging buffers, what a step leaves to be read back
    int64_t staging_bytes;
    int64_t tap_bytes;
    int32_t n_on_device; // attention nodes of the last step's graph that the scheduler placed there
};

struct kvcast_stats {
    int64_t n_steps;            // sparse steps since the last reset
    int64_t attention_us;       // time in the attention op of those steps, first thread in to last thread out
    int64_t blocks_read;        // blocks read by those steps, summed over layers and KV heads
    int64_t choose_us;          // time in choosing blocks, likewise
    int64_t summary_bytes_read; // by choosing
    int64_t device_us;          // that kvcast_collect waited for the device, the device path's steps
};

// What a context holds besides llama.cpp's own, in bytes.
struct kvcast_sizes {
    int64_t scratch; // lists and scores, on the host
    int64_t summary; // of the keys, likewise
    int64_t pool;    // on the device: slots, both staging buffers, what a step is sent and leaves
    int64_t staging;
    int64_t taps;
    int64_t mirrors; // of the last two, on the host, pinned where that can be
    int64_t stream;  // K and V of two layers on the device while a large batch runs, where all layers are served and on one GPU
    int64_t landing; // and its pinned memory on the host
};

LLAMA_API const char * kvcast_version(void);
// Of a context of this shape (all of info but kq_scale and the bytes that kvcast holds), without making one. n_batch: tokens of the
// largest batch on a GPU. Dimensions must be positive, and heads whole blocks of the cache's types; the arrays that only checks of drafts
// use, made at the first of them, are not in it.
LLAMA_API struct kvcast_sizes kvcast_sizes_of(struct kvcast_info shape, struct kvcast_params params, int32_t n_batch);

// NULL on refusal; then error (a buffer of n_error bytes) holds one sentence that says why.
LLAMA_API struct kvcast_context * kvcast_attach(struct llama_context * ctx, struct kvcast_params params, char * error, int32_t n_error);
// Stock behaviour again. Must come before llama_free(). NULL is ignored.
LLAMA_API void kvcast_detach(struct kvcast_context * kv);

LLAMA_API struct kvcast_info kvcast_get_info(const struct kvcast_context * kv);
LLAMA_API const int32_t * kvcast_model_layers(const struct kvcast_context * kv); // [n_layer], ascending

LLAMA_API void kvcast_set_mode(struct kvcast_context * kv, int32_t mode);
// Tells that cells from first_cell on were edited other than by llama_decode() appending to them.
LLAMA_API void kvcast_invalidate(struct kvcast_context * kv, int32_t first_cell);
// Makes the running or the next llama_decode() stop between two nodes and return 2. Safe from any thread.
LLAMA_API void kvcast_abort(struct kvcast_context * kv);
LLAMA_API void kvcast_clear_abort(struct kvcast_context * kv);
// Why a grammar failed in the last calls of this thread that made, applied or advanced one, "" otherwise; asking forgets it. The sampler
// allows any token afterwards: the caller ends the text.
LLAMA_API const char * kvcast_grammar_error(void);

// Ends what takes long from outside: loading a model, and llama_decode() of any context, with or without a kvcast context. A watch says
// stop when kvcast_watch_stop was called, from any thread, or when poll returns 0; poll (or NULL) is asked five times a second at most, by
// the thread that loads or decodes, so that it can look for signals.
LLAMA_API struct kvcast_watch * kvcast_watch_new(int32_t (*poll)(void));
LLAMA_API void kvcast_watch_free(struct kvcast_watch * watch); // after what was given it
LLAMA_API void kvcast_watch_stop(struct kvcast_watch * watch, int32_t stop);
// For llama_set_abort_callback and for llama_model_params.progress_callback, with the watch as their data.
LLAMA_API bool kvcast_watch_stops(void * watch);
LLAMA_API bool kvcast_watch_goes_on(float progress, void * watch);
// Callbacks for a callee that takes one argument: they call user, an int64_t (*)(const void * call), with what they were called with.
// Without a user nothing is called.
// Python's own functions lose what a signal handler raises as they begin; a generator's send does not, and takes one argument.
struct kvcast_log_call {
    int32_t level;
    const char * text;
};
struct kvcast_attention_call {
    int32_t layer;
    int32_t pos;
    const float * scores;
    int32_t n_taps;
    int32_t n_head_kv;
    int32_t stride;
};
struct kvcast_io_call {
    void * data;
    int64_t n_bytes;
};
LLAMA_API void kvcast_log_by_one(enum ggml_log_level level, const char * text, void * user);
LLAMA_API int kvcast_attention_by_one(
        void * user, int32_t layer, int32_t pos, const float * scores, int32_t n_taps, int32_t n_head_kv, int32_t stride);
LLAMA_API int64_t kvcast_io_by_one(void * user, void * data, int64_t n_bytes);
// Lets a kvcast context ask a watch between two nodes, too; NULL: none.
LLAMA_API void kvcast_set_watch(struct kvcast_context * kv, struct kvcast_watch * watch);

// The reason of the last llama_decode() that returned 2 on our account, "" otherwise.
LLAMA_API const char * kvcast_last_error(const struct kvcast_context * kv);

LLAMA_API void kvcast_set_attention_callback(struct kvcast_context * kv, kvcast_attention_callback fn, void * user);

// Block lists of the next sparse steps, written by the caller: ids ascending, the block of the new token included.
LLAMA_API int32_t * kvcast_blocks(struct kvcast_context * kv);   // [n_layer][n_head_kv][n_blocks]
LLAMA_API int32_t * kvcast_n_listed(struct kvcast_context * kv); // [n_layer][n_head_kv]

// Blocks that the step itself chooses, only with params.summary: each row adds to its list, behind the listed ones, the
// n_topk blocks of [begin, end) that are not listed and have the largest weight * (attention estimated with the step's query).
// The blocks of that range must be complete. NULL without a summary.
LLAMA_API int32_t * kvcast_n_topk(struct kvcast_context * kv); // [n_layer][n_head_kv]
LLAMA_API float * kvcast_weights(struct kvcast_context * kv);  // [n_layer][n_head_kv][n_blocks]
LLAMA_API void kvcast_set_topk_range(struct kvcast_context * kv, int32_t begin, int32_t end);
// Makes every row choose in the next step. It must be called when lists, n_topk or the range were changed; otherwise rows
// whose choice hardly changes choose again only at every second, then at every fourth step, and keep it in between.
LLAMA_API void kvcast_reselect(struct kvcast_context * kv);
// Which channels the summary keeps, from the store and the queries of the last history batch; before its first use, and
// again when the content has changed much. Costs a pass over 64 blocks of every layer; the keys themselves are summarised in the steps.
LLAMA_API void kvcast_prepare_summary(struct kvcast_context * kv);
// What the choice of channels left, which the store alone does not give again: to be kept with a saved state. Bytes, 0 without a
// summary; copies out; whether such bytes, of anybody's, can be taken in; copies in what can, after which the keys are summarised
// anew in the steps where it differs from what is there.
LLAMA_API int64_t kvcast_summary_state_bytes(const struct kvcast_context * kv);
LLAMA_API void kvcast_get_summary_state(const struct kvcast_context * kv, uint8_t * dst);
LLAMA_API bool kvcast_check_summary_state(const struct kvcast_context * kv, const uint8_t * src, int64_t n_bytes);
LLAMA_API bool kvcast_set_summary_state(struct kvcast_context * kv, const uint8_t * src, int64_t n_bytes);
// What a row chooses: blocks of 16 tokens (grain 16, the default), or as many tokens in pieces of 4 or singly, by their estimates alone.
// Behind the listed blocks lie then those that hold a chosen token, with the scores of what was chosen. What was chosen before is
// forgotten. Not 0: there is no summary, or no such grain.
LLAMA_API int32_t kvcast_set_grain(struct kvcast_context * kv, int32_t grain);
// Of the last sparse step: blocks behind the listed ones, NULL without a summary; and the tokens that a row chose, by their cells,
// ascending, n of them: none with a grain of blocks.
LLAMA_API const int32_t * kvcast_n_chosen(const struct kvcast_context * kv); // [n_layer][n_head_kv]
LLAMA_API const int32_t * kvcast_chosen_cells(const struct kvcast_context * kv, int32_t layer, int32_t head, int32_t * n);
// Of the last sparse step, for rows that chose: the estimates of the range, in units of the attention that the first and the
// newest block got; and the share of the whole attention that the step attended to, estimated.
LLAMA_API const float * kvcast_estimates(const struct kvcast_context * kv); // [n_layer][n_head_kv][n_blocks]
LLAMA_API float * kvcast_shares(struct kvcast_context * kv);                // [n_layer][n_head_kv]

// The device path. A pool of slots, each one block of one KV head, lies beside the compute; a sparse step attends to the slots, and
// kvcast_blocks is the table: entry i of a row is the block in slot i, -1 for none; n_listed, the same for all heads of a layer,
// how many slots are in use. The slots of a row: n_sink of the first blocks; a ring of n_window, block b at n_sink + b % n_window;
// then critical blocks, all of them complete. The caller writes the table, and moves what it says into the slots:
// fill a staging buffer, upload it (any thread), scatter it (the thread of llama_decode).
LLAMA_API struct kvcast_pool_info kvcast_get_pool_info(const struct kvcast_context * kv);
// Slots per KV head by layer, multiples of 16 whose sum is at most n_layer*pool_blocks; empties the table. 0 on success.
LLAMA_API int32_t kvcast_pool_plan(struct kvcast_context * kv, const int32_t * n_slots, int32_t n_sink, int32_t n_window);
// Staging buffer 0 or 1 on the host: K of n_staging blocks, then V of them; and beside it the slots that they go to, counted over
// layers, KV heads and slots in this order.
LLAMA_API uint8_t * kvcast_staging(struct kvcast_context * kv, int32_t buffer);
LLAMA_API int64_t * kvcast_staging_slots(struct kvcast_context * kv, int32_t buffer);
// Brings the first n blocks of a staging buffer to the device, and returns when they are there.
LLAMA_API void kvcast_pool_upload(struct kvcast_context * kv, int32_t buffer, int32_t n);
LLAMA_API int32_t kvcast_pool_scatter(struct kvcast_context * kv, int32_t buffer, int32_t n); // 0 on success
// After each llama_decode(): what is still on a GPU of K and V of its tokens comes into the store; after a sparse step of the
// device path the trace is filled. 1: an attention callback failed; 2: kvcast_abort was called; then the caller must remove the tokens.
LLAMA_API int32_t kvcast_collect(struct kvcast_context * kv);
// Frees what only prompts need on a GPU: K and V of two layers, through which large batches attend to the store.
LLAMA_API void kvcast_end_prompt(struct kvcast_context * kv);
// Its scores, from what was read back; the table may have changed since: n_listed [n_layer*n_head_kv] is that of the step. May run
// beside the next step, until that is collected.
LLAMA_API void kvcast_take_taps(struct kvcast_context * kv, const int32_t * n_listed);
// Slots in use that differ from the block of the store that the table names; 0 is right. Reads the whole pool back.
LLAMA_API int64_t kvcast_pool_verify(struct kvcast_context * kv);
// What the query of the step that was collected last would have given every block of the store, exactly: scores [n_head_kv][n_blocks].
LLAMA_API void kvcast_score_store(struct kvcast_context * kv, int32_t layer, int32_t head, float * scores);

// Results of the last step.
LLAMA_API const float * kvcast_scores(const struct kvcast_context * kv);         // sparse: [n_layer][n_head_kv][n_blocks], list order
LLAMA_API const float * kvcast_history_scores(const struct kvcast_context * kv); // history: [n_layer][max_taps][n_head_kv][n_blocks]
LLAMA_API const float * kvcast_lse(const struct kvcast_context * kv);            // [n_layer][max_taps][n_head], natural log
LLAMA_API const float * kvcast_trace_q(const struct kvcast_context * kv);        // [n_layer][max_taps][n_head][head_dim_k], or NULL
LLAMA_API const float * kvcast_trace_scores(const struct kvcast_context * kv);   // [n_layer][max_taps][n_head][n_blocks], or NULL

// The store of one layer: n_cells rows of k_row_bytes (v_row_bytes) each, in the cache's own type.
LLAMA_API const void * kvcast_k_data(const struct kvcast_context * kv, int32_t layer);
LLAMA_API const void * kvcast_v_data(const struct kvcast_context * kv, int32_t layer);

LLAMA_API struct kvcast_stats kvcast_get_stats(const struct kvcast_context * kv);
LLAMA_API void kvcast_reset_stats(struct kvcast_context * kv);

// The state of a context, kvcast attached or not, to and from a file that the caller reads and writes: the bytes of
// llama_state_get_data. A kvcast_io moves n_bytes at a time, in order, and returns as many; anything else ends the call.
typedef int64_t (*kvcast_io)(void * user, void * data, int64_t n_bytes);
// Bytes written, -1 when a call of `write` failed.
LLAMA_API int64_t kvcast_write_state(struct llama_context * ctx, kvcast_io write, void * user);
// Whether n_bytes, of anybody's, are a whole state of this model with n_tokens tokens of one sequence, position by position, and
// every key and value a number of a sane size. Reads them all; the context stays as it is. If not, error says why.
LLAMA_API bool kvcast_check_state(
        struct llama_context * ctx, kvcast_io read, void * user, int64_t n_bytes, int32_t n_tokens, char * error, int32_t n_error);
// Takes in a state that was checked. When it cannot be, error says why and the context is empty.
LLAMA_API bool kvcast_read_state(struct llama_context * ctx, kvcast_io read, void * user, int64_t n_bytes, char * error, int32_t n_error);

#ifdef __cplusplus
}
#endif
