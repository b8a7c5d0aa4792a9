"""A predictor inside a GGUF: the tensors stay as they are, stock llama.cpp loads the file, kvcast uses it, a damaged one is left out."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings

import numpy as np
import onnx
import pytest

from commands import command, one_sentence
from kvcast import KvcastError, Llama, ModelError, SparseConfig
from kvcast.bindings.library import CARRIED
from kvcast.gguf import embedded_predictor as embedded
from kvcast.gguf.embedded_predictor import embed, extract
from kvcast.gguf.reader import GgufFile
from logits import REFERENCE, logits_of
from predictor_onnx.infer import PredictorError, resolve

STOCK = """
import sys
import numpy as np
import llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=256, n_threads=2, n_threads_batch=2, flash_attn=True, verbose=False)
llm.eval(llm.tokenize(b"The capital of France is"))
np.save(sys.argv[2], np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), shape=(llm.n_vocab(),)))
with open("/proc/self/maps") as maps:
    print([line.split()[-1] for line in maps if "libllama" in line][0])
"""


@pytest.fixture(scope="module")
def carrier(smollm2, tmp_path_factory):
    """SmolLM2 with the paper's network inside, which is not the default."""
    out = tmp_path_factory.mktemp("embedded") / "carrier.gguf"
    embed(smollm2, resolve("paper"), out)
    return out


def tensor_data(path):
    with GgufFile(path) as gguf, path.open("rb") as file:
        assert gguf.data_offset % gguf.get("general.alignment", 32) == 0
        file.seek(gguf.data_offset)
        return gguf.tensors(), hashlib.file_digest(file, "sha256").digest() if sys.version_info >= (3, 11) else file.read()


def carrying(source, out, network, sha256=None):
    """A file with any bytes in place of a network."""
    with GgufFile(source) as gguf:
        gguf.set_bytes(embedded.ONNX, network)
        gguf.set_str(embedded.CARD, "{}")
        gguf.set_str(embedded.SHA256, sha256 or hashlib.sha256(network).hexdigest())
        with source.open("rb") as before, out.open("wb") as after:
            after.write(gguf.metadata())
            before.seek(gguf.data_offset)
            shutil.copyfileobj(before, after)
    return out


