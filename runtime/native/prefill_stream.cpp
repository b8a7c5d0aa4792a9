// A large batch attends on the GPU to a cache in host memory. The scheduler would copy each layer's K and V between two stops of
// the compute, and have the CPU write the new rows. Here the GPU writes them, the old rows of the next layer come up and the new
// rows of the layer before go down while a layer is computed. The scheduler stops once a layer, at its mark.
#include "prefill_stream.h"

#include "context.h"
#include "kvcast-graph.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>

static constexpr int64_t GROW = 16384;    // cells
static constexpr int64_t PIECE = 4 << 20; // bytes: a copy in one piece holds up small ones of the compute

int64_t kvcast::stream_rows(int64_t n, int64_t n_cells) { return std::min((n + GROW - 1) / GROW * GROW, n_cells); }

std::unique_ptr<kvcast_stream> kvcast::make_stream(const kvcast_context & kv) {
    const auto & model = kv.ctx->get_model();
    auto stream = std::make_unique<kvcast_stream>();
    stream->device = model.dev_layer(kv.model_layers[0]);
    for (const auto il : kv.model_layers) {
        if (model.dev_layer(il) != stream->device) {
            return nullptr;
        }
    }
    if (kv.info.n_layer != (int) model.hparams.n_layer()) {
        return nullptr; // sliding-window layers between them have a cache of their own
    }
    if (ggml_backend_dev_type(stream->device) != GGML_BACKEND_DEVICE_TYPE_GPU || kv.ctx->get_cparams().cb_eval) {
        return nullptr;
    }
    stream->queue.reset(ggml_backend_dev_init(stream->device, nullptr));
    return stream->queue ? std::move(stream) : nullptr;
}

ggml_backend_buffer_ptr kvcast::host_buffer(ggml_backend_dev_t device, size_t bytes) {
    auto * type = ggml_backend_dev_host_buffer_type(device);
    ggml_backend_buffer_ptr buffer(type ? ggml_backend_buft_alloc_buffer(type, bytes) : nullptr);
    if (!buffer) {
        buffer.reset(ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), bytes));
    }
    return buffer;
}

static void free_memory(kvcast_stream & s) {
    s.memory.reset();
    s.tensors.reset();
    s.n_rows = 0;
    s.made++;
}

// false when there is no memory left
static bool make_room(kvcast_context & kv, int64_t n_rows, int64_t n_new) {
    auto & s = *kv.stream;
    for (auto & landing : s.landing) {
        const size_t bytes = n_new * (kv.info.k_row_bytes + kv.info.v_row_bytes);
        if (!landing || ggml_backend_buffer_get_size(landing.get()) < bytes) {
            landing = kvcast::host_buffer(s.device, bytes);
            if (!landing) {
                return false;
            }
        }
    }
    if (n_rows <= s.n_rows) {
        return true;
    }
    free_memory(s);
    n_rows = kvcast::stream_rows(n_rows, kv.info.n_cells);
    s.tensors.reset(ggml_init({4 * ggml_tensor_overhead(), nullptr, true}));
    for (int i = 0; i < 2; ++i) {
        s.k[i] = ggml_new_tensor_2d(s.tensors.get(), (ggml_type) kv.info.type_k, (int64_t) kv.info.head_dim_k * kv.info.n_head_kv, n_rows);
        s.v[i] = ggml_new_tensor_2d(s.tensors.get(), (ggml_type) kv.info.type_v, (int64_t) kv.info.head_dim_v * kv.info.n_head_kv, n_rows);
    }
    s.memory.reset(ggml_backend_alloc_ctx_tensors_from_buft(s.tensors.get(), ggml_backend_dev_buffer_type(s.device)));
    if (!s.memory) {
        return false;
    }
    ggml_backend_buffer_clear(s.memory.get(), 0); // cells that are masked must not hold NaN
    s.n_rows = n_rows;
    return true;
}

bool kvcast_build_streamed(kvcast_context * kv, ggml_context * ctx, ggml_cgraph * gf, int mode, ggml_tensor * k_cur, ggml_tensor * v_cur,
        ggml_tensor * cells, int64_t n_kv, int il, ggml_tensor *& k, ggml_tensor *& v) {
    if (!kv || !kv->stream) {
        return false;
    }
    auto & s = *kv->stream;
    const auto & info = kv->info;
    if (il == 0) {
        kvcast::finish_stream(*kv);
        s.marks.clear();
        // scores of a history batch are computed where its keys are
        const bool fits = mode == KVCAST_STREAM || (mode == KVCAST_HISTORY && kv->scores_on_gpu());
        if (!fits || k_cur->ne[2] < kvcast::MIN_ON_GPU || !make_room(*kv, n_kv, k_cur->ne[2])) {
            return false;
        }
        s.made_for = s.made;
    } else if (s.marks.empty()) {
        return false;
    }
    const auto write = [&](ggml_tensor * to, ggml_tensor * rows, int64_t dim) {
        rows = ggml_is_contiguous(rows) ? rows : ggml_cont(ctx, rows);
        auto * written = ggml_set_rows(ctx, to, ggml_reshape_2d(ctx, rows, to->ne[0], rows->ne[2]), cells);
        ggml_build_forward_expand(gf, written);
        return ggml_view_4d(ctx, written, dim, info.n_head_kv, n_kv, 1, ggml_row_size(to->type, dim), to->nb[1], to->nb[1] * n_kv, 0);
    };
    const auto made_by = [](const ggml_tensor * t) { return t->view_src ? t->view_src : t; };
    s.marks.emplace_back(made_by(k_cur), made_by(v_cur));
    k = write(s.k[il % 2], k_cur, info.head_dim_k);
    v = write(s.v[il % 2], v_cur, info.head_dim_v);
    return true;
}

