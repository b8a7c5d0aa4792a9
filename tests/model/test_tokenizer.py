"""Any text, of any length, becomes tokens: the same as llama.cpp's own where that gets through, with every rule for words."""

import json
import os
import subprocess
import sys

import pytest

from kvcast.bindings.library import CARRIED
from places import DATA, ROOT
from shapes import write_shape

REFERENCE = ROOT / "build" / "reference" / "kvcast" / "lib"
SHAPE = {"n_layer": 1, "n_embd": 64, "n_ff": 128, "n_vocab": 600}
PRE = (
    "default llama3 minicpm5 deepseek-llm deepseek-coder deepseek-v3 spark2_5 youtu falcon starcoder gpt-2 jais-2 gemma4 sarvam-moe "
    "whitespace qwen2 qwen35 poro-chat viking tekken chameleon gpt-4o granite-embed-multi-97m tiny_aya superbpe bailingmoe seed-coder "
    "kimi-k2 ufakzeka grok-2 afmoe laguna exaone-moe"
).split()
RAW = ("gemma4", "sarvam-moe", "whitespace")  # their words are not written in GPT-2's letters
UNITS = [
    "-",
    " ",
    "a",
    "A",
    "1",
    "é",
    "中",
    "\n",
    "\u0301",
    "\u3000",
    "€",
    "\t",
    "a ",
    "-a",
    "aB",
    "a1",
    "\u0915\u093f",
    " \n",
    "'s",
    "🙂",
    "\0",
    "<",
]
# stdin: JSON, file of a model and texts; out come lists of ids
TOKENIZE = """
import json, sys
{imports}
for path, texts in json.load(sys.stdin).items():
    print(path, file=sys.stderr)
    llm = Llama(path, n_ctx=64, verbose=False{options})
    print(json.dumps([llm.tokenize(text.encode("utf-8", "surrogatepass"), add_bos=False, special=True) for text in texts]), flush=True)
"""
OURS = TOKENIZE.format(imports="from kvcast import Llama", options="")
STOCK = TOKENIZE.format(imports="from llama_cpp import Llama", options=", vocab_only=True")


def tokens(script, texts, **environment):
    """Of texts by model, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps({str(path): of_model for path, of_model in texts.items()}),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-500:]}"
    return dict(zip(texts, map(json.loads, done.stdout.splitlines())))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model for each rule for words."""
    folder = tmp_path_factory.mktemp("models")
    special = ("<|x|>", "<|x|>y")
    return {pre: write_shape(folder / f"{pre}.gguf", vocabulary="gpt2", pre=pre, special=special, **SHAPE) for pre in PRE}


def test_long_runs_of_one_kind(models):
    texts = [unit * (40000 // len(unit)) for unit in UNITS]
    found = tokens(OURS, {path: [*texts, "".join(texts)] for path in models.values()})
    for pre, path in models.items():
        if pre not in RAW:  # which have no tokens for most bytes of these files
            assert all(len(ids) >= 20000 for ids in found[path]), pre


def test_the_same_tokens_as_unpatched(models):
    assert REFERENCE.is_dir(), "build the reference first: make reference"
    texts = [(DATA / name).read_text()[:20000] for name in ("code.txt", "log.txt")]
    # each kind in runs of each length after each other, and special tokens between; few texts, as std::regex is slow to set up
    texts += ["".join(unit * n + other for unit in UNITS for n in (1, 2, 3, 4, 5, 7, 30)) for other in UNITS]
    texts += ["".join(a + b + c for a in UNITS for b in UNITS) for c in ("a", " ", "1", ".\n")]
    texts += ["".join(unit + c for unit in UNITS for c in ("<|x|>y", "<|x|> y", "<|x|>", "<|x"))]
    single = [" ".join(text.split()) for text in texts]  # unpatched, two spaces or line ends in a row end the process in RAW
    asked = {path: single if pre in RAW else texts for pre, path in models.items()}
    ours, stock = tokens(OURS, asked), tokens(STOCK, asked, LLAMA_CPP_LIB_PATH=str(REFERENCE), PYTHONPATH=str(CARRIED.parent))
    for pre, path in models.items():
        for text, a, b in zip(asked[path], ours[path], stock[path]):
            assert a == b, f"{pre}: {text!r}"
