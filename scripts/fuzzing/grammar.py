"""Grammars and JSON schemas, as requests bring them: refused in a sentence, or followed to an end, in time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema

from kvcast import GenerationError, InputError, Llama
from kvcast.llama.grammar import check_grammar, grammar_of_schema
from shapes import write_shape

from . import mutate

# isort: split
from llama_cpp import LlamaGrammar, llama_grammar  # which kvcast carries

N_TOKENS = 200  # of an answer
WHOLE = (
    llama_grammar.JSON_GBNF, llama_grammar.JSON_ARR_GBNF, llama_grammar.C_GBNF, llama_grammar.CHESS_GBNF, llama_grammar.JAPANESE_GBNF,
    llama_grammar.LIST_GBNF,
)  # fmt: skip
COUNTS = (0, 1, 2, 3, 7, 50, 2000, 2001, 10**6, 2**31, 2**64, 10**30)
LETTERS = ("a", "b", "z", "0", "-", " ", r"\n", r"\x41", r"\u00e9", r"\U0001F642", r"\"", r"\\", "é", "中", "🙂", r"\x00", r"\uD800", r"\q")
PIECES = (
    '"',
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "*",
    "+",
    "?",
    "|",
    "::=",
    "\n",
    "#",
    ".",
    "<[5]>",
    "!",
    "root",
    " ",
    ",",
    "^",
    "\\",
    "\0",
    "<",
    ">",
)
TYPES = ("string", "integer", "number", "boolean", "null", "object", "array", "date", ["string", "null"], [], 3)
FORMATS = ("date", "time", "date-time", "uuid", "email", "uri", "x")
PATTERNS = (
    "^a+$",
    "^[a-z]{1,3}$",
    "^(a|b)*$",
    "^\\d{4}-\\d{2}$",
    "^.*$",
    "(((",
    "^(?=a)$",
    "a{99999}",
    "^" + "(a?){30}" * 3 + "$",
    "^[^\\x00-\\uffff]$",
)


class Grammar:
    """Half of the cases are GBNF, half schemas; grown, or known ones changed."""

    def __init__(self, folder: Path):
        self.llm = Llama(write_shape(folder / "tiny.gguf", vocabulary="llama", n_layer=1), n_ctx=1024, n_threads=1, verbose=False)

    def make(self, rng: random.Random) -> bytes:
        kind = rng.randrange(8)
        if kind < 3:
            text = _grammar(rng)
        elif kind < 4:
            text = rng.choice(WHOLE)
            for _ in range(rng.choice((1, 1, 2, 5))):
                text = mutate.some_bytes(rng, text.encode("utf-8", "replace")).decode("utf-8", "replace")
        else:
            schema = _schema(rng, 0)
            for _ in range(rng.choice((0, 0, 1, 2))):
                schema = mutate.value(rng, schema)
            return b"s" + json.dumps(schema).encode()
        if rng.random() < 0.3:
            at = rng.randrange(len(text) + 1)
            text = text[:at] + rng.choice(PIECES) + text[at:]
        return b"g" + text.encode("utf-8", "surrogatepass")

    def run(self, data: bytes) -> str:
        """A grammar is to be followed character by character; a schema's answer that came to an end fits it."""
        schema = json.loads(data[1:]) if data[:1] == b"s" else None
        try:
            text = data[1:].decode("utf-8", "surrogatepass") if schema is None and data[:1] == b"g" else grammar_of_schema(schema)
            check_grammar(text, n_vocab=self.llm.n_vocab())
        except InputError:
            return "refused"
        self.llm.reset()
        grammar = LlamaGrammar.from_string(text, verbose=False)
        try:
            answer: Any = self.llm.create_completion("a", max_tokens=N_TOKENS, temperature=3.0, seed=len(data), grammar=grammar)
        except InputError:
            return "refused as it answered"
        except GenerationError as error:  # how many ways a text leaves open is known once it is there
            assert "in too many ways" in str(error), error
            return "ended, in too many ways"
        choice = answer["choices"][0]
        if data[:1] == b"g" or choice["finish_reason"] != "stop":
            return choice["finish_reason"]
        return _fits(choice["text"], schema)


