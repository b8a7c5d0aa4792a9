// What kvcast_attach would allocate for a context of some shape.
#include "sizes.h"

#include "prefill_stream.h"

kvcast_sizes kvcast_sizes_of(kvcast_info shape, kvcast_params params, int32_t n_batch) {
    kvcast_sizes sizes = {};
    const auto counting = [](int64_t & bytes) {
        return [&bytes](const auto & array, size_t n) { bytes += (int64_t) (n * sizeof(array[0])); };
    };
    kvcast_context kv;
    kv.info = shape;
    kvcast::for_each_array(kv, params, counting(sizes.scratch));
    if (params.summary) {
        kvcast_summary summary;
        kvcast::for_each_array(summary, shape, counting(sizes.summary));
    }
    if (params.pool_blocks > 0) {
        kvcast_pool pool;
        const auto groups = kvcast::make_pool_tensors(pool, shape, params.pool_blocks, params.staging_share);
        const auto bytes = [](const std::vector<ggml_tensor *> & tensors) {
            int64_t sum = 0;
            for (const auto * t : tensors) {
                sum += (int64_t) kvcast::pool_align(ggml_nbytes(t));
            }
            return sum;
        };
        sizes.pool = bytes(groups.slots);
        sizes.staging = bytes(groups.staging[0]) + bytes(groups.staging[1]);
        sizes.taps = bytes(groups.outbox) + bytes(groups.inbox);
        sizes.mirrors = sizes.staging + sizes.taps;
    }
    const int64_t by_cell = shape.k_row_bytes + shape.v_row_bytes;
    sizes.stream = 2 * by_cell * kvcast::stream_rows(shape.n_cells, shape.n_cells);
    sizes.landing = 2 * by_cell * n_batch;
    return sizes;
}
