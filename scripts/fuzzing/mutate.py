"""Bytes and JSON, changed a little."""

from __future__ import annotations

import random
from typing import Any

NUMBERS = (
    0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 511, 512, 1000, 4095, 65535, 65536,
    2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip
ODD = ("", "x", "\x00", "é", "🙂" * 9, "a" * 5000, "../../etc/passwd", "{{ 7*7 }}", "<|im_start|>", "\ud800", None, True, False, 0, -1, 1.5,
       1e308, float("nan"), float("inf"), 2**31, 2**63, 2**70, [], {}, [[]], [None], {"": None})  # fmt: skip


def number(rng: random.Random, old: int, n_bytes: int) -> bytes:
    """Another number in as many bytes, little-endian."""
    new = rng.choice((*NUMBERS, old - 1, old + 1, 2 * old, old // 2, rng.getrandbits(8 * n_bytes)))
    return (new % (1 << 8 * n_bytes)).to_bytes(n_bytes, "little")


def some_bytes(rng: random.Random, data: bytes, end: int | None = None) -> bytes:
    """One change before ``end``: bits, a cut, a piece left out, doubled or made up."""
    end = min(len(data), end or len(data))
    if end == 0:
        return rng.randbytes(9)
    at, n = rng.randrange(end), rng.choice((1, 2, 4, 8, 16, 64))
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + n :]
    if kind == 2:
        return data[:at] + data[at : at + n] + data[at:]
    if kind == 3:
        return data[:at] + rng.randbytes(n) + data[at + n :]
    changed = bytearray(data)
    for _ in range(n if kind == 4 else 1):
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def value(rng: random.Random, old: Any) -> Any:
    """A JSON value with one place changed, left out or doubled."""
    if isinstance(old, dict) and old and rng.random() < 0.9:
        key = rng.choice(list(old))
        others = {k: v for k, v in old.items() if k != key}
        kind = rng.randrange(8)
        if kind == 0:
            return others
        if kind == 1:
            return {**others, rng.choice((key + "x", key.upper(), "")): old[key]}
        return {**old, key: value(rng, old[key])}
    if isinstance(old, list) and old and rng.random() < 0.8:
        at = rng.randrange(len(old))
        return rng.choice(([*old[:at], value(rng, old[at]), *old[at + 1 :]], [*old[:at], *old[at + 1 :]], [*old, old[at]]))
    if isinstance(old, int) and rng.random() < 0.5:
        return rng.choice((*NUMBERS, -1, old + 1, old - 1, float(old)))
    return rng.choice(ODD)
