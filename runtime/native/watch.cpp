// What stops a load or a llama_decode() from outside: a flag, and a caller that is asked now and then whether to go on.
#include "kvcast.h"

#include "ggml.h"

#include <atomic>
#include <mutex>

static constexpr int64_t POLL_US = 200000; // a poll may have to wait for Python's lock

struct kvcast_watch {
    int32_t (*poll)(void);
    std::atomic<bool> stop{false};
    std::atomic<int64_t> polled_us{0};
};

kvcast_watch * kvcast_watch_new(int32_t (*poll)(void)) {
    auto * watch = new kvcast_watch;
    watch->poll = poll;
    return watch;
}

void kvcast_watch_free(kvcast_watch * watch) { delete watch; }
void kvcast_watch_stop(kvcast_watch * watch, int32_t stop) { watch->stop = stop != 0; }

bool kvcast_watch_stops(void * data) {
    auto & watch = *static_cast<kvcast_watch *>(data);
    if (watch.stop) {
        return true;
    }
    const int64_t now = ggml_time_us();
    if (!watch.poll || now - watch.polled_us < POLL_US) {
        return false;
    }
    watch.polled_us = now;
    return watch.poll() == 0;
}

using one_argument = int64_t (*)(const void * call);

void kvcast_log_by_one(ggml_log_level level, const char * text, void * user) {
    if (!user) {
        return;
    }
    static std::recursive_mutex mutex; // a generator takes one call at a time
    const std::lock_guard<std::recursive_mutex> lock(mutex);
    static bool inside = false; // what a model says that is freed in the middle of another message
    if (!inside) {
        inside = true;
        const kvcast_log_call call{level, text};
        reinterpret_cast<one_argument>(user)(&call);
        inside = false;
    }
}

int kvcast_attention_by_one(
        void * user, int32_t layer, int32_t pos, const float * scores, int32_t n_taps, int32_t n_head_kv, int32_t stride) {
    const kvcast_attention_call call{layer, pos, scores, n_taps, n_head_kv, stride};
    return static_cast<int>(reinterpret_cast<one_argument>(user)(&call));
}

int64_t kvcast_io_by_one(void * user, void * data, int64_t n_bytes) {
    const kvcast_io_call call{data, n_bytes};
    return reinterpret_cast<one_argument>(user)(&call);
}

bool kvcast_watch_goes_on(float /*progress*/, void * watch) { return !kvcast_watch_stops(watch); }
