// Attention arithmetic over lists of blocks. The same source is compiled once per instruction set (kernels-impl.h).
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvcast {

// K or V of one KV head: row of cell c at data + c*row_bytes, n values wide.
struct rows {
    const char * data;
    size_t row_bytes;
    int n;
    void (*to_float)(const void * src, float * dst, int64_t n); // nullptr: f16, by our own vector code
};

// A run of listed blocks of one KV head, for the queries of its group; or of single cells, 16 taken together as a block is.
struct task {
    rows k;
    rows v;
    const int32_t * blocks; // [n_blocks] block ids
    const int32_t * cells;  // nullptr, or instead of blocks (attend): [n_blocks*16] cells
    int n_blocks;
    const int32_t * cell_pos;      // [n_cells] position of each cell, INT32_MAX when not attended
    const int32_t * block_max_pos; // largest of a block's cell_pos
    const float * q;               // [n_q][k.n], scaled
    const int32_t * q_pos;         // [n_q]
    int n_q;
    float * work; // attend: [n_q*n_blocks*16 + 16*max(k.n, v.n)]; score: [16*k.n + n_q*16]
    // out
    float * max;       // [n_q] largest logit, -inf when nothing was attended
    float * sum;       // [n_q] sum of exp(logit - max)
    float * out;       // attend: [n_q][v.n], weighted by exp(logit - max), not normalised
    float * block_sum; // attend: [n_q][n_blocks] of exp(logit - max), of cells [n_q][n_blocks*16]; score: of exp(logit - block_max)
    float * block_max; // score: [n_q][n_blocks]
};

// Attention of the queries of a group, estimated from the summaries of keys (summary.h): some channels of every key, the
// other channels by the mean of the key's block.
struct estimate_task {
    const int8_t * const * channels; // [n_channels] codes of one channel, one for each cell
    const int8_t * means;            // [blocks/16][dim][16] codes of the blocks' means
    int n_channels;                  // at most MAX_CHANNELS
    int dim;
    const float * channel_q; // [n_q][n_channels], times the scale of the codes
    const float * mean_q;    // [n_q][dim], likewise, 0 for the channels above
    const float * offset;    // [n_q] added to the logits
    int n_q;                 // at most MAX_GROUP
    int begin;               // blocks, a multiple of 16
    int end;                 // codes must be readable up to the next multiple of 16
    float * out;             // [end], from begin on: sum over queries and cells of 2^logit
    int grain;               // 1 or 4: also of pieces of so many cells; 16: blocks alone
    float * pieces;          // [end*16/grain], likewise, up to that multiple
};
constexpr int MAX_CHANNELS = 64;
constexpr int MAX_GROUP = 64;

struct kernels {
    const char * name;
    void (*attend)(const task & t);
    void (*score)(const task & t); // as attend without V; leaves max and sum alone
    void (*estimate)(const estimate_task & t);
    // The indices of the k largest of x [n], ascending, to out [k + 1]; of equal ones the earlier. Negative numbers only when no others
    // are left, none of them larger than another. work [n + 1]; hint: about the k-th largest, as bits, or 0; a better one comes back.
    void (*topk)(const float * x, int n, int k, int32_t * out, int32_t * work, int32_t * hint);
};

// The best for this machine; KVCAST_KERNELS=avx512|avx2|generic forces one (tests).
const kernels & best_kernels();

extern const kernels kernels_generic;
#if defined(KVCAST_X86)
extern const kernels kernels_avx2;
extern const kernels kernels_avx512;
#endif

} // namespace kvcast
