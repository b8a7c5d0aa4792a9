"""Learned predictors: the shipped network against a naive twin, and what can be wrong with a file."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from kvcast import Llama, SparseConfig
from kvcast.sparse.history import History
from predictor_onnx.features import DECAYS
from predictor_onnx.infer import HERE, PredictorError, open_predictor, resolve, shipped
from predictor_onnx.runtime import onnxruntime


def naive_stream(path, averages):
    weights = {t.name: numpy_helper.to_array(t).astype(np.float64) for t in onnx.load(path).graph.initializer}
    logs = np.log(averages.astype(np.float64) + 1e-6)

    def conv(x, i, relu):
        w, b = weights[f"conv{i}.weight"], weights[f"conv{i}.bias"]
        pad = w.shape[2] // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad)))
        n = x.shape[2] - 2 * pad
        y = b[None, :, None] + sum(np.einsum("oi,rin->ron", w[:, :, k], x[:, :, k : k + n]) for k in range(w.shape[2]))
        return np.maximum(y, 0) if relu else y

    x = conv(conv(logs * 0.1 + 0.5, 0, True), 1, True)
    return np.exp(logs[:, 3] + np.clip(conv(x, 2, False)[:, 0], -4, 4))


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (90, 480)])
def test_stream_against_numpy(shape):
    rng = np.random.default_rng(0)
    averages = (rng.random((shape[0], len(DECAYS), shape[1])) ** 5).astype(np.float32)
    path = resolve("stream")
    np.testing.assert_allclose(open_predictor(path).run(averages), naive_stream(path, averages), rtol=2e-4)


@pytest.mark.parametrize("observe", ["observe_listed", "observe_later"])
def test_what_is_predicted_anew_equals_a_prediction_of_everything(observe):
    """Over steps that see a few blocks each, with edits and growth; but for the first blocks, where a whole row is padded."""
    rng = np.random.default_rng(0)
    n_rows, n_total = 6, 1300
    known, predictor = History(n_rows, 1, n_total), open_predictor(resolve("stream"))
    assert predictor._reach == 2
    known.observe_all((rng.random((n_rows, 4, 1, n_total)) ** 5).astype(np.float32), 0, 4, 1000)
    n_anew, last = [], np.empty(0)
    run = predictor.run
    predictor.run = lambda averages: n_anew.append(averages.shape[2]) or run(averages)
    for step in range(30):
        n_used = 1000 + step
        blocks = np.stack([np.sort(rng.permutation(n_used)[:12]) for _ in range(n_rows)]).astype(np.int32)
        blocks[:, -1] = n_used - 1
        scores = (rng.random((n_rows, 12)) ** 5).astype(np.float32)
        if step % 4:
            blocks[::2] = last[::2]  # the same lists for some steps
        last = blocks
        getattr(known, observe)(blocks, np.full(n_rows, 12, np.int32), scores, np.ones(n_rows, np.float32))
        if step == 20:
            known.truncate(900 * 16)
        rows = slice(0, n_rows) if step % 3 else slice(2, 5)
        if step == 23:
            known.observe_rows(3, scores[:1, None].repeat(n_used // 12 + 1, 2)[:, :, :n_used], n_used)
        got = predictor.predict(known, n_used, rows)
        whole = run(np.ascontiguousarray(known.averages[rows, :, :n_used]))
        np.testing.assert_allclose(got[:, 2:-2], whole[:, 2:-2], rtol=2e-4)
    assert n_anew[0] >= 3 * 1000 and n_anew[2] < 6 * 300


def test_without_cuda_the_network_runs_on_the_cpu_and_says_so():
    if "CUDAExecutionProvider" in onnxruntime().get_available_providers():
        pytest.skip("ONNX Runtime has its CUDA provider here")
    with pytest.warns(UserWarning, match="runs on the CPU"):
        assert not open_predictor(resolve("stream"), cuda=True).on_gpu


def test_a_name_of_a_dimension_that_is_no_text(tmp_path):
    content = resolve("stream").read_bytes()
    assert content.count(b"blocks") > 1
    path = tmp_path / "x.onnx"
    path.write_bytes(content.replace(b"blocks", b"bl\xffcks"))
    with pytest.raises(PredictorError, match="cannot be loaded"):
        open_predictor(path)


def test_every_shipped_predictor_has_a_card():
    assert "stream" in shipped()
    for name in shipped():
        card = json.loads((HERE / f"{name}.json").read_text())
        assert card["middle_recovery_24_blocks_held_out"] and card["ms_per_prediction"] and card["trained_on"]


def edited(tmp_path, edit):
    model = onnx.load(resolve("stream"))
    edit(model)
    path = tmp_path / "edited.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def nan_weights(model):
    tensor = next(t for t in model.graph.initializer if t.name == "conv1.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0, 0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def wrong_opset(model):
    model.opset_import[0].version = 999


def wrong_name(model):
    model.graph.input[0].name = "history"
    model.graph.node[0].input[0] = "history"


def wrong_rank(model):
    shape = model.graph.input[0].type.tensor_type.shape
    del shape.dim[1:]


def wrong_shape(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 7


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (nan_weights, "not numbers"),
        (wrong_opset, "cannot be loaded"),
        (wrong_name, "history"),
        (wrong_shape, "wants 7 averages"),
        (wrong_rank, "1 dimensions|cannot be loaded"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, edit, word):
    with pytest.raises(PredictorError, match=word) as caught:
        open_predictor(edited(tmp_path, edit))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not onnx at all"])
def test_not_onnx(tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(PredictorError):
        open_predictor(tmp_path / "x.onnx")


def test_the_model_runs_with_ema_after_a_bad_predictor(smollm2, tmp_path, code):
    with pytest.raises(PredictorError, match=r"nowhere\.onnx"):
        Llama(smollm2, n_ctx=512, sparse=SparseConfig(predictor="onnx:nowhere.onnx"), verbose=False)
    llm = Llama(smollm2, n_ctx=1024, sparse=SparseConfig(budget=256, predictor="onnx:stream"), n_threads=2, verbose=False)
    tokens = llm.tokenize(code.encode())[:830]
    llm.eval(tokens[:800])
    for token in tokens[800:815]:
        llm.eval([token])
    with pytest.raises(PredictorError):
        llm.session.configure(SparseConfig(budget=256, predictor=f"onnx:{edited(tmp_path, nan_weights)}"))
    assert llm.session.config.predictor == "onnx:stream"
    llm.session.configure(SparseConfig(budget=256))
    for token in tokens[815:830]:
        llm.eval([token])
    assert llm.n_tokens == 830
    llm.close()
