"""Predictors that a model's file brings, and those that cannot run here: the model runs without."""

import warnings

import pytest

from kvcast import Llama, SparseConfig
from kvcast.gguf import embedded_predictor as embedded
from networks import content, convolutions
from odd_networks import BAD
from predictor_onnx import infer, runtime
from predictor_onnx.infer import PredictorError, open_predictor, resolve
from tiny import SHAPES, write_tiny

ort = runtime.onnxruntime()


@pytest.fixture(autouse=True)
def sessions(monkeypatch):
    """The networks that ONNX Runtime was given."""
    opened = []
    real = runtime.open_session
    monkeypatch.setattr(infer, "open_session", lambda written, *more: opened.append(written) or real(written, *more))
    return opened


@pytest.mark.parametrize("version", ["1.20.1", "1.23.1", "0.9", "nonsense"])
def test_an_old_onnx_runtime_is_refused(version, monkeypatch, tmp_path):
    monkeypatch.setattr(ort, "__version__", version)
    with pytest.raises(PredictorError, match=rf"{version} has known holes; pip install --upgrade"):
        open_predictor(resolve("stream"))
    with pytest.warns(UserWarning, match="the predictor is 'ema': ONNX Runtime .* has known holes"):
        llm = Llama(write_tiny(tmp_path / "x.gguf", SHAPES["llama"]), n_ctx=256, sparse=SparseConfig(), n_threads=2, verbose=False)
    llm.close()


@pytest.fixture(scope="module")
def carriers(tmp_path_factory):
    """Makes tiny models with anything in the place of a network."""
    import hashlib
    import json

    from kvcast.gguf.reader import GgufFile
    from tiny import SHAPES, write_tiny

    folder = tmp_path_factory.mktemp("carriers")
    plain = write_tiny(folder / "plain.gguf", SHAPES["llama"])

    def make(data, card=None):
        out = folder / f"{hashlib.sha256(data + str(card).encode()).hexdigest()[:8]}.gguf"
        with GgufFile(plain) as gguf:
            gguf.set_bytes(embedded.ONNX, data)
            gguf.set_str(embedded.CARD, json.dumps({"name": "theirs", "architecture": "conv"}) if card is None else card)
            gguf.set_str(embedded.SHA256, hashlib.sha256(data).hexdigest())
            with plain.open("rb") as before:
                before.seek(gguf.data_offset)
                out.write_bytes(gguf.metadata() + before.read())
        return out

    return make


def loaded(path, **config):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        llm = Llama(path, n_ctx=256, sparse=SparseConfig(**config), n_threads=2, verbose=False)
    said = [str(w.message) for w in seen]
    return llm, said


@pytest.mark.parametrize("name", ["loop", "external data", "doubled 200 times", "100,000 nodes", "constant of shape", "cut", "functions"])
def test_a_model_runs_without_the_predictor_that_it_brings(name, carriers, sessions):
    llm, said = loaded(carriers(BAD[name][0]()))
    assert len(said) == 1 and "the model's own predictor is left out and 'onnx:stream' used instead" in said[0]
    assert len(sessions) == 1 and llm.session.predictor._network._bounds.seconds is None
    llm.eval(list(range(1, 100)))
    llm.eval([5])
    llm.close()


def test_a_predictor_that_is_not_wanted_is_never_loaded(carriers, monkeypatch):
    path = carriers(content(*convolutions(1, 4)))

    def never(self):
        raise AssertionError("looked at")

    monkeypatch.setattr(embedded.Embedded, "checked", never)
    for predictor in ("onnx:stream", "ema", "window"):
        llm, said = loaded(path, predictor=predictor)
        assert not said
        llm.close()


def test_a_predictor_that_a_model_brings_is_said(carriers):
    from kvcast.gguf.support import sparse_if_tested
    from kvcast.planning.inspect_gguf import inspect

    path, bad = carriers(content(*convolutions(1, 4))), carriers(BAD["loop"][0]())
    found = inspect(path)["embedded_predictor"]
    n = 4 * 5 * 3 + 4 + 4 * 3 + 1
    assert found["name"] == "theirs" and found["parameters"] == n and found["intact"] and found["why_not_used"] is None
    found = inspect(bad)["embedded_predictor"]
    assert found["intact"] and "Loop" in found["why_not_used"] and found["parameters"] is None
    for config, n_said in ((SparseConfig(), 1), (SparseConfig(predictor="onnx:stream"), 0), (None, 0)):
        said = []
        assert sparse_if_tested(path, config, said.append) == config
        assert len(said) == n_said
        for text in said:
            assert path.name in text and "'theirs'" in text and f"{n} parameters" in text and "onnx:stream" in text
    said = []
    sparse_if_tested(bad, SparseConfig(), said.append)
    assert said == []


CARDS = {
    "escapes": '{"name": "\\u001b[2J"}',
    "turned round": '{"name": "a\\u202eb"}',
    "a long name": '{"name": "' + "x" * 1000 + '"}',
    "deep": "[" * 200_000,
    "a long number": '{"name": "x", "parameters": ' + "9" * 10_000 + "}",
    "a number for a name": '{"name": 5}',
    "a list": "[1]",
    "a name for a number": '{"name": "x", "parameters": "many"}',
    "a huge one": '{"name": "x", "note": "' + "x" * (1 << 19) + '"}',
    "nothing": "",
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_from_outside(name, carriers, tmp_path):
    from kvcast.planning.inspect_gguf import inspect

    found = inspect(carriers(content(*convolutions(1, 4)), CARDS[name]))["embedded_predictor"]
    assert found["name"] is None and found["parameters"] and found["why_not_used"] is None
    (tmp_path / "x.onnx").write_bytes(content(*convolutions(1, 4)))
    (tmp_path / "x.json").write_text(CARDS[name])
    from kvcast.cli.predictor import card

    with pytest.raises(ValueError, match="is damaged") as caught:
        card(str(tmp_path / "x.onnx"))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400
