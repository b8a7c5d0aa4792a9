"""JSON strings as GBNF: texts, formats and regular expressions of a JSON schema, as they stand between quotes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .errors import InputError
from .grammar import REPEATS, shown

if sys.version_info >= (3, 11):
    from re import _constants as codes  # type: ignore[attr-defined]  # Python's own parser; its results have been the same since 3.6
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as codes
    import sre_parse as parser

PATTERN_MOST, GROUPS_MOST = 2_000, 50  # characters, and parentheses inside each other
LAST = 0x10FFFF
Ranges = list[tuple[int, int]]

CHAR = r"""[^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-CefEF] [0-9a-fA-F]{3} | [dD] [0-7] [0-9a-fA-F]{2}))"""
PLAIN = r"""[^"\\\x00-\x1F]"""
_DATE = (
    '[12] [0-9]{3} "-" (("0" [13578] | "1" [02]) "-" ("0" [1-9] | [12] [0-9] | "3" [01]) | '
    '("0" [469] | "11") "-" ("0" [1-9] | [12] [0-9] | "30") | "02-" ("0" [1-9] | "1" [0-9] | "2" [0-8]))'
)
_HOURS, _SIXTY = '([01] [0-9] | "2" [0-3])', "[0-5] [0-9]"
_TIME = f'{_HOURS} ":" {_SIXTY} ":" {_SIXTY} ("." [0-9]{{1,6}})? ("Z" | [+-] {_HOURS} ":" {_SIXTY})'
_LABEL = '[a-zA-Z0-9]{1,30} ("-" [a-zA-Z0-9]{1,30}){0,5}'
_BYTE = '([1-9]? [0-9] | "1" [0-9]{2} | "2" ([0-4] [0-9] | "5" [0-5]))'
_SMALL = 'duration-number "M" (duration-number "S")? | duration-number "S"'
FORMATS = {  # names and rules; what the rules need comes with them
    "date": {"date": _DATE},
    "time": {"time": _TIME},
    "date-time": {"date-time": 'date "T" time', "date": _DATE, "time": _TIME},
    "uuid": {"uuid": ' "-" '.join(f"[0-9a-fA-F]{{{n}}}" for n in (8, 4, 4, 4, 12))},
    "email": {
        "email": 'email-word ("." email-word){0,5} "@" label ("." label){0,5} "." [a-zA-Z]{2,10}',
        "email-word": "[a-zA-Z0-9_+]{1,30}",
        "label": _LABEL,
    },
    "hostname": {"hostname": 'label ("." label){0,5}', "label": _LABEL},
    "ipv4": {"ipv4": f'{_BYTE} ("." {_BYTE}){{3}}'},
    "ipv6": {"ipv6": '[0-9a-fA-F]{1,4} (":" [0-9a-fA-F]{1,4}){7}'},
    "uri": {"uri": '[a-zA-Z] [a-zA-Z0-9+.-]{0,20} ":" "//"? [a-zA-Z0-9._~!$&\'()*+,;=:@/?-]+'},
    "duration": {
        "duration": '"P" (duration-number "D" ("T" duration-time)? | "T" duration-time)',
        "duration-time": f'duration-number "H" ({_SMALL})? | {_SMALL}',
        "duration-number": "[0-9]{1,6}",
    },
}
_ESCAPES = {0x22: '"', 0x5C: "\\", 0x08: "b", 0x0C: "f", 0x0A: "n", 0x0D: "r", 0x09: "t"}
_CLASSES: dict[Any, Ranges] = {
    codes.CATEGORY_DIGIT: [(48, 57)],
    codes.CATEGORY_WORD: [(48, 57), (65, 90), (95, 95), (97, 122)],
    codes.CATEGORY_SPACE: [(9, 13), (32, 32), (0xA0, 0xA0), (0x2028, 0x2029), (0xFEFF, 0xFEFF)],
}
_NEGATIVE = {
    codes.CATEGORY_NOT_DIGIT: codes.CATEGORY_DIGIT,
    codes.CATEGORY_NOT_WORD: codes.CATEGORY_WORD,
    codes.CATEGORY_NOT_SPACE: codes.CATEGORY_SPACE,
}
_BEGINS, _ENDS = (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING), (codes.AT_END, codes.AT_END_STRING)
_REPEATS = {getattr(codes, name) for name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") if hasattr(codes, name)}


def quoted(text: str) -> str:
    """A text as GBNF writes it."""
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else _escaped(ord(c)) for c in text) + '"'


def of_json(value: Any) -> str:
    """A value as JSON writes it, as GBNF writes that."""
    return quoted(json.dumps(value, ensure_ascii=False, allow_nan=False))


def in_common(one: str, other: str) -> str:
    """What two texts begin with."""
    return one[: next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))]


def repeated(what: str, least: int, most: int | None) -> str:
    """A rule or a class, so often; as llama.cpp takes it: an upper bound beyond 2,000 is none."""
    if most is not None and most > REPEATS:
        most = None
    n_full, rest = divmod(least, REPEATS)
    parts = [f"{what}{{{REPEATS}}}"] * n_full
    if most != least or rest:
        parts.append(f"{what}{{{rest},{'' if most is None else most - n_full * REPEATS}}}")
    return " ".join(parts) or '""'


