// The parts of kvcast.h that hand out what is there.
#include "context.h"
#include "kvcast-grammar.h"
#include "kvcast-graph.h"
#include "pool.h"
#include "prefill_stream.h"

#include <algorithm>

static thread_local std::string grammar_error, grammar_error_asked;
void kvcast_grammar_failed(const char * what) { grammar_error = what; }
const char * kvcast_grammar_error(void) {
    grammar_error_asked.swap(grammar_error);
    grammar_error.clear();
    return grammar_error_asked.c_str();
}

const char * kvcast_version(void) { return KVCAST_VERSION; }

kvcast_info kvcast_get_info(const kvcast_context * kv) { return kv->info; }
const int32_t * kvcast_model_layers(const kvcast_context * kv) { return kv->model_layers.data(); }
kvcast_stats kvcast_get_stats(const kvcast_context * kv) { return kv->stats; }
void kvcast_reset_stats(kvcast_context * kv) { kv->stats = {}; }

void kvcast_invalidate(kvcast_context * kv, int32_t first_cell) {
    kv->known = false;
    if (kv->pool) {
        kv->pool->step_open = false;
    }
    if (kv->stream) {
        kvcast::release_stream(*kv);
    }
    if (kv->summary) {
        for (auto & n : kv->summary->n_done) {
            n = std::min(n, first_cell / KVCAST_BLOCK);
        }
    }
}
void kvcast_abort(kvcast_context * kv) { kv->abort = true; }
void kvcast_set_watch(kvcast_context * kv, kvcast_watch * watch) { kv->watch = watch; }
void kvcast_clear_abort(kvcast_context * kv) {
    kv->abort = false;
    kv->error.clear();
}
const char * kvcast_last_error(const kvcast_context * kv) { return kv->error.c_str(); }

void kvcast_set_attention_callback(kvcast_context * kv, kvcast_attention_callback fn, void * user) {
    kv->callback = fn;
    kv->callback_user = user;
}

int32_t * kvcast_blocks(kvcast_context * kv) { return kv->blocks.data(); }
int32_t * kvcast_n_listed(kvcast_context * kv) { return kv->n_listed.data(); }

const float * kvcast_scores(const kvcast_context * kv) { return kv->scores.data(); }
const float * kvcast_history_scores(const kvcast_context * kv) { return kv->history_scores.data(); }
const float * kvcast_lse(const kvcast_context * kv) { return kv->lse.data(); }
const float * kvcast_trace_q(const kvcast_context * kv) { return kv->trace_q.empty() ? nullptr : kv->trace_q.data(); }
const float * kvcast_trace_scores(const kvcast_context * kv) { return kv->trace_scores.empty() ? nullptr : kv->trace_scores.data(); }

const void * kvcast_k_data(const kvcast_context * kv, int32_t layer) { return kv->layers[layer]->k; }

const void * kvcast_v_data(const kvcast_context * kv, int32_t layer) { return kv->layers[layer]->v; }
