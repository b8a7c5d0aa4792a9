"""GGUF headers: read by `kvcast inspect`, loaded by llama.cpp, and one in eight evaluated."""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path

from kvcast import Llama, ModelError, SparseConfig
from kvcast.gguf.embedded_predictor import embed
from kvcast.gguf.support import CANNOT_LOAD
from kvcast.planning.inspect_gguf import inspect
from predictor_onnx.infer import resolve
from shapes import write_shape

from . import mutate

SHAPE = {"n_embd": 64, "n_ff": 128, "n_head": 4, "n_head_kv": 2, "n_vocab": 320, "n_ctx": 512}
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
N_SHOWN = 4  # elements of an array that are looked at one by one


class Places:
    """Where the numbers of a header lie: (offset, bytes), those of values apart from those of the structure."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 4
        self.structure: list[tuple[int, int]] = []
        self.values: list[tuple[int, int]] = []
        self.keys: list[tuple[int, int]] = []
        self._take(4)
        n_tensors, n_keys = self._take(8), self._take(8)
        for _ in range(n_keys):
            begin = self._at
            self._string()
            self.keys.append((begin + 8, self._at - begin - 8))
            self._value(self._take(4))
        for _ in range(n_tensors):
            self._string()
            for _ in range(self._take(4)):
                self._take(8)
            self._take(4)
            self._take(8)
        self.end = self._at

    def _take(self, n: int, places: list[tuple[int, int]] | None = None) -> int:
        (self.structure if places is None else places).append((self._at, n))
        self._at += n
        return int.from_bytes(self._data[self._at - n : self._at], "little")

    def _string(self) -> None:
        n = self._take(8)
        self.values += [(self._at + i, 1) for i in range(min(n, 2))]
        self._at += n

    def _value(self, kind: int) -> None:
        if kind == STRING:
            self._string()
        elif kind != ARRAY:
            self._take(SCALAR_BYTES[kind], self.values)
        else:
            of, n = self._take(4), self._take(8)
            for i in range(n):
                if of == STRING and i < N_SHOWN:
                    self._string()
                elif of == STRING:
                    self._at += 8 + struct.unpack_from("<Q", self._data, self._at)[0]
                elif i < N_SHOWN:
                    self._take(SCALAR_BYTES[of], self.values)
                else:
                    self._at += SCALAR_BYTES[of]


class GgufHeader:
    """A surface; see ``harness.Surface``."""

    def __init__(self, folder: Path):
        self._path = folder / "case.gguf"
        self._bases = [
            write_shape(folder / "bare.gguf", **SHAPE, rope__dimension_count=16).read_bytes(),
            write_shape(folder / "letters.gguf", **SHAPE, vocabulary="llama").read_bytes(),
            write_shape(folder / "pairs.gguf", **SHAPE, vocabulary="gpt2").read_bytes(),
            write_shape(folder / "gemma.gguf", arch="gemma3", attention__sliding_window=32, **SHAPE).read_bytes(),
        ]
        embed(folder / "letters.gguf", resolve("stream"), folder / "carrier.gguf")
        self._bases.append((folder / "carrier.gguf").read_bytes())
        self._places = [Places(base) for base in self._bases]

    def make(self, rng: random.Random) -> bytes:
        i = rng.randrange(len(self._bases))
        data, places = self._bases[i], self._places[i]
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            kind = rng.random()
            if kind < 0.15:
                data = mutate.some_bytes(rng, data, places.end)
                if len(data) != len(self._bases[i]):
                    break  # nothing lies where it lay
            elif kind < 0.25:
                at, n = rng.choice(places.keys)
                data = data[:at] + b"x" * n + data[at + n :]  # as if the key were not there
            else:
                at, n = rng.choice(places.values if kind < 0.8 else places.structure)
                data = data[:at] + mutate.number(rng, int.from_bytes(data[at : at + n], "little"), n) + data[at + n :]
        return data

    def run(self, data: bytes) -> str:
        self._path.write_bytes(data)
        try:
            found = inspect(self._path)
        except ModelError:
            return "refused by the header check"
        json.dumps(found)
        if found["why_dense"] == CANNOT_LOAD:
            return "refused by llama.cpp"
        if zlib.crc32(data) % 8:
            return "served"
        try:
            llm = Llama(
                self._path, n_ctx=256, sparse=None if found["why_dense"] else SparseConfig(budget=96, predictor="ema"), verbose=False
            )
        except ModelError:
            return "refused when loaded"
        for tokens in ([1, 2, 3], [4], [5]):
            llm.eval(tokens)
        llm.close()
        return "evaluated"
