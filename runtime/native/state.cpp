// llama.cpp's state of a context (its arch and memory, as llama_state_save_file lays them out) to and from a caller's file, and the
// checks that llama.cpp leaves out: it empties the cache first, takes any position, and finds out later that the rest does not fit.
#include "kvcast.h"

#include "llama-arch.h"
#include "llama-context.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-memory-recurrent.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr size_t SMALL = 1 << 16; // bytes that are passed on together
constexpr size_t CHUNK = 1 << 24; // of tensor data
constexpr float LARGEST = 1e9f;   // of keys, values and recurrent states: their products and sums stay finite. Half precision ends at 65504

struct refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

bool on_host(const ggml_tensor * t) { return ggml_backend_buffer_is_host(t->view_src ? t->view_src->buffer : t->buffer); }

struct writer : llama_io_write_i {
    kvcast_io fn;
    void * user;
    std::vector<uint8_t> small, large;
    size_t n = 0;

    writer(kvcast_io fn, void * user) : fn(fn), user(user) {}

    void pass(const void * src, size_t size) {
        if (size && fn(user, const_cast<void *>(src), (int64_t) size) != (int64_t) size) {
            throw refused("it could not be written");
        }
    }
    void flush() {
        pass(small.data(), small.size());
        small.clear();
    }
    void write(const void * src, size_t size) override {
        small.insert(small.end(), (const uint8_t *) src, (const uint8_t *) src + size);
        n += size;
        if (small.size() >= SMALL) {
            flush();
        }
    }
    void write_tensor(ggml_tensor * t, size_t offset, size_t size) override {
        if (size < SMALL && on_host(t)) { // V that is transposed comes in small pieces
            write((const uint8_t *) t->data + offset, size);
            return;
        }
        flush();
        for (size_t i = 0; i < size; i += CHUNK) {
            const size_t part = std::min(CHUNK, size - i);
            if (on_host(t)) {
                pass((const uint8_t *) t->data + offset + i, part);
            } else {
                large.resize(part);
                ggml_backend_tensor_get(t, large.data(), offset + i, part);
                pass(large.data(), part);
            }
        }
        n += size;
    }
    size_t n_bytes() override { return n; }
};

struct reader : llama_io_read_i {
    kvcast_io fn;
    void * user;
    size_t left;  // that the file has
    size_t n = 0; // read
    std::vector<uint8_t> small, large;
    size_t at = 0; // in `small`

    reader(kvcast_io fn, void * user, int64_t n_bytes) : fn(fn), user(user), left(n_bytes < 0 ? 0 : (size_t) n_bytes) {}

    void pull(void * dst, size_t size) {
        if (size > left || (size && fn(user, dst, (int64_t) size) != (int64_t) size)) {
            throw refused("it ends too early");
        }
        left -= size;
    }
    void read(void * dst, size_t size) override {
        auto * to = (uint8_t *) dst;
        n += size;
        while (size) {
            if (at == small.size()) {
                small.resize(std::min(SMALL, left));
                at = 0;
                if (small.empty()) {
                    throw refused("it ends too early");
                }
                pull(small.data(), small.size());
            }
            const size_t part = std::min(size, small.size() - at);
            memcpy(to, small.data() + at, part);
            at += part;
            to += part;
            size -= part;
        }
    }
    // what was pulled already first, then straight to where it belongs
    void read_large(uint8_t * dst, size_t size) {
        const size_t part = std::min(size, small.size() - at);
        read(dst, part);
        if (size - part < SMALL) {
            read(dst + part, size - part);
        } else {
            pull(dst + part, size - part);
            n += size - part;
        }
    }
    void read_tensor(ggml_tensor * t, size_t offset, size_t size) override {
        for (size_t i = 0; i < size; i += CHUNK) {
            const size_t part = std::min(CHUNK, size - i);
            if (on_host(t)) {
                read_large((uint8_t *) t->data + offset + i, part);
            } else {
                large.resize(part);
                read_large(large.data(), part);
                ggml_backend_tensor_set(t, large.data(), offset + i, part);
            }
        }
    }
    size_t n_bytes() override { return n; }
    size_t n_left() const { return left + small.size() - at; }

    template <typename T>
    T get() {
        T x;
        read(&x, sizeof(x));
        return x;
    }
};

void require(bool good, const char * why) {
    if (!good) {
        throw refused(why);
    }
}

void check_arch(reader & in, const llama_context & ctx) {
    const std::string arch = llm_arch_name(ctx.get_model().arch);
    require(in.get<uint32_t>() == arch.size(), "its family is not the model's");
    std::string found(arch.size(), 0);
    in.read(&found[0], found.size());
    require(found == arch, "its family is not the model's");
}

