// The choice within a step: of the blocks or tokens of a row, those to which the step's query gives most, as estimated.
#include "context.h"

#include <algorithm>

namespace {

constexpr int STEADY = 4;    // a row is steady when less than one in so many of its chosen blocks or tokens is new
constexpr int PAUSE_MAX = 3; // steps that a steady row keeps its choice

// how many of `now` are not in `before`, both ascending
int n_new(const int32_t * now, int n, const std::vector<int32_t> & before) {
    int n_same = 0, i = 0;
    size_t p = 0;
    while (i < n && p < before.size()) { // without branches that cannot be foreseen
        const int32_t a = now[i], b = before[p];
        n_same += a == b;
        i += a <= b;
        p += b <= a;
    }
    return n - n_same;
}

// the blocks that hold cells, ascending: to list
int blocks_of(const std::vector<int32_t> & cells, int32_t * list) {
    int n = 0;
    int32_t last = -1;
    for (const int32_t c : cells) {
        const int32_t b = c / KVCAST_BLOCK;
        n += b != last;
        list[n - 1] = b;
        last = b;
    }
    return n;
}

} // namespace

void kvcast::select_row(kvcast_context & kv, int layer, int head) {
    auto & s = *kv.summary;
    const size_t row = (size_t) layer * kv.info.n_head_kv + head;
    int32_t * list = &kv.blocks[row * kv.info.n_blocks];
    const float * estimate = &s.estimates[row * kv.info.n_blocks];
    const int n_listed = kv.n_listed[row];
    const int begin = s.topk_begin, n_range = s.topk_end - s.topk_begin;
    const int per_block = KVCAST_BLOCK / s.grain;
    const int n_wanted = s.n_topk[row] * per_block;

    // what may be chosen: blocks by their estimates and weights, or pieces of them by their estimates; what is listed never
    static thread_local std::vector<float> weighed;
    static thread_local std::vector<int32_t> picked, work, before;
    picked.resize(n_wanted + 1);
    work.resize((size_t) n_range * per_block + 1);
    float * value;
    if (s.grain < KVCAST_BLOCK) {
        value = s.pieces_of(head) + (size_t) begin * per_block;
    } else {
        weighed.resize(n_range);
        value = weighed.data();
        for (int b = 0; b < n_range; ++b) {
            const float v = estimate[begin + b] * s.weights[row * kv.info.n_blocks + begin + b];
            value[b] = v >= 0 ? v : 0; // nan too
        }
    }
    float rest = 0, chosen = 0;
    for (int b = begin; b < s.topk_end; ++b) {
        rest += estimate[b];
    }
    for (int i = 0; i < n_listed; ++i) {
        if (list[i] >= begin && list[i] < s.topk_end) {
            std::fill_n(value + (size_t) (list[i] - begin) * per_block, per_block, -1.0f);
            rest -= estimate[list[i]];
        }
    }
    kv.kernels->topk(value, n_range * per_block, n_wanted, picked.data(), work.data(), &s.threshold[row]);

    int n_changed;
    if (s.grain == KVCAST_BLOCK) {
        before.assign(list + n_listed, list + n_listed + n_wanted);
        for (int i = 0; i < n_wanted; ++i) {
            list[n_listed + i] = begin + picked[i];
            chosen += estimate[begin + picked[i]];
        }
        n_changed = n_new(list + n_listed, n_wanted, before);
        s.n_chosen[row] = n_wanted;
    } else {
        auto & cells = s.cells[row];
        before.swap(cells);
        cells.resize((size_t) n_wanted * s.grain);
        for (int i = 0; i < n_wanted; ++i) {
            chosen += value[picked[i]];
            for (int j = 0; j < s.grain; ++j) {
                cells[(size_t) i * s.grain + j] = begin * KVCAST_BLOCK + picked[i] * s.grain + j;
            }
        }
        n_changed = n_new(cells.data(), (int) cells.size(), before) / s.grain;
        s.n_chosen[row] = blocks_of(cells, list + n_listed);
    }
    s.pause[row] = n_changed * STEADY >= n_wanted ? 0 : std::min(2 * s.pause[row] + 1, PAUSE_MAX);
    s.wait[row] = s.pause[row];
    s.rest_to_chosen[row] = chosen > 0 ? std::max(rest - chosen, 0.0f) / chosen : 0.0f;
}
