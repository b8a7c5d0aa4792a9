"""Callbacks by Python functions and by Numba's compiled ones; exact rows; the examples of the docs."""

import ctypes
import subprocess
import sys

import numba
import numpy as np
import pytest
from numba import types

from kvcast import CallbackError, Llama, SparseConfig
from places import DATA, ROOT


@pytest.fixture
def llm(small):
    llm = Llama(small, n_ctx=1024, sparse=SparseConfig(budget=256, trace=True), n_threads=2, n_threads_batch=2, verbose=False)
    yield llm
    llm.close()


@pytest.mark.sanitize
def test_kv_is_reported_once_when_a_block_is_complete(llm, code):
    tokens = llm.tokenize(code.encode())
    seen = []
    llm.on_kv(lambda layer, block, k, v: seen.append((layer, block, k, v)))
    llm.eval(tokens[:500])
    for token in tokens[500:530]:
        llm.eval([token])
    assert [(layer, block) for layer, block, *_ in seen] == [(layer, block) for block in range(33) for layer in range(4)]
    for layer, block, k, v in seen[:: 4 * 7]:
        assert k.shape == v.shape == (16, 3, 64) and k.dtype == np.float16
        stored = llm.session.attached.rows_of(layer, 16 * block, 16 * block + 16)
        assert (stored[0] == k).all() and (stored[1] == v).all()
    seen.clear()
    llm.n_tokens = 400  # an edit: what is written again is reported again
    llm.eval(tokens[400:420])
    assert {block for _, block, *_ in seen} == {25}


@pytest.mark.sanitize
def test_a_failing_kv_callback_is_raised_and_loses_nothing(llm, code):
    tokens = llm.tokenize(code.encode())

    def fail(layer, block, k, v):
        raise OSError("disk full")

    llm.on_kv(fail)
    with pytest.raises(CallbackError, match="OSError: disk full") as caught:
        llm.eval(tokens[:300])
    assert isinstance(caught.value.__cause__, OSError)
    llm.on_kv(None)
    llm.eval(tokens[llm.n_tokens : 320])
    llm.eval([tokens[320]])
    assert llm.n_tokens == 321


@pytest.mark.sanitize
def test_compiled_callbacks_by_address(llm, code):
    counts = np.zeros(2, np.int64)
    address = counts.ctypes.data

    @numba.cfunc(types.int32(types.voidptr, types.int32, types.int32, types.CPointer(types.float32), types.int32, types.int32, types.int32))
    def attention(user, layer, pos, scores, n_taps, n_head_kv, stride):
        numba.carray(_pointer(address), 2)[0] += 1
        return 0

    @numba.cfunc(types.int32(types.int32, types.int32, types.voidptr, types.voidptr, types.int64, types.int64))
    def kv(layer, block, k, v, k_row_bytes, v_row_bytes):
        numba.carray(_pointer(address), 2)[1] += k_row_bytes
        return 0

    tokens = llm.tokenize(code.encode())
    llm.on_attention(attention.address)
    llm.on_kv(kv.address)
    llm.eval(tokens[:300])
    for token in tokens[300:310]:
        llm.eval([token])
    assert counts[0] == 4 * 11  # a history batch and 10 steps
    assert counts[1] == 4 * (310 // 16) * llm.session.attached.info.k_row_bytes
    llm.on_kv(ctypes.cast(_failing, ctypes.c_void_p).value)
    with pytest.raises(CallbackError, match="returned 7"):
        llm.eval(tokens[310:330])


_failing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
    lambda *_: 7
)


@numba.extending.intrinsic
def _pointer(_context, address):
    def cast(_c, builder, signature, args):
        return builder.inttoptr(args[0], _c.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(address), cast


@pytest.mark.sanitize
def test_exact_rows_agree_with_the_block_scores(llm, code):
    tokens = llm.tokenize(code.encode())
    with pytest.raises(ValueError, match="nothing has been evaluated"):
        llm.attention_row(0)
    llm.eval(tokens[:500])
    info = llm.session.attached.info
    for layer in (0, 3):
        row = llm.attention_row(layer)
        assert row.shape == (9, 500)
        blocks = np.add.reduceat(row, np.arange(0, 500, 16), axis=1).reshape(3, 3, -1).mean(1)
        np.testing.assert_allclose(
            blocks, llm.session.attached.history_scores[layer, llm.session.n_history_taps - 1, :, :32], rtol=2e-3, atol=1e-6
        )
    llm.eval([tokens[500]])
    row = llm.attention_row(2)
    assert row.shape == (info.n_head, 501)
    attached = llm.session.attached
    blocks, chosen = attached.blocks[2, 1], attached.chosen_cells(2, 1)
    held = np.isin(np.arange(501) // 16, blocks[: attached.n_listed[2, 1]]) | np.isin(np.arange(501), chosen)
    assert len(chosen) and held.sum() < 501
    expected = [row[h, np.arange(501) // 16 == blocks[0]].sum() / row[h, held].sum() for h in range(3, 6)]
    np.testing.assert_allclose(llm.session.attached.scores[2, 1, 0], np.mean(expected), rtol=2e-3)


def test_rows_need_queries(small):
    llm = Llama(small, n_ctx=512, sparse=SparseConfig(budget=256), verbose=False)
    with pytest.raises(ValueError, match="trace=True"):
        llm.attention_row(0)
    llm.close()


@pytest.mark.parametrize(
    ("script", "options", "said"),
    [("heat_map.py", ["--tokens", "6", "--context", "1024"], "wrote"), ("stream_kv.py", ["--context", "1024"], "equal to the store")],
)
def test_examples(script, options, said, tmp_path):
    out = tmp_path / "out.png"
    command = [sys.executable, ROOT / "docs" / "examples" / script, DATA / "code.txt", "--out", out, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and said in done.stdout, done.stderr
    assert out.stat().st_size > 10_000
