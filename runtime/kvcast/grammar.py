"""Grammars from outside: a GBNF text is read here, as llama.cpp's parser reads it, and refused where that would crash or never end.

llama.cpp calls itself for parentheses and for rules that begin with rules, writes repetitions out, and follows every way in which a text
may go on; some grammars make it do so for ever. What a grammar does in the middle of an answer cannot all be known before: there the work
for a token is bounded, and ``Llama.sample`` raises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from .errors import InputError
from .limits import Limits

REPEATS = 2000  # llama.cpp's own bound; {m,n} with a larger n is {m,}
CHAIN = 500  # rules that begin with one another: llama.cpp calls itself for each
ESCAPES = r"there are \n, \r, \t, \\, \", \[, \], \-, \xHH, \uHHHH and \UHHHHHHHH"
LAST, SURROGATES = 0x10FFFF, (0xD800, 0xDFFF)

_LINE_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_NUMBER = re.compile(r"[0-9]+")
_CHAR = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([trn\\\"\[\]-]))|[^\\]", re.DOTALL)
_PLAIN = re.compile(r'[^"\\]+')
_NAMED = {"t": "\t", "r": "\r", "n": "\n"}
_TOKEN_ID = re.compile(r"<\[([0-9]+)\]>")
_TOKEN_TEXT = re.compile(r"<[^>]*>")


@dataclass(slots=True)
class Item:
    """A symbol of a sequence and how often it stands there."""

    rule: int | None  # None: characters or a token
    size: int  # elements of llama.cpp
    n_rules: int = 1  # as llama.cpp counts what a repetition multiplies
    least: int = 1
    most: int | None = 1

    @property
    def repeated(self) -> bool:
        return (self.least, self.most) != (1, 1)


NOTHING = Item(None, 0, least=0, most=0)  # "", or what is repeated no times: it cannot be repeated


@dataclass(slots=True)
class Rule:
    """Alternatives, each a sequence; ``name`` is that of the rule that a group is written in."""

    name: str
    alternatives: list[list[Item]] = field(default_factory=list)
    defined: bool = False


class Reader:
    """Reads a grammar into rules, the first errors of which are raised.

    Parameters
    ----------
    n_vocab : int or None
        Tokens of the model; None: any number.
    token_of : callable or None
        How many tokens a text like ``<|im_end|>`` is; None: such texts are taken.
    """

    def __init__(self, text: str, limits: Limits, n_vocab: int | None = None, token_of: Callable[[str], int] | None = None):
        self._text, self._limits, self._n_vocab, self._token_of = text, limits, n_vocab, token_of
        self._at = 0
        self._name = ""
        self._n_elements = 0
        self._n_symbols = 0
        self.rules: list[Rule] = []
        self.ids: dict[str, int] = {}
        self._skip(_SPACE)
        while self._at < len(text):
            self._rule()

    def _refuse(self, what: str, at: int | None = None) -> InputError:
        line = self._text.count("\n", 0, self._at if at is None else at) + 1
        where = f"rule {shown(self._name)}, line {line}" if self._name else f"line {line}"
        return InputError(f"the grammar is refused, {where}: {what}")

    def _skip(self, space: re.Pattern[str]) -> None:
        self._at = space.match(self._text, self._at).end()  # type: ignore[union-attr]  # it matches nothing, too

    def _is(self, char: str) -> bool:
        return self._text.startswith(char, self._at)

    def _id_of(self, name: str) -> int:
        if name not in self.ids:
            self.ids[name] = self._new_rule(name)
        return self.ids[name]

    def _new_rule(self, name: str) -> int:
        self._n_symbols += 1
        if len(self.rules) == self._limits.grammar_rules:
            raise self._refuse(f"it has more than {self._limits.grammar_rules:,} rules and groups; write a smaller one")
        self.rules.append(Rule(name))
        return len(self.rules) - 1

    def _grow(self, n: int) -> None:
        self._n_elements += n
        if self._n_elements > self._limits.grammar_elements:
            raise self._refuse(
                f"with its repetitions written out it has more than {self._limits.grammar_elements:,} elements; repeat less, or use *"
            )

    def _rule(self) -> None:
        self._name = ""
        name = _NAME.match(self._text, self._at)
        if name is None:
            why = "put | at the end of the line before" if self._is("|") else "write NAME ::= ..., NAME of letters, digits and -"
            raise self._refuse(f"{shown(self._rest())} is no rule; {why}")
        self._name = name[0]
        rule = self._id_of(name[0])
        self._at = name.end()
        self._skip(_LINE_SPACE)
        if not self._is("::="):
            raise self._refuse(f"::= is missing before {shown(self._rest())}; names of rules hold letters, digits and -")
        self._at += 3
        self._skip(_SPACE)
        self.rules[rule].alternatives = self._alternatives()
        self.rules[rule].defined = True
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            raise self._refuse(f"{shown(self._rest())} is not understood; end the rule there, or correct it")
        self._skip(_SPACE)

    def _alternatives(self) -> list[list[Item]]:
        """What follows ::=, to the end of the rule. Groups lie on a stack of our own."""
        groups: list[tuple[int, int, list[list[Item]], int]] = []  # rule, symbols before, alternatives around, where it begins
        alternatives: list[list[Item]] = [[]]
        while self._at < len(self._text):
            char = self._text[self._at]
            sequence = alternatives[-1]
            if char == "(":
                if len(groups) == self._limits.grammar_depth:
                    raise self._refuse(
                        f"parentheses are more than {self._limits.grammar_depth} deep; give what is inside a rule of its own"
                    )
                begin, n_before = self._at, self._n_symbols
                self._at += 1
                self._skip(_SPACE)
                groups.append((self._new_rule(self._name), n_before, alternatives, begin))
                alternatives = [[]]
                continue
            if char == "|":
                self._at += 1
                self._skip(_SPACE)
                alternatives.append([])
                self._grow(1)
                continue
            if char == ")" and groups:
                rule, n_before, around, _ = groups.pop()
                self.rules[rule].alternatives, self.rules[rule].defined = alternatives, True
                alternatives = around
                alternatives[-1].append(Item(rule, 1, max(1, self._n_symbols - n_before)))
                self._at += 1
                self._grow(2)
            elif char in "*+?{":
                self._repeat(sequence, char, bool(groups))
            else:
                item = self._symbol(char)
                if item is None:
                    break
                sequence.append(item if item.size else NOTHING)
                self._grow(item.size)
            self._skip(_SPACE if groups else _LINE_SPACE)
        if groups:
            raise self._refuse("a ( is not closed; add )", groups[-1][3])
        return alternatives

    def _symbol(self, char: str) -> Item | None:
        """What is at hand, but for groups and repetitions; None: none."""
        if char == '"':
            return Item(None, self._literal())
        if char == "[":
            return Item(None, self._class())
        if char in "<!":
            self._token()
            return Item(None, 1)
        if char == ".":
            self._at += 1
            return Item(None, 1)
        name = _NAME.match(self._text, self._at)
        if name is None:
            return None
        self._at = name.end()
        return Item(self._id_of(name[0]), 1)

    def _character(self, closing: str) -> int:
        found = _CHAR.match(self._text, self._at)
        if found is None:
            if self._at + 1 >= len(self._text):
                raise self._refuse(f"{closing} is missing; close what was opened")
            raise self._refuse(f"{self._text[self._at : self._at + 2]!a} is no escape; {ESCAPES}")
        self._at = found.end()
        if digits := found[1] or found[2] or found[3]:
            return int(digits, 16)
        return ord(_NAMED.get(found[4], found[4]) if found[4] else found[0])

    def _literal(self) -> int:
        begin = self._at
        self._at += 1
        size = 0
        while not self._is('"'):
            if plain := _PLAIN.match(self._text, self._at):
                self._at = plain.end()
                size += len(plain[0])
                continue
            if self._at >= len(self._text):
                raise self._refuse('a text is not closed; add "', begin)
            code = self._character('"')
            if not is_character(code):
                raise self._refuse(
                    f"{shown(self._text[begin : begin + 30])} holds U+{code:04X}, which no text has; {_instead(code)}", begin
                )
            size += 1
        self._at += 1
        return size

    def _class(self) -> int:
        begin = self._at
        self._at += 1
        negative = self._is("^")
        self._at += negative
        ranges: list[tuple[int, int]] = []
        size = 0
        while not self._is("]"):
            if self._at >= len(self._text):
                raise self._refuse("a [ is not closed; add ]", begin)
            first = last = self._character("]")
            if self._is("-") and self._at + 1 < len(self._text) and self._text[self._at + 1] != "]":
                self._at += 1
                last = self._character("]")
                size += 1
                if last < first:
                    raise self._refuse(f"the range {shown(chr_of(first))} to {shown(chr_of(last))} is empty; write the smaller one first")
            ranges.append((first, last))
            size += 1
        self._at += 1
        if not ranges or _covers(ranges) is (True if negative else None):
            raise self._refuse(f"{shown(self._text[begin : self._at])} matches nothing; name a character that a text can have", begin)
        return size

    def _token(self) -> None:
        begin = self._at
        self._at += self._is("!")
        if found := _TOKEN_ID.match(self._text, self._at):
            n_most = (1 << 31) if self._n_vocab is None else self._n_vocab
            if len(found[1]) > 10 or int(found[1]) >= n_most:
                raise self._refuse(f"there is no token {found[1][:20]}; the model has 0 to {n_most - 1}")
        elif found := _TOKEN_TEXT.match(self._text, self._at):
            if self._token_of is not None and self._token_of(found[0]) != 1:
                raise self._refuse(
                    f"{shown(found[0])} is not one token of this model; name one of its special tokens, or write it in quotes"
                )
        else:
            raise self._refuse(f"{shown(self._text[begin : begin + 20])} is no token; write <[ID]> or <NAME>")
        self._at = found.end()

    def _repeat(self, sequence: list[Item], char: str, nested: bool) -> None:
        begin = self._at
        self._at += 1
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1), "{": (1, 1)}[char]
        if char == "{":
            least, most = self._counts(begin, _SPACE if nested else _LINE_SPACE)
        if not sequence or sequence[-1] is NOTHING:
            raise self._refuse(f"nothing stands before {self._text[begin : self._at]}; say what is repeated", begin)
        item = sequence.pop()
        factor = most if most else max(1, least)
        if item.n_rules * factor > REPEATS:
            raise self._refuse(
                f"it repeats {factor:,} times what holds {item.n_rules:,} groups and rules; more than {REPEATS:,} are not taken", begin
            )
        n_rules = item.n_rules * factor
        if item.repeated:  # the repetition of a repetition
            rule = self._new_rule(self._name)
            self.rules[rule].alternatives, self.rules[rule].defined = [[item]], True
            item = Item(rule, item.size)
        n_more = 1 if most is None else most - least
        self._n_symbols += n_more  # llama.cpp's rules for what is left out
        self._grow(item.size * max(0, least - 1) + n_more * (item.size + 3))
        sequence.append(NOTHING if most == 0 else Item(item.rule, item.size * least + (n_more > 0), n_rules, least, most))

    def _counts(self, begin: int, space: re.Pattern[str]) -> tuple[int, int | None]:
        """Of {m}, {m,} and {m,n}."""
        numbers: list[int | None] = []
        while True:
            self._skip(space)
            found = _NUMBER.match(self._text, self._at)
            if found is None and not numbers:
                raise self._refuse("{ is not followed by a number; write {m}, {m,} or {m,n}", begin)
            numbers.append(None if found is None else int(found[0][:10]))
            self._at = self._at if found is None else found.end()
            self._skip(space)
            if self._is("}"):
                break
            if not self._is(",") or len(numbers) == 2:
                raise self._refuse("{ is not closed; write {m}, {m,} or {m,n}", begin)
            self._at += 1
        self._at += 1
        least, most = numbers[0] or 0, numbers[-1]
        if least > REPEATS:
            raise self._refuse(f"{self._text[begin : self._at][:30]} repeats more than {REPEATS:,} times; llama.cpp takes no more", begin)
        if most is not None and most < least:
            raise self._refuse(f"{self._text[begin : self._at]} ends before it begins; write {{{most},{least}}}", begin)
        return least, None if most is not None and most > REPEATS else most

    def _rest(self) -> str:
        return self._text[self._at : self._at + 20].split("\n")[0]


def check(
    text: str, root: str = "root", limits: Limits | None = None, n_vocab: int | None = None, token_of: Callable[[str], int] | None = None
) -> None:
    """See that llama.cpp can follow a grammar.

    Parameters
    ----------
    text : str
        GBNF.
    root : str
        The rule that an answer is.
    n_vocab, token_of
        See ``Reader``.

    Raises
    ------
    InputError
        It cannot, or should not: one sentence that names the rule and what to do.
    """
    limits = limits or Limits()
    try:
        n_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise InputError("the grammar holds half of a surrogate pair, which is no character; write the whole character") from error
    if n_bytes > limits.grammar_bytes:
        raise InputError(f"the grammar has {n_bytes:,} bytes, and at most {limits.grammar_bytes:,} are taken; write a smaller one")
    if "\0" in text:
        raise InputError("the grammar holds a NUL character, which ends texts; leave it out")
    reader = Reader(text, limits, n_vocab, token_of)
    for name, rule in reader.ids.items():
        if not reader.rules[rule].defined:
            raise InputError(f"the grammar is refused: rule {shown(name)} is named, but not defined; add {name[:40]} ::= ...")
    if root not in reader.ids:
        raise InputError(f"the grammar has no rule {shown(root)}, which an answer begins with; add {root} ::= ...")
    _Shape(reader.rules, limits).check(reader.ids[root])


class _Shape:
    """What the rules of a grammar do to each other."""

    def __init__(self, rules: list[Rule], limits: Limits):
        self._rules, self._limits = rules, limits
        self._may_be_empty = self._closure(lambda item, done: item.least == 0 or (item.rule is not None and item.rule in done))
        self._can_end = self._closure(lambda item, done: item.least == 0 or item.rule is None or item.rule in done)

    def check(self, root: int) -> None:
        self._check_repetitions()
        order = self._in_order_of_beginnings()
        self._check_ways(order)
        self._check_ends(root)

    def _refuse(self, rule: int, what: str) -> InputError:
        return InputError(f"the grammar is refused: rule {shown(self._rules[rule].name)} {what}")

    def _closure(self, holds: Callable[[Item, set[int]], bool]) -> set[int]:
        """The rules with an alternative all of whose items hold, given what holds already."""
        users: dict[int, list[int]] = {}
        for i, rule in enumerate(self._rules):
            for alternative in rule.alternatives:
                for item in alternative:
                    if item.rule is not None:
                        users.setdefault(item.rule, []).append(i)
        done: set[int] = set()
        to_see = list(range(len(self._rules)))
        while to_see:
            i = to_see.pop()
            if i not in done and any(all(holds(item, done) for item in alternative) for alternative in self._rules[i].alternatives):
                done.add(i)
                to_see += users.get(i, [])
        return done

    def _empty(self, item: Item) -> bool:
        return item.rule is not None and item.rule in self._may_be_empty

    def _beginnings(self, alternative: list[Item]) -> list[Item]:
        """The items that may come first."""
        for n, item in enumerate(alternative):
            if item.least > 0 and not self._empty(item):
                return alternative[: n + 1]
        return alternative

    def _check_repetitions(self) -> None:
        for i, rule in enumerate(self._rules):
            for alternative in rule.alternatives:
                for item in alternative:
                    if item.most is None and self._empty(item):
                        raise self._refuse(i, "repeats without end what may be empty; make what is repeated at least one character")

    def _in_order_of_beginnings(self) -> list[int]:
        """The rules, each after those that it begins with."""
        order: list[int] = []
        begun: dict[int, bool] = {}  # False: it is being looked at
        heights = [0] * len(self._rules)
        for first in range(len(self._rules)):
            if first in begun:
                continue
            begun[first] = False
            path = [(first, iter(self._first_rules(first)))]
            while path:
                i, following = path[-1]
                nxt = next(following, None)
                if nxt is None:
                    path.pop()
                    begun[i] = True
                    order.append(i)
                    heights[i] = 1 + max((heights[j] for j in self._first_rules(i)), default=0)
                    if heights[i] > CHAIN:
                        raise self._refuse(
                            i, f"begins with a rule that begins with a rule, and so on, more than {CHAIN} times; write it flatter"
                        )
                elif nxt not in begun:
                    begun[nxt] = False
                    path.append((nxt, iter(self._first_rules(nxt))))
                elif not begun[nxt]:
                    raise self._refuse(
                        nxt,
                        "begins with itself (left recursion), which has no end; put it behind what comes first, as in list ::= item (comma item)*",
                    )
        return order

    def _first_rules(self, i: int) -> list[int]:
        return [item.rule for alternative in self._rules[i].alternatives for item in self._beginnings(alternative) if item.rule is not None]

    def _check_ways(self, order: list[int]) -> None:
        most = self._limits.grammar_ways
        ways = [0] * len(self._rules)
        for i in order:
            for alternative in self._rules[i].alternatives:
                beginnings = self._beginnings(alternative)
                for item in beginnings:
                    n = 1 if item.rule is None else ways[item.rule]
                    ways[i] += n * (max(1, item.most or 1) if self._empty(item) else 1)
                ways[i] += len(beginnings) == len(alternative) and all(item.least == 0 or self._empty(item) for item in alternative)
            if ways[i] > most:
                raise self._refuse(
                    i, f"can begin in more than {most:,} ways; let alternatives that begin alike share their beginning, as in a (b | c)"
                )

    def _check_ends(self, root: int) -> None:
        seen, to_see = {root}, [root]
        while to_see:
            i = to_see.pop()
            if i not in self._can_end:
                raise self._refuse(i, "can never end, as each of its ways leads back to it; add one that does not")
            for alternative in self._rules[i].alternatives:
                for item in alternative:
                    if item.rule is not None and item.rule not in seen:
                        seen.add(item.rule)
                        to_see.append(item.rule)


def is_character(code: int) -> bool:
    """Whether a text can have it."""
    return 0 < code <= LAST and not SURROGATES[0] <= code <= SURROGATES[1]


def _instead(code: int) -> str:
    return "write the whole character, not half of a surrogate pair" if SURROGATES[0] <= code <= SURROGATES[1] else "leave it out"


def _covers(ranges: list[tuple[int, int]]) -> bool | None:
    """True: the ranges hold every character that a text can have; None: not one."""
    before, after = SURROGATES[0] - 1, SURROGATES[1] + 1
    if not any((first <= before and last >= 1) or (first <= LAST and last >= after) for first, last in ranges):
        return None
    nxt = 1  # the first that is not covered
    for first, last in sorted(ranges):
        if first <= nxt or (nxt > before and first <= after):
            nxt = max(nxt, last + 1)
    return nxt > LAST


def chr_of(code: int) -> str:
    return chr(code) if is_character(code) else f"U+{code:04X}"


def shown(text: str) -> str:
    """A part of what came from outside, short and printable."""
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")
