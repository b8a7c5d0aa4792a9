"""Memory that runs out is said in one sentence, and the session in hand goes on."""

import subprocess
import sys

import numpy as np
import pytest

from kvcast import KvcastError, Llama, ModelError, SessionError, SparseConfig
from kvcast.chat import documents as cache
from kvcast.engine import saving, session
from logits import logits_of
from places import DATA

# with an address space that has no room for much more: what needs it fails, all else works
LIMITED = """
import resource, sys
from pathlib import Path
import psutil
from kvcast import Llama, ModelError, SessionError, SparseConfig, SparseUnsupported
from kvcast.bindings.context import NativeContext
import llama_cpp

model, text, folder = map(Path, sys.argv[1:])
make = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
llm = Llama(model, n_ctx=1024, sparse=SparseConfig(budget=256), **make)
bare = llama_cpp.Llama(str(model), n_ctx=2048, flash_attn=True, offload_kqv=False, **make)
tokens = llm.tokenize(text.read_bytes())
llm.eval(tokens[:600])
llm.eval([tokens[600]])
state = llm.save_state()

def refused(kind, words, call):
    try:
        call()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")
    n = llm.n_tokens
    llm.eval([tokens[n]])
    assert llm.n_tokens == llm.session.n_tokens == n + 1

def room(n_bytes):
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + n_bytes, resource.RLIM_INFINITY))

room(48 << 20)
refused(SessionError, "no memory for a copy", llm.save_state)
refused(SessionError, "no memory to take the state in", lambda: llm.load_state(state))
refused(SparseUnsupported, "host memory ran out", lambda: NativeContext(bare.ctx, 1 << 16))
refused(SparseUnsupported, "no memory left for the pool", lambda: NativeContext(bare.ctx, 1, 0, False, 128, 1))
refused(ModelError, "memory ran out", lambda: Llama(model, n_ctx=8192, **make))  # the weights
llm.save_session(folder / "x.session")  # makes no copy
llm.load_session(folder / "x.session")
llm.eval([tokens[llm.n_tokens]])
room(model.stat().st_size + (80 << 20))
refused(ModelError, "memory ran out", lambda: Llama(model, n_ctx=8192, **make))  # the KV cache, 188 MB
print("fine")
"""


def test_an_address_space_that_is_full(smollm2, tmp_path):
    command = [sys.executable, "-c", LIMITED, str(smollm2), str(DATA / "code.txt"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("fine\n"), done.stderr


def no_memory(*_, **__):
    raise MemoryError


@pytest.mark.parametrize("path", ["host", "device"])
def test_allocations_that_fail_in_python(small, code, tmp_path, monkeypatch, path):
    config = SparseConfig(budget=256, path=path)
    shared = dict(n_ctx=768, n_threads=2, n_threads_batch=2, verbose=False)
    llm, other = (Llama(small, sparse=config, **shared) for _ in range(2))
    tokens = llm.tokenize(code.encode())
    for x in (llm, other):
        x.eval(tokens[:600])
        x.eval([tokens[600]])
        x.session.configure(config)

    with monkeypatch.context() as m:
        m.setattr(session, "History", no_memory)
        with pytest.raises(ModelError, match="memory ran out beside the KV cache of 512 tokens"):
            Llama(small, sparse=config, **{**shared, "n_ctx": 512})
    with monkeypatch.context() as m:
        m.setattr(session.History, "keep_steps", no_memory)
        before = llm.session.predictor
        with pytest.raises(KvcastError, match="no memory for predictor='onnx:paper'"):
            llm.session.configure(SparseConfig(budget=256, path=path, predictor="onnx:paper"))
        assert llm.session.predictor is before and llm.session.config == config
    with monkeypatch.context() as m:
        m.setattr(np, "savez", no_memory)
        saving.save(other.session, other.n_tokens)  # what trying to save does to the session in hand
        with pytest.raises(SessionError, match="memory ran out"):
            llm.save_session(tmp_path / "x")
        with pytest.raises(KvcastError, match="cannot be kept"):
            cache.DocumentCache(tmp_path).save(llm, tokens[:601], "x")
    assert not list(tmp_path.iterdir())
    for x in (llm, other):
        for token in tokens[601:606]:
            x.eval([token])
    np.testing.assert_array_equal(logits_of(llm), logits_of(other))
    llm.close()
    other.close()