void kvcast_end_prompt(kvcast_context * kv) {
    if (kv->stream) {
        kvcast::release_stream(*kv);
    }
}

bool kvcast::stream_is_current(const kvcast_stream & s) { return s.marks.empty() || s.made_for == s.made; }

// ---- copies, on the queue beside the compute

// A backend copies memory that is not pinned through one buffer of its own: one copy at a time.
static void next_copy(const kvcast_context & kv) {
    if (kv.info.pinned_bytes <= 0) {
        ggml_backend_synchronize(kv.stream->queue.get());
    }
}

static void bring(kvcast_context & kv, int il) {
    auto & s = *kv.stream;
    const auto copy = [&](ggml_tensor * to, const void * from, int64_t row_bytes) {
        const int64_t n = s.n_before * row_bytes;
        for (int64_t at = 0; at < n; at += PIECE) {
            ggml_backend_tensor_set_async(s.queue.get(), to, (const char *) from + at, at, std::min(PIECE, n - at));
            next_copy(kv);
        }
    };
    if (s.n_before > 0) {
        copy(s.k[il % 2], kv.layers[il]->k, kv.info.k_row_bytes);
        copy(s.v[il % 2], kv.layers[il]->v, kv.info.v_row_bytes);
    }
}

static void leave(kvcast_context & kv, int il) {
    auto & s = *kv.stream;
    auto * to = (char *) ggml_backend_buffer_get_base(s.landing[il % 2].get());
    for (const auto & [from, row_bytes] : {std::pair{s.k[il % 2], kv.info.k_row_bytes}, {s.v[il % 2], kv.info.v_row_bytes}}) {
        for (const auto & [first, end] : s.runs) {
            ggml_backend_tensor_get_async(s.queue.get(), from, to, first * row_bytes, (end - first) * row_bytes);
            next_copy(kv);
            to += (end - first) * row_bytes;
        }
    }
}

// Rows that have landed go to the store, on a thread of their own; those of the layer before are there.
static void write(kvcast_context & kv, int il) {
    auto & s = *kv.stream;
    if (s.writer.valid()) {
        s.writer.wait();
    }
    const auto * from = (const char *) ggml_backend_buffer_get_base(s.landing[il % 2].get());
    s.writer = std::async(std::launch::async, [&kv, &s, il, from]() mutable {
        for (const auto & [to, row_bytes] : {std::pair{kv.layers[il]->k, kv.info.k_row_bytes}, {kv.layers[il]->v, kv.info.v_row_bytes}}) {
            for (const auto & [first, end] : s.runs) {
                memcpy((char *) to + first * row_bytes, from, (end - first) * row_bytes);
                from += (end - first) * row_bytes;
            }
        }
    });
}

void kvcast::begin_stream(kvcast_context & kv, const int64_t * cells, int64_t n_tokens) {
    auto & s = *kv.stream;
    finish_stream(kv);
    if (s.marks.empty()) {
        return;
    }
    s.runs.clear();
    for (int64_t i = 0; i < n_tokens; ++i) {
        if (s.runs.empty() || s.runs.back().second != cells[i]) {
            s.runs.emplace_back(cells[i], cells[i]);
        }
        s.runs.back().second++;
    }
    // appended as a rule; else everything comes up, and the new rows are written over it
    const int64_t n_used = kv.cache->get_cells(0).used_max_p1();
    s.n_before = s.runs.size() == 1 && s.runs[0].second == n_used ? s.runs[0].first : n_used;
    s.next = 0;
    s.open = true;
    bring(kv, 0);
}

bool kvcast::stream_callback(ggml_tensor * t, bool ask, void * user) {
    auto & kv = *static_cast<kvcast_context *>(user);
    auto & s = *kv.stream;
    if (ask) {
        return s.open && s.next < s.marks.size() && (t == s.marks[s.next].first || t == s.marks[s.next].second);
    }
    // the attention of the layer before has been computed, and nothing runs
    const int il = (int) s.next++;
    ggml_backend_synchronize(s.queue.get());
    if (il > 1) {
        write(kv, il - 2);
    }
    if (il > 0) {
        leave(kv, il - 1);
    }
    if (il + 1 < kv.info.n_layer) {
        bring(kv, il + 1);
    }
    return !kv.stops(); // false ends the graph; kvcast_collect reports it
}

void kvcast::finish_stream(kvcast_context & kv) {
    auto & s = *kv.stream;
    if (!s.open) {
        return;
    }
    s.open = false;
    ggml_backend_synchronize(s.queue.get());
    if (s.next == s.marks.size()) { // the scheduler has waited for the compute
        const int last = kv.info.n_layer - 1;
        leave(kv, last);
        if (last > 0) {
            write(kv, last - 1);
        }
        ggml_backend_synchronize(s.queue.get());
        write(kv, last);
    }
    if (s.writer.valid()) {
        s.writer.wait();
    }
}

void kvcast::release_stream(kvcast_context & kv) {
    finish_stream(kv);
    if (kv.stream->n_rows > 0) {
        free_memory(*kv.stream);
        kv.stream->landing[0].reset();
        kv.stream->landing[1].reset();
    }
}
