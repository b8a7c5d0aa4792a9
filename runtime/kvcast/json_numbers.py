"""JSON numbers within bounds as GBNF: bounds become alternatives of digits."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from math import ceil, floor
from typing import Any

from .errors import InputError
from .json_strings import in_common

DIGITS = 16  # of numbers without bounds, and of fractions
FRACTION = f"[0-9]{{0,{DIGITS}}}"
_MOST_DIGITS = 40  # of a bound
_FAR = 10**_MOST_DIGITS


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound; ``open``: the number itself is out."""

    value: Decimal
    open: bool = False


def bounds_of(schema: dict[str, Any]) -> tuple[Bound | None, Bound | None]:
    """The lower and the upper bound; both ways to write exclusive ones. One that is far beyond what is written is none.

    Raises
    ------
    InputError
        One is no number, or has very many digits.
    """
    found = []
    for name, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        is_open = schema.get(exclusive) is True  # as OpenAPI 3.0 has it
        bounds = [Bound(_number(name, schema[name]), is_open)] if schema.get(name) is not None else []
        if not isinstance(schema.get(exclusive), bool | None):
            bounds.append(Bound(_number(exclusive, schema[exclusive]), True))
        bounds = [bound for bound in bounds if sign * bound.value > -_FAR]
        if any(sign * bound.value >= _FAR for bound in bounds):
            raise InputError(f"the schema's {name} has more than {_MOST_DIGITS} digits; use a simpler one, or leave it out")
        found.append(max(bounds, key=lambda b, sign=sign: (sign * b.value, b.open), default=None))  # type: ignore[misc]
    return found[0], found[1]


def _number(name: str, value: Any) -> Decimal:
    number = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = Decimal(value if isinstance(value, int) and abs(value) < _FAR else repr(float(value) if abs(value) < 1e300 else 1e300))
        number = number.copy_sign(Decimal(-1 if value < 0 else 1))
    if number is None or not number.is_finite():
        raise InputError(f"the schema's {name} is {str(value)[:40]}; it must be a number")
    return number if -int(number.as_tuple().exponent) <= _MOST_DIGITS else Decimal(0)  # type: ignore[arg-type]


def integer(least: Bound | None, most: Bound | None) -> str:
    """Whole numbers between bounds."""
    low = None if least is None else floor(least.value) + 1 if least.open else ceil(least.value)
    high = None if most is None else ceil(most.value) - 1 if most.open else floor(most.value)
    if low is None and high is None:
        return f'"-"? ("0" | [1-9] [0-9]{{0,{DIGITS - 1}}})'
    if low is None:
        low = -_beyond(high or 0)
    if high is None:
        high = _beyond(low)
    if low > high:
        raise _nothing(least, most)
    ways = []
    if low < 0:
        ways += [f'"-" ({" | ".join(_between(max(1, -high), -low))})']
    if high >= 0:
        ways += _between(max(0, low), high)
    return " | ".join(ways)


def number(least: Bound | None, most: Bound | None) -> str:
    """Numbers between bounds; without exponents if there are any."""
    if least is None and most is None:
        return f'"-"? ("0" | [1-9] [0-9]{{0,{DIGITS - 1}}}) ("." [0-9]{{1,{DIGITS}}})? ([eE] [+-]? [0-9]{{1,2}})?'
    if least and most and (least.value > most.value or (least.value == most.value and (least.open or most.open))):
        raise _nothing(least, most)
    zero = Bound(Decimal(0))
    ways = []
    if least is None or least.value < 0:
        low = Bound(-most.value, most.open) if most and most.value <= 0 else zero
        high = Bound(-least.value, least.open) if least else None
        ways += [f'"-" ({" | ".join(_magnitude(low, high))})']
    if most is None or most.value > 0 or (most.value == 0 and not most.open):
        ways += _magnitude(least if least and least.value >= 0 else zero, most)
    return " | ".join(ways)


