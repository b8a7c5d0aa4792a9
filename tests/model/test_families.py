"""Contracts 2, 3 and 4 (DESIGN.md, section 9) of every family that is served without being asked, with rope scaling and KV types.

Random weights in the family's shape (tiny.py). docs/coverage.md names these tests.
"""

import re

import numpy as np
import pytest

from commands import command
from kvcast import Llama, SparseConfig, SparseUnsupported, SparseUntested
from kvcast.bindings.context import NativeContext
from kvcast.gguf.memory import KV_TYPES
from kvcast.gguf.support import TESTED
from kvcast.server.model_manager import ModelManager
from kvcast.server.settings import ModelSettings
from logits import logits_of
from places import ROOT
from tiny import N_VOCAB, SHAPES, UNTESTED, WITH_SINKS, write_tiny

N_PROMPT, N_STEPS = 600, 12
# Largest difference of a logit from dense, in shares of the largest logit. llama.cpp's flash attention rounds queries to the
# type of K (f16, bf16, 8 bits), the host path does not.
DIFFERENCE = {"f16": 0.01, "bf16": 0.02, "q8_0": 0.02, "q4_0": 0.02}


@pytest.fixture(params=["host", "device"])
def path(request):
    return request.param


class Dense:
    """A model with a dense run: its logits, and its rows of the store after the last step."""

    def __init__(self, file, kv_type="f16"):
        kind = KV_TYPES[kv_type]
        self.load = lambda **more: Llama(file, n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False, type_k=kind, type_v=kind, **more)
        self.tokens = np.random.default_rng(1).integers(0, N_VOCAB, N_PROMPT + N_STEPS).tolist()
        llm = self.load(flash_attn=True, offload_kqv=False, swa_full=False)
        for end in (512, N_PROMPT - 64, N_PROMPT):  # the batches of a sparse session
            llm.eval(self.tokens[llm.n_tokens : end])
        self.logits = steps(llm, self.tokens)
        look = NativeContext(llm.ctx, 1)
        self.layers = look.layers.tolist()
        self.rows = [[rows[: len(self.tokens)].copy() for rows in look.rows(i)] for i in range(len(self.layers))]
        look.close()
        llm.close()

    def difference(self, llm):
        """Largest of a logit over the steps, in shares of the largest logit."""
        return np.abs(steps(llm, self.tokens) - self.logits).max() / np.abs(self.logits).max()


def steps(llm, tokens):
    found = []
    for token in tokens[N_PROMPT:]:
        llm.eval([token])
        found.append(logits_of(llm))
    return np.stack(found)


def check_contracts(dense, path, bound, untested=False):
    llm = dense.load(sparse=SparseConfig(budget=1024, path=path, predictor="ema", untested=untested))
    session, attached = llm.session, llm.session.attached
    assert attached.layers.tolist() == dense.layers
    llm.eval(dense.tokens[:N_PROMPT])
    difference = dense.difference(llm)
    print(f"\n{path}: logits differ from dense by {difference:.5f} of the largest")
    assert difference <= bound
    assert session.times.share_sum == N_STEPS

    llm.n_tokens = N_PROMPT
    session.configure(SparseConfig(budget=256, path=path, predictor="ema"))
    fewer = dense.difference(llm)
    print(f"with half of the blocks by {fewer:.5f}")
    assert fewer > 2 * difference  # else nothing was proven
    assert session.times.blocks_read < 0.6 * session.times.blocks_dense
    for i, layer in enumerate(dense.layers):
        n = len(dense.tokens) if layer == 0 else N_PROMPT
        for ours, theirs in zip(attached.rows(i), dense.rows[i]):
            np.testing.assert_array_equal(ours[:n], theirs[:n], err_msg=f"layer {layer}")
    if path == "device":
        assert attached.verify_pool() == 0
    llm.close()


@pytest.fixture(scope="module", params=SHAPES)
def family(request, tmp_path_factory):
    return Dense(write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf", SHAPES[request.param]))


def test_family(family, path):
    check_contracts(family, path, DIFFERENCE["f16"])


@pytest.fixture(scope="module", params=KV_TYPES)
def kv_type(request, tmp_path_factory):
    return request.param, Dense(write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf", SHAPES["llama"]), request.param)


def test_kv_type(kv_type, path):
    check_contracts(kv_type[1], path, DIFFERENCE[kv_type[0]])


@pytest.fixture(scope="module")
def untested(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "untested.gguf", UNTESTED)


@pytest.fixture(scope="module")
def with_sinks(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "sinks.gguf", WITH_SINKS)


def test_tested_families_are_those_that_the_tests_run():
    assert TESTED == tuple(sorted({shape.arch for shape in SHAPES.values()}))


def test_the_table_of_coverage_is_complete():
    families = re.findall(r"^\| `(\w+)`.*pytest tests/model/test_families.py", (ROOT / "docs/coverage.md").read_text(), re.M)
    assert tuple(sorted(families)) == TESTED


def test_an_untested_family_is_asked_for(untested):
    with pytest.raises(SparseUntested, match=r"'internlm2' is untested.* sparse=None .* SparseConfig\(untested=True\)"):
        Llama(untested, n_ctx=1024, sparse=SparseConfig(), verbose=False)
    check_contracts(Dense(untested), "host", DIFFERENCE["f16"], untested=True)


def test_sinks_are_refused_also_when_asked_for(with_sinks):
    for asked in (False, True):
        with pytest.raises(SparseUnsupported, match="'gpt-oss' adds sinks"):
            Llama(with_sinks, n_ctx=1024, sparse=SparseConfig(untested=asked), verbose=False)
    Llama(with_sinks, n_ctx=1024, verbose=False).close()


NO_TEMPLATE = "the file has no chat template, as a base model has none; questions are put in Llama 2's, which it may not know"


def test_the_command_line_runs_what_is_untested_dense_and_says_so(untested, with_sinks):
    done = command("chat", "--model", untested, "--context", "512")
    assert done.returncode == 0, done.stderr
    dense = "running dense: the model family 'internlm2' is untested with sparse attention; --untested (SparseConfig.untested) asks for it"
    assert done.stderr.splitlines() == [dense, NO_TEMPLATE]
    asked = command("chat", "--model", untested, "--context", "512", "--untested")
    assert asked.returncode == 0 and asked.stderr.splitlines() == [NO_TEMPLATE]
    done = command("chat", "--model", with_sinks, "--context", "512")
    assert done.returncode == 0 and done.stderr.startswith("running dense: the family 'gpt-oss' adds sinks")


@pytest.mark.parametrize("asked", [False, True])
def test_the_server_too(untested, asked):
    said = []
    proxy = ModelManager([ModelSettings(model=str(untested), n_ctx=512, sparse=SparseConfig(untested=asked))], None, said.append)
    assert (proxy.current.sparse is not None) == asked
    assert said.pop() == f"untested: {NO_TEMPLATE}"
    assert len(said) == (not asked) and all("running dense" in line for line in said)
    proxy.free()
