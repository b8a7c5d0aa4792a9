"""Grammars and JSON schemas from outside: those that must be refused before llama.cpp sees them, and those that must work."""

import json
import random
import subprocess
import sys

import jsonschema
import pytest
from llama_cpp import LlamaGrammar, LogitsProcessorList
from llama_cpp import llama_grammar as upstream

from kvcast import GenerationError, Llama, SparseConfig
from kvcast.llama.gbnf import MAX_REPEAT, GrammarError
from kvcast.llama.grammar import check_grammar, grammar_of_schema
from shapes import write_shape

CHAIN = "\n".join(f'r{i} ::= r{i + 1} r{i + 1} | "a"' for i in range(3000)) + '\nr3000 ::= "b"\nroot ::= r0'

REFUSED = {
    "nested": "root ::= " + "(" * 20000 + '"a"' + ")" * 20000,
    "nested, closed by nobody": "root ::= " + "(" * 50,
    "a class of nothing": "root ::= [z-a]",
    "an empty class": "root ::= []",
    "a class without anything left": r"root ::= [^\x00-\U0010FFFF]",
    "NUL": r'root ::= "\x00"',
    "beyond Unicode": r'root ::= "\U00110000"',
    "a surrogate": r"root ::= [\uD800-\uDFFF]",
    "most before least": 'root ::= "a"{5,2}',
    "too many": 'root ::= "a"{2001}',
    "far too many": 'root ::= "a"{99999999999999999999999}',
    "too many within one another": 'root ::= ("a"{0,50}){0,50}',
    "no number": 'root ::= "a"{,3}',
    "nothing to repeat": "root ::= *",
    "nothing to repeat in parentheses": 'root ::= (+ "a")',
    "an empty literal repeated": 'root ::= ""*',
    "left recursion": 'root ::= root "a" | "b"',
    "left recursion by others": 'root ::= a "x"\na ::= b\nb ::= root',
    "left recursion behind what may be empty": 'root ::= a root "x" | "y"\na ::= b\nb ::= "" | "z"',
    "only itself": "root ::= root",
    "doubling": CHAIN,
    "many ways": 'r0 ::= "a"?\nr1 ::= r0{1000}\nr2 ::= r1{1000}\nroot ::= r2 "b"',
    "no root": 'a ::= "x"',
    "nothing": "",
    "undefined": "root ::= nowhere",
    "a name with an underscore": 'root ::= a_b\na_b ::= "x"',
    "quotes not closed": 'root ::= "a',
    "an escape that is none": r'root ::= "\q"',
    "short hexadecimal": r'root ::= "\u12"',
    "trailing rubbish": 'root ::= "a" )',
    "no ::=": 'root = "a"',
    "no such token": "root ::= <[320]>",
    "a token that is not closed": "root ::= <[3]",
    "NUL in the text": 'root ::= "a"\0',
    "half a surrogate pair": 'root ::= "\ud800"',
    "large": 'root ::= "' + "a" * 300_000 + '"',
}

