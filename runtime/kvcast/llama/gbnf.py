"""GBNF, llama.cpp's language of grammars, read as llama.cpp 0c1e57098 reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from ..errors import InputError
from ..limits import Limits

MAX_REPEAT = 2000  # llama.cpp's own bound, of one repetition and of those within one another
MAX_CHAIN = 500  # rules that begin with one another: llama.cpp calls itself for each
WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
ESCAPES = {"t": "\t", "r": "\r", "n": "\n", **{c: c for c in '\\"[]-'}}
HEX = {"x": 2, "u": 4, "U": 8}
LAST = 0x10FFFF
NO_TEXT = ((0, 0), (0xD800, 0xDFFF))  # code points that no token's text has


class GrammarError(InputError):
    """A grammar or a schema cannot be used; the message says where and why."""


@dataclass(slots=True)
class Item:
    """A piece of a sequence: ``n`` characters or tokens in a row, a rule, or what may follow ``least`` times of a repetition."""

    n: int = 0
    rule: str = ""
    optional: tuple[Item, ...] = ()
    times: int = 0  # of ``optional`` at most; 0: any number


Sequence = list[Item]


@dataclass(slots=True)
class Rule:
    """Its alternatives; ``where`` is the line on which it begins."""

    where: int
    alternatives: list[Sequence] = field(default_factory=list)


class _Parser:
    """Reads GBNF without recursion; parentheses become rules of their own."""

    def __init__(self, text: str, n_vocab: int | None, limits: Limits):
        self._limits = limits
        try:
            n_bytes = len(text.encode())
        except UnicodeEncodeError:
            raise GrammarError("the grammar holds half of a surrogate pair (\\ud800 to \\udfff); send whole characters") from None
        if n_bytes > limits.grammar_bytes:
            raise GrammarError(f"the grammar has {n_bytes:,} bytes; {limits.grammar_bytes:,} are the most, make it shorter")
        if "\0" in text:
            raise GrammarError("the grammar holds a NUL character; leave it out")
        self._text, self._at, self._line, self._n_vocab = text + "\0", 0, 1, n_vocab
        self._rules: dict[str, Rule] = {}
        self._n_made = self._n_elements = 0

    def parse(self) -> dict[str, Rule]:
        self._space(True)
        while self._now() != "\0":
            self._rule()
        return self._rules

    # ---- characters

    def _now(self) -> str:
        return self._text[self._at]

    def _fail(self, why: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise GrammarError(f"the grammar cannot be read in line {line}: {why}")

    def _space(self, lines: bool) -> None:
        text = self._text
        while (c := text[self._at]) in (" \t#\r\n" if lines else " \t#"):
            if c == "#":
                while text[self._at] not in "\r\n\0":
                    self._at += 1
            else:
                self._at += 1

    def _word(self, what: str) -> str:
        begin = self._at
        while self._now() in WORD:
            self._at += 1
        if begin == self._at:
            self._fail(f"{what} is expected, of letters, digits and '-'; {self._now()!r} stands there")
        return self._text[begin : self._at]

    def _number(self) -> int:
        begin = self._at
        while self._now() in "0123456789":
            self._at += 1
        if begin == self._at:
            self._fail("a number is expected")
        return int(self._text[begin : min(self._at, begin + 12)])  # more digits are too many anyway

    def _char(self) -> int:
        c = self._now()
        self._at += 1
        if c == "\0":
            self._fail("it ends within quotes or brackets")
        if c != "\\":
            return ord(c)
        kind = self._now()
        self._at += 1
        if kind in ESCAPES:
            return ord(ESCAPES[kind])
        if kind not in HEX:
            self._fail(
                f'there is no escape \\{kind if kind != chr(0) else ""}; use \\n, \\t, \\r, \\\\, \\", \\[, \\], \\-, \\x, \\u or \\U'
            )
        digits = self._text[self._at : self._at + HEX[kind]]
        if len(digits) < HEX[kind] or not all(d in "0123456789abcdefABCDEF" for d in digits):
            self._fail(f"\\{kind} needs {HEX[kind]} hexadecimal digits")
        self._at += HEX[kind]
        return int(digits, 16)

    # ---- rules

    def _rule(self) -> None:
        where = self._text.count("\n", 0, self._at) + 1 if len(self._rules) < 1000 else 0
        name = self._word("a rule's name")
        self._space(False)
        if not self._text.startswith("::=", self._at):
            self._fail(f"'::=' is expected after the name {name!r}")
        self._at += 3
        self._space(True)
        self._body(name, where)
        if self._text.startswith("\r\n", self._at):
            self._at += 2
        elif self._now() in "\r\n":
            self._at += 1
        elif self._now() != "\0":
            self._fail(f"{self._now()!r} is not expected in the rule {name!r}")
        self._space(True)

    def _body(self, name: str, where: int) -> None:
        """Alternatives up to the end of the rule. ``open_`` holds the rules whose parentheses are open, and where each goes on."""
        open_: list[tuple[Rule, Sequence]] = []
        rule = Rule(where)
        sequence: Sequence = []
        last: Sequence = []  # what a repetition repeats
        product = 1
        self._count_rule()
        while True:
            c, nested = self._now(), bool(open_)
            if c == '"':
                last, product = self._literal(sequence), 1
            elif c == "[":
                last, product = self._class(sequence), 1
            elif c in "<!":
                last, product = self._token(sequence), 1
            elif c == ".":
                self._at += 1
                last, product = self._add(sequence, Item(1)), 1
            elif c in WORD:
                last, product = self._add(sequence, Item(rule=self._word("a rule's name"))), 1
            elif c in "*+?{":
                product = self._repeat(sequence, last, product)
                last = sequence[-1:]
            elif c == "(":
                if len(open_) == self._limits.grammar_depth:
                    self._fail(f"parentheses are nested more than {self._limits.grammar_depth} deep; use rules instead")
                self._at += 1
                self._space(True)
                open_.append((rule, sequence))
                rule, sequence, last = Rule(where), [], []
                self._count_rule()
                continue
            elif c == ")" and open_:
                self._at += 1
                rule.alternatives.append(sequence)
                self._n_made += 1
                made = f"({self._n_made}"  # no rule of theirs is called so
                self._rules[made] = rule
                n_within = 1 + sum(item.times for alternative in rule.alternatives for item in alternative)
                rule, sequence = open_.pop()
                last, product = self._add(sequence, Item(rule=made)), n_within
            elif c == "|":
                self._at += 1
                rule.alternatives.append(sequence)
                sequence, last = [], []
                self._space(True)
                continue
            else:
                break
            self._space(bool(open_) if c == ")" else nested)
        if open_:
            self._fail(f"a parenthesis of the rule {name!r} is not closed")
        rule.alternatives.append(sequence)
        self._rules[name] = rule

    def _count_rule(self) -> None:
        if len(self._rules) + 1 > self._limits.grammar_rules:
            self._fail(f"more than {self._limits.grammar_rules:,} rules; make the grammar smaller")

    def _add(self, sequence: Sequence, item: Item) -> Sequence:
        self._n_elements += max(1, item.n)
        if self._n_elements > self._limits.grammar_elements:
            self._fail(f"repetitions make more than {self._limits.grammar_elements:,} elements of it; repeat less")
        sequence.append(item)
        return [item]

    def _literal(self, sequence: Sequence) -> Sequence:
        self._at += 1
        n = 0
        while self._now() != '"':
            self._possible(((code := self._char()), code))
            n += 1
        self._at += 1
        return self._add(sequence, Item(n)) if n else []

    def _class(self, sequence: Sequence) -> Sequence:
        self._at += 1
        inverse = self._now() == "^"
        self._at += inverse
        ranges = []
        while self._now() != "]":
            first = last = self._char()
            if self._now() == "-" and self._text[self._at + 1] != "]":
                self._at += 1
                last = self._char()
            if last < first:
                self._fail(f"the range from {_shown(first)} to {_shown(last)} holds nothing; write the lower one first")
            ranges.append((first, last))
        self._at += 1
        if not ranges:
            self._fail("an empty class [] or [^] matches nothing; leave it out")
        if inverse:
            self._not_everything(ranges)
        else:
            for found in ranges:
                self._possible(found)
        return self._add(sequence, Item(1))

    def _possible(self, ranges: tuple[int, int]) -> None:
        first, last = ranges
        if last > LAST or any(a <= first and last <= b for a, b in NO_TEXT):
            self._fail(f"no text holds {_shown(first if first > LAST or last <= LAST else last)}; leave it out")

    def _not_everything(self, ranges: list[tuple[int, int]]) -> None:
        free = 0
        for first, last in sorted([*ranges, *NO_TEXT, (LAST + 1, LAST + 1)]):
            if first > free:
                return
            free = max(free, last + 1)
        self._fail("a class that excludes every character matches nothing; leave it out")

    def _token(self, sequence: Sequence) -> Sequence:
        self._at += self._now() == "!"
        if self._now() != "<":
            self._fail("'<' is expected: a token is written <name> or <[number]>")
        self._at += 1
        if self._now() == "[":
            self._at += 1
            token = self._number()
            if self._n_vocab is not None and token >= self._n_vocab:
                self._fail(f"there is no token {token}; the model has 0 to {self._n_vocab - 1}")
            if not self._text.startswith("]>", self._at):
                self._fail("']>' is expected after the number of a token")
            self._at += 2
        else:
            end = self._text.find(">", self._at)
            if end < 0 or end - self._at > 1000 or "\n" in self._text[self._at : end]:
                self._fail("'>' is expected after the name of a token")
            self._at = end + 1
        return self._add(sequence, Item(1))

    def _repeat(self, sequence: Sequence, last: Sequence, product: int) -> int:
        """The rewriting that llama.cpp does, counted; returns how many rules one repetition of this has."""
        c = self._now()
        self._at += 1
        if not last or sequence[-len(last) :] != last:
            self._fail(f"there is nothing before {c!r} to repeat")
        least, most = {"*": (0, 0), "+": (1, 0), "?": (0, 1)}.get(c, (0, 0))
        bounded = c == "?"
        if c == "{":
            self._space(True)
            least = most = self._number()
            bounded = True
            self._space(True)
            if self._now() == ",":
                self._at += 1
                self._space(True)
                bounded = self._now() != "}"
                most = self._number() if bounded else 0
                self._space(True)
            if self._now() != "}":
                self._fail("'}' is expected after the number of repetitions")
            self._at += 1
            if bounded and most < least:
                self._fail(f"{{{least},{most}}} asks for at least {least} and at most {most}; exchange the numbers")
            if least > MAX_REPEAT:
                self._fail(f"{least:,} repetitions; {MAX_REPEAT:,} are the most")
            if bounded and most > MAX_REPEAT:
                bounded, most = False, 0  # as llama.cpp: so many are as good as any number
        times = most if bounded and most else max(1, least)
        if product * times > MAX_REPEAT:
            self._fail(f"repetitions within one another make {product * times:,} of one part; {MAX_REPEAT:,} are the most")
        repeated = tuple(last)
        if least == 0:
            del sequence[-len(last) :]
        for _ in range(least - 1):
            for item in repeated:
                self._add(sequence, item)
        if not bounded or most > least:
            n = most - least if bounded else 0
            self._n_elements += sum(max(1, item.n) for item in repeated) * n
            self._add(sequence, Item(optional=repeated, times=n))
        elif least == 0:  # {0}: nothing is left to be repeated
            self._add(sequence, Item(optional=(), times=0))
        return product * times


def _shown(code: int) -> str:
    return repr(chr(code)) if 0x20 < code <= LAST and not 0xD800 <= code <= 0xDFFF else f"U+{code:04X}"
