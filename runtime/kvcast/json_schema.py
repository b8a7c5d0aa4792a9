"""JSON schemas as grammars: what an answer must be for a ``response_format`` or for a tool that is called.

Every answer that the grammar allows fits the schema, but for what a grammar cannot hold: ``not``, ``if``, ``oneOf`` where more than one
fits, ``uniqueItems``, ``multipleOf``, ``contains``, ``patternProperties``, lengths beside a ``pattern``, upper bounds of more than 2,000.
Not every answer that fits is allowed: properties come in the schema's order, and others only where it speaks of them.
"""

from __future__ import annotations

import functools
import json
import re
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

from . import json_numbers
from .errors import InputError
from .grammar import is_character, shown
from .json_strings import CHAR, FORMATS, PLAIN, Pattern, in_common, of_json, quoted, repeated
from .limits import Limits

import llama_cpp  # isort: skip

FEW = 64  # literals that are simply listed
SAYS_NOTHING = {
    "title", "description", "default", "examples", "example", "$comment", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "id",
    "discriminator", "strict", "$defs", "definitions", "nullable",
}  # fmt: skip
KINDS = {  # keywords that only one type has; the type where none is named
    "object": {"properties", "required", "additionalProperties", "propertyNames", "minProperties", "maxProperties", "patternProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"pattern", "format", "minLength", "maxLength"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
}
PRIMITIVES = {  # what each needs is among them
    "space": '| " " | "\\n" [ \\t]{0,20}',
    "colon": '":" space',
    "comma": '"," space',
    "char": CHAR,
    "plain": PLAIN,
    "string": '"\\"" char* "\\""',
    "number": json_numbers.number(None, None),
    "integer": json_numbers.integer(None, None),
    "boolean": '"true" | "false"',
    "null": '"null"',
    "object": '"{" space (member (comma member)* space)? "}"',
    "member": "string colon value",
    "array": '"[" space (value (comma value)* space)? "]"',
    "value": "object | array | string | number | boolean | null",
}
_WORD = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|([a-zA-Z][a-zA-Z0-9-]*)')


def grammar_of(schema: Any, limits: Limits | None = None) -> llama_cpp.LlamaGrammar:
    """The grammar of the answers that a schema describes.

    Parameters
    ----------
    schema : dict or bool
        As JSON has it.

    Raises
    ------
    InputError
        It is wrong or too large, or nothing fits it: one sentence that names the place and what to do.
    """
    limits = limits or Limits()
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the schema is no JSON ({error}); correct it") from error
    return llama_cpp.LlamaGrammar.from_string(_text_of(text, limits))


def take_format(arguments: dict[str, Any], limits: Limits) -> None:
    """Take the ``response_format`` out of the arguments of a chat completion, and put the grammar in that it asks for.

    Raises
    ------
    InputError
        See ``grammar_of``; or there is a grammar already, or it is of another type.
    """
    form = arguments.pop("response_format", None)
    if form is None or form.get("type", "text") == "text":
        return
    if form["type"] == "json_object":
        schema = form.get("schema")
    elif form["type"] == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema")
    else:
        raise InputError(f"response_format has the type {shown(str(form['type']))}; use text, json_object or json_schema")
    if arguments.get("grammar") is not None:
        raise InputError("response_format does not go with a grammar; leave one out")
    arguments["grammar"] = grammar_of({"type": "object"} if schema is None else schema, limits)


@functools.lru_cache(64)
def _text_of(schema: str, limits: Limits) -> str:
    if len(schema) > limits.grammar_bytes:
        raise InputError(f"the schema has {len(schema):,} characters, and at most {limits.grammar_bytes:,} are taken; send a smaller one")
    return Converter(json.loads(schema), limits).text()


class Converter:
    """Makes the rules of a schema, one after another: a part becomes the name of a rule, and is seen to later, so that no depth of
    references or parts matters.

    Parameters
    ----------
    schema : dict or bool
    limits : Limits
    """

    def __init__(self, schema: Any, limits: Limits):
        self._schema, self._limits = schema, limits
        self._rules: dict[str, str] = {}
        self._n_of: dict[str, int] = {}
        self._n_parts = 0
        self._of_ref: dict[str, str] = {}
        self._of_text: dict[str, str] = {}
        self._to_do: deque[tuple[str, Any, int]] = deque([("root", schema, 0)])
        while self._to_do:
            name, part, depth = self._to_do.popleft()
            self._name, self._depth = name, depth
            self._rules[name] = self._body(part)

    def text(self) -> str:
        """GBNF."""
        needed = [*self._rules.values()]
        while needed:
            for name in filter(None, _WORD.findall(needed.pop())):
                if name not in self._rules:
                    self._rules[name] = PRIMITIVES[name]
                    needed.append(PRIMITIVES[name])
        return "\n".join(f"{name} ::= {body}" for name, body in self._rules.items()) + "\n"

    def _refuse(self, why: str) -> InputError:
        return InputError(f"the schema is refused at {self._name.removeprefix('root-').replace('-', '.')}: {why}")

    # ---- names and rules

    def _new_name(self, *words: str) -> str:
        base = re.sub("[^a-zA-Z0-9]+", "-", "-".join(words))[:60].strip("-")
        n = self._n_of[base] = self._n_of.get(base, -1) + 1
        name = f"{base}-{n}" if n else base
        return name if name not in self._rules and name not in PRIMITIVES and name != "root" else self._new_name(*words)

    def _add(self, body: str, word: str = "part") -> str:
        """A rule for an expression; the same for the same."""
        if body not in self._of_text:
            self._count()
            self._of_text[body] = name = self._new_name(self._name, word)
            self._rules[name] = body
        return self._of_text[body]

    def _count(self) -> None:
        self._n_parts += 1
        if self._n_parts > self._limits.schema_parts:
            raise InputError(f"the schema has more than {self._limits.schema_parts:,} parts; send a smaller one")

    def _later(self, schema: Any, word: str) -> str:
        """The rule of a part."""
        if isinstance(schema, dict):
            schema = {key: value for key, value in schema.items() if key not in SAYS_NOTHING or (key == "nullable" and value)}
        if schema is True or schema == {}:
            return "value"
        if isinstance(schema, dict) and schema.keys() == {"type"} and schema["type"] in PRIMITIVES.keys() - {"value"}:
            return str(schema["type"])
        if isinstance(schema, dict) and schema.keys() == {"$ref"}:
            return self._referred(schema["$ref"])
        self._count()
        if self._depth >= self._limits.schema_depth:
            raise self._refuse(f"it is nested more than {self._limits.schema_depth} deep; flatten it, or use $defs and $ref")
        name = self._new_name(self._name, word)
        self._rules[name] = ""
        self._to_do.append((name, schema, self._depth + 1))
        return name

    def _referred(self, ref: Any) -> str:
        if ref == "#":
            return "root"
        if not isinstance(ref, str) or ref not in self._of_ref:
            target = self._resolve(ref)
            self._count()
            self._of_ref[ref] = name = self._new_name("ref", str(ref).rpartition("/")[2])
            self._rules[name] = ""
            self._to_do.append((name, target, 0))
        return self._of_ref[ref]

    def _resolve(self, ref: Any) -> Any:
        """What a reference within the schema means."""
        if not isinstance(ref, str) or not ref.startswith("#"):
            raise self._refuse(f"$ref is {shown(str(ref))}, and nothing is fetched; put what it means under $defs")
        found = self._schema
        for key in ref[1:].split("/")[1:]:
            key = unquote(key).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdecimal() and len(key) < 6 and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise self._refuse(f"$ref is {shown(ref)}, which is not there; define it under $defs")
        if ref[1:] and not ref.startswith("#/"):
            raise self._refuse(f"$ref is {shown(ref)}; write it as #/$defs/NAME")
        return found

    # ---- schemas

    def _body(self, schema: Any) -> str:
        for _ in range(self._limits.schema_depth):
            if schema is True or schema == {}:
                return "value"
            if schema is False:
                raise self._refuse("false is a schema that nothing fits; leave it out")
            if not isinstance(schema, dict):
                raise self._refuse(f"a schema is {shown(json.dumps(schema))}; it must be an object")
            others = schema.keys() - SAYS_NOTHING
            if "$ref" in schema:
                if others == {"$ref"} and not schema.get("nullable"):
                    return self._referred(schema["$ref"])
                rest = {key: value for key, value in schema.items() if key != "$ref"}
                schema = self._both(self._resolve(schema["$ref"]), rest)
            elif schema.get("allOf"):
                rest = {key: value for key, value in schema.items() if key != "allOf"}
                for part in self._list(schema, "allOf"):
                    rest = self._both(rest, self._resolve(part["$ref"]) if isinstance(part, dict) and part.keys() == {"$ref"} else part)
                schema = rest
            else:
                return self._of_ways(schema)
        raise self._refuse("its references and allOf lead on and on; write it flatter")

    def _of_ways(self, schema: dict[str, Any]) -> str:
        if "const" in schema:
            return self._literals([schema["const"]], schema)
        if "enum" in schema:
            return self._literals(self._list(schema, "enum"), schema)
        for key in ("anyOf", "oneOf"):
            if schema.get(key):
                rest = {k: v for k, v in schema.items() if k != key}
                plain = not rest.keys() - SAYS_NOTHING and not rest.get("nullable")
                ways = [part if plain else {"allOf": [part, rest]} for part in self._list(schema, key)]
                return self._any_of([way for way in ways if self._can_be_held(way)] or ways)
        kinds = schema.get("type")
        if schema.get("nullable") is True and kinds != "null":
            rest = {k: v for k, v in schema.items() if k != "nullable"}
            return self._any_of([rest, {"type": "null"}])
        if isinstance(kinds, list):
            if not kinds:
                raise self._refuse("type is an empty list; name a type")
            return self._any_of([{**schema, "type": kind} for kind in kinds])
        if kinds is None:
            kinds = next((kind for kind, keys in KINDS.items() if keys & schema.keys()), None)
            if kinds is None:  # not, if and the like
                return "value"
        if not isinstance(kinds, str) or kinds not in ("object", "array", "string", "number", "integer", "boolean", "null"):
            raise self._refuse(f"type is {shown(json.dumps(kinds))}; it must be object, array, string, number, integer, boolean or null")
        make = getattr(self, f"_{kinds}", None)
        return kinds if make is None else make(schema)

    def _any_of(self, ways: Iterable[Any]) -> str:
        return " | ".join(self._later(way, f"way{i}") for i, way in enumerate(ways))

    def _can_be_held(self, way: Any) -> bool:
        """Whether its own pattern can: pydantic offers numbers also as texts, with one that looks ahead."""
        pattern = way.get("pattern") if isinstance(way, dict) else None
        try:
            return pattern is None or bool(Pattern(pattern, lambda text: "char"))
        except InputError:
            return False

    def _both(self, one: Any, other: Any) -> Any:
        """A schema of what fits two."""
        if one is False or other is False:
            return False
        if not isinstance(one, dict) or not isinstance(other, dict):
            return other if isinstance(other, dict) or one is True else one
        both = dict(one)
        for key, value in other.items():
            if key not in both or key in SAYS_NOTHING:
                both[key] = value if key != "nullable" else bool(value) and bool(one.get(key, True))
            elif (merge := _MERGED.get(key)) is not None:
                try:
                    both[key] = merge(both[key], value)
                except (TypeError, AttributeError) as error:
                    raise self._refuse(f"{key} is {shown(json.dumps(value))}; correct it") from error
            elif key == "$ref":
                both["allOf"] = [*both.get("allOf", []), {"$ref": value}]
            else:
                both[key] = value
        if both.get("type") == []:
            raise self._refuse("allOf, or what stands beside a $ref or anyOf, asks for two types at once, which nothing has; correct one")
        return both

    def _list(self, schema: dict[str, Any], key: str) -> list[Any]:
        value = schema[key]
        if not isinstance(value, list) or not value:
            raise self._refuse(f"{key} is {shown(json.dumps(value))}; it must be a list of at least one")
        return value

    def _size(self, schema: dict[str, Any], of: str) -> tuple[int, int | None]:
        """``minX`` and ``maxX``."""
        least, most = schema.get(f"min{of}"), schema.get(f"max{of}")
        for name, value in ((f"min{of}", least), (f"max{of}", most)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or value < 0):
                raise self._refuse(f"{name} is {shown(json.dumps(value))}; it must be a whole number from 0 on")
        least, most = int(least or 0), None if most is None else int(most)
        if most is not None and least > most:
            raise self._refuse(f"min{of} is {least} and max{of} {most}, which nothing is between; correct one")
        if least > self._limits.grammar_elements:
            raise self._refuse(f"min{of} is {least:,}, more than an answer has; use a smaller one")
        return least, most

    # ---- values

    def _literals(self, values: list[Any], schema: dict[str, Any]) -> str:
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds if isinstance(kinds, list) else None
        fitting = [value for value in values if kinds is None or any(_is_a(value, kind) for kind in kinds)]
        if schema.get("nullable") is True and None not in fitting:
            fitting.append(None)
        if not fitting:
            raise self._refuse("no value of const or enum is of its type; correct one")
        texts = sorted({json.dumps(value, ensure_ascii=False, allow_nan=False) for value in fitting})
        if any(not is_character(ord(c)) for text in texts for c in text):
            raise self._refuse("a value holds half of a surrogate pair, which is no character; write the whole character")
        if len(texts) <= FEW:
            return " | ".join(quoted(text) for text in texts)
        return self._listed(texts)

    def _listed(self, texts: list[str]) -> str:
        """Many texts, in order: those that begin alike share their beginning."""
        root = self._new_name(self._name, "value")
        to_do = [(root, texts)]
        while to_do:
            name, left = to_do.pop()
            self._count()
            ways = ['""'] if left[0] == "" else []
            groups: dict[str, list[str]] = {}
            for text in left:
                if text:
                    groups.setdefault(text[0], []).append(text)
            for group in groups.values():
                common = in_common(group[0], group[-1])  # they are in order
                if len(group) == 1:
                    ways.append(quoted(common))
                else:
                    inner = self._new_name(self._name, "value")
                    self._rules[inner] = ""
                    ways.append(f"{quoted(common)} {inner}")
                    to_do.append((inner, [text[len(common) :] for text in group]))
            self._rules[name] = " | ".join(ways)
        return root

    def _integer(self, schema: dict[str, Any]) -> str:
        return json_numbers.integer(*json_numbers.bounds_of(schema))

    def _number(self, schema: dict[str, Any]) -> str:
        return json_numbers.number(*json_numbers.bounds_of(schema))

    def _string(self, schema: dict[str, Any]) -> str:
        if schema.get("pattern") is not None:
            return f'"\\"" {Pattern(schema["pattern"], self._add).text} "\\""'
        kind = schema.get("format")
        if isinstance(kind, str) and re.fullmatch("uuid[1-8]?", kind):
            kind = "uuid"
        if isinstance(kind, str) and kind in FORMATS:
            self._rules.update(FORMATS[kind])
            return f'"\\"" {kind} "\\""'
        least, most = self._size(schema, "Length")
        return "string" if (least, most) == (0, None) else f'"\\"" {repeated("char", least, most)} "\\""'

    def _array(self, schema: dict[str, Any]) -> str:
        least, most = self._size(schema, "Items")
        items, first = schema.get("items", True), schema.get("prefixItems") or []
        if isinstance(items, list):
            items, first = schema.get("additionalItems", True), items
        if not isinstance(first, list):
            raise self._refuse(f"prefixItems is {shown(json.dumps(first))}; it must be a list")
        if most is not None:
            first = first[:most]
        parts = [self._later(part, f"item{i}") for i, part in enumerate(first)]
        if "items" not in schema and parts and least <= len(parts):
            items = False  # nothing is said of others
        least, most = max(0, least - len(parts)), None if most is None else most - len(parts)
        if items is False:
            if least:
                raise self._refuse("minItems is more than there are items; correct one")
            most = 0
        if most == 0:
            inside = " comma ".join(parts)
            return f'"[" space {inside} space "]"' if inside else '"[" space "]"'
        item = self._later(items, "item")
        more = self._add(f"comma {item}", "more")
        if parts:
            return f'"[" space {" comma ".join(parts)} {repeated(more, least, most)} space "]"'
        inside = f"{item} {repeated(more, max(0, least - 1), None if most is None else most - 1)} space"
        return f'"[" space {inside} "]"' if least else f'"[" space ({inside})? "]"'

    def _object(self, schema: dict[str, Any]) -> str:
        properties, required, more = schema.get("properties") or {}, schema.get("required") or [], schema.get("additionalProperties")
        if not isinstance(properties, dict) or not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._refuse("properties must be an object, and required a list of names; correct them")
        least, most = self._size(schema, "Properties")
        if more is None and not properties and not schema.get("patternProperties"):
            more = True
        properties = {**properties, **{name: True if more in (None, False) else more for name in required if name not in properties}}
        if most is not None and most < len(set(required)):
            raise self._refuse("maxProperties is less than there are required ones; correct one")
        names = [name for name, part in properties.items() if part is not False or name in required]
        needed = {name for name in names if name in required}
        open_ended = more not in (None, False) and not schema.get("patternProperties")
        if not open_ended and least > len(names):
            raise self._refuse("minProperties is more than there are properties; correct one")
        if most is not None:  # those that may be left out are, from the end
            n_free = most - len(needed)
            names = [name for name in names if name in needed or (n_free := n_free - 1) >= 0]
            open_ended = open_ended and most > len(names)
        for name in names:
            if len(needed) < least:
                needed.add(name)
        head = tail = ""
        if open_ended:
            key = self._key(schema.get("propertyNames"), names)
            pair = self._add(f"{key} colon {self._later(more, 'additional')}", "additional-member")
            tails = self._add(f"comma {pair}", "more")
            n_least, n_most = max(0, least - len(names)), None if most is None else most - len(names)
            tail = repeated(tails, n_least, n_most)
            head = f"{pair} {repeated(tails, max(0, n_least - 1), None if n_most is None else n_most - 1)}"
        for name in reversed(names):
            pair = self._add(f"{of_json(name)} colon {self._later(properties[name], name or 'empty')}", f"{name}-member")
            if name in needed:
                head, tail = f"{pair} {tail}".strip(), f"comma {pair} {tail}".strip()
            else:
                after = self._add(tail, "rest") if " " in tail else tail
                head = self._add(f"{pair} {after} | {head}" if head else f"{pair} {after}", "first")
                tail = self._add(f"{after} | comma {pair} {after}", "rest")
        if not head:
            return '"{" space "}"'
        return f'"{{" space {head} space "}}"' if needed or least else f'"{{" space ({head} space)? "}}"'

    def _key(self, names: Any, others: list[str]) -> str:
        """A key that is none of the others."""
        if isinstance(names, dict) and names.keys() - SAYS_NOTHING - {"type"} and not others:
            return self._later({"type": "string", **names}, "key")
        texts = sorted(name for name in others if json.dumps(name, ensure_ascii=False) == f'"{name}"')
        if not texts:
            return "string"
        root = self._new_name(self._name, "key")
        to_do = [(root, texts)]
        while to_do:
            rule, left = to_do.pop()
            self._count()
            groups: dict[str, list[str]] = {}
            for text in left:
                if text:
                    groups.setdefault(text[0], []).append(text[1:])
            ways = [] if left[0] == "" else ['""']
            begun = "".join(f"\\U{ord(c):08X}" for c in groups)
            ways.append(f'[^"\\\\\\x00-\\x1F{begun}] plain*')
            for char, group in groups.items():
                inner = self._new_name(self._name, "key")
                self._rules[inner] = ""
                ways.append(f"{quoted(char)} {inner}")
                to_do.append((inner, group))
            self._rules[rule] = " | ".join(ways)
        return f'"\\"" {root} "\\""'


def _is_a(value: Any, kind: Any) -> bool:
    if kind in ("number", "integer"):
        return isinstance(value, int | float) and not isinstance(value, bool) and (kind == "number" or value == value // 1)
    types: dict[Any, type] = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    return isinstance(value, types.get(kind, object))


def _types(one: Any, other: Any) -> Any:
    first, second = ([value] if isinstance(value, str) else value for value in (one, other))
    both = [kind for kind in first if kind in second or (kind == "integer" and "number" in second)]
    both += [kind for kind in second if kind == "integer" and "number" in first and kind not in both]
    return both[0] if len(both) == 1 else both


def _all_of(one: Any, other: Any) -> Any:
    return one if one == other else {"allOf": [one, other]}


def _ways(one: list[Any], other: list[Any]) -> list[Any]:
    return [{"allOf": [a, b]} for a in one for b in other]


_MERGED: dict[str, Callable[[Any, Any], Any]] = {
    "properties": lambda a, b: {**a, **{name: _all_of(a[name], part) if name in a else part for name, part in b.items()}},
    "required": lambda a, b: [*a, *(name for name in b if name not in a)],
    "additionalProperties": lambda a, b: False if False in (a, b) else b if a is True else a if b is True else _all_of(a, b),
    "items": lambda a, b: b if a is True else a if b is True else _all_of(a, b),
    "enum": lambda a, b: [value for value in a if value in b],
    "type": _types,
    "anyOf": _ways,
    "oneOf": _ways,
    "allOf": lambda a, b: [*a, *b],
    **dict.fromkeys(("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"), max),
    **dict.fromkeys(("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"), min),
}
