"""Documents on disk: one is kept, its files are changed, and what is opened must be that document or nothing."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path

import numpy as np

from kvcast import Llama, SparseConfig
from kvcast.cache import MIN_TOKENS, DocumentCache
from kvcast.native import llama_cpp
from shapes import write_shape

from . import mutate
from .gguf_file import SHAPE

N_TOKENS = MIN_TOKENS + 8


class Session:
    """A surface; see ``harness.Surface``. An input is the two files, the description first, with its length before it."""

    def __init__(self, folder: Path):
        model = write_shape(folder / "tiny.gguf", **{**SHAPE, "n_ctx": 1024}, vocabulary="llama")
        self._llm = Llama(model, n_ctx=1024, n_batch=64, sparse=SparseConfig(budget=96, predictor="ema"), n_threads=1, verbose=False)
        self._tokens = [3 + i % 250 for i in range(N_TOKENS)]
        self._cache = DocumentCache(folder / "documents")
        self._llm.eval(self._tokens)
        assert self._cache.save(self._llm, self._tokens, "a document")
        (self._listed,), (self._state,) = (list(self._cache.folder.glob(f"*.{kind}")) for kind in ("json", "kv"))
        self._files = self._listed.read_bytes(), self._state.read_bytes()
        self._rows = [rows[:N_TOKENS].copy() for layer in range(2) for rows in self._llm.session.attached.rows(layer)]

    def make(self, rng: random.Random) -> bytes:
        listed, state = self._files
        kind = rng.random()
        if kind < 0.3:
            listed = mutate.some_bytes(rng, listed)
        elif kind < 0.5:
            listed = json.dumps(mutate.value(rng, json.loads(listed))).encode("utf-8", "replace")
        else:
            state = mutate.some_bytes(rng, state, rng.choice((64, 4096, None)))
            if kind < 0.9:  # whoever writes such a file knows how to make it pass
                listed = json.dumps({**json.loads(listed), "crc32": zlib.crc32(state), "n_bytes": len(state)}).encode()
        return len(listed).to_bytes(4, "little") + listed + state

    def run(self, data: bytes) -> str:
        n = 4 + int.from_bytes(data[:4], "little")
        self._listed.write_bytes(data[4:n])
        self._state.write_bytes(data[n:])
        llm = self._llm
        opened = self._cache.load(llm, self._tokens)
        same = opened and all(
            np.array_equal(rows[:N_TOKENS], kept)
            for rows, kept in zip((r for layer in range(2) for r in llm.session.attached.rows(layer)), self._rows)
        )
        if not opened:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
            llm.reset()
        llm.eval([5])
        assert llm.n_tokens == (N_TOKENS + 1 if opened else 1)
        return "opened" if same else "opened with other content" if opened else "left"
