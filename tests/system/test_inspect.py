"""``kvcast inspect``: what it says is what the file holds."""

import json

from commands import command, one_sentence
from kvcast.gguf.embedded_predictor import embed
from kvcast.planning.inspect_gguf import inspect
from predictor_onnx.infer import resolve
from shapes import write_shape
from tiny import UNTESTED, write_tiny


def test_smollm2(smollm2, tmp_path):
    done = command("inspect", "smollm2", "--json", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    assert "Q4_1" in done.stdout and "49,152" in done.stdout
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["architecture"] == "llama" and found["quantisation"] == "Q4_1" and found["context"] == 8192
    shape = {k: found["shape"][k] for k in ("layers", "heads", "kv_heads", "head_dim_k", "embedding", "vocabulary")}
    assert shape == {"layers": 30, "heads": 9, "kv_heads": 3, "head_dim_k": 64, "embedding": 576, "vocabulary": 49152}
    assert found["kv_bytes_per_token"] == {
        "f16": 4 * 30 * 3 * 64,
        "bf16": 4 * 30 * 3 * 64,
        "q8_0": 2 * 30 * 6 * 34,
        "q4_0": 2 * 30 * 6 * 18,
    }
    assert found["chat_template"] is True and found["sliding_window"] is None and found["rope"]["scaling"] is None
    assert found["sparse"] is True and found["why_dense"] is None and found["embedded_predictor"] is None
    assert sum(found["tensor_bytes"].values()) <= found["file_bytes"] and next(iter(found["tensor_bytes"])) == "q4_1"


def test_an_embedded_predictor(smollm2, tmp_path):
    embed(smollm2, resolve("stream"), tmp_path / "x.gguf")
    found = inspect(tmp_path / "x.gguf")["embedded_predictor"]
    assert found["name"] == "stream" and found["intact"] and found["parameters"] == 657
    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "y.gguf").write_bytes(data.replace(resolve("stream").read_bytes(), bytes(resolve("stream").stat().st_size)))
    assert inspect(tmp_path / "y.gguf")["embedded_predictor"]["intact"] is False


def test_what_is_not_served_sparse(tmp_path):
    gemma = dict(attention__sliding_window=512, attention__key_length=64, attention__value_length=64)
    found = inspect(write_shape(tmp_path / "gemma.gguf", "gemma3", n_layer=2, **gemma))
    assert found["sparse"] is False and "sliding-window" in found["why_dense"] and found["sliding_window"] == 512
    found = inspect(write_shape(tmp_path / "gemma.gguf", "gemma3", n_layer=12, **gemma))
    assert found["sparse"] is True and (found["shape"]["layers"], found["shape"]["sliding_window_layers"]) == (12, 10)
    found = inspect(write_tiny(tmp_path / "untested.gguf", UNTESTED))
    assert found["sparse"] is False and "untested" in found["why_dense"]
    unknown = write_shape(tmp_path / "unknown.gguf", "teapot")
    assert "cannot load" in inspect(unknown)["why_dense"]


def test_wrong_input(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    one_sentence(command("inspect", tmp_path / "x.gguf"), "cannot be read")
