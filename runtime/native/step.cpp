// Before a step: which cells hold what, whether the lists are sound, and how the work is cut into parts.
#include "context.h"
#include "pool.h"
#include "prefill_stream.h"

#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>

void kvcast_set_mode(kvcast_context * kv, int32_t mode) {
    if (kv->mode == KVCAST_DENSE && mode != KVCAST_DENSE) {
        kv->known = false; // dense batches do not pass through begin_step
    }
    const auto & model = kv->ctx->get_model();
    const auto on_gpu = [&](int il) { return ggml_backend_dev_type(model.dev_layer(il)) == GGML_BACKEND_DEVICE_TYPE_GPU; };
    if (mode == KVCAST_VERIFY && std::any_of(kv->model_layers.begin(), kv->model_layers.end(), on_gpu)) {
        mode = KVCAST_HISTORY;
    }
    kv->mode = mode;
    auto & cparams = const_cast<llama_cparams &>(kv->ctx->get_cparams());
    cparams.kvcast_mode = mode == KVCAST_DENSE && kv->stream ? KVCAST_STREAM : mode;
    if (kv->stream) {
        cparams.cb_eval = mode == KVCAST_SPARSE ? nullptr : kvcast::stream_callback;
        cparams.cb_eval_user_data = kv;
    }
}

kvcast_layer * kvcast_context::layer_of(int il) const {
    const auto at = std::lower_bound(model_layers.begin(), model_layers.end(), il);
    return at != model_layers.end() && *at == il ? layers[at - model_layers.begin()].get() : nullptr;
}

void kvcast_context::fail(const std::string & why) {
    if (error.empty()) {
        error = why;
    }
    abort = true;
}

bool kvcast_context::stops() {
    if (watch && kvcast_watch_stops(watch)) {
        abort = true;
    }
    return abort;
}

void kvcast_context::update_cells(const llama_ubatch & ubatch, const int64_t * idxs) {
    const auto & cells = cache->get_cells(0);

    if (known && cells.get_used() == n_known + ubatch.n_tokens) {
        for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
            cell_pos[idxs[i]] = ubatch.pos[i];
        }
    } else {
        for (int c = 0; c < info.n_cells; ++c) {
            cell_pos[c] = cells.is_empty(c) ? kvcast::NEVER : cells.pos_get(c);
        }
        for (int b = 0; b < info.n_blocks; ++b) {
            block_max_pos[b] = *std::max_element(&cell_pos[b * KVCAST_BLOCK], &cell_pos[b * KVCAST_BLOCK] + KVCAST_BLOCK);
        }
    }
    for (uint32_t i = 0; i < ubatch.n_tokens; ++i) {
        const int64_t b = idxs[i] / KVCAST_BLOCK;
        block_max_pos[b] = *std::max_element(&cell_pos[b * KVCAST_BLOCK], &cell_pos[b * KVCAST_BLOCK] + KVCAST_BLOCK);
    }
    n_known = cells.get_used();
    known = true;
    n_used_blocks = (int) (cells.used_max_p1() + KVCAST_BLOCK - 1) / KVCAST_BLOCK;
}

bool kvcast_context::check_lists(int32_t new_block) {
    for (int row = 0; row < info.n_layer * info.n_head_kv; ++row) {
        const int32_t * list = &blocks[(size_t) row * info.n_blocks];
        const int n = n_listed[row];
        bool good = n >= 1 && n_attended(row) <= info.n_blocks;
        bool has_new = false;
        for (int i = 0; good && i < n; ++i) {
            good = list[i] >= 0 && list[i] < n_used_blocks && (i == 0 || list[i] > list[i - 1]);
            has_new |= list[i] == new_block;
        }
        if (!good || !has_new) {
            fail("the block list of layer " + std::to_string(model_layers[row / info.n_head_kv]) + ", KV head " +
                    std::to_string(row % info.n_head_kv) +
                    (good ? " lacks the block of the new token" : " is empty, not ascending or names a block that holds nothing"));
            return false;
        }
    }
    if (summary) {
        const auto & s = *summary;
        const int n_range = s.topk_end - s.topk_begin;
        for (size_t row = 0; row < s.n_topk.size(); ++row) {
            if (s.n_topk[row] == 0) {
                continue;
            }
            int n_inside = 0;
            for (int i = 0; i < n_listed[row]; ++i) {
                n_inside += blocks[row * info.n_blocks + i] >= s.topk_begin && blocks[row * info.n_blocks + i] < s.topk_end;
            }
            if (s.topk_begin < 0 || s.topk_end >= n_used_blocks || s.n_topk[row] < 0 || s.n_topk[row] > n_range - n_inside) {
                fail("layer " + std::to_string(model_layers[row / info.n_head_kv]) + ", KV head " + std::to_string(row % info.n_head_kv) +
                        " cannot choose " + std::to_string(s.n_topk[row]) + " blocks of [" + std::to_string(s.topk_begin) + ", " +
                        std::to_string(s.topk_end) + ")");
                return false;
            }
        }
    }
    return true;
}

