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
from typing import Any

import llama_cpp.llama_grammar as upstream

from ..limits import Limits
from .gbnf import MAX_CHAIN, MAX_REPEAT, GrammarError, Item, Rule, Sequence, _Parser


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
        if nothing := next((name for name, rule in converter._rules.items() if not rule.strip()), None):
            raise GrammarError(f"the schema allows nothing at {nothing[:80]!r} (an empty type, enum or anyOf); name what is allowed")
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
