"""Session files taken apart and put together again, with a checksum that fits: what anybody can make."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvcast.llama.session_file import LENGTH, MAGIC, STATE_HEADER, TAIL, VERSION


@dataclass(frozen=True)
class Parts:
    """A session file. ``state`` begins behind the tokens; ``packed`` is the .npz; ``meta`` without what follows from the rest."""

    header: bytes
    tokens: bytes
    state: bytes
    packed: bytes
    meta: Any

    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(self.packed)) as found:
            return {name: x.copy() for name, x in found.items()}

    def with_arrays(self, arrays: dict[str, Any], save: Any = np.savez) -> Parts:
        packed = io.BytesIO()
        save(packed, **arrays)
        return replace(self, packed=packed.getvalue())

    def with_meta(self, **changes: Any) -> Parts:
        return replace(self, meta={**self.meta, **changes})

    def join(self, version: int = VERSION, fitting: bool = True) -> bytes:
        """The file. ``fitting``: the sizes in the description are those of the parts."""
        meta = self.meta
        if fitting and isinstance(meta, dict):
            meta = {**meta, "n_state": len(self.state), "n_arrays": len(self.packed)}
        description = meta if isinstance(meta, bytes) else json.dumps(meta).encode("utf-8", "replace")
        return sealed(self.header + self.tokens + self.state + self.packed + description + LENGTH.pack(len(description)), version)


def sealed(body: bytes, version: int = VERSION) -> bytes:
    return body + TAIL.pack(hashlib.blake2b(body, digest_size=32).digest(), version, MAGIC)


def take_apart(path: Path) -> Parts:
    data = path.read_bytes()
    end = len(data) - TAIL.size - LENGTH.size
    (n,) = LENGTH.unpack(data[end : end + LENGTH.size])
    meta = json.loads(data[end - n : end])
    a = STATE_HEADER.size
    b = a + 4 * meta["n_tokens"]
    c = b + meta["n_state"]
    assert c + meta["n_arrays"] == end - n
    return Parts(data[:a], data[a:b], data[b:c], data[c : end - n], meta)


@dataclass(frozen=True)
class Field:
    """A number in llama.cpp's state."""

    name: str
    at: int
    format: str

    def read(self, state: bytes) -> int:
        return struct.unpack_from("<" + self.format, state, self.at)[0]

    def write(self, state: bytes, value: int) -> bytes:
        packed = struct.pack("<" + self.format.upper(), value % (1 << 8 * struct.calcsize(self.format)))
        return state[: self.at] + packed + state[self.at + len(packed) :]


def fields(state: bytes, n_caches: int = 1) -> list[Field]:
    """Of a state of a model with so many KV caches (two with sliding windows): every number that is no key or value."""
    found: list[Field] = []
    at = 0

    def number(name: str, kind: str) -> int:
        nonlocal at
        found.append(Field(name, at, kind))
        at += struct.calcsize(kind)
        return found[-1].read(state)

    n = number("arch_length", "I")
    at += n
    for _ in range(n_caches):
        number("n_stream", "I")
        n_cells = number("n_cells", "I")
        for _ in range(n_cells):
            number("pos", "i")
            number("n_seq", "I")
            number("seq", "i")
        if not n_cells:
            continue
        transposed = number("v_trans", "I")
        n_layer = number("n_layer", "I")
        for i in range(2 * n_layer):
            number("type", "i")
            n = number("size", "I") * number("width", "I") if transposed and i >= n_layer else number("row", "Q")
            at += n_cells * n
    assert at == len(state)
    return found
