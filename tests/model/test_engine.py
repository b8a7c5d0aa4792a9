"""The shape of a step: who calls whom, and how often."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest

from kvcast import GenerationError, Llama, SparseConfig
from kvcast.engine.path import AttentionPath
from tiny import N_VOCAB, SHAPES, write_tiny

TOKENS = np.random.default_rng(0).integers(3, N_VOCAB, 400).tolist()
PATHS = {"dense": None, "host": SparseConfig(budget=96), "device": SparseConfig(budget=256, path="device")}
INTERFACE = [name for name, member in vars(AttentionPath).items() if callable(member) and not name.startswith("_")]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("engine") / "tiny.gguf", SHAPES["llama"])


@pytest.mark.parametrize("path", ["host", "device"])
def test_a_step_is_prepared_decoded_and_finished(file, monkeypatch, path):
    llm = Llama(file, n_ctx=512, n_batch=128, n_threads=1, sparse=PATHS[path], verbose=False)
    llm.eval(TOKENS[:300])
    calls, inside = [], []

    def noted(owner, name):
        call = getattr(owner, name)

        def wrapped(*arguments, **more):
            if not inside:  # not what a path calls of itself
                calls.append(name)
            inside.append(name)
            try:
                return call(*arguments, **more)
            finally:
                inside.pop()

        monkeypatch.setattr(owner, name, wrapped)

    for name in INTERFACE:
        noted(llm.session.path, name)
    noted(llm.session, "decode")
    llm.eval([TOKENS[300]])
    assert calls == ["prepare", "decode", "finish"]
    calls.clear()
    llm.eval(TOKENS[301:400])
    assert calls.count("decode") == 2 and [c for c in calls if c in ("before_batch", "decode", "finish_batch")] == [
        "before_batch", "decode", "finish_batch", "before_batch", "decode", "finish_batch",
    ]  # fmt: skip
    llm.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_model_that_nobody_refers_to_is_freed_at_once(file, path):
    llm = Llama(file, n_ctx=512, n_threads=1, sparse=PATHS[path], verbose=False)
    llm.eval(TOKENS[:100])
    for token in TOKENS[100:110]:
        llm.eval([token])
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(llm)
        del llm
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("path", ["host", "device"])
def test_a_token_that_was_looked_at_ahead_does_not_count_when_its_step_fails(file, monkeypatch, path):
    config = replace(PATHS[path], predictor="oracle")
    llm = Llama(file, n_ctx=512, n_batch=128, n_threads=1, sparse=config, verbose=False)
    llm.eval(TOKENS[:300])

    def fail(*_):
        raise RuntimeError("no step")

    with monkeypatch.context() as patched:
        patched.setattr(llm.session.path, "prepare", fail)
        with pytest.raises(GenerationError, match="the store holds the 300 tokens"):
            llm.eval([TOKENS[300]])
    assert llm.n_tokens == llm.session.n_tokens == 300
    llm.eval([TOKENS[300]])
    assert llm.n_tokens == 301
    llm.close()
