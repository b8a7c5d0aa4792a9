"""Grammars (GBNF) and JSON schemas from outside: checked here, before llama.cpp sees them.

llama.cpp's parser and its sets of possible continuations recurse and multiply without bounds. What passes here parses in little time and
memory, is no left recursion, and has no character that nothing matches. While an answer is sampled, llama.cpp bounds the rest
(patches/0004-grammar-errors.patch) and ``Llama`` says so.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from .errors import InputError
from .limits import Limits

import llama_cpp.llama_grammar as upstream  # isort: skip

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


def check_grammar(text: str, root: str = "root", n_vocab: int | None = None, limits: Limits | None = None) -> None:
    """Whether a grammar may be given to llama.cpp.

    Parameters
    ----------
    text : str
        GBNF, as llama.cpp 0c1e57098 reads it.
    root : str
        The rule that it begins with.
    n_vocab : int or None
        Of the model, for tokens named by number.

    Raises
    ------
    GrammarError
    """
    _check(text, root, n_vocab, limits or Limits())


@functools.lru_cache(maxsize=32)
def _check(text: str, root: str, n_vocab: int | None, limits: Limits) -> None:
    rules = _Parser(text, n_vocab, limits).parse()
    if root not in rules:
        raise GrammarError(f"the grammar has no rule {root!r}; add one, it is where the text begins")
    for name, rule in rules.items():
        for used in _used(rule):
            if used not in rules:
                raise GrammarError(f"the grammar's rule {name!r} (line {rule.where}) uses {used!r}, which is not defined; define it")
    empty = _may_be_empty(rules)
    order = _order(rules, empty)
    _check_ways(rules, empty, order, limits.grammar_ways)


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


# ---- rules, as a graph


def _flat(sequence: Sequence | tuple[Item, ...]) -> Iterator[Item]:
    for item in sequence:
        yield item
        yield from _flat(item.optional)  # at most as deep as repetitions directly follow one another


def _used(rule: Rule) -> Iterator[str]:
    return (item.rule for sequence in rule.alternatives for item in _flat(sequence) if item.rule)


def _may_be_empty(rules: dict[str, Rule]) -> set[str]:
    """Rules that the empty text fulfils."""
    empty: set[str] = set()
    users: dict[str, list[str]] = {}
    for name, rule in rules.items():
        for used in _used(rule):
            users.setdefault(used, []).append(name)
    todo = list(rules)
    while todo:
        name = todo.pop()
        if name not in empty and any(all(_is_empty(item, empty) for item in sequence) for sequence in rules[name].alternatives):
            empty.add(name)
            todo += users.get(name, [])
    return empty


def _is_empty(item: Item, empty: set[str]) -> bool:
    return item.rule in empty if item.rule else item.n == 0


def _first(sequence: Sequence | tuple[Item, ...], empty: set[str]) -> Iterator[str]:
    """Rules that a text of the sequence may begin with."""
    for item in sequence:
        if item.rule:
            yield item.rule
        yield from _first(item.optional, empty)
        if not _is_empty(item, empty):
            return


def _order(rules: dict[str, Rule], empty: set[str]) -> list[str]:
    """The rules, each after those that it may begin with."""
    first = {name: {r for sequence in rule.alternatives for r in _first(sequence, empty)} for name, rule in rules.items()}
    order: list[str] = []
    depth: dict[str, int] = {}
    for start in rules:
        path, on_path = [(start, iter(first[start]))], {start}
        if start in depth:
            continue
        while path:
            name, left = path[-1]
            following = next((r for r in left if r not in depth), None)
            if following is None:
                path.pop()
                on_path.discard(name)
                depth[name] = 1 + max((depth[r] for r in first[name]), default=0)
                if depth[name] > MAX_CHAIN:
                    raise GrammarError(f"more than {MAX_CHAIN} rules of the grammar begin with one another; make it flatter")
                order.append(name)
            elif following in on_path:
                shown = next((n for n, _ in reversed(path) if not n.startswith("(")), start)
                raise GrammarError(
                    f"the grammar's rule {shown!r} begins with itself (left recursion); write what repeats with * or put it at the end"
                )
            else:
                path.append((following, iter(first[following])))
                on_path.add(following)
    return order


def _check_ways(rules: dict[str, Rule], empty: set[str], order: list[str], n_most: int) -> None:
    """Bound the ways in which a text can go on: llama.cpp keeps all of them, at each character."""
    ways: dict[str, int] = {}

    def of_sequence(sequence: Sequence | tuple[Item, ...]) -> int:
        n = longest = 0
        for item in reversed(sequence):
            own = ways.get(item.rule, 0) if item.rule else 1
            if item.optional:
                inner = of_sequence(item.optional)
                own = 1 + inner * (item.times or 1) if all(_is_empty(i, empty) for i in item.optional) else 1 + inner
            n = own + n if _is_empty(item, empty) else own
            longest = max(longest, n)
        return max(1, longest)

    for name in order:
        ways[name] = sum(of_sequence(sequence) for sequence in rules[name].alternatives)
        if ways[name] > n_most:
            raise GrammarError(
                f"the grammar's rule {next((n for n in (name, *rules) if not n.startswith('(')), name)!r} can go on in more than "
                f"{n_most:,} ways at once; repeat less of what may be empty"
            )


# ---- JSON schemas

# of a string in JSON; llama-cpp-python's lets control characters pass, which no JSON parser takes
STRING_CHARACTER = r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})'


def grammar_of_schema(schema: Any, limits: Limits | None = None) -> str:
    """The grammar of the JSON texts that a schema describes, as llama-cpp-python converts it.

    More than 2,000 as ``maxLength`` or ``maxItems`` is as good as none: llama.cpp counts no further.

    Parameters
    ----------
    schema : dict or str
        A JSON schema, or its text.

    Raises
    ------
    GrammarError
        It is too large, names another document, or uses what cannot be converted.
    """
    text = schema if isinstance(schema, str) else _dumped(schema)
    return _converted(text, limits or Limits())


def _dumped(schema: Any) -> str:
    try:
        return json.dumps(schema)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is no JSON ({error}); correct it") from None


@functools.lru_cache(maxsize=32)
def _converted(text: str, limits: Limits) -> str:
    if len(text) > limits.grammar_bytes:
        raise GrammarError(f"the schema has {len(text):,} characters; {limits.grammar_bytes:,} are the most, make it smaller")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise GrammarError("the schema is no JSON that can be read; correct it") from None
    if not isinstance(schema, dict):
        raise GrammarError(f"the schema is {json.dumps(schema)[:40]}; it must be an object")
    _check_values(schema, limits)
    if any(value.get("$ref") == "#" for value in _objects(schema)):  # the converter follows paths only
        for value in _objects(schema):
            if value.get("$ref") == "#":
                value["$ref"] = "#/$defs/whole"
        definitions = schema.setdefault("$defs", {})
        definitions["whole"] = {k: v for k, v in schema.items() if k != "$defs"}
        schema = {"$ref": "#/$defs/whole", "$defs": definitions}
    try:
        converter = upstream.SchemaConverter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
        converter.visit(converter.resolve_refs(schema, ""), "")
        grammar = converter.format_grammar()
    except GrammarError:
        raise
    except (AssertionError, AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise GrammarError(
            f"the schema cannot be turned into a grammar ({reason}); use types, properties, items, enum, anyOf, $ref"
        ) from None
    check_grammar(grammar, limits=limits)
    return grammar


def _check_values(schema: dict[str, Any], limits: Limits) -> None:
    level: list[Any] = [schema]
    n, depth = 1, 0
    while level:
        depth += 1
        if depth > limits.schema_depth:
            raise GrammarError(f"the schema is more than {limits.schema_depth} levels deep; use $defs and $ref")
        level = [v for value in level for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, dict | list)]
        n += sum(len(value) for value in level)
        if n > limits.schema_parts:
            raise GrammarError(f"the schema has more than {limits.schema_parts:,} values; make it smaller")
    for value in _objects(schema):
        ref = value.get("$ref", "#")
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise GrammarError(f"the schema refers to {str(ref)[:80]!r}; only its own parts (#/$defs/NAME) can be used, nothing is fetched")
        if isinstance(pattern := value.get("pattern"), str):
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                raise GrammarError(f"the schema's pattern {pattern[:40]!r} is no regular expression ({error}); correct it") from None
        for name in ("minLength", "maxLength", "minItems", "maxItems"):
            bound = value.get(name)
            if name not in value or isinstance(bound, dict):  # a property may be called so
                continue
            if isinstance(bound, float) and bound.is_integer():
                value[name] = bound = int(bound)
            if not isinstance(bound, int) or isinstance(bound, bool) or bound < 0:
                raise GrammarError(f"the schema has {name}={json.dumps(bound)[:40]}; it must be a whole number, 0 or more")
            if name.startswith("min") and bound > MAX_REPEAT:
                raise GrammarError(f"the schema has {name}={bound}; {MAX_REPEAT:,} is the most that can be asked for")
            most = value.get("max" + name[3:])
            if name.startswith("min") and isinstance(most, int) and most < bound:
                raise GrammarError(f"the schema has {name}={bound} and max{name[3:]}={most}; exchange the numbers")


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    todo = [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            yield value
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def _repetition(item: str, least: int, most: int | None, separator_rule: str | None = None, item_rule_is_literal: bool = False) -> str:
    """In the place of the converter's own, which nests a parenthesis for each repetition."""
    if least > MAX_REPEAT:
        raise GrammarError(f"the schema asks for {least:,} repetitions; {MAX_REPEAT:,} are the most")
    if most is not None and most < least:
        raise GrammarError(f"the schema asks for at least {least} and at most {most} repetitions; exchange the numbers")
    if most == 0:
        return ""
    if separator_rule is None:
        return f"{item}{{{least},{'' if most is None else most}}}"
    more = f"({separator_rule} {item}){{{max(0, least - 1)},{'' if most is None else most - 1}}}"
    return f"{item} {more}" if least else f"({item} {more})?"


def use_in(module: Any) -> None:
    """Let llama-cpp-python's chat formats convert schemas through here, too."""
    module._build_repetition = _repetition
    if hasattr(module, "PRIMITIVE_RULES"):
        module.PRIMITIVE_RULES["char"] = module.BuiltinRule(STRING_CHARACTER, [])
    module.json_schema_to_gbnf = _schema_to_gbnf


def _schema_to_gbnf(schema: str, prop_order: list[str] | None = None) -> str:
    return grammar_of_schema(schema)


use_in(upstream)