def _magnitude(low: Bound, high: Bound | None) -> list[str]:
    """Numbers from 0 on, between bounds: by their whole part."""
    first = floor(low.value)
    if high is None:
        high = Bound(Decimal(_beyond(first)))
    last = floor(high.value)
    if first == last:
        return _fractions_between(first, low, high)
    ways = []
    if low.value == first and not low.open:
        ways.append(f'"{first}" ("." [0-9]{{1,{DIGITS}}})?')
    else:
        ways += [f'"{first}." {fraction}' for fraction in _fractions_above(_fraction_of(low.value), low.open)]
    if last > first + 1:
        ways.append(f'({" | ".join(_between(first + 1, last - 1))}) ("." [0-9]{{1,{DIGITS}}})?')
    if high.value == last:
        ways += [] if high.open else [f'"{last}" ("." "0"{{1,{DIGITS}}})?']
    else:
        ways.append(f'"{last}"')
        ways += [f'"{last}." {fraction}' for fraction in _fractions_below(_fraction_of(high.value), high.open)]
    return ways


def _fraction_of(value: Decimal) -> str:
    """The digits behind the point."""
    return format(value % 1, "f").partition(".")[2].rstrip("0")


def _fractions_above(digits: str, is_open: bool) -> list[str]:
    more = f'"0"{{0,{DIGITS}}} [1-9] {FRACTION}' if is_open else FRACTION
    ways = [f'"{digits}" {more}' if digits else more]
    return ways + [f'"{digits[:i]}" [{int(d) + 1}-9] {FRACTION}' for i, d in enumerate(digits) if d != "9"]


def _fractions_below(digits: str, is_open: bool) -> list[str]:
    ways = [] if is_open else [f'"{digits}" "0"{{0,{DIGITS}}}']
    ways += [f'"{digits[:i]}"' for i in range(1, len(digits))]
    return ways + [f'"{digits[:i]}" [0-{int(d) - 1}] {FRACTION}' for i, d in enumerate(digits) if d != "0"]


def _fractions_between(whole: int, low: Bound, high: Bound) -> list[str]:
    """Bounds with the same whole part: with as many digits as they have, or two."""
    n = max(2, len(_fraction_of(low.value)), len(_fraction_of(high.value)))
    scale = 10**n
    first = floor(low.value * scale) + 1 if low.open else ceil(low.value * scale)
    last = ceil(high.value * scale) - 1 if high.open else floor(high.value * scale)
    if first > last:
        raise _nothing(low, high)
    ways = [f'"{whole}." {way}' for way in _same_length(str(first - whole * scale).zfill(n), str(last - whole * scale).zfill(n))]
    return ways + ([f'"{whole}"'] if low.value == whole and not low.open else [])


def _beyond(value: int) -> int:
    """The largest number that is written where there is no bound, on that side of the other bound."""
    return max(10**DIGITS, 10 ** (len(str(abs(value))) + 1)) - 1


def _between(low: int, high: int) -> list[str]:
    """Whole numbers from 0 on, by their length."""
    ways = []
    for n in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (n - 1) if n > 1 else 0), min(high, 10**n - 1)
        ways += _same_length(str(first), str(last))
    return ways


def _same_length(low: str, high: str) -> list[str]:
    """Numbers of one length, between two of it: what they have in common, a digit that decides, and any that follow."""
    common = in_common(low, high)
    before = f'"{common}" ' if common else ""
    low, high = low[len(common) :], high[len(common) :]
    n = len(low) - 1
    if n < 0:
        return [before.strip()]
    free = f" [0-9]{{{n}}}" if n else ""
    first, last = int(low[0]), int(high[0])
    ways = []
    if low[1:] != "0" * n:
        ways += [f'{before}"{first}" {way}' for way in _same_length(low[1:], "9" * n)]
        first += 1
    if high[1:] != "9" * n:
        ways += [f'{before}"{last}" {way}' for way in _same_length("0" * n, high[1:])]
        last -= 1
    return ways + ([f"{before}[{first}-{last}]{free}"] if first <= last else [])


def _nothing(least: Bound | None, most: Bound | None) -> InputError:
    low, high = (b.value if b else "none" for b in (least, most))
    return InputError(f"the schema has a number with the lower bound {low} and the upper bound {high}, which none is between; correct one")