GRAMMARS = {
    "a literal": 'root ::= "yes" | "no"',
    "list": 'root ::= item+\nitem ::= "- " [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]+ "\\n"',
    "arithmetic": 'root ::= (expr "=" ws term "\\n")+\nexpr ::= term ([-+*/] term)*\nterm ::= num | "(" ws expr ")" ws\n'
    'num ::= [0-9]+ ws\nws ::= [ \\t]*',
    "json": upstream.JSON_GBNF,
    "json array": upstream.JSON_ARR_GBNF,
    "c": upstream.C_GBNF,
    "chess": upstream.CHESS_GBNF,
    "japanese": upstream.JAPANESE_GBNF,
    "counts": 'root ::= "a"{3} "b"{2,} "c"{1,4} "d"{0,20000}',
    "what may be empty, repeated": 'root ::= ("a"? "b"?)* "."',
    "right recursion": 'root ::= "(" root ")" | ""',
    "comments and lines": '# a comment\nroot ::= # begins\n  "x" |\n  (\n    "y"\n    "z" # within\n  )\r\n\n',
    "classes": r'root ::= [a-z] [^a-z\n] [\]\[\\-] [-x] [x-] [é-ü] .',
    "tokens": "root ::= <[5]> !<[7]> [a-z]+",
    "an e-mail": 'root ::= [a-z0-9.-]+ "@" [a-z0-9-]+ ("." [a-z]{2,4}){1,3}',
    "only the end": 'root ::= ""',
}  # fmt: skip

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}
SCHEMAS = {
    "pydantic": {**PERSON, "title": "Person", "additionalProperties": False},
    "a long bound": {"type": "object", "properties": {"title": {"type": "string", "maxLength": 20000}}, "required": ["title"]},
    "many bounds": {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 500} for i in range(30)}},
    "a pattern with a long bound": {"type": "string", "pattern": "^[a-z]{1,20000}$"},
    "$defs": {
        "type": "object",
        "properties": {"people": {"type": "array", "items": {"$ref": "#/$defs/Person"}, "minItems": 1, "maxItems": 3}},
        "required": ["people"],
        "$defs": {"Person": PERSON},
    },
    "a tree": {
        "$ref": "#/$defs/Node",
        "$defs": {
            "Node": {
                "type": "object",
                "properties": {"value": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
                "required": ["value", "next"],
            }
        },
    },
    "a tree of itself": {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}, "required": ["children"]},
    "enum": {"type": "object", "properties": {"unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}}, "required": ["unit"]},
    "nullable": {"type": "object", "properties": {"x": {"type": ["string", "null"]}}, "required": ["x"]},
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
    "oneOf": {"oneOf": [PERSON, {"type": "null"}]},
    "const": {"const": "yes"},
    "a tuple": {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}]},
    "lengths": {"type": "string", "minLength": 2, "maxLength": 4},
    "a pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "a date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "a map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "anything": {"type": "object"},
    "bounds that are floats": {"type": "array", "items": {"type": "boolean"}, "minItems": 1.0, "maxItems": 2.0},
    "no item": {"type": "array", "items": {"type": "string"}, "maxItems": 0},
    "a property called minLength": {"type": "object", "properties": {"minLength": {"type": "integer"}}, "required": ["minLength"]},
}