def _fits(text: str, schema: Any) -> str:
    """That an answer is JSON is asked for; that it fits is counted, as ranges of numbers and some patterns are only approached."""
    try:
        value = json.loads(text)
    except ValueError:
        if '"pattern"' in json.dumps(schema):  # which may ask for what a string in JSON cannot hold
            return "no JSON, with a pattern"
        raise
    try:
        jsonschema.validate(value, schema)
    except jsonschema.ValidationError:
        return "JSON, another one"
    except Exception:  # noqa: BLE001 - a schema that jsonschema cannot read
        return "JSON, not checked"
    return "JSON that fits"


def _grammar(rng: random.Random) -> str:
    names = ["root", *(f"r{i}" for i in range(rng.choice((0, 1, 3, 8, 40))))]
    lines = [f"{name} ::= {_alternatives(rng, names, 0)}" for name in names]
    if rng.random() < 0.05:
        deep = rng.choice((10, 63, 64, 65, 5000))
        lines.append("deep ::= " + "(" * deep + '"a"' + ")" * deep)
    rng.shuffle(lines)
    return "\n".join(lines)


def _alternatives(rng: random.Random, names: list[str], depth: int) -> str:
    return " | ".join(_sequence(rng, names, depth) for _ in range(rng.choice((1, 1, 2, 3))))


def _sequence(rng: random.Random, names: list[str], depth: int) -> str:
    return " ".join(_item(rng, names, depth) for _ in range(rng.choice((0, 1, 1, 2, 4))))


def _item(rng: random.Random, names: list[str], depth: int) -> str:
    kind = rng.randrange(10)
    if kind < 4:
        item = '"' + "".join(rng.choices(LETTERS[: 13 if rng.random() < 0.9 else None], k=rng.choice((0, 1, 3)))) + '"'
    elif kind < 6:
        some = "".join(rng.choice((x, f"{x}-{y}")) for x, y in zip(rng.choices(LETTERS[:8], k=2), rng.choices(LETTERS[:14], k=2)))
        item = f"[{rng.choice(('', '^'))}{some}]"
    elif kind < 8 or depth > 4:
        item = rng.choice(names)
    elif kind == 8:
        item = rng.choice((".", "<[5]>", "!<[7]>", "nowhere"))
    else:
        item = f"({_alternatives(rng, names, depth + 1)})"
    least, most = rng.choice(COUNTS), rng.choice(COUNTS)
    times = (*[""] * 12, "*", "+", "?", f"{{{least}}}", f"{{{least},}}", f"{{{least},{most}}}", f"{{,{most}}}")
    return item + rng.choice(times)


def _schema(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(12) if depth < 4 else rng.randrange(6)
    if kind == 0:
        return {"type": rng.choice(TYPES)}
    if kind == 1:
        return {"enum": [rng.choice(mutate.ODD[:4]), rng.randrange(100), None][: rng.randrange(4)]}
    if kind == 2:
        return {"const": rng.choice((1, "x", None, [1], {"a": 1}, '"\\\n'))}
    if kind == 3:
        return {"type": "string", **_bounds(rng, "minLength", "maxLength")}
    if kind == 4:
        return {"type": "string", **rng.choice(({"format": rng.choice(FORMATS)}, {"pattern": rng.choice(PATTERNS)}))}
    if kind == 5:
        return {"type": rng.choice(("integer", "number")), **_bounds(rng, "minimum", "maximum")}
    if kind == 6:
        return {"type": "array", "items": _schema(rng, depth + 1), **_bounds(rng, "minItems", "maxItems")}
    if kind == 7:
        return {rng.choice(("anyOf", "oneOf", "allOf")): [_schema(rng, depth + 1) for _ in range(rng.randrange(4))]}
    if kind == 8:
        return {"$ref": rng.choice(("#", "#/$defs/a", "#/$defs/none", "https://example.org/x.json", "#/properties/a", 3))}
    if kind == 9:
        return {"$defs": {"a": _schema(rng, depth + 1)}, "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}}
    names = rng.sample(("a", "b", "name", "é", '"', "", "x" * 300, "a b"), rng.randrange(1, 5))
    return {
        "type": "object",
        "properties": {name: _schema(rng, depth + 1) for name in names},
        "required": rng.choice((names, names[:1], [], ["nowhere"])),
        **rng.choice(({}, {"additionalProperties": rng.choice((True, False, {"type": "string"}))})),
    }


def _bounds(rng: random.Random, least: str, most: str) -> dict[str, Any]:
    found = {least: rng.choice((*COUNTS, -1, 1.5)), most: rng.choice((*COUNTS, -1, 1.5))}
    return {name: value for name, value in found.items() if rng.random() < 0.6}
