"""Documents on disk: one is kept, its file is changed, and what is opened must be a session of the model, or nothing; then the session in
hand goes on to the bit."""

from __future__ import annotations

import io
import random
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kvcast import Llama, SparseConfig
from kvcast.bindings.api import llama_cpp
from kvcast.chat.documents import MIN_TOKENS, DocumentCache
from kvcast.llama.session_file import TAIL
from tiny import SHAPES, write_tiny

from . import mutate
from .forge import Parts, fields, sealed, take_apart

N_TOKENS = MIN_TOKENS + 8
SPARSE = SparseConfig(budget=96, predictor="ema", untested=True)
MODELS: dict[str, SparseConfig | None] = {"llama": SPARSE, "gemma3": SPARSE, "qwen2": None}
TYPES = ("<f4", ">f4", "<f8", "<f2", "<i4", "u1", "?", "<c8", "O", "M8[s]", "V8", "<U3", "S4")
ODD_NUMBERS = (np.nan, np.inf, -np.inf, -1.0, -0.0, 1e-45, 2.5, 1e9, 1e30, 3.4e38)


class Session:
    """A surface; see ``harness.Surface``. An input is the number of a model and a file of it."""

    def __init__(self, folder: Path):
        self._subjects = [_Subject(folder / name, name, config) for name, config in MODELS.items()]

    def make(self, rng: random.Random) -> bytes:
        which = rng.randrange(len(self._subjects))
        return bytes([which]) + self._subjects[which].make(rng)

    def run(self, data: bytes) -> str:
        return self._subjects[data[0] % len(self._subjects)].run(data[1:])


class _Subject:
    def __init__(self, folder: Path, name: str, config: SparseConfig | None):
        folder.mkdir(exist_ok=True)
        model = write_tiny(folder / "tiny.gguf", SHAPES[name])
        self._llm = Llama(model, n_ctx=1024, n_batch=64, sparse=config, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
        self._tokens = [3 + i % 250 for i in range(N_TOKENS)]
        self._cache = DocumentCache(folder / "documents")
        self._llm.eval(self._tokens)
        self._cache.clear()
        assert self._cache.save(self._llm, self._tokens, "a document")
        (self._path,) = self._cache.folder.glob("*.kv")
        self._parts = take_apart(self._path)
        self._fields = fields(self._parts.state, 2 if self._llm.header.n_layer_swa else 1)
        self._hand = folder / "hand"
        self._llm.reset()
        self._llm.eval(self._tokens[:40])
        self._llm.save_session(self._hand)
        self._expected = self._go_on()

    def _go_on(self) -> np.ndarray:
        self._llm.eval([5])
        return np.array(self._llm._ctx.get_logits_ith(-1)[: self._llm.n_vocab()])

    def make(self, rng: random.Random) -> bytes:
        parts = self._parts
        kind = rng.random()
        if kind < 0.15:
            return mutate.some_bytes(rng, parts.join(), rng.choice((64, 4096, None)))
        # whoever writes such a file knows how to make its checksum fit
        if kind < 0.35:
            meta = mutate.value(rng, parts.meta)
            return replace(parts, meta=meta).join(fitting=rng.random() < 0.7)
        if kind < 0.55:
            return _with_odd_arrays(rng, parts).join()
        if kind < 0.6:
            return replace(parts, tokens=mutate.some_bytes(rng, parts.tokens), header=mutate.some_bytes(rng, parts.header)).join()
        if kind < 0.9:
            return replace(parts, state=self._odd_state(rng)).join()
        return sealed(mutate.some_bytes(rng, parts.join()[: -TAIL.size]))

    def _odd_state(self, rng: random.Random) -> bytes:
        state = self._parts.state
        kind = rng.random()
        if kind < 0.6:  # one number, or the same one of several cells
            field = rng.choice(self._fields)
            others = [f for f in self._fields if f.name == field.name] if rng.random() < 0.2 else [field]
            for f in others[:64]:
                size = 8 if f.format == "Q" else 4
                state = f.write(state, int.from_bytes(mutate.number(rng, f.read(state), size), "little"))
            return state
        if kind < 0.8:  # a cut, or more
            return mutate.some_bytes(rng, state)
        at = rng.randrange(len(state) - 8)  # keys and values
        odd = np.float16(rng.choice(ODD_NUMBERS[:6])).tobytes() * rng.choice((1, 4, 64))
        return state[:at] + odd + state[at + len(odd) :]

    def run(self, data: bytes) -> str:
        llm = self._llm
        llm.load_session(self._hand)
        self._path.write_bytes(data)
        assert len(self._cache.entries()) <= 1
        opened = self._cache.load(llm, self._tokens)
        if opened:
            llm.eval([5])
            return "opened"
        assert llm.n_tokens == 40
        np.testing.assert_array_equal(self._go_on(), self._expected)
        assert llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0) == 40
        return "left"


def _with_odd_arrays(rng: random.Random, parts: Parts) -> Parts:
    arrays: dict[str, Any] = parts.arrays()
    kind = rng.randrange(7)
    if kind == 0 or not arrays:
        return replace(parts, packed=mutate.some_bytes(rng, parts.packed))
    name = rng.choice(list(arrays))
    x = arrays[name]
    if kind == 1:  # numbers
        values = x.view(np.float32) if name != "summary" else x[: len(x) // 4 * 4].view(rng.choice((np.float32, np.int32)))
        for _ in range(rng.choice((1, 9))):
            odd = rng.choice(ODD_NUMBERS) if values.dtype.kind == "f" else rng.choice((-1, 63, 64, 128, 2**31 - 1, -(2**31)))
            values.flat[rng.randrange(values.size)] = odd
    elif kind == 2:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays[name] = np.zeros(x.shape, rng.choice(TYPES))
    elif kind == 3:
        shape = [rng.choice((n, n, 0, 1, n + 1, max(0, n - 1), 2 * n)) for n in (*x.shape, *rng.choice(((), (1,), (2,))))][
            : rng.randrange(5)
        ]
        if np.prod(shape, dtype=np.int64) < 1 << 22:
            arrays[name] = np.zeros(shape, x.dtype)
    elif kind == 4:
        arrays = {(rng.choice((k + "x", "", "averages", "../" + k)) if k == name else k): v for k, v in arrays.items()}
    elif kind == 5:
        return parts.with_arrays(arrays, np.savez_compressed)
    else:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))) as archive:
            for key, value in arrays.items():
                member = io.BytesIO()
                np.lib.format.write_array(member, value)
                content = member.getvalue()
                archive.writestr(f"{key}.npy", mutate.some_bytes(rng, content, 128) if key == name else content)
        return replace(parts, packed=packed.getvalue())
    return parts.with_arrays(arrays)
