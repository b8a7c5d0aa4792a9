"""Networks from outside: only what a predictor needs is let through, and what runs is bounded in memory and time."""

import os
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from kvcast.gguf import embedded_predictor as embedded
from kvcast.sparse.history import History
from kvcast.sparse.predictors import OnnxPredictor
from networks import constant, content, convolutions, info, node
from odd_networks import BAD, GOOD, SUMMED
from places import ROOT
from predictor_onnx import infer, network, operators, runtime
from predictor_onnx.infer import PredictorError, open_predictor, resolve, shipped

ort = runtime.onnxruntime()


def refused(data, *words, within_s=30.0):
    """In one sentence, soon, and without ONNX Runtime."""
    begin = time.monotonic()
    with pytest.raises(PredictorError) as caught:
        open_predictor(data)
    said = str(caught.value)
    assert "\n" not in said and said.isprintable() and said.isascii() and len(said) < 400, said
    assert time.monotonic() - begin < within_s
    for word in words:
        assert word in said, said
    return said


@pytest.fixture(autouse=True)
def sessions(monkeypatch):
    """The networks that ONNX Runtime was given."""
    opened = []
    real = runtime.open_session
    monkeypatch.setattr(infer, "open_session", lambda written, *more: opened.append(written) or real(written, *more))
    return opened


# ---- what is let through


