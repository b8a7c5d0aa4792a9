// The summary of the keys, and by it the attention to every block or token, estimated with the step's own query.
#include "context.h"

#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr float LOG2_E = 1.442695041f;
constexpr int SAMPLE = 64;      // blocks that the choice of channels looks at
constexpr float LARGEST = 1e9f; // of what is taken in: products of such numbers are finite

int8_t code_of(float x, float center, float scale) { return (int8_t) std::lrintf(std::clamp((x - center) / scale, -127.0f, 127.0f)); }

void row_as_floats(const kvcast::rows & r, size_t cell, float * dst) {
    const void * src = r.data + cell * r.row_bytes;
    const auto to_float = r.to_float ? r.to_float : ggml_get_type_traits(GGML_TYPE_F16)->to_float;
    to_float(src, dst, r.n);
}

void summarise_block(kvcast_summary & s, size_t row, const kvcast::rows & k, int block) {
    const int dim = k.n;
    float * keys = kvcast::thread_scratch((size_t) (KVCAST_BLOCK + 1) * dim);
    float * mean = keys + KVCAST_BLOCK * dim;
    std::fill_n(mean, dim, 0.0f);
    const float * center = &s.center[row * dim];
    const float * scale = &s.scale[row * dim];
    for (int j = 0; j < KVCAST_BLOCK; ++j) {
        row_as_floats(k, (size_t) block * KVCAST_BLOCK + j, keys + j * dim);
        for (int i = 0; i < dim; ++i) {
            mean[i] += keys[j * dim + i] / KVCAST_BLOCK;
        }
    }
    for (int i = 0; i < dim; ++i) {
        s.means[(row * s.n_blocks + block / 16 * 16) * dim + i * 16 + block % 16] = code_of(mean[i], center[i], scale[i]);
    }
    for (int c = 0; c < s.n_channels; ++c) {
        const int i = s.channels[row * s.n_channels + c];
        int8_t * codes = &s.codes[((row * s.n_channels + c) * s.n_blocks + block) * KVCAST_BLOCK];
        for (int j = 0; j < KVCAST_BLOCK; ++j) {
            codes[j] = code_of(keys[j * dim + i], center[i], scale[i]);
        }
    }
}

// out [end]: the group's mean estimate for blocks [begin, end), in units of the reference
void estimate(const kvcast_layer & layer, const kvcast::queries & q, const kvcast::rows & k, int head, int begin, int end, float * out) {
    const auto & kv = *layer.kv;
    const auto & s = *kv.summary;
    const int dim = kv.info.head_dim_k;
    const int group = kv.group();
    const size_t row = (size_t) layer.id * kv.info.n_head_kv + head;

    float * queries = kvcast::thread_scratch(2 * group * dim + (size_t) KVCAST_BLOCK * (dim + group) + group * (6 + s.n_probed));
    float * mean_q = queries + group * dim;
    float * channel_q = mean_q + group * dim;
    float * work = channel_q + group * s.n_probed;
    float * block_max = work + KVCAST_BLOCK * (dim + group);
    float * block_sum = block_max + 2 * group;
    float * offset = block_sum + 2 * group;
    kvcast::pack_queries(q, head, group, 0, 1, layer.scale, queries);

    // logits of different tokens may lie hundreds apart (Qwen 2.5): measure from what is exactly known
    const int32_t first_and_newest[2] = {0, kv.n_used_blocks - 1};
    int32_t q_pos[kvcast::MAX_GROUP];
    std::fill_n(q_pos, group, kv.q_pos[0]);
    kvcast::task ends = kv.task_of(k, queries, q_pos, group, work);
    ends.blocks = first_and_newest;
    ends.n_blocks = 2;
    ends.block_sum = block_sum;
    ends.block_max = block_max;
    kv.kernels->score(ends);

    // the channels to look at: where this query and the keys move most
    static thread_local std::vector<std::pair<float, int>> order; // (importance, index among the kept channels)
    order.resize(s.n_channels);
    for (int c = 0; c < s.n_channels; ++c) {
        const int i = s.channels[row * s.n_channels + c];
        float sum = 0;
        for (int g = 0; g < group; ++g) {
            sum += std::fabs(queries[g * dim + i]);
        }
        order[c] = {sum * s.spread[row * dim + i], c};
    }
    std::partial_sort(order.begin(), order.begin() + s.n_probed, order.end(), std::greater<>());

    const int8_t * channels[kvcast::MAX_CHANNELS];
    for (int g = 0; g < group; ++g) {
        const float m = std::max(block_max[2 * g], block_max[2 * g + 1]);
        const float reference = m +
                std::log(block_sum[2 * g] * std::exp(block_max[2 * g] - m) + block_sum[2 * g + 1] * std::exp(block_max[2 * g + 1] - m));
        offset[g] = -LOG2_E * (reference + std::log((float) group));
        for (int i = 0; i < dim; ++i) {
            const float x = LOG2_E * queries[g * dim + i];
            mean_q[g * dim + i] = x * s.scale[row * dim + i];
            offset[g] += x * s.center[row * dim + i];
        }
        for (int c = 0; c < s.n_probed; ++c) {
            const int kept = order[c].second;
            const int i = s.channels[row * s.n_channels + kept];
            channels[c] = &s.codes[(row * s.n_channels + kept) * s.n_blocks * KVCAST_BLOCK];
            channel_q[g * s.n_probed + c] = mean_q[g * dim + i];
            mean_q[g * dim + i] = 0;
        }
    }
    kvcast::estimate_task t = {};
    t.channels = channels;
    t.means = &s.means[row * s.n_blocks * dim];
    t.n_channels = s.n_probed;
    t.dim = dim;
    t.channel_q = channel_q;
    t.mean_q = mean_q;
    t.offset = offset;
    t.n_q = group;
    t.begin = begin;
    t.end = end;
    t.out = out;
    t.grain = s.grain;
    if (s.grain < KVCAST_BLOCK) {
        t.pieces = kv.summary->pieces_of(head);
    }
    kv.kernels->estimate(t);
}

} // namespace

