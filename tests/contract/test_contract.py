"""Contracts 1 to 3, on SmolLM2, Qwen 0.5B and Gemma 3 270M (three windows); `make test-long` runs them at 4,096 tokens, too."""

import os
import subprocess
import sys

import numpy as np
import pytest

from kvcast import Llama, SparseConfig
from kvcast.bindings.context import NativeContext
from kvcast.bindings.library import CARRIED
from logits import LOGIT_DIFFERENCE, REFERENCE, logits_of
from lowlevel import Context
from places import ROOT

LONG = bool(os.environ.get("KVCAST_LONG"))
N_CONTEXT, N_STEPS = {"smollm2": 4096 if LONG else 2048, "qwen": 4096 if LONG else 1536, "gemma3": 1536}, 12


STOCK = """
import os, sys
import numpy as np
import llama_cpp
path, text, out, n_context, n_steps, flash = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6] == "1"
llm = llama_cpp.Llama(path, n_ctx=n_context + 256, n_threads=2, n_threads_batch=2, flash_attn=flash, verbose=False)
tokens = llm.tokenize(open(text).read().encode())[: n_context + n_steps]
llm.eval(tokens[:n_context])
rows = []
for t in tokens[n_context:]:
    llm.eval([t])
    rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy())
np.save(out, np.stack(rows))
with open("/proc/self/maps") as maps:
    print([line.split()[-1] for line in maps if "libllama" in line][0])
"""


def forced(llm, tokens):
    llm.eval(tokens[:-N_STEPS])
    rows = []
    for token in tokens[-N_STEPS:]:
        llm.eval([token])
        rows.append(logits_of(llm))
    return np.stack(rows)


@pytest.fixture(params=["host", "device"])
def path(request):
    return request.param


@pytest.fixture(scope="module", params=["smollm2", "qwen", "gemma3"])
def model(request):
    return request.param, request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def dense(model, code):
    """Dense logits with flash attention on, the tokens, and the loaded model at their end."""
    n_context = N_CONTEXT[model[0]]
    llm = Llama(model[1], n_ctx=n_context + 256, flash_attn=True, offload_kqv=False, n_threads=2, n_threads_batch=2, verbose=False)
    tokens = llm.tokenize(code.encode())[: n_context + N_STEPS]
    yield forced(llm, tokens), tokens, llm
    llm.close()


@pytest.fixture(scope="module")
def differs_by_itself(model, dense):
    """How far logits move when llama.cpp's flash attention is turned off."""
    expected, tokens, _ = dense
    llm = Llama(model[1], n_ctx=N_CONTEXT[model[0]] + 256, flash_attn=False, n_threads=2, n_threads_batch=2, verbose=False)
    yield np.abs(forced(llm, tokens) - expected)
    llm.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_contract_1_sparse_none_equals_an_unpatched_build(model, dense, tmp_path):
    assert REFERENCE.is_dir(), "build the reference first: make reference"
    script, out = tmp_path / "stock.py", tmp_path / "logits.npy"
    script.write_text(STOCK)
    environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(REFERENCE), "PYTHONPATH": str(CARRIED.parent)}
    arguments = [str(model[1]), str(ROOT / "tests/data/code.txt"), str(out), str(N_CONTEXT[model[0]]), str(N_STEPS), "1"]
    done = subprocess.run([sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(REFERENCE / "libllama.so")
    np.testing.assert_array_equal(np.load(out), dense[0])


def test_contract_2_budget_over_context(model, dense, differs_by_itself, path):
    expected, tokens, _ = dense
    name, file = model
    make = {"n_ctx": N_CONTEXT[name] + 256, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
    with_all = Llama(file, sparse=SparseConfig(budget=2 * N_CONTEXT[name], path=path), **make)
    got = forced(with_all, tokens)
    assert with_all.session.times.share_sum == N_STEPS
    with_all.close()
    own = differs_by_itself
    difference = np.abs(got - expected)
    print(f"\n{name}, {path} path: logits differ by {difference.max():.3f} at most, {difference.mean():.4f} in the mean;")
    print(f"dense with flash attention off and on: {own.max():.3f}, {own.mean():.4f}")
    assert difference.max() <= LOGIT_DIFFERENCE[name]
    assert difference.mean() <= 1.5 * own.mean()
    second, first = np.sort(expected, 1)[:, -2:].T
    clear = first - second > 2 * LOGIT_DIFFERENCE[name]
    assert clear.sum() >= 2
    np.testing.assert_array_equal(got.argmax(1)[clear], expected.argmax(1)[clear])


def test_contract_3_rows_of_the_store(model, dense, path):
    _, tokens, _ = dense
    n_prompt = 768
    make = {"n_ctx": 2048, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
    stock = Llama(model[1], flash_attn=True, offload_kqv=False, swa_full=False, **make)
    for batch in (tokens[:512], tokens[512 : n_prompt - 64], tokens[n_prompt - 64 : n_prompt]):
        stock.eval(batch)
    for token in tokens[n_prompt : n_prompt + 40]:
        stock.eval([token])
    sparse = Llama(model[1], sparse=SparseConfig(budget=256, path=path), **make)
    sparse.eval(tokens[:n_prompt])
    for token in tokens[n_prompt : n_prompt + 40]:
        sparse.eval([token])
    assert sparse.session.times.blocks_read < 0.6 * sparse.session.times.blocks_dense
    look = NativeContext(stock.ctx, 1)
    for layer in range(look.info.n_layer):
        for ours, theirs in zip(sparse.session.attached.rows(layer), look.rows(layer)):
            np.testing.assert_array_equal(ours[:n_prompt], theirs[:n_prompt], err_msg=f"prompt rows, layer {layer}")
            if look.layers[layer] == 0:
                np.testing.assert_array_equal(ours[: n_prompt + 40], theirs[: n_prompt + 40])
    look.close()
    stock.close()
    sparse.close()


def test_contract_3_every_row_is_what_the_graph_computed(model, code):
    from kvcast.bindings import api as native

    seen = {}
    context = Context(model[1], 1024, flash_attn=True, names=("Kcur-", "Vcur-"), watch=lambda name, x: seen.__setitem__(name, x))
    llm = Llama(model[1], n_ctx=512, vocab_only=False, verbose=False)
    tokens = llm.tokenize(code.encode())[:600]
    llm.close()
    attached = NativeContext(context.ctx, 64)
    info = attached.info
    context.decode(tokens[:512])
    attached.set_mode(native.SPARSE)
    for position, token in enumerate(tokens[512:530], 512):
        listed = np.array([0, 1, 5, 9, *range(position // 16 - 3, position // 16 + 1)])
        attached.blocks[..., : len(listed)] = listed
        attached.n_listed[:] = len(listed)
        context.decode([token])
        for layer in range(info.n_layer):
            k, v = attached.rows(layer)
            for name, rows in (("Kcur", k), ("Vcur", v)):
                computed = seen[f"{name}-{attached.layers[layer]}"].astype(np.float16).view(np.uint8)
                np.testing.assert_array_equal(rows[position], computed, err_msg=f"{name}, layer {layer}, position {position}")
    attached.close()
    context.close()
