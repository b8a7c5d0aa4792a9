"""Checks of single values that users give.

A check takes a name and a value and returns the value, NumPy's numbers as Python's. Anything else is an ``ArgumentError`` that names the
argument, the value and what would be right.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from .errors import ArgumentError

Check = Callable[[str, Any], Any]
INT32_MAX = (1 << 31) - 1
UINT32_MAX = (1 << 32) - 1
FLOAT32_MAX = float(np.finfo(np.float32).max)
BELOW_1 = math.nextafter(1.0, 0.0)
ADDRESS_MIN = 1 << 16  # of a function: lower ones belong to nobody


def shown(value: object) -> str:
    """A value as it is quoted in a sentence."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - whatever somebody's __repr__ does, or a number of more digits than Python writes
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def wrong(name: str, value: object, must: str) -> ArgumentError:
    return ArgumentError(f"{name} is {shown(value)}; it must be {must}")


def whole(least: int, most: int, why: str = "") -> Check:
    """A whole number within a range."""
    must = f"a whole number from {least} to {most}" if least > -INT32_MAX else "a whole number of 32 bits"

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool | np.bool_):
            raise wrong(name, value, must + why)
        try:
            number = operator.index(value)
        except TypeError:
            raise wrong(name, value, must + why) from None
        if not least <= number <= most:
            raise wrong(name, value, must + why)
        return number

    return check


def number(least: float = -FLOAT32_MAX, most: float = FLOAT32_MAX, why: str = "") -> Check:
    """A finite number within a range."""
    if least <= -FLOAT32_MAX and most >= FLOAT32_MAX:
        must = "a finite number"
    elif most >= FLOAT32_MAX:
        must = f"a finite number, {least:g} or more"
    elif most == BELOW_1:
        must = f"a share: {least:g} or more, and less than 1"
    else:
        must = f"a number from {least:g} to {most:g}"

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool | np.bool_) or not isinstance(value, Real) or not least <= float(value) <= most:
            raise wrong(name, value, must + why)
        return float(value) if isinstance(value, np.generic) else value  # type: ignore[return-value]

    return check


def flag(name: str, value: Any) -> bool:
    """True or False, or 1 or 0."""
    if isinstance(value, bool | np.bool_) or (isinstance(value, int | np.integer) and value in (0, 1)):
        return bool(value)
    raise wrong(name, value, "True or False")


def one_of(values: Mapping[int, str]) -> Check:
    """One of some whole numbers, which have names."""
    must = "one of " + ", ".join(f"{value} ({name})" for value, name in values.items())

    def check(name: str, value: Any) -> int:
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or int(value) not in values:
            raise wrong(name, value, must)
        return int(value)

    return check


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a string")
    return value


def made_of(kind: type, words: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise wrong(name, value, words)
        return value

    return check


def function(name: str, value: Any) -> Any:
    if not callable(value):
        raise wrong(name, value, "something that can be called")
    return value


def functions(name: str, value: Any) -> Any:
    """A list of functions, or what is called as one."""
    if not isinstance(value, Iterable) or not all(callable(f) for f in value):
        raise wrong(name, value, "a list of functions")
    return value


def function_or_address(name: str, value: Any) -> Any:
    """A Python function, or the address of a C function."""
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        if not ADDRESS_MIN <= value < 1 << 64:
            raise wrong(name, value, "a function, the address of a C function, or None")
        return int(value)
    if not callable(value):
        raise wrong(name, value, "a function, the address of a C function, or None")
    return value


def optional(check: Check) -> Check:
    """As ``check``, or None."""
    return lambda name, value: None if value is None else check(name, value)
