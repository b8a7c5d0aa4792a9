"""Rows of the store as numbers, and scores against NumPy."""

import numpy as np

import naive

F16, Q8_0, Q4_0, BF16 = 1, 8, 2, 30


def rows_as_float(rows, kind, n_head_kv):
    """(n_cells, row_bytes) uint8 to (n_cells, n_head_kv, d) float32."""
    if kind == F16:
        x = rows.view(np.float16).astype(np.float32)
    elif kind == BF16:
        x = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        import gguf

        x = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind))
    return x.reshape(len(rows), n_head_kv, -1)


def compare(attached, tap, n_used, lists, position):
    info = attached.info
    for layer in range(info.n_layer):
        k = rows_as_float(attached.rows(layer)[0], info.type_k, info.n_head_kv)
        sums, lse = naive.block_scores(attached.trace_q[layer, tap], k, info.n_head_kv, lists(layer), position + 1, info.kq_scale)
        np.testing.assert_allclose(attached.lse[layer, tap], lse, atol=2e-3, err_msg=f"log-sum-exp, layer {layer}")
        for head, expected in enumerate(sums):
            got = attached.trace_scores[layer, tap, head, : len(expected)]
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-7, err_msg=f"layer {layer}, head {head}")
            np.testing.assert_allclose(got.sum(), 1, rtol=1e-4)
