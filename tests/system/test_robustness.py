"""Odd input, a little of what `make fuzz` and `make soak` do at length; and what they found."""

import json
import struct
import subprocess
import sys

import pytest

from commands import command, one_sentence
from kvcast import Llama, ModelError
from kvcast.chat.documents import DocumentCache
from kvcast.gguf.reader import GgufFile
from kvcast.llama import session_file
from kvcast.planning.inspect_gguf import inspect
from places import ROOT
from predictor_onnx.infer import resolve
from shapes import write_shape

SCRIPTS = ROOT / "scripts"


def run(script, *arguments):
    return subprocess.run([sys.executable, SCRIPTS / script, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("surface", "n_cases"), [("gguf", 300), ("predictor", 300), ("session", 40), ("server", 500), ("grammar", 200)])
def test_odd_input(surface, n_cases, tmp_path):
    done = run("fuzz.py", "--surface", surface, "--cases", n_cases, "--out", tmp_path)
    assert done.returncode == 0 and f"{n_cases} cases" in done.stdout, done.stdout + done.stderr


def test_sessions_at_random():
    done = run("soak.py", "--only", "sessions", "--scale", 0.01)
    assert done.returncode == 0 and "1,000 steps" in done.stdout, done.stdout + done.stderr


def test_a_crash_is_one_finding_and_the_next_case_goes_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from fuzzing.harness import fuzz

    class Fragile:
        def __init__(self, folder):
            self.folder = folder

        def make(self, rng):
            return bytes([rng.randrange(4)])

        def run(self, data):
            if data == b"\0":
                import ctypes

                ctypes.string_at(0)
            if data == b"\1":
                raise KeyError("odd")
            return "fine"

    report = fuzz(Fragile, "fragile", range(40), 1, tmp_path)
    assert sum(report.outcomes.values()) + sum(report.findings.values()) == 40
    assert {f.split()[0] for f in report.findings} == {"SIGSEGV:", "KeyError"}
    kept = {p.read_bytes() for p in tmp_path.iterdir()}
    assert kept == {b"\0", b"\1"}


def tiny(path, old=b"", new=b"", **shape):
    """A tiny model, with some bytes of its header replaced by as many others."""
    data = write_shape(path, vocabulary="llama", n_vocab=320, **shape).read_bytes()
    assert len(old) == len(new) and old in data
    path.write_bytes(data.replace(old, new, 1))
    return path


@pytest.mark.parametrize("n_layer", [0, 513])
def test_a_number_of_layers_that_llama_cpp_would_not_survive(n_layer, tmp_path):
    right = (2).to_bytes(4, "little")
    key = b"llama.block_count" + (4).to_bytes(4, "little")
    path = tiny(tmp_path / "x.gguf", key + right, key + n_layer.to_bytes(4, "little"))
    one_sentence(command("inspect", path), f"claims {n_layer} layers")


def test_a_number_of_layers_is_looked_at_before_there_is_a_list_of_them(tmp_path):
    path = write_shape(tmp_path / "x.gguf", "gemma3", attention__sliding_window=32)
    key = b"gemma3.block_count" + (4).to_bytes(4, "little")
    at = path.read_bytes().index(key) + len(key)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * 4)
    with pytest.raises(ModelError, match="claims 4294967295 layers"):
        inspect(path)


@pytest.mark.parametrize(
    ("key", "number", "words"),
    [
        ("attention__head_count_kv", 2 + (1 << 28), "268435458 KV heads for 4 heads"),
        ("attention__head_count", 1 << 29, "2 KV heads for 536870912 heads"),
        ("attention__key_length", 1 << 31, "heads of 2147483648 channels"),
        ("attention__value_length_swa", 16 + (1 << 31), "heads of 2147483664 channels"),
    ],
)
def test_numbers_whose_products_overflow(key, number, words, tmp_path):
    path = write_shape(tmp_path / "x.gguf", **{key: number})
    with pytest.raises(ModelError, match=words):
        inspect(path)


def test_a_negative_epsilon(tmp_path):
    path = tiny(tmp_path / "x.gguf", struct.pack("<f", 1e-5), struct.pack("<f", -1e-5))
    with pytest.raises(ModelError, match="layer_norm_rms_epsilon"):
        inspect(path)


def test_a_sliding_window_without_end(tmp_path):
    with pytest.raises(ModelError, match="sliding window of 2147483648 tokens"):
        inspect(write_shape(tmp_path / "x.gguf", "gemma3", attention__sliding_window=1 << 31))


@pytest.mark.parametrize("scaling", ["", "linaer", "YARN", "\x1b[2J"])
def test_a_rope_scaling_that_llama_cpp_would_not_survive(scaling, tmp_path):
    path = write_shape(tmp_path / "x.gguf")
    with GgufFile(path) as gguf:
        gguf.set_str("llama.rope.scaling.type", scaling)
        path.write_bytes(gguf.metadata() + path.read_bytes()[gguf.data_offset :])
    one_sentence(command("inspect", path), "its RoPE scaling is", "linear")


def test_the_same_token_twice(tmp_path):
    path = tiny(tmp_path / "x.gguf", b"word1", b"word0")
    with pytest.raises(ModelError, match="the same token twice"):
        Llama(path, verbose=False)


@pytest.mark.parametrize(("old", "new"), [(b"endfor", b"endfox"), (b"</s>", b"</\xff>")])
def test_texts_that_cannot_be_read(old, new, tmp_path):
    path = tiny(tmp_path / "x.gguf", old, new)
    with pytest.raises(ModelError, match="chat template"):
        Llama(path, n_ctx=64, verbose=False)


def test_names_that_are_no_text(tmp_path):
    assert inspect(tiny(tmp_path / "x.gguf", b"output_norm", b"\xff\xfetput_norm"))["sparse"] is False


@pytest.mark.parametrize("wrong", [{"title": None}, {"n_tokens": []}, {"model": 3}], ids=str)
def test_a_description_of_a_document_with_other_types(wrong, tmp_path, monkeypatch):
    meta = {"title": "x", "model": "x", "n_tokens": 1}
    good, odd = "0" * 32, "1" * 32
    described = {good: meta, odd: {**meta, **wrong}}
    for name in described:
        (tmp_path / f"{name}.kv").touch()
    monkeypatch.setattr(session_file, "read_meta", lambda path: {**described[path.stem], "about": described[path.stem]})
    assert [e.key for e in DocumentCache(tmp_path).entries()] == [good]
    assert (tmp_path / f"{odd}.kv").exists()  # a list removes nothing


def test_a_damaged_card(tmp_path):
    network = tmp_path / "x.onnx"
    network.write_bytes(resolve("stream").read_bytes())
    card = json.loads(resolve("stream").with_suffix(".json").read_text())
    for wrong in ([], {}, {**card, "name": None}, {**card, "middle_recovery_24_blocks_held_out": [1]}):
        network.with_suffix(".json").write_text(json.dumps(wrong))
        one_sentence(command("predictor", "card", network), "is damaged")
