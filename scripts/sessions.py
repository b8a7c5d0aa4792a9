"""Whole sessions at random: documents, decode steps and edits on both paths, the contract checked every few hundred steps.

The model is SmolLM2 without its upper layers, which makes 100,000 steps a matter of minutes. A check compares what can be known
exactly. Rows of the first layer depend on nothing but their token and position, so they equal, byte for byte, those of a model that
has no other layer. The pool equals the store. And dense llama.cpp, given the session's state, says the same of the next token as the
session does when it attends to everything.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

import kvcast
from kvcast import Llama, SparseConfig, models
from kvcast.bindings.api import llama_cpp
from kvcast.bindings.context import NativeContext
from kvcast.cores import usable_cores

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "helpers"))
from small import first_layers

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "scripts/demo.txt", *sorted((ROOT / "tests/data").glob("*.txt")), Path(kvcast.__file__).parent / "data/prose.txt"]
N_LAYER = 4
N_CTX, N_STEPS, CHECK_EVERY = 2048, 500, 250
ROOM = 200  # tokens that an edit and the steps after it may add
LOGIT_DIFFERENCE = 1.8  # as stated in tests/contract/test_contract.py
MEMORY_BYTES = 20 << 20  # that the process may hold more in the last fifth of the sessions than in the first, in the median
M_MMAP_THRESHOLD = -3  # of malloc.h
EDITS = {"truncate": 3, "regenerate": 3, "prefix": 3, "save": 2, "load": 3, "configure": 3, "reset": 1}  # and how often


def logits_of(llm: Llama) -> np.ndarray:
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)).copy()


class Sessions:
    """The models, and the sessions run on them.

    Attributes
    ----------
    n_checks : int
    difference, replayed : float
        The largest difference of a logit from dense: given the same state; after a dense run of the same tokens, of sessions that
        attended to everything from their first token on.
    """

    def __init__(self) -> None:
        path = models.resolve("smollm2")
        shared = {"n_ctx": N_CTX, "n_batch": 128, "n_threads": usable_cores(), "verbose": False}
        dense = {"flash_attn": True, "offload_kqv": False, **shared}
        with tempfile.TemporaryDirectory() as folder:
            few, one = (first_layers(path, Path(folder) / f"{n}.gguf", n) for n in (N_LAYER, 1))
            self._sparse = [Llama(few, sparse=SparseConfig(budget=N_CTX, path=p), **shared) for p in ("host", "device")]
            self._dense, self._first = Llama(few, **dense), Llama(one, **dense)
        self._first_store = NativeContext(self._first.ctx, 1)
        self._text = [t for file in TEXTS for t in self._dense.tokenize(file.read_bytes())]
        self.n_checks = 0
        self.difference = self.replayed = 0.0

    def close(self) -> None:
        self._first_store.close()
        for llm in (*self._sparse, self._dense, self._first):
            llm.close()

    def run(self, number: int) -> None:
        """One session of ``N_STEPS`` decode steps; the number decides everything about it."""
        rng = random.Random(number)
        llm = self._sparse[number % 2]
        everything = number % 4 >= 2  # a quarter of the sessions on each path
        limit = rng.randint(512, N_CTX)
        saved = None
        llm.session.configure(replace(llm.session.config, budget=N_CTX))
        self._edit(llm, "reset", rng, limit, everything)
        n_steps = 0
        while n_steps < N_STEPS:
            (kind,) = rng.choices(list(EDITS), EDITS.values())
            if kind == "save":
                saved = llm.save_state()
            elif kind == "load" and saved is not None:
                llm.load_state(saved)
            else:
                self._edit(llm, kind, rng, limit, everything)
            if llm.n_tokens > limit - ROOM:
                llm.n_tokens = rng.randint(64, limit - ROOM)
            before = n_steps
            n_steps = min(N_STEPS, n_steps + rng.randint(1, 60))
            for token in self._some_text(rng, n_steps - before):
                llm.eval([token])
            if before // CHECK_EVERY < n_steps // CHECK_EVERY:
                self._check(llm, rng, everything and n_steps == N_STEPS)

    def _some_text(self, rng: random.Random, n: int) -> list[int]:
        start = rng.randrange(len(self._text) - n)
        return self._text[start : start + n]

    def _edit(self, llm: Llama, kind: str, rng: random.Random, limit: int, everything: bool) -> None:
        n = llm.n_tokens
        if kind == "truncate":
            llm.n_tokens = rng.randint(1, n)
        elif kind == "regenerate":
            llm.n_tokens = max(1, n - rng.randint(1, 40))
            llm.eval(self._some_text(rng, rng.randint(1, 100)))
        elif kind == "prefix":
            prompt = llm.input_ids[: rng.randint(1, n)].tolist() + self._some_text(rng, rng.randint(1, 100))
            next(llm.generate(prompt, temp=0.0))
        elif kind == "configure" and not everything:
            budget, predictor = rng.choice((256, 256, 512, 1024, N_CTX)), rng.choice(("auto", "ema"))
            llm.session.configure(replace(llm.session.config, budget=budget, predictor=predictor, hold=rng.choice((None, 1, 4, 32))))
        elif kind == "reset":
            llm.reset()
            llm.eval(self._some_text(rng, rng.randint(100, limit - ROOM)))

    def _check(self, llm: Llama, rng: random.Random, replay: bool) -> None:
        n, config, session = llm.n_tokens, llm.session.config, llm.session
        tokens, (token,) = llm.input_ids[:n].tolist(), self._some_text(rng, 1)
        self._first.reset()
        self._first.eval(tokens)
        for ours, theirs in zip(session.attached.rows(0), self._first_store.rows(0)):
            np.testing.assert_array_equal(ours[:n], theirs[:n], err_msg="rows of the first layer")
        if config.device:
            assert session.attached.verify_pool() == 0, "a slot of the pool differs from the store"

        self._dense.load_state(llm.save_state())
        session.configure(replace(config, budget=N_CTX))
        for x in (llm, self._dense):
            x.eval([token])
        ours = logits_of(llm)
        self.difference = max(self.difference, agree(ours, logits_of(self._dense), "given the same state"))
        if replay:
            self._dense.reset()
            self._dense.eval([*tokens, token])
            self.replayed = max(self.replayed, agree(ours, logits_of(self._dense), "after a dense run of the same tokens"))
        llm.n_tokens = n
        session.configure(config)
        self.n_checks += 1


def agree(ours: np.ndarray, dense: np.ndarray, when: str) -> float:
    """The largest difference of a logit; an AssertionError where it, or the top token, is not as the contract says."""
    difference = float(np.abs(ours - dense).max())
    assert difference <= LOGIT_DIFFERENCE, f"logits differ by {difference:.2f} from dense, {when}"
    second, first = np.sort(dense)[-2:]
    assert first - second <= 2 * LOGIT_DIFFERENCE or ours.argmax() == dense.argmax(), f"another top token than dense, {when}"
    return difference


def sessions(first: int, last: int) -> None:
    """Run the sessions [first, last); AssertionError when one of them, or memory, is not as it should be."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)  # what is freed goes back to the system, so that memory is what is held
    soak, process, memory = Sessions(), psutil.Process(), []
    for number in range(first, last):
        soak.run(number)
        gc.collect()
        memory.append(process.memory_info().rss)
        if (number + 1) % 10 == 0 or number + 1 == last:
            print(
                f"sessions: {number + 1 - first} done, {(number + 1 - first) * N_STEPS:,} steps, {soak.n_checks} checks; logits within "
                f"{soak.difference:.2f} of dense, {soak.replayed:.2f} after a dense run; {memory[-1] / 1e6:.0f} MB",
                flush=True,
            )
    soak.close()
    fifth = len(memory) // 5
    if fifth > 1:
        before, after = np.median(memory[:fifth]), np.median(memory[-fifth:])
        print(f"sessions: {before / 1e6:.0f} MB in the first fifth of the sessions, {after / 1e6:.0f} MB in the last (medians)")
        assert after < before + MEMORY_BYTES, "memory grew"