namespace kvcast {

rows head_rows(const ggml_tensor * t, int head) {
    return {
            (const char *) t->data + head * t->nb[1],
            t->nb[2],
            (int) t->ne[0],
            t->type == GGML_TYPE_F16 ? nullptr : ggml_get_type_traits(t->type)->to_float,
    };
}

rows keys_of(const kvcast_context & kv, int layer, int head) {
    const auto * k = kv.cache->get_k_storage(kv.model_layers[layer]);
    const int dim = kv.info.head_dim_k;
    return {
            (const char *) k->data + head * ggml_row_size(k->type, dim),
            k->nb[1],
            dim,
            k->type == GGML_TYPE_F16 ? nullptr : ggml_get_type_traits(k->type)->to_float,
    };
}

queries::queries(const ggml_tensor * q) : data((const char *) q->data), head_bytes(q->nb[1]), token_bytes(q->nb[2]), dim((int) q->ne[0]) {}

void pack_queries(const queries & q, int head, int group, int begin, int end, float scale, float * dst) {
    for (int t = begin; t < end; ++t) {
        for (int g = 0; g < group; ++g) {
            const float * src = (const float *) (q.data + t * q.token_bytes + (head * group + g) * q.head_bytes);
            for (int i = 0; i < q.dim; ++i) {
                *dst++ = src[i] * scale;
            }
        }
    }
}

void select_blocks(kvcast_layer & layer, const queries & q, const ggml_tensor * k, int n_threads) {
    auto & kv = *layer.kv;
    auto & s = *kv.summary;
    const auto & info = kv.info;
    // blocks of one head that one thread estimates at a time, a multiple of 16: some chunks for each thread, but not small ones
    const int chunk = std::clamp(s.topk_end * info.n_head_kv / (3 * n_threads) + 15, 128, 1024) / 16 * 16;
    const int n_chunks = (s.topk_end + chunk - 1) / chunk;

    while (true) {
        const int p = layer.next_chunk.fetch_add(1, std::memory_order_relaxed);
        if (p >= n_chunks * (int) layer.selecting_heads.size()) {
            return;
        }
        if (p == 0) {
            layer.select_begin_us = ggml_time_us();
        }
        const int head = layer.selecting_heads[p / n_chunks];
        const size_t row = (size_t) layer.id * info.n_head_kv + head;
        const int begin = p % n_chunks * chunk;
        const int end = std::min(begin + chunk, s.topk_end);

        const rows keys = head_rows(k, head);
        for (int b = std::max(begin, s.n_done[row]); b < end; ++b) {
            summarise_block(s, row, keys, b);
        }
        estimate(layer, q, keys, head, begin, end, &s.estimates[row * info.n_blocks]);

        if (layer.chunks_done[head].fetch_add(1, std::memory_order_acq_rel) + 1 == n_chunks) {
            s.n_done[row] = std::max(s.n_done[row], s.topk_end);
            select_row(kv, layer.id, head);
            layer.chosen[head].store(true, std::memory_order_release);
            if (layer.heads_done.fetch_add(1, std::memory_order_acq_rel) + 1 == (int) layer.selecting_heads.size()) {
                kv.stats.choose_us += ggml_time_us() - layer.select_begin_us;
                kv.stats.summary_bytes_read += (int64_t) layer.selecting_heads.size() * s.topk_end *
                        (s.n_probed * KVCAST_BLOCK + info.head_dim_k);
            }
        }
    }
}

} // namespace kvcast

