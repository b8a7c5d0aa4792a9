"""Documents on disk: one is kept, its file is changed, and what is opened must be that document or nothing."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np

from kvcast import Llama, SparseConfig
from kvcast.cache import MIN_TOKENS, DocumentCache
from kvcast.native import llama_cpp
from kvcast.session_file import LENGTH, MAGIC, TAIL, VERSION, read_meta
from shapes import write_shape

from . import mutate
from .gguf_file import SHAPE

N_TOKENS = MIN_TOKENS + 8


class Session:
    """A surface; see ``harness.Surface``. An input is the file."""

    def __init__(self, folder: Path):
        model = write_shape(folder / "tiny.gguf", **{**SHAPE, "n_ctx": 1024}, vocabulary="llama")
        self._llm = Llama(model, n_ctx=1024, n_batch=64, sparse=SparseConfig(budget=96, predictor="ema"), n_threads=1, verbose=False)
        self._tokens = [3 + i % 250 for i in range(N_TOKENS)]
        self._cache = DocumentCache(folder / "documents")
        self._llm.eval(self._tokens)
        assert self._cache.save(self._llm, self._tokens, "a document")
        (self._path,) = self._cache.folder.glob("*.kv")
        self._file = self._path.read_bytes()
        self._meta = read_meta(self._path)
        end = len(self._file) - TAIL.size - LENGTH.size - len(json.dumps(self._meta).encode())
        self._state, self._arrays = self._file[: end - self._meta["n_arrays"]], self._file[end - self._meta["n_arrays"] : end]
        self._rows = [rows[:N_TOKENS].copy() for layer in range(2) for rows in self._llm.session.attached.rows(layer)]

    def make(self, rng: random.Random) -> bytes:
        kind = rng.random()
        if kind < 0.25:
            return mutate.some_bytes(rng, self._file, rng.choice((64, 4096, None)))
        # whoever writes such a file knows how to make its checksum fit
        state, arrays, meta = self._state, self._arrays, self._meta
        if kind < 0.6:
            meta = mutate.value(rng, meta)
        elif kind < 0.8:
            arrays = mutate.some_bytes(rng, arrays)
            meta = {**meta, "n_arrays": len(arrays)}
        else:  # the tokens; rows of keys and values may be anything
            state = mutate.some_bytes(rng, state[: 12 + 4 * N_TOKENS]) + state[12 + 4 * N_TOKENS :]
        description = json.dumps(meta).encode("utf-8", "replace")
        body = state + arrays + description + LENGTH.pack(len(description))
        return body + TAIL.pack(hashlib.blake2b(body, digest_size=32).digest(), VERSION, MAGIC)

    def run(self, data: bytes) -> str:
        self._path.write_bytes(data)
        llm = self._llm
        assert len(self._cache.entries()) <= 1
        opened = self._path.exists() and self._cache.load(llm, self._tokens)
        same = opened and all(
            np.array_equal(rows[:N_TOKENS], kept)
            for rows, kept in zip((r for layer in range(2) for r in llm.session.attached.rows(layer)), self._rows)
        )
        if not opened:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
            llm.reset()
        n_before = llm.n_tokens
        llm.eval([5])
        assert llm.n_tokens == n_before + 1
        return "opened" if same else "opened with other content" if opened else "left"