// n values of a type, as they lie in the file
void check_values(reader & in, ggml_type type, size_t n_bytes) {
    const auto * traits = ggml_get_type_traits(type);
    const size_t n_once = 4096 * traits->type_size;
    std::vector<uint8_t> raw;
    std::vector<float> values(4096 * traits->blck_size);
    require(n_bytes % traits->type_size == 0 && (type == GGML_TYPE_F32 || traits->to_float), "it has a type of another kind");
    while (n_bytes) {
        raw.resize(std::min(n_bytes, n_once));
        in.read_large(raw.data(), raw.size());
        n_bytes -= raw.size();
        const size_t n = raw.size() / traits->type_size * traits->blck_size;
        if (type == GGML_TYPE_F32) {
            memcpy(values.data(), raw.data(), raw.size());
        } else {
            traits->to_float(raw.data(), values.data(), (int64_t) n);
        }
        bool good = true;
        for (size_t i = 0; i < n; ++i) {
            good &= std::fabs(values[i]) <= LARGEST; // not so for nan
        }
        require(good, "it holds a key or a value that is no number of a sane size");
    }
}

// Of one sequence, number 0. whole: cell i holds position i; a cache of windows holds some of the positions, each once, and all of those
// that the next token attends to.
void check_cache(reader & in, const llama_context & ctx, const llama_kv_cache & kv, uint32_t n_tokens, bool whole) {
    const auto & hparams = ctx.get_model().hparams;
    require(in.get<uint32_t>() == kv.get_n_stream() && kv.get_n_stream() == 1, "it has another number of streams");
    const uint32_t n_cells = in.get<uint32_t>();
    require(n_cells <= kv.get_size() && (whole ? n_cells == n_tokens : n_cells <= n_tokens),
            "it has another number of cells than of tokens");
    std::vector<bool> seen(n_tokens);
    for (uint32_t i = 0; i < n_cells; ++i) {
        const auto pos = in.get<llama_pos>();
        require(pos >= 0 && (uint32_t) pos < n_tokens && !seen[pos] && (!whole || (uint32_t) pos == i),
                "its positions are not those of its tokens");
        seen[pos] = true;
        require(in.get<uint32_t>() == 1, "a cell is not of one sequence");
        if (kv.has_cell_ext()) {
            const auto ext = in.get<llama_kv_cell_ext>();
            require(ext.tok >= LLAMA_TOKEN_NULL && ext.tok < (int32_t) ctx.get_model().vocab.n_tokens(),
                    "a cell is of a token that the model does not have");
        }
        require(in.get<llama_seq_id>() == 0, "a cell is of another sequence");
    }
    for (uint32_t pos = 0; pos < n_tokens; ++pos) {
        require(seen[pos] || llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, (llama_pos) pos, (llama_pos) n_tokens),
                "a position is missing that the next token attends to");
    }
    if (n_cells == 0) {
        return;
    }
    const bool transposed = !ctx.get_cparams().flash_attn;
    require(in.get<uint32_t>() == (transposed ? 1u : 0u), "its values lie in another order");
    const auto layers = kv.get_layer_ids();
    require(in.get<uint32_t>() == layers.size(), "it has another number of layers");
    const auto check_rows = [&](ggml_type type, uint32_t n_embd) {
        const uint64_t row = ggml_row_size(type, n_embd);
        require(in.get<int32_t>() == (int32_t) type && in.get<uint64_t>() == row, "its rows are of another type or size");
        check_values(in, type, n_cells * row);
    };
    for (const auto il : layers) {
        check_rows(kv.type_k(), hparams.n_embd_k_gqa(il));
    }
    for (const auto il : layers) {
        if (hparams.is_mla()) {
            continue; // no values of their own
        }
        if (!transposed) {
            check_rows(kv.type_v(), hparams.n_embd_v_gqa(il));
            continue;
        }
        const uint32_t size = ggml_type_size(kv.type_v());
        require(in.get<int32_t>() == (int32_t) kv.type_v() && in.get<uint32_t>() == size && in.get<uint32_t>() == hparams.n_embd_v_gqa(il),
                "its rows are of another type or size");
        check_values(in, kv.type_v(), (size_t) hparams.n_embd_v_gqa(il) * n_cells * size);
    }
}

void check_cache(reader & in, const llama_context & ctx, const llama_kv_cache_iswa & kv, uint32_t n_tokens) {
    check_cache(in, ctx, *kv.get_base(), n_tokens, true);
    check_cache(in, ctx, *kv.get_swa(), n_tokens, false);
}