class Pattern:
    """A regular expression (ECMA 262, as far as Python reads it alike) as an expression of GBNF.

    Parameters
    ----------
    add : callable
        Takes an expression into the grammar; its rule's name.

    Raises
    ------
    InputError
        A grammar cannot follow it.
    """

    def __init__(self, pattern: str, add: Callable[[str], str]):
        self._pattern, self._add = pattern, add
        if not isinstance(pattern, str) or len(pattern) > PATTERN_MOST or _depth(pattern) > GROUPS_MOST:
            raise self._refuse(f"it is no text, longer than {PATTERN_MOST:,} characters, or its groups are more than {GROUPS_MOST} deep")
        try:
            tree = parser.parse(re.sub(r"\(\?<(?![=!])", "(?P<", pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise self._refuse(f"it cannot be read ({error})") from error
        if tree.state.flags & ~re.UNICODE:
            raise self._refuse("flags are not followed")
        self.text = self._whole(list(tree), False)

    def _refuse(self, why: str) -> InputError:
        return InputError(f"the schema's pattern {shown(str(self._pattern))} is refused: {why}; write it otherwise, or leave it out")

    def _whole(self, items: list[Any], begun: bool) -> str:
        """What may stand at an end of the text, where anchors may be."""
        while items and items[0][0] is codes.AT and items[0][1] in _BEGINS:
            items, begun = items[1:], True
        if len(items) == 1 and items[0][0] is codes.SUBPATTERN and not any(items[0][1][1:3]):
            return self._whole(list(items[0][1][3]), begun)
        before = "" if begun else "char* "
        if items and items[-1][0] is codes.BRANCH:
            if len(items) == 1:
                return f"({' | '.join(self._whole(list(way), begun) for way in items[0][1][1])})"
            ways = " | ".join(self._whole(list(way), True) for way in items[-1][1][1])
            return f"{before}{self._sequence(items[:-1])} ({ways})"
        if items and items[-1][0] is codes.AT and items[-1][1] in _ENDS:
            return before + self._sequence(items[:-1])
        return f"{before}{self._sequence(items)} char*"

    def _sequence(self, items: Sequence[Any]) -> str:
        parts: list[str] = []
        text = ""
        for kind, value in items:
            if kind is codes.LITERAL:
                text += json.dumps(chr(value), ensure_ascii=False)[1:-1]
                continue
            if text:
                parts.append(quoted(text))
                text = ""
            parts.append(self._part(kind, value))
        if text:
            parts.append(quoted(text))
        return " ".join(parts)

    def _part(self, kind: Any, value: Any) -> str:
        if kind is codes.IN:
            return self._set(self._ranges(value))
        if kind is codes.ANY:
            return self._set(_others([(10, 10), (13, 13), (0x2028, 0x2029)]))
        if kind is codes.NOT_LITERAL:
            return self._set(_others([(value, value)]))
        if kind in _REPEATS:
            least, most, inner = value
            what = self._sequence(inner)
            if not re.fullmatch(r"\[[^\s]*\]", what):
                what = self._add(what)
            return repeated(what, least, None if most is codes.MAXREPEAT else most)
        if kind is codes.BRANCH:
            return f"({' | '.join(self._sequence(way) for way in value[1])})"
        if kind is codes.SUBPATTERN and not any(value[1:3]):
            return f"({self._sequence(value[3])})"
        if kind is getattr(codes, "ATOMIC_GROUP", None):
            return f"({self._sequence(value)})"
        if kind is codes.AT:
            raise self._refuse("^, $ and \\b are followed at its ends only")
        raise self._refuse("looking ahead or behind, references to groups and flags are not followed")

    def _ranges(self, items: Sequence[Any]) -> Ranges:
        ranges: Ranges = []
        negative = False
        for kind, value in items:
            if kind is codes.NEGATE:
                negative = True
            elif kind is codes.LITERAL:
                ranges.append((value, value))
            elif kind is codes.RANGE:
                ranges.append(value)
            elif value in _NEGATIVE:
                ranges += _others(_CLASSES[_NEGATIVE[value]])
            else:
                ranges += _CLASSES[value]
        return _others(ranges) if negative else ranges

    def _set(self, ranges: Ranges) -> str:
        """Characters as JSON writes them: some as they are, some with a backslash."""
        plain = _others([*_others(ranges), (0, 31), (0x22, 0x22), (0x5C, 0x5C), (0xD800, 0xDFFF)])
        ways = [f"[{''.join(_escaped(a) if a == b else f'{_escaped(a)}-{_escaped(b)}' for a, b in plain)}]"] if plain else []
        ways += [quoted("\\" + letter) for code, letter in _ESCAPES.items() if any(a <= code <= b for a, b in ranges)]
        if not ways:
            controls = [code for code in range(32) if any(a <= code <= b for a, b in ranges)]
            ways = [quoted(f"\\u{code:04x}") for code in controls]
        if not ways:
            raise self._refuse("a class in it matches nothing")
        return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


def _others(ranges: Ranges) -> Ranges:
    """The characters that are in none of the ranges."""
    others: Ranges = []
    nxt = 0
    for first, last in sorted(ranges):
        if first > nxt:
            others.append((nxt, first - 1))
        nxt = max(nxt, last + 1)
    return [*others, (nxt, LAST)] if nxt <= LAST else others


def _escaped(code: int) -> str:
    """A character as GBNF takes it in a class and in a text."""
    if chr(code).isascii() and chr(code).isalnum():
        return chr(code)
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def _depth(pattern: str) -> int:
    depth = deepest = 0
    for char in re.sub(r"\\.", "", pattern):
        depth += (char == "(") - (char == ")")
        deepest = max(deepest, depth)
    return deepest