REFUSED_SCHEMAS = {
    "another document": {"$ref": "https://example.org/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "not there": {"$ref": "#/$defs/nowhere"},
    "in a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "too long": {"type": "string", "minLength": 20000},
    "too many": {"type": "array", "items": {"type": "string"}, "minItems": 3000},
    "less than none": {"type": "string", "maxLength": -1},
    "no number": {"type": "string", "maxLength": "many"},
    "exchanged": {"type": "array", "items": {"type": "string"}, "minItems": 5, "maxItems": 2},
    "no such type": {"type": "text"},
    "no object": [1, 2],
    "large": {"enum": [f"value{i}" for i in range(20_000)]},
    "no type": {"type": [], "properties": {"a": {"type": "integer", "minimum": 10**30}, "é": {"$ref": "#"}}, "required": ["nowhere"]},
    "no choice": {"type": "object", "properties": {"a": {"anyOf": []}}, "required": ["a"]},
    "no value": {"type": "array", "items": {"enum": []}},
    "a pattern that is none": {"type": "string", "pattern": "^(a$"},
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = write_shape(tmp_path_factory.mktemp("grammar") / "tiny.gguf", n_embd=64, n_ff=128, n_vocab=320, n_ctx=1024, vocabulary="llama")
    llm = Llama(path, n_ctx=1024, sparse=SparseConfig(budget=96, predictor="ema"), n_threads=1, verbose=False)
    yield llm
    llm.close()


def said(llm, grammar: LlamaGrammar, max_tokens: int = 400, seed: int = 0) -> tuple[str, str]:
    """Text under a grammar, of a model without a mind: every token that is allowed is as likely, those that end things a little more."""
    rng = random.Random(seed)
    liked = [3 + ord(c) for c in '"}],:0a'] + [llm.token_eos()]

    def like(_ids, scores):
        for token in liked:
            scores[token] += rng.random() * 40
        return scores

    found = llm.create_completion("x", max_tokens=max_tokens, temperature=0, grammar=grammar, logits_processor=LogitsProcessorList([like]))
    return found["choices"][0]["text"], found["choices"][0]["finish_reason"]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(llm, name):
    with pytest.raises(GrammarError) as caught:
        check_grammar(REFUSED[name], n_vocab=llm.n_vocab())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    with pytest.raises(GrammarError):  # what llama-cpp-python's own ways do with it
        llm.create_completion("x", max_tokens=2, grammar=LlamaGrammar.from_string(REFUSED[name]))


@pytest.mark.parametrize("name", GRAMMARS)
def test_grammars_that_work(llm, name):
    text, _ = said(llm, LlamaGrammar.from_string(GRAMMARS[name]), 40)
    assert isinstance(text, str)
    if name == "a literal":
        assert text in ("yes", "no")
    if name == "only the end":
        assert text == ""


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_work(llm, name):
    schema = SCHEMAS[name]
    for seed in range(3):
        text, end = said(llm, LlamaGrammar.from_string(grammar_of_schema(schema)), seed=seed)
        if end == "stop":
            jsonschema.validate(json.loads(text), schema)


def test_strings_hold_no_control_characters(llm):
    """llama-cpp-python's own rule lets them pass, which no parser takes."""
    text = grammar_of_schema({"type": "string", "minLength": 300})
    for seed in range(3):
        answer, _ = said(llm, LlamaGrammar.from_string(text, verbose=False), seed=seed)
        assert min(map(ord, answer)) >= 32


@pytest.mark.parametrize("name", REFUSED_SCHEMAS)
def test_schemas_that_are_refused(llm, name):
    form = {"type": "json_object", "schema": REFUSED_SCHEMAS[name]}
    with pytest.raises(GrammarError) as caught:
        llm.create_chat_completion([{"role": "user", "content": "x"}], response_format=form, max_tokens=2)
    assert "\n" not in str(caught.value)


def test_a_schema_too_deep_to_be_walked(llm):
    schema: dict = {}
    value = schema
    for _ in range(200):
        value["properties"] = {"x": {}}
        value = value["properties"]["x"]
    with pytest.raises(GrammarError, match=r"levels deep|no JSON"):
        grammar_of_schema(schema)
    with pytest.raises(GrammarError, match=r"cannot be read|no JSON"):
        grammar_of_schema('{"a":' * 50_000)


def test_more_than_can_be_counted_is_any_number():
    grammar = grammar_of_schema({"type": "string", "maxLength": 10 * MAX_REPEAT})
    check_grammar(grammar)
    assert "char{0,20000}" in grammar


def test_an_ambiguous_grammar_ends_its_request_only(llm):
    """Each character doubles what may follow: llama.cpp would fill memory."""
    doubling = 'root ::= s "."\ns ::= "a" s b | "a" s c | ""\nb ::= "x" | "y"\nc ::= "x" | "z"'
    check_grammar(doubling)

    def only_a(_ids, scores):
        scores[3 + ord("a")] += 100
        return scores

    with pytest.raises(GenerationError, match="too many ways"):
        llm.create_completion("x", max_tokens=200, temperature=0, grammar=LlamaGrammar.from_string(doubling),
                              logits_processor=LogitsProcessorList([only_a]))  # fmt: skip
    assert said(llm, LlamaGrammar.from_string('root ::= "yes"'))[0] == "yes"


def test_a_grammar_that_no_token_of_the_model_fits(tmp_path, llm):
    """A vocabulary without bytes cannot write everything: sampling picks a token that does not fit, and llama.cpp throws or aborts."""
    with pytest.raises(GenerationError, match="cannot go on"):
        llm.create_completion("x", max_tokens=5, temperature=0, grammar=LlamaGrammar.from_string("root ::= <[1]> !<[1]>"))
        llm.create_completion("x", max_tokens=5, temperature=0, grammar=LlamaGrammar.from_string("root ::= <[2]> <[2]>"))
    assert said(llm, LlamaGrammar.from_string('root ::= "no"'))[0] == "no"


LONG_TOKENS = """
import sys
from kvcast import GenerationError, Llama
from llama_cpp import LlamaGrammar
llm = Llama(sys.argv[1], n_ctx=256, verbose=False)
for grammar in ('root ::= ([a-z]+ | [a-y]+ | "a")+ "."', 'root ::= ("a" | "a")* "b"'):
    try:
        llm.create_completion("x", max_tokens=3, temperature=0, grammar=LlamaGrammar.from_string(grammar))
        print("answered")
    except GenerationError as error:
        print(error)
print(llm.create_completion("x", max_tokens=4, temperature=0, grammar=LlamaGrammar.from_string('root ::= "yes"'))["choices"][0]["text"])
"""


def test_long_tokens_and_an_ambiguous_grammar(tmp_path):
    """Each token of the vocabulary is tried in all the ways in which a grammar can read it, 2^n for n characters that it can read twice."""
    model = write_shape(tmp_path / "long.gguf", n_layer=1, n_embd=64, n_ff=128, n_vocab=320, vocabulary="llama", special=("a" * 100 + "!",))
    done = subprocess.run([sys.executable, "-c", LONG_TOKENS, str(model)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *said, last = done.stdout.splitlines()
    assert len(said) == 2 and all("too many ways" in line for line in said) and last == "yes"