void check_recurrent(reader & in, const llama_context & ctx, const llama_memory_recurrent & memory, uint32_t n_tokens) {
    const auto & hparams = ctx.get_model().hparams;
    const uint32_t n_cells = in.get<uint32_t>();
    require(n_cells == (n_tokens ? 1u : 0u) && n_cells <= memory.size, "it has another number of recurrent states");
    for (uint32_t i = 0; i < n_cells; ++i) {
        require(in.get<llama_pos>() == (llama_pos) n_tokens - 1, "its recurrent state is of another position");
        require(in.get<uint32_t>() == 1 && in.get<llama_seq_id>() == 0, "its recurrent state is of another sequence");
    }
    require(in.get<uint32_t>() == 0, "its recurrent states lie in another order");
    require(in.get<uint32_t>() == hparams.n_layer(), "it has another number of layers");
    const auto check_rows = [&](const ggml_tensor * t, uint32_t n, bool typed) {
        const uint64_t row = ggml_row_size(t->type, n);
        require((!typed || in.get<int32_t>() == (int32_t) t->type) && in.get<uint64_t>() == row,
                "its recurrent states are of another type or size");
        check_values(in, t->type, n_cells * row);
    };
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (memory.r_l[il]) {
            check_rows(memory.r_l[il], hparams.n_embd_r(), true);
            if (memory.p_l[il]) {
                check_rows(memory.p_l[il], hparams.ple_conv_state(), false);
            }
        }
    }
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (memory.s_l[il]) {
            check_rows(memory.s_l[il], hparams.n_embd_s(), true);
        }
    }
}

void check_memory(reader & in, const llama_context & ctx, uint32_t n_tokens) {
    const auto * memory = ctx.get_memory();
    if (const auto * windows = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        check_cache(in, ctx, *windows, n_tokens);
    } else if (const auto * cache = dynamic_cast<const llama_kv_cache *>(memory)) {
        check_cache(in, ctx, *cache, n_tokens, true);
    } else if (const auto * recurrent = dynamic_cast<const llama_memory_recurrent *>(memory)) {
        check_recurrent(in, ctx, *recurrent, n_tokens);
    } else if (const auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory)) {
        check_cache(in, ctx, *hybrid->get_mem_attn(), n_tokens, true);
        check_recurrent(in, ctx, *hybrid->get_mem_recr(), n_tokens);
    } else if (const auto * both = dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        check_cache(in, ctx, *both->get_mem_attn(), n_tokens);
        check_recurrent(in, ctx, *both->get_mem_recr(), n_tokens);
    } else {
        throw refused("a model with this kind of memory has no sessions in files");
    }
}

template <typename F>
bool said(char * error, int32_t n_error, F run) {
    try {
        run();
        return true;
    } catch (const refused & e) {
        snprintf(error, n_error, "%s", e.what());
    } catch (const std::exception &) { // bad_alloc, or llama.cpp's own
        snprintf(error, n_error, "llama.cpp does not take it");
    }
    return false;
}

} // namespace

int64_t kvcast_write_state(llama_context * ctx, kvcast_io write, void * user) {
    char error[128];
    writer out(write, user);
    const bool good = said(error, sizeof(error), [&] {
        ctx->synchronize();
        out.write_string(llm_arch_name(ctx->get_model().arch));
        if (ctx->get_memory()) {
            ctx->get_memory()->state_write(out);
        }
        out.flush();
    });
    return good ? (int64_t) out.n : -1;
}

bool kvcast_check_state(
        llama_context * ctx, kvcast_io read, void * user, int64_t n_bytes, int32_t n_tokens, char * error, int32_t n_error) {
    reader in(read, user, n_bytes);
    return said(error, n_error, [&] {
        check_arch(in, *ctx);
        check_memory(in, *ctx, (uint32_t) std::max(0, n_tokens));
        require(in.n_left() == 0, "it goes on behind its end");
    });
}

bool kvcast_read_state(llama_context * ctx, kvcast_io read, void * user, int64_t n_bytes, char * error, int32_t n_error) {
    reader in(read, user, n_bytes);
    ctx->synchronize();
    const bool good = said(error, n_error, [&] {
        check_arch(in, *ctx);
        ctx->get_memory()->state_read(in);
        require(in.n_left() == 0, "it goes on behind its end");
    });
    if (!good && ctx->get_memory()) {
        ctx->get_memory()->clear(true);
    }
    return good;
}
