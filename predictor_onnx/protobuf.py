"""The wire format of protocol buffers, as far as ONNX needs it: flat, bounded, and stricter than the format.

A message is a table: field number to ``(name, kind)``. Kinds: ``int`` (varint, signed 64 bits), ``float``, ``text`` (UTF-8), ``bytes``
(also an embedded message, which is read by another call: nothing here recurses); a ``*`` behind means repeated, ``""`` that the field is
passed over, ``"!"`` that it is refused by its name. What the table does not have is refused, and so is a single field that comes twice,
which other readers would merge.
(https://protobuf.dev/programming-guides/encoding)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

Table = Mapping[int, tuple[str, str]]
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_WIRE = {"int": VARINT, "float": FIXED32, "text": BYTES, "bytes": BYTES}
_EMPTY: dict[str, Any] = {"int": 0, "float": 0.0, "text": "", "bytes": None}


class Damaged(ValueError):
    """What is read breaks a rule; the message is a part of a sentence."""


class Reader:
    """Reads messages until ``n_fields_max`` fields, those in packed lists included, were read."""

    def __init__(self, n_fields_max: int):
        self._n_left = n_fields_max

    def read(self, data: memoryview, what: str, table: Table) -> dict[str, Any]:
        """The fields of a message by name: lists of repeated ones, zero or empty where one is missing, None for missing ``bytes``.

        Raises
        ------
        Damaged
        """
        found: dict[str, Any] = {}
        for name, kind in table.values():
            if kind not in ("", "!"):
                found[name] = [] if kind.endswith("*") else _EMPTY[kind]
        seen: set[int] = set()
        at = 0
        while at < len(data):
            self._count(1)
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            if wire not in (VARINT, FIXED64, BYTES, FIXED32):
                raise Damaged(f"its {what} has a field of the unknown type {wire}")
            value: Any
            if wire == VARINT:
                value, at = _varint(data, at)
            else:
                n_bytes = {FIXED64: 8, FIXED32: 4}.get(wire, 0)
                if wire == BYTES:
                    n_bytes, at = _varint(data, at)
                if n_bytes > len(data) - at:
                    raise Damaged(f"its {what} is cut short")
                value, at = data[at : at + n_bytes], at + n_bytes
            if number not in table:
                raise Damaged(f"its {what} has a field {number}, which a predictor does not need")
            name, kind = table[number]
            if kind == "!":
                raise Damaged(f"its {what} has {name}, which a predictor does not need")
            if not kind:
                continue
            single = kind.rstrip("*")
            if kind.endswith("*"):
                if wire == BYTES and _WIRE[single] != BYTES:
                    found[name] += self._packed(value, single, what)
                    continue
            elif number in seen:
                raise Damaged(f"its {what} has two values of {name}")
            seen.add(number)
            if wire != _WIRE[single]:
                raise Damaged(f"its {what} has a {name} of the wrong type")
            value = _value(value, single, what)
            if kind.endswith("*"):
                found[name].append(value)
            else:
                found[name] = value
        return found

    def _packed(self, data: memoryview, kind: str, what: str) -> Iterable[Any]:
        if kind == "float":
            if len(data) % 4:
                raise Damaged(f"its {what} is cut short")
            self._count(len(data) // 4)
            return struct.unpack(f"<{len(data) // 4}f", data)
        values, at = [], 0
        while at < len(data):
            self._count(1)
            value, at = _varint(data, at)
            values.append(_signed(value))
        return values

    def _count(self, n: int) -> None:
        self._n_left -= n
        if self._n_left < 0:
            raise Damaged("it has more parts than a predictor needs")


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    if at < len(data) and data[at] < 0x80:  # most are short
        return data[at], at + 1
    value = 0
    for i in range(10):
        if at + i >= len(data):
            raise Damaged("it is cut short")
        byte = data[at + i]
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            if value >> 64:
                break
            return value, at + i + 1
    raise Damaged("it has a number of more than 64 bits")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _value(value: Any, kind: str, what: str) -> Any:
    if kind == "int":
        return _signed(value)
    if kind == "float":
        return struct.unpack("<f", value)[0]
    if kind == "text":
        try:
            return str(value, "utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"its {what} has a name that is no text") from None
    return value


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number: int, value: int | float | str | bytes) -> bytes:
    """One field, written."""
    if isinstance(value, float):
        return varint(number << 3 | FIXED32) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3 | VARINT) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | BYTES) + varint(len(data)) + data