@pytest.mark.parametrize("name", shipped())
def test_what_is_written_anew_computes_the_same(name):
    path = resolve(name)
    read, kind, _ = infer.examine(path.read_bytes(), name)
    again = read.written({x: len(d) for x, d in zip(kind.inputs, kind.declared)}, dict(zip(kind.outputs, (2, 3))))
    onnx.checker.check_model(onnx.ModelProto.FromString(again), full_check=True)
    rng = np.random.default_rng(0)
    shapes = list(kind.shapes(3, 70))[-1][0]
    given = {x: np.asarray(rng.random(shape) + 0.01, np.float32) for x, shape in shapes.items()}
    ours, theirs = (ort.InferenceSession(data, providers=["CPUExecutionProvider"]) for data in (again, path.read_bytes()))
    for a, b in zip(ours.run(list(kind.outputs), given), theirs.run(list(kind.outputs), given)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", GOOD)
def test_what_others_train_runs(name, sessions):
    data = GOOD[name]()
    predictor = open_predictor(data)
    assert len(sessions) == 1 and not any(x in sessions[0] for x in (b"[2J", b"[31m", b"ort_config", b"somebody"))
    given = np.random.default_rng(0).random((3, 5, 40)).astype(np.float32)
    try:
        theirs = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(["scores"], {"averages": given})[0]
    except Exception as error:  # noqa: BLE001 - this ONNX Runtime is older than the opset
        pytest.skip(str(error))
    np.testing.assert_array_equal(predictor.run(given), np.clip(theirs, 0, None))


# ---- what is not


@pytest.mark.parametrize("name", BAD)
def test_what_no_predictor_needs_is_refused(name, sessions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret.bin").write_bytes(bytes(400))
    make, *words = BAD[name]
    said = refused(make())
    assert not sessions
    for word in words:
        assert any(x in said for x in word.split("|")), said


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.onnx")
    for path in (tmp_path, tmp_path / "fifo.onnx", tmp_path / "none.onnx"):
        with pytest.raises(PredictorError, match="there is no predictor"):
            open_predictor(path)
    with pytest.raises(PredictorError, match="there is no predictor"):
        open_predictor(infer.Path("/dev/zero"))


# ---- bounds of what runs


def test_large_predictions_are_made_in_pieces(monkeypatch):
    averages = np.random.default_rng(0).random((6, 5, 300)).astype(np.float32)
    predictor = open_predictor(resolve("stream"))
    assert predictor._reach == 2
    line = averages.transpose(1, 0, 2).reshape(1, 5, -1)
    expected, long = predictor.run(averages), predictor.run(line)
    calls, session = [], predictor._session

    def run(names, given, *more):
        calls.append(given["averages"].size // 5)
        return session.run(names, given, *more)

    predictor._session = SimpleNamespace(run=run)
    for n_cells in (64, 700):
        monkeypatch.setattr(runtime.Bounds, "n_cells", n_cells)
        np.testing.assert_array_equal(predictor.run(averages), expected)
        np.testing.assert_allclose(predictor.run(line), long, rtol=1e-6)
    assert len(calls) > 30 and max(calls) <= 700


def test_bound_buffers_as_on_a_gpu_yield_the_same(monkeypatch):
    averages = np.random.default_rng(0).random((6, 5, 300)).astype(np.float32)
    predictor = open_predictor(resolve("stream").read_bytes())
    expected = predictor.run(averages)
    monkeypatch.setattr(runtime, "WATCHED", 0)  # with options, too
    monkeypatch.setattr(predictor, "on_gpu", True)
    np.testing.assert_array_equal(predictor.run(averages), expected)


def test_paper_in_pieces_is_the_same(monkeypatch):
    rows = np.random.default_rng(0).random((90, 7, 64)).astype(np.float32)
    whole, cut = open_predictor(resolve("paper")), open_predictor(resolve("paper"))
    for end in (64, 65, 70, 89):
        expected = whole.run(rows[:end], end)
        with monkeypatch.context() as patched:
            patched.setattr(runtime.Bounds, "n_cells", 130)
            np.testing.assert_allclose(cut.run(rows[:end], end), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("bound", ["ROW_VALUES", "ROW_OPERATIONS"])
def test_a_row_that_takes_too_much_is_not_begun(bound, monkeypatch):
    predictor = open_predictor(content(*convolutions(1, 1000, 1)))
    monkeypatch.setattr(runtime, bound, 1 << 20)
    monkeypatch.setattr(runtime, "CALL_VALUES", 1 << 18)
    with pytest.raises(PredictorError, match="too large for a context of 2,000 blocks"):
        predictor._reach = None
        predictor.run(np.zeros((2, 5, 2000), np.float32))


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (4, 1), (3, 200)])
@pytest.mark.parametrize("name", GOOD)
def test_what_a_call_costs_is_known_before(name, shape):
    """The values that ONNX Runtime's own shapes say, at any size, are no more than the bound for a block times rows and blocks."""
    data = GOOD[name]()
    _, _, cost = infer.examine(data, name)
    made = onnx.ModelProto.FromString(data)
    del made.graph.output[:]
    made.graph.output.extend(info(n.output[0], TensorProto.FLOAT, None) for n in made.graph.node if n.op_type != "Constant")
    try:
        session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
        found = session.run(None, {"averages": np.full((shape[0], 5, shape[1]), 0.1, np.float32)})
    except Exception as error:  # noqa: BLE001 - this ONNX Runtime is older than the opset
        pytest.skip(str(error))
    assert sum(x.size for x in found) <= cost.n_values * shape[0] * shape[1] + 100


def history_of(n_rows, n_blocks, value=None):
    known = History(n_rows, 1, n_blocks)
    scores = (
        np.random.default_rng(0).random((n_rows, 4, 1, n_blocks)).astype(np.float32)
        if value is None
        else np.full((n_rows, 4, 1, n_blocks), value, np.float32)
    )
    known.observe_all(scores, 0, 4, n_blocks)
    return known


def gives_up(learned, known, n_blocks, *words):
    """One warning; then, and from then on, what the average says."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        first = learned.predict(known, n_blocks)[:, :n_blocks].copy()
        again = learned.predict(known, n_blocks)[:, :n_blocks]
    np.testing.assert_array_equal(first, known.averages[:, 3, :n_blocks])
    np.testing.assert_array_equal(first, again)
    assert len(seen) == 1 and "'ema' is used" in str(seen[0].message), [str(w.message) for w in seen]
    for word in words:
        assert word in str(seen[0].message)


def test_a_network_that_takes_too_long_is_left_for_the_average(monkeypatch):
    learned = OnnxPredictor(content(*convolutions(12, 150)), 1, cuda=False)
    learned._network._reach = None
    known = history_of(64, 2000)
    monkeypatch.setattr(
        learned._network, "_bounds", runtime.Bounds(learned._network._bounds.n_values, learned._network._bounds.n_operations, 0.3)
    )
    begin = time.monotonic()
    gives_up(learned, known, 2000, "takes longer than 0.3 s")
    assert time.monotonic() - begin < 60


def test_those_that_come_with_kvcast_have_the_time_that_they_need():
    assert open_predictor(resolve("stream"))._bounds.seconds is None
    assert open_predictor(resolve("stream").read_bytes())._bounds.seconds == runtime.PREDICTION_S


INTERRUPTED = """
import sys, threading, time, _thread
import numpy as np
from predictor_onnx.infer import open_predictor
sys.path.insert(0, {tests!r})
from odd_networks import BAD, CONV1, CONV3, GOOD, SUMMED
from networks import content, convolutions
predictor = open_predictor(content(*convolutions(12, 150)))
predictor._reach = None
predictor._bounds = type(predictor._bounds)(predictor._bounds.n_values, predictor._bounds.n_operations, None)
print("ready", flush=True)
predictor.run(np.zeros((2048, 5, 2000), np.float32))
print("finished", flush=True)
"""


def test_an_interrupt_ends_a_prediction():
    """The whole would take minutes; a single call about a second."""
    code = INTERRUPTED.format(tests=str(ROOT / "tests" / "helpers"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        out, errors = child.communicate(timeout=60)
    assert child.returncode != 0 and "finished" not in out and "KeyboardInterrupt" in errors, errors


def test_values_that_are_not_numbers_are_left_for_the_average():
    nodes = [node("Gather", ["averages", "last"], ["s"], axis=1), node("Sub", ["limit", "s"], ["d"]), node("Sqrt", ["d"], ["scores"])]
    learned = OnnxPredictor(content(nodes, [constant("limit", 0.6), constant("last", 0, np.int64)]), 1, cuda=False)
    known = history_of(2, 50, 0.1)
    np.testing.assert_allclose(learned.predict(known, 50), 0.5**0.5, rtol=1e-6)
    known.observe_all(np.full((2, 1, 1, 50), 0.9, np.float32), 0, 1, 50)
    gives_up(learned, known, 50, "not numbers")


def test_one_that_fails_later_is_left_for_the_average(monkeypatch):
    learned = OnnxPredictor("stream", 1, cuda=False)

    def fail(*_):
        raise runtime.unusable()[0]("injected")

    monkeypatch.setattr(learned._network, "_session", SimpleNamespace(run=fail))
    gives_up(learned, history_of(2, 50), 50, "injected")


def test_scores_are_shares_whatever_a_network_yields():
    huge = OnnxPredictor(content([SUMMED, node("Mul", ["s", "k"], ["scores"])], [constant("k", 3e38)]), 1, cuda=False)
    negative = OnnxPredictor(content([SUMMED, node("Neg", ["s"], ["scores"])]), 1, cuda=False)
    known = history_of(2, 50)
    assert 0 < huge.predict(known, 50).max() <= 1 << 20
    assert (negative.predict(known, 50)[:, :50] == 0).all()


# ---- ONNX Runtime itself


def test_versions():
    assert runtime.version_of("1.32.0") == runtime.version_of("1.32.0+cuda") == (1, 32, 0)
    assert runtime.version_of("1.28.0.dev20260701") == (1, 28, 0) and runtime.version_of("2") == (2,)


def test_a_network_of_a_gigabyte_is_not_read(monkeypatch):
    gguf = SimpleNamespace(count=lambda key: 1 << 30, get=lambda key, default: default)  # no get_bytes
    found = embedded.embedded_in(gguf)
    with pytest.raises(embedded.ModelError, match="1,073,741,824 bytes"):
        found.checked()
    assert "bytes" in found.about()["why_not_used"]


def test_the_bounds_have_room_for_what_ships():
    for name in shipped():
        read, _, cost = infer.examine(resolve(name).read_bytes(), name)
        assert cost.n_values < operators.VALUES_PER_BLOCK / 2 and cost.n_operations < operators.OPERATIONS_PER_BLOCK / 2
        assert len(read.nodes) < network.NODES_MAX / 8


def test_every_kind_of_operator_is_documented():
    text = (infer.HERE.parent / "docs" / "gguf.md").read_text()
    missing = [op for op in operators.OPERATORS if op not in text]
    assert not missing