void kvcast_context::note_queries(int layer, const ggml_tensor * q) {
    const int dim = info.head_dim_k;
    std::vector<float> queries(group() * q->ne[2] * dim);
    for (int head = 0; head < info.n_head_kv; ++head) {
        kvcast::pack_queries(kvcast::queries(q), head, group(), 0, (int) q->ne[2], 1.0f, queries.data());
        float * power = &summary->q_power[((size_t) layer * info.n_head_kv + head) * dim];
        std::fill_n(power, dim, 0.0f);
        for (size_t i = 0; i < queries.size(); ++i) {
            power[i % dim] += queries[i] * queries[i];
        }
    }
}

void kvcast_context::estimate_shares(int layer) {
    for (int head = 0; head < info.n_head_kv; ++head) {
        const size_t row = (size_t) layer * info.n_head_kv + head;
        if (summary->n_topk[row] == 0) {
            continue;
        }
        // the estimates are measured by what was chosen then really got
        const float * score = &scores[row * info.n_blocks];
        float chosen = 0;
        for (int i = n_listed[row]; i < n_listed[row] + summary->n_chosen[row]; ++i) {
            chosen += score[i];
        }
        summary->shares[row] = 1 / (1 + chosen * summary->rest_to_chosen[row]);
    }
}

// What the codes and means of a row were made with.
static std::vector<uint8_t> made_with(const kvcast_summary & s, size_t row, size_t dim) {
    std::vector<uint8_t> bytes(s.n_channels * sizeof(int32_t) + 2 * dim * sizeof(float));
    memcpy(bytes.data(), &s.channels[row * s.n_channels], s.n_channels * sizeof(int32_t));
    memcpy(bytes.data() + s.n_channels * sizeof(int32_t), &s.center[row * dim], dim * sizeof(float));
    memcpy(bytes.data() + s.n_channels * sizeof(int32_t) + dim * sizeof(float), &s.scale[row * dim], dim * sizeof(float));
    return bytes;
}

void kvcast_context::prepare_summary(int layer) {
    auto & s = *summary;
    const int dim = info.head_dim_k;
    const int n_blocks = (int) cache->get_cells(0).used_max_p1() / KVCAST_BLOCK;
    const int n_sample = std::min(SAMPLE, n_blocks);

    std::vector<float> keys((size_t) n_sample * KVCAST_BLOCK * dim);
    for (int head = 0; head < info.n_head_kv; ++head) {
        const size_t row = (size_t) layer * info.n_head_kv + head;
        const auto before = made_with(s, row, dim);
        const auto r = kvcast::keys_of(*this, layer, head);
        for (int n = 0; n < n_sample * KVCAST_BLOCK; ++n) {
            const size_t block = (size_t) (n / KVCAST_BLOCK) * n_blocks / n_sample;
            row_as_floats(r, block * KVCAST_BLOCK + n % KVCAST_BLOCK, &keys[(size_t) n * dim]);
        }
        std::vector<std::pair<float, int>> order(dim);
        for (int i = 0; i < dim; ++i) {
            float low = INFINITY, high = -INFINITY, spread = 0;
            for (int b = 0; b < n_sample; ++b) {
                float sum = 0, square = 0;
                for (int j = 0; j < KVCAST_BLOCK; ++j) {
                    const float x = keys[((size_t) b * KVCAST_BLOCK + j) * dim + i];
                    low = std::fmin(low, x);
                    high = std::fmax(high, x);
                    sum += x;
                    square += x * x;
                }
                spread += std::fmax(square - sum * sum / KVCAST_BLOCK, 0.0f);
            }
            s.center[row * dim + i] = n_sample ? (low + high) / 2 : 0.0f;
            s.scale[row * dim + i] = n_sample ? std::fmax(1.1f * (high - low) / 2 / 127, 1e-6f) : 1.0f;
            s.spread[row * dim + i] = std::sqrt(spread);
            order[i] = {spread * s.q_power[row * dim + i], i};
        }
        std::partial_sort(order.begin(), order.begin() + s.n_channels, order.end(), std::greater<>());
        for (int c = 0; c < s.n_channels; ++c) {
            s.channels[row * s.n_channels + c] = order[c].second;
        }
        if (made_with(s, row, dim) != before) { // the same prompt once more chooses the same
            s.n_done[row] = 0;
        }
    }
}

