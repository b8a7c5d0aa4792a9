"""Block scores and log-sum-exp against NumPy, from the traced q and the K of the store; and against llama.cpp's softmax."""

import numpy as np
import pytest

from kvcast import Llama
from kvcast.bindings import api as native
from kvcast.bindings.context import NativeContext
from lowlevel import Context
from stored import BF16, F16, Q4_0, Q8_0, compare

TYPES = {"f16": F16, "bf16": BF16, "q8_0": Q8_0, "q4_0": Q4_0}
CASES = [(name, kind) for name in ("small", "small_qwen") for kind in TYPES] + [("gemma3", "f16")]


@pytest.mark.sanitize
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_scores_against_numpy(name, kind, request, code, kernels):
    kind = TYPES[kind]
    llm = Llama(
        request.getfixturevalue(name), n_ctx=1024, verbose=False, flash_attn=True, offload_kqv=False, n_threads=2, type_k=kind, type_v=kind
    )
    tokens = llm.tokenize(code.encode())[:900]
    attached = NativeContext(llm.ctx, 64, native.TRACE_HEAD | native.TRACE_SCORES)
    info = attached.info
    llm.eval(tokens[:740])
    attached.set_mode(native.HISTORY)
    llm.eval(tokens[740:790])
    all_blocks = [np.arange(50)] * info.n_head_kv
    for tap in (0, 7, 49):
        position = 740 + tap
        n_used = position // 16 + 1
        compare(attached, tap, n_used, lambda _, n=n_used: [b[:n] for b in all_blocks], position)
    group_mean = attached.trace_scores.reshape(info.n_layer, 64, info.n_head_kv, -1, info.n_blocks).mean(3)
    np.testing.assert_allclose(attached.history_scores[:, :50], group_mean[:, :50], rtol=1e-4, atol=1e-7)

    rng = np.random.default_rng(1)
    attached.set_mode(native.SPARSE)
    for position in (790, 791):
        n_used = position // 16 + 1
        chosen = {}
        for layer in range(info.n_layer):
            for head in range(info.n_head_kv):  # lists of any length, 1 to all
                n = rng.integers(1, n_used + 1)
                ids = np.union1d(rng.choice(n_used, n, replace=False), [n_used - 1])
                chosen[layer, head] = ids
                attached.blocks[layer, head, : len(ids)] = ids
                attached.n_listed[layer, head] = len(ids)
        llm.eval([tokens[position]])
        compare(attached, 0, n_used, lambda layer, c=chosen: [c[layer, h] for h in range(info.n_head_kv)], position)
    attached.close()
    llm.close()


def test_layer_0_against_llama_cpp_softmax(small, code):
    """Flash attention off, llama.cpp's own softmax of layer 0, pooled by block."""
    llm = Llama(small, n_ctx=1024, verbose=False, flash_attn=True, offload_kqv=False, n_threads=2)
    tokens = llm.tokenize(code.encode())[:700]
    attached = NativeContext(llm.ctx, 64, native.TRACE_HEAD | native.TRACE_SCORES)
    info = attached.info
    llm.eval(tokens[:650])
    attached.set_mode(native.HISTORY)
    llm.eval(tokens[650:651])
    ours = attached.trace_scores[0, 0].copy()

    seen = {}
    context = Context(small, 1024, flash_attn=False, names=("kq_soft_max-0",), watch=lambda name, x: seen.__setitem__(name, x))
    for i in range(0, 650, 512):
        context.decode(tokens[i : min(i + 512, 650)])
    context.decode(tokens[650:651])
    softmax = seen["kq_soft_max-0"].reshape(info.n_head, -1)  # (n_head, n_kv), n_kv padded
    theirs = softmax[:, : softmax.shape[1] // 16 * 16].reshape(info.n_head, -1, 16).sum(2)
    np.testing.assert_allclose(ours[:, :41], theirs[:, :41], rtol=2e-3, atol=1e-5)
    context.close()
    attached.close()
    llm.close()


@pytest.mark.sanitize
@pytest.mark.parametrize("n_threads", [1, 3, 7])
def test_any_number_of_threads(small, code, n_threads):
    llm = Llama(small, n_ctx=512, verbose=False, flash_attn=True, offload_kqv=False, n_threads=n_threads)
    tokens = llm.tokenize(code.encode())[:400]
    attached = NativeContext(llm.ctx, 64, native.TRACE_HEAD | native.TRACE_SCORES)
    llm.eval(tokens[:399])
    attached.set_mode(native.SPARSE)
    attached.blocks[..., :25] = np.arange(25)
    attached.n_listed[:] = 25
    llm.eval([tokens[399]])
    compare(attached, 0, 25, lambda _: [np.arange(25)] * 3, 399)
    attached.close()
    llm.close()