def wrong_inputs():
    value = onnx.helper.make_tensor_value_info
    given, scores = value("x", onnx.TensorProto.FLOAT, ["n"]), value("scores", onnx.TensorProto.FLOAT, ["n"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["scores"])], "g", [given], [scores])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_only_metadata_is_added(smollm2, carrier):
    assert tensor_data(carrier) == tensor_data(smollm2)
    with GgufFile(carrier) as gguf:
        assert gguf.get_bytes("kvcast.predictor.onnx") == resolve("paper").read_bytes()
        assert json.loads(gguf.get("kvcast.predictor.card"))["name"] == "paper"
        assert gguf.get("kvcast.predictor.sha256") == hashlib.sha256(resolve("paper").read_bytes()).hexdigest()
        assert gguf.get("general.architecture") == "llama" and gguf.count("tokenizer.ggml.tokens") == 49152
    assert not list(carrier.parent.glob("*.part"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_stock_llama_cpp_loads_it(smollm2, carrier, tmp_path):
    assert REFERENCE.is_dir(), "build the reference first: make reference"
    found = []
    for path in (smollm2, carrier):
        environment = {**os.environ, "LLAMA_CPP_LIB_PATH": str(REFERENCE), "PYTHONPATH": str(CARRIED.parent)}
        arguments = [sys.executable, "-c", STOCK, str(path), str(tmp_path / "logits.npy")]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == str((REFERENCE / "libllama.so").resolve())
        found.append(np.load(tmp_path / "logits.npy"))
    np.testing.assert_array_equal(*found)


def test_extract_gives_it_back(carrier, tmp_path):
    extract(carrier, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == resolve("paper").read_bytes()
    assert (tmp_path / "back.json").read_text() == resolve("paper").with_suffix(".json").read_text()


def test_another_one_replaces_it(carrier, smollm2, tmp_path):
    again, once = tmp_path / "again.gguf", tmp_path / "once.gguf"
    embed(carrier, resolve("stream"), again)
    embed(smollm2, resolve("stream"), once)
    assert again.read_bytes() == once.read_bytes()
    extract(again, tmp_path / "x.onnx")
    assert (tmp_path / "x.onnx").read_bytes() == resolve("stream").read_bytes()


def test_memory_is_bounded(smollm2, tmp_path):
    tracemalloc.start()
    embed(smollm2, resolve("stream"), tmp_path / "x.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * embedded.CHUNK < smollm2.stat().st_size


def predictor_used(path, predictor="auto"):
    """What a session makes of it, and the warnings."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        llm = Llama(path, n_ctx=256, sparse=SparseConfig(predictor=predictor), n_threads=2, verbose=False)
        kind = type(llm.session.predictor._network).__name__
        llm.eval(llm.tokenize(b"The capital of France is"))
        assert np.isfinite(logits_of(llm)).all()
        llm.close()
    return kind, [str(w.message) for w in seen]


def test_auto_uses_it(carrier):
    assert predictor_used(carrier) == ("PaperPredictor", [])
    assert predictor_used(carrier, "onnx:stream") == ("StreamPredictor", [])


def test_one_that_cannot_be_used_is_left_out_with_a_warning(smollm2, carrier, tmp_path):
    damaged = bytearray(carrier.read_bytes())
    at = damaged.find(resolve("paper").read_bytes())
    damaged[at + 5000] ^= 1
    (tmp_path / "bit.gguf").write_bytes(damaged)
    cases = {
        "its sha256 is another": tmp_path / "bit.gguf",
        "'embedded' cannot be loaded": carrying(smollm2, tmp_path / "not-onnx.gguf", b"this is not a network"),
        "takes ('x',)": carrying(smollm2, tmp_path / "inputs.gguf", wrong_inputs()),
    }
    for reason, path in cases.items():
        kind, said = predictor_used(path)
        assert kind == "StreamPredictor"
        assert len(said) == 1 and reason in said[0] and "'onnx:stream' used instead" in said[0], said
    with pytest.raises(ModelError, match="its sha256 is another"):
        extract(tmp_path / "bit.gguf", tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_refusals_leave_nothing_behind(smollm2, tmp_path, monkeypatch):
    out = tmp_path / "out.gguf"
    (tmp_path / "link.gguf").symlink_to(smollm2)
    for same in (smollm2, tmp_path / "link.gguf"):
        with pytest.raises(KvcastError, match="cannot replace the file that it is made from"):
            embed(smollm2, resolve("stream"), same)
    shutil.copy(resolve("stream"), tmp_path / "bare.onnx")
    with pytest.raises(KvcastError, match=r"has no card.*bare.json"):
        embed(smollm2, tmp_path / "bare.onnx", out)
    (tmp_path / "bare.json").write_text("{")
    with pytest.raises(KvcastError, match="is not JSON"):
        embed(smollm2, tmp_path / "bare.onnx", out)
    (tmp_path / "none.onnx").write_bytes(b"x")
    with pytest.raises(PredictorError):
        embed(smollm2, tmp_path / "none.onnx", out)
    with pytest.raises(KvcastError, match="there is no folder"):
        embed(smollm2, resolve("stream"), tmp_path / "nowhere" / "out.gguf")
    with pytest.raises(ModelError, match="has no embedded predictor"):
        extract(smollm2, tmp_path / "x.onnx")

    with pytest.raises(KvcastError, match=r"ends in .onnx"):
        extract(smollm2, tmp_path / "x.json")

    def fail(done, n_bytes):
        raise OSError("the disk failed")

    with pytest.raises(KvcastError, match="the disk failed"):
        embed(smollm2, resolve("stream"), out, fail)
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 90_000_000))
    with pytest.raises(KvcastError, match=r"needs 0.10 GB, and 0.09 GB are free there"):
        embed(smollm2, resolve("stream"), out)
    assert not out.exists() and not list(tmp_path.glob("*.part"))


def test_commands(smollm2, tmp_path):
    done = command("embed-predictor", smollm2, resolve("stream"), tmp_path / "x.gguf")
    assert done.returncode == 0, done.stderr
    done = command("extract-predictor", tmp_path / "x.gguf", tmp_path / "y.onnx")
    assert done.returncode == 0 and (tmp_path / "y.onnx").read_bytes() == resolve("stream").read_bytes()
    one_sentence(command("embed-predictor", smollm2, tmp_path / "no.onnx", tmp_path / "z.gguf"), "there is no predictor")