void kvcast_prepare_summary(kvcast_context * kv) {
    for (int layer = 0; kv->summary && layer < kv->info.n_layer; ++layer) {
        kv->prepare_summary(layer);
    }
}

template <typename S, typename F>
static void for_each_part(S & s, F f) {
    f(s.channels.data(), s.channels.size() * sizeof(s.channels[0]));
    for (auto * x : {&s.center, &s.scale, &s.spread, &s.q_power}) {
        f(x->data(), x->size() * sizeof(float));
    }
}

int64_t kvcast_summary_state_bytes(const kvcast_context * kv) {
    int64_t n_bytes = 0;
    if (kv->summary) {
        for_each_part(*kv->summary, [&](const void *, size_t n) { n_bytes += (int64_t) n; });
    }
    return n_bytes;
}

void kvcast_get_summary_state(const kvcast_context * kv, uint8_t * dst) {
    if (kv->summary) {
        for_each_part(*kv->summary, [&](const void * part, size_t n) {
            memcpy(dst, part, n);
            dst += n;
        });
    }
}

bool kvcast_check_summary_state(const kvcast_context * kv, const uint8_t * src, int64_t n_bytes) {
    if (!kv->summary || n_bytes != kvcast_summary_state_bytes(kv)) {
        return false;
    }
    const auto & s = *kv->summary;
    bool good = true;
    int32_t channel;
    for (size_t i = 0; i < s.channels.size(); ++i, src += sizeof(channel)) {
        memcpy(&channel, src, sizeof(channel));
        good &= channel >= 0 && channel < kv->info.head_dim_k;
    }
    float x;
    for (const auto * part : {&s.center, &s.scale, &s.spread, &s.q_power}) {
        const float least = part == &s.center ? -LARGEST : 0.0f;
        for (size_t i = 0; i < part->size(); ++i, src += sizeof(x)) {
            memcpy(&x, src, sizeof(x));
            good &= x >= least && x <= LARGEST; // not so for nan
        }
    }
    return good;
}

bool kvcast_set_summary_state(kvcast_context * kv, const uint8_t * src, int64_t n_bytes) {
    if (!kvcast_check_summary_state(kv, src, n_bytes)) {
        return false;
    }
    auto & s = *kv->summary;
    std::vector<std::vector<uint8_t>> before;
    for (size_t row = 0; row < s.n_done.size(); ++row) {
        before.push_back(made_with(s, row, kv->info.head_dim_k));
    }
    for_each_part(s, [&](void * part, size_t n) {
        memcpy(part, src, n);
        src += n;
    });
    for (size_t row = 0; row < s.n_done.size(); ++row) {
        if (made_with(s, row, kv->info.head_dim_k) != before[row]) {
            s.n_done[row] = 0;
        }
    }
    return true;
}

int32_t * kvcast_n_topk(kvcast_context * kv) { return kv->summary ? kv->summary->n_topk.data() : nullptr; }
float * kvcast_weights(kvcast_context * kv) { return kv->summary ? kv->summary->weights.data() : nullptr; }
const float * kvcast_estimates(const kvcast_context * kv) { return kv->summary ? kv->summary->estimates.data() : nullptr; }
float * kvcast_shares(kvcast_context * kv) { return kv->summary ? kv->summary->shares.data() : nullptr; }

void kvcast_set_topk_range(kvcast_context * kv, int32_t begin, int32_t end) {
    if (kv->summary) {
        kv->summary->topk_begin = begin;
        kv->summary->topk_end = end;
    }
}

int32_t kvcast_set_grain(kvcast_context * kv, int32_t grain) {
    if (!kv->summary || (grain != 1 && grain != 4 && grain != KVCAST_BLOCK)) {
        return grain == KVCAST_BLOCK ? 0 : -1;
    }
    auto & s = *kv->summary;
    s.grain = grain;
    for (auto & cells : s.cells) {
        cells.clear();
    }
    kvcast_reselect(kv);
    return 0;
}

const int32_t * kvcast_chosen_cells(const kvcast_context * kv, int32_t layer, int32_t head, int32_t * n) {
    const size_t row = (size_t) layer * kv->info.n_head_kv + head;
    *n = kv->chooses_cells(row) ? (int32_t) kv->summary->cells[row].size() : 0;
    return *n ? kv->summary->cells[row].data() : nullptr;
}

const int32_t * kvcast_n_chosen(const kvcast_context * kv) { return kv->summary ? kv->summary->n_chosen.data() : nullptr; }

void kvcast_reselect(kvcast_context * kv) {
    if (kv->summary) {
        std::fill(kv->summary->pause.begin(), kv->summary->pause.end(), 0);
        std::fill(kv->summary->wait.begin(), kv->summary->wait.end(), 0);
    }
}
