// Prompts on a GPU whose KV cache lies in host memory: K and V of one layer after another pass through two buffers on the device,
// copied beside the compute of the layer before (prefill_stream.cpp).
#pragma once

#include "kvcast.h"

#include "ggml-cpp.h"

#include <future>
#include <memory>
#include <utility>
#include <vector>

struct kvcast_context;

struct kvcast_stream {
    ggml_backend_dev_t device = nullptr;
    ggml_backend_ptr queue; // for copies beside the compute

    // buffer 0 holds the even layers in turn, buffer 1 the odd ones
    ggml_context_ptr tensors;
    ggml_backend_buffer_ptr memory;
    ggml_tensor * k[2] = {}; // [n_embd_k, n_rows], of the cache's type
    ggml_tensor * v[2] = {};
    int64_t n_rows = 0; // cells that they hold
    uint64_t made = 0;  // counts the buffers: graphs hold their addresses

    // the last graph
    // by layer: the nodes that its new rows of K and V are made from, which come after the attention of the layer before; empty: it does not
    // stream. Backends reorder nodes and drop views: these two are sure to be seen, and to come before the rows are written.
    std::vector<std::pair<const ggml_tensor *, const ggml_tensor *>> marks;
    uint64_t made_for = 0;

    // the batch that runs
    std::vector<std::pair<int64_t, int64_t>> runs; // cells [first, end) that its tokens go to
    int64_t n_before = 0;                          // cells to bring to the device, [0, n_before)
    size_t next = 0;                               // layer that is reached next
    bool open = false;                             // the store still lacks rows of the last layers

    // new rows on their way to the store, of even and of odd layers: K of all, then V. A backend's pinned memory, as it may have
    // registered the store for reading only.
    ggml_backend_buffer_ptr landing[2];
    std::future<void> writer; // from there to the store
};

namespace kvcast {

// memory on the host that the device copies from and to, pinned where it can be; nullptr: there is none left
ggml_backend_buffer_ptr host_buffer(ggml_backend_dev_t device, size_t bytes);
// cells that a buffer is made for, to hold n of a cache's n_cells
int64_t stream_rows(int64_t n, int64_t n_cells);
// nullptr where the layers do not all lie on one GPU
std::unique_ptr<kvcast_stream> make_stream(const kvcast_context & kv);
// whether the graph that was built last streams and still finds its buffers
bool stream_is_current(const kvcast_stream & stream);
// before the graph runs; cells of its tokens
void begin_stream(kvcast_context & kv, const int64_t * cells, int64_t n_tokens);
// when it has run: the store is complete
void finish_stream(kvcast_context & kv);
// finishes, and frees the memory on the device
void release_stream(kvcast_context & kv);
// the scheduler's evaluation callback; user: kvcast_context
bool stream_callback(ggml_tensor * t, bool ask, void * user);

} // namespace kvcast