// Cuts the lists into parts of about equal size, several for each thread, so that uneven threads end together.
void kvcast_context::plan_sparse() {
    const int n_threads = (int) ctx->n_threads();
    size_t n_parts_max = 0;
    for (auto & layer : layers) {
        std::vector<int> n(info.n_head_kv);
        int total = 0;
        for (int h = 0; h < info.n_head_kv; ++h) {
            n[h] = n_attended((size_t) layer->id * info.n_head_kv + h);
            total += n[h];
        }
        const int size = std::clamp(total / (4 * n_threads), 4, 64);
        layer->parts.clear();
        layer->selecting_heads.clear();
        for (int h = 0; h < info.n_head_kv; ++h) {
            const size_t row = (size_t) layer->id * info.n_head_kv + h;
            const bool chooses = summary && summary->n_topk[row] > 0 && summary->wait[row] == 0;
            layer->chosen[h] = !chooses;
            if (chooses) {
                layer->selecting_heads.push_back(h);
            } else if (summary && summary->wait[row] > 0) {
                summary->wait[row]--;
            }
            const size_t n_before = layer->parts.size();
            const auto cut = [&](int n_blocks, bool cells) {
                const int n_parts = (n_blocks + size - 1) / size;
                for (int i = 0; i < n_parts; ++i) {
                    layer->parts.push_back(
                            {h, (int) ((int64_t) n_blocks * i / n_parts), (int) ((int64_t) n_blocks * (i + 1) / n_parts), cells});
                }
            };
            if (chooses_cells(row)) {
                cut(n_listed[row], false);
                cut(summary->n_topk[row], true);
                n_cells_max = std::max(n_cells_max, summary->n_topk[row] * KVCAST_BLOCK);
            } else {
                cut(n[h], false);
            }
            layer->n_parts[h] = (int) (layer->parts.size() - n_before);
            if (summary && summary->n_topk[row] == 0) {
                summary->n_chosen[row] = 0;
            }
            stats.blocks_read += n[h];
        }
        n_parts_max = std::max(n_parts_max, layer->parts.size());
    }
    if (part_max.size() < n_parts_max * group()) {
        part_max.resize(n_parts_max * group());
        part_sum.resize(n_parts_max * group());
        part_out.resize(n_parts_max * group() * info.head_dim_v);
    }
    if (part_cell_sum.size() < (size_t) info.n_head * n_cells_max) {
        part_cell_sum.resize((size_t) info.n_head * n_cells_max);
    }
    stats.n_steps++;
}

void kvcast_context::plan_history(int n_taps) {
    const int size = 8; // queries that share one widening of K
    for (auto & layer : layers) {
        layer->parts.clear();
        for (int h = 0; h < info.n_head_kv; ++h) {
            for (int i = 0; i < n_taps; i += size) {
                layer->parts.push_back({h, i, std::min(n_taps, i + size)});
            }
            layer->n_parts[h] = (n_taps + size - 1) / size;
        }
    }
}

// Cuts the blocks in use into several parts for each thread.
void kvcast_context::plan_verify(int n_tokens) {
    const int n_parts = std::clamp(4 * (int) ctx->n_threads() / info.n_head_kv, 1, n_used_blocks);
    const size_t n_q = (size_t) n_tokens * group();
    for (auto & layer : layers) {
        layer->parts.clear();
        for (int h = 0; h < info.n_head_kv; ++h) {
            for (int i = 0; i < n_parts; ++i) {
                layer->parts.push_back({h, n_used_blocks * i / n_parts, n_used_blocks * (i + 1) / n_parts});
            }
            layer->n_parts[h] = n_parts;
        }
    }
    const size_t n_results = (size_t) n_parts * info.n_head_kv * n_q;
    part_max.resize(std::max(part_max.size(), n_results));
    part_sum.resize(std::max(part_sum.size(), n_results));
    part_out.resize(std::max(part_out.size(), n_results * info.head_dim_v));
    verify_sum.resize(std::max(verify_sum.size(), info.n_head_kv * n_q * n_used_blocks));
    verify_max.resize(verify_sum.size());
}

void kvcast_context::begin_step(const llama_ubatch & ubatch, const int64_t * cells, bool pooled) {
    if (ubatch.n_tokens > (mode == KVCAST_SPARSE ? 1u : (uint32_t) info.max_taps)) {
        if (mode == KVCAST_HISTORY || mode == KVCAST_VERIFY) {
            fail("a batch in history mode has " + std::to_string(ubatch.n_tokens) + " tokens, more than max_taps");
        }
        known = false;
        return;
    }
    update_cells(ubatch, cells);
    q_pos.assign(ubatch.pos, ubatch.pos + ubatch.n_tokens);
    if (pooled) {
        if (pool->step_open) {
            fail("the results of the step before were not collected (kvcast_collect)");
        } else if (kvcast::send_inbox(*this, (int32_t) cells[0])) {
            stats.n_steps++;
            for (const int n : n_listed) {
                stats.blocks_read += n;
            }
        }
        return;
    }
    if (mode == KVCAST_SPARSE) {
        if (!check_lists((int32_t) (cells[0] / KVCAST_BLOCK))) {
            return;
        }
        plan_sparse();
    } else if (mode == KVCAST_VERIFY) {
        plan_verify((int) ubatch.n_tokens);
    } else {
        plan_history((int) ubatch.n_tokens);
    }
    for (auto & layer : layers) {
        layer->next = 0;
        layer->n_done = 0;
        layer->next_chunk = 0;
        layer->heads_done = 0;
        for (int h = 0; h < info.n_head_kv; ++h) {
            layer->parts_done[h] = 0;
            layer->chunks_done[h] = 0;
        }
    }
}
