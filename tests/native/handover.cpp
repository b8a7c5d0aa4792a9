// What runs on several threads, for a thread sanitizer: the attention nodes and the choice of blocks (host path); and the
// prefetch of the device path, whose worker reads the store, uploads, and takes in scores beside a step. Its real caller is
// runtime/kvcast/engine/device_path.py, which calls in this order. `make sanitize` builds and runs it: handover MODEL.gguf
#include "kvcast.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <random>
#include <thread>
#include <vector>

namespace {

constexpr int N_PROMPT = 600, N_TAPS = 64, N_STEPS = 64, N_THREADS = 3;
constexpr int N_SLOTS = 16, N_SINK = 1, N_WINDOW = 4, N_FIXED = N_SINK + N_WINDOW; // blocks

void check(bool good, const char * what) {
    if (!good) {
        fprintf(stderr, "handover: %s\n", what);
        exit(1);
    }
}

struct session {
    llama_context * ctx;
    kvcast_context * kv = nullptr;
    kvcast_info info = {};
    int n_tokens = 0;

    session(llama_model * model, kvcast_params params) {
        auto settings = llama_context_default_params();
        settings.n_ctx = 1024;
        settings.n_batch = settings.n_ubatch = 512;
        settings.n_threads = settings.n_threads_batch = N_THREADS;
        settings.offload_kqv = false;
        settings.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        ctx = llama_init_from_model(model, settings);
        char why[512] = "";
        kv = ctx ? kvcast_attach(ctx, params, why, sizeof(why)) : nullptr;
        check(kv, why);
        info = kvcast_get_info(kv);
        decode(N_PROMPT - N_TAPS);
        kvcast_set_mode(kv, KVCAST_HISTORY);
        decode(N_TAPS);
        kvcast_set_mode(kv, KVCAST_SPARSE);
    }

    ~session() {
        kvcast_detach(kv);
        llama_free(ctx);
    }

    int n_rows() const { return info.n_layer * info.n_head_kv; }
    int32_t * blocks(int row) const { return kvcast_blocks(kv) + (size_t) row * info.n_blocks; }

