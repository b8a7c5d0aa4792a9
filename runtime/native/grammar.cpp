// Why a grammar failed: the samplers' C API has no way to say it.
#include "kvcast-grammar.h"
#include "kvcast.h"

#include <string>

namespace {
thread_local std::string reason;
thread_local bool failed = false;
}

void kvcast_grammar_failed(const char * why) {
    if (!failed) { // what follows from the first is of no interest
        reason = why;
    }
    failed = true;
}

const char * kvcast_grammar_error(void) {
    const bool any = failed;
    failed = false;
    return any ? reason.c_str() : nullptr;
}