    // false: it was aborted, and nothing happened
    bool decode(int n) {
        for (int done = 0; done < n;) {
            const int n_batch = std::min(n - done, 512);
            std::vector<llama_token> tokens(n_batch);
            for (int i = 0; i < n_batch; ++i) {
                tokens[i] = (n_tokens + i) * 37 % llama_vocab_n_tokens(llama_model_get_vocab(llama_get_model(ctx)));
            }
            const int result = llama_decode(ctx, llama_batch_get_one(tokens.data(), n_batch));
            check(result == 0 || result == 2, "llama_decode failed");
            if (result == 2) {
                kvcast_clear_abort(kv);
                llama_memory_seq_rm(llama_get_memory(ctx), -1, n_tokens, -1);
                kvcast_invalidate(kv, n_tokens);
                return false;
            }
            done += n_batch;
            n_tokens += n_batch;
        }
        return true;
    }
};

void host_path(llama_model * model) {
    session s(model, {N_TAPS, KVCAST_TRACE_NONE, 1, 0, 0});
    kvcast_prepare_summary(s.kv);
    int n_aborted = 0;
    for (int step = 0; step < N_STEPS; ++step) {
        const int n_used = s.n_tokens / KVCAST_BLOCK + 1;
        for (int row = 0; row < s.n_rows(); ++row) {
            s.blocks(row)[0] = 0;
            for (int i = 0; i < N_WINDOW; ++i) {
                s.blocks(row)[1 + i] = n_used - N_WINDOW + i;
            }
            kvcast_n_listed(s.kv)[row] = 1 + N_WINDOW;
            kvcast_n_topk(s.kv)[row] = 4 + row % 8;
        }
        kvcast_set_topk_range(s.kv, 1, n_used - N_WINDOW);
        if (step % 3 == 0) {
            kvcast_reselect(s.kv);
        }
        std::thread other;
        if (step % 8 == 7) {
            other = std::thread([&] {
                std::this_thread::sleep_for(std::chrono::milliseconds(step % 5));
                kvcast_abort(s.kv);
            });
        }
        const bool done = s.decode(1);
        if (other.joinable()) {
            other.join();
            kvcast_clear_abort(s.kv);
        }
        n_aborted += !done;
    }
    printf("host path: %d steps on %d threads, %d stopped\n", N_STEPS, N_THREADS, n_aborted);
}

struct move {
    int row, slot, block;
};

// Brings blocks from the store to a staging buffer, and up.
void stage(const session & s, const kvcast_pool_info & pool, int buffer, const std::vector<move> & moves) {
    uint8_t * k = kvcast_staging(s.kv, buffer);
    uint8_t * v = k + pool.n_staging * pool.k_block_bytes;
    const int64_t k_head = s.info.k_row_bytes / s.info.n_head_kv, v_head = s.info.v_row_bytes / s.info.n_head_kv;
    for (size_t i = 0; i < moves.size(); ++i) {
        const int layer = moves[i].row / s.info.n_head_kv, head = moves[i].row % s.info.n_head_kv;
        for (int j = 0; j < KVCAST_BLOCK; ++j) {
            const int64_t cell = moves[i].block * KVCAST_BLOCK + j;
            memcpy(k, (const char *) kvcast_k_data(s.kv, layer) + cell * s.info.k_row_bytes + head * k_head, k_head);
            memcpy(v, (const char *) kvcast_v_data(s.kv, layer) + cell * s.info.v_row_bytes + head * v_head, v_head);
            k += k_head;
            v += v_head;
        }
        kvcast_staging_slots(s.kv, buffer)[i] = moves[i].row * N_SLOTS + moves[i].slot; // every layer has as many
    }
    kvcast_pool_upload(s.kv, buffer, (int) moves.size());
}

void apply(const session & s, int buffer, const std::vector<move> & moves) {
    check(kvcast_pool_scatter(s.kv, buffer, (int) moves.size()) == 0, "scatter failed");
    for (const auto & m : moves) {
        s.blocks(m.row)[m.slot] = m.block;
    }
}

void device_path(llama_model * model) {
    session s(model, {N_TAPS, KVCAST_TRACE_NONE, 0, N_SLOTS, N_SLOTS}); // a staging buffer has a block for each row
    const auto pool = kvcast_get_pool_info(s.kv);
    const std::vector<int32_t> slots(s.info.n_layer, N_SLOTS), n_listed(s.n_rows(), N_SLOTS);
    check(kvcast_pool_plan(s.kv, slots.data(), N_SINK, N_WINDOW) == 0, "the plan was refused");
    int n_used = s.n_tokens / KVCAST_BLOCK + 1;
    for (int slot = 0; slot < N_SLOTS; ++slot) {
        std::vector<move> moves;
        for (int row = 0; row < s.n_rows(); ++row) {
            int block = slot < N_SINK ? slot : slot - N_WINDOW; // the first blocks
            for (int b = n_used - N_WINDOW; b < n_used; ++b) {
                block = slot == N_SINK + b % N_WINDOW ? b : block;
            }
            moves.push_back({row, slot, block});
        }
        stage(s, pool, slot % 2, moves);
        apply(s, slot % 2, moves);
    }
    std::fill_n(kvcast_n_listed(s.kv), s.n_rows(), N_SLOTS);

    std::mt19937 random(1);
    std::vector<float> scores((size_t) s.info.n_head_kv * s.info.n_blocks);
    std::vector<move> moves;
    int buffer = 0, n_moved = 0;
    for (int step = 0; step < N_STEPS; ++step) {
        apply(s, buffer, moves);
        n_moved += (int) moves.size();
        buffer = 1 - buffer;
        if (s.n_tokens / KVCAST_BLOCK + 1 > n_used) {
            n_used++;
            for (int row = 0; row < s.n_rows(); ++row) {
                s.blocks(row)[N_SINK + (n_used - 1) % N_WINDOW] = n_used - 1;
            }
        }
        moves.clear();
        for (int row = 0; row < s.n_rows() && row < pool.n_staging; ++row) {
            const int32_t * table = s.blocks(row);
            const int block = N_SINK + random() % (n_used - N_FIXED);
            if (std::find(table, table + N_SLOTS, block) == table + N_SLOTS) {
                moves.push_back({row, (int) (N_FIXED + random() % (N_SLOTS - N_FIXED)), block});
            }
        }
        auto beside = std::async(std::launch::async, [&] {
            if (step > 0) {
                kvcast_take_taps(s.kv, n_listed.data());
                for (int head = 0; head < s.info.n_head_kv; ++head) {
                    kvcast_score_store(s.kv, step % s.info.n_layer, head, &scores[(size_t) head * s.info.n_blocks]);
                }
            }
            stage(s, pool, buffer, moves);
        });
        check(s.decode(1), "a step was stopped");
        beside.get();
        check(kvcast_collect(s.kv) == 0, "the step's results could not be collected");
        check(kvcast_pool_verify(s.kv) == 0, "a slot differs from the store");
    }
    printf("device path: %d steps, %d blocks brought beside them\n", N_STEPS, n_moved);
}

} // namespace

int main(int argc, char ** argv) {
    check(argc == 2, "give a GGUF file");
    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    auto params = llama_model_default_params();
    params.n_gpu_layers = 0;
    auto * model = llama_model_load_from_file(argv[1], params);
    check(model, "the model cannot be loaded");
    host_path(model);
    device_path(model);
    llama_model_free(model);
    return 0;
}
