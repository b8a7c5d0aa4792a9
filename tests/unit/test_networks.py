"""Networks from outside: only what a predictor needs is let through, and what runs is bounded in memory and time."""

import functools
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
from onnx import TensorProto, helper

from kvcast import Llama, SparseConfig
from kvcast.gguf import embedded_predictor as embedded
from kvcast.sparse.history import History
from kvcast.sparse.predictors import OnnxPredictor
from networks import AVERAGES, SCORES, SUM, chain, constant, content, convolutions, info, model, node, perceptron
from places import ROOT
from predictor_onnx import infer, network, operators, runtime
from predictor_onnx.infer import PredictorError, open_predictor, resolve, shipped

ort = runtime.onnxruntime()
CONV1, CONV3 = ([constant("w", np.ones((1, 5, n)))] for n in (1, 3))
SUMMED = node("ReduceMean", ["averages"], ["s"], axes=[1], keepdims=0)


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


def three_outputs_of_old_files():
    """Constants that are listed as inputs, too, as files of IR version 3 do; an output that nobody asks for; texts."""
    made = model([*convolutions(1, 4)[0], node("Identity", ["raw"], ["more"])], convolutions(1, 4)[1])
    made.graph.input.extend(
        info(t.name, TensorProto.INT64 if t.name == "axis" else TensorProto.FLOAT, t.dims) for t in made.graph.initializer
    )
    made.graph.output.append(info("more", TensorProto.FLOAT, None))
    made.producer_name, made.doc_string, made.graph.doc_string = "somebody", "a" * 100_000, "\x1b[2J"
    made.metadata_props.add(key="ort_config", value='{"session_options": {"enable_profiling": 1}}')
    made.opset_import.add(domain="com.example", version=1)
    made.graph.node[0].name, made.graph.node[0].doc_string = "\x1b[31m", "x"
    return made.SerializeToString()


def typed_constants():
    """Values in lists of their type, and constants that are nodes."""
    weights = helper.make_tensor("w", TensorProto.FLOAT, [1, 5, 1], [0.2] * 5)
    starts = helper.make_tensor("starts", TensorProto.INT64, [1], [0])
    nodes = [
        node("Constant", [], ["ends"], value_ints=[2**40]),
        node("Constant", [], ["axes"], value=constant("", [2], np.int64)),
        node("Constant", [], ["half"], value_float=0.5),
        node("Conv", ["averages", "w"], ["y"], auto_pad="SAME_UPPER", kernel_shape=[1]),
        node("Slice", ["y", "starts", "ends", "axes"], ["z"]),
        node("Mul", ["z", "half"], ["m"]),
        node("Flatten", ["m"], ["scores"]),
    ]
    return content(nodes, [weights, starts])


def by_gemm():
    nodes = [
        node("Transpose", ["averages"], ["t"], perm=[1, 0, 2]),
        node("Flatten", ["t"], ["flat"]),  # (5, rows * blocks)
        node("Gemm", ["w", "flat", "b"], ["y"], alpha=0.5),
        node("Unsqueeze", ["y", "one"], ["u"]),
        node("MatMul", ["flat5", "u"], ["v"]),
        node("Squeeze", ["v"], ["line"]),
        node("Gather", ["averages", "last"], ["g"], axis=1),
        node("Max", ["g"], ["scores"]),
    ]
    ints = [constant("one", [0], np.int64), constant("last", -1, np.int32)]
    return content(nodes, [constant("w", np.ones((1, 5))), constant("b", [1.0]), constant("flat5", np.ones((1, 1, 1))), *ints])


GOOD = {
    "convolutions": lambda: content(*convolutions(3, 16)),
    "perceptron": lambda: content(*perceptron(32), opset=20),
    "512 nodes": lambda: content(chain(511)),
    "newest opset": lambda: content(*convolutions(1, 4), opset=21, ir_version=10),
    "oldest opset": lambda: content([SUM], opset=13, ir_version=7),
    "old file": three_outputs_of_old_files,
    "typed constants": typed_constants,
    "gemm": by_gemm,
    "no declared shapes": lambda: content([SUM], inputs=[info("averages", TensorProto.FLOAT, None)]),
    "softmax, clip, concat": lambda: content(
        [
            node("Softmax", ["averages"], ["p"], axis=1),
            node("Clip", ["p", "", "high"], ["c"]),
            node("Concat", ["c", "averages"], ["both"], axis=1),
            node("ReduceSum", ["both", "axes"], ["scores"], keepdims=0),
        ],
        [constant("high", 0.5), constant("axes", [1], np.int64)],
    ),
}


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


def with_loop():
    body = helper.make_graph(
        [node("Identity", ["c"], ["d"]), node("Identity", ["v"], ["w"])], "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("v", TensorProto.FLOAT, None)],
        [info("d", TensorProto.BOOL, []), info("w", TensorProto.FLOAT, None)],
    )  # fmt: skip
    return content([node("Loop", ["", "", "averages"], ["x"], body=body), node("ReduceMean", ["x"], ["scores"], axes=[1], keepdims=0)])


def with_if():
    branch = helper.make_graph([node("Identity", ["averages"], ["x"])], "b", [], [info("x", TensorProto.FLOAT, None)])
    return content([node("If", ["averages"], ["y"], then_branch=branch, else_branch=branch), SUM])


def with_scan():
    body = helper.make_graph(
        [node("Identity", ["v"], ["w"])], "b", [info("v", TensorProto.FLOAT, None)], [info("w", TensorProto.FLOAT, None)]
    )
    return content([node("Scan", ["averages"], ["y"], body=body, num_scan_inputs=1), SUM])


def external(location="secret.bin", in_node=False):
    tensor = constant("w", np.zeros(100))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "400")):
        tensor.external_data.add(key=key, value=value)
    if in_node:
        return content([node("Constant", [], ["w"], value=tensor), SUM])
    return content([SUM], [tensor])


def sparse(in_node=False):
    values, places = constant("v", [1.0]), constant("", [0], np.int64)
    tensor = helper.make_sparse_tensor(values, places, [100])
    if in_node:
        return content([node("Constant", [], ["w"], sparse_value=tensor), SUM])
    made = model([SUM])
    made.graph.sparse_initializer.append(tensor)
    return made.SerializeToString()


def with_function():
    made = model([node("Mine", ["averages"], ["scores"])])
    made.functions.append(helper.make_function("", "Mine", ["a"], ["b"], [node("Identity", ["a"], ["b"])], [helper.make_opsetid("", 17)]))
    return made.SerializeToString()


def sized(shape):
    return helper.make_tensor("w", TensorProto.FLOAT, shape, np.zeros(0), raw=False) if 0 in shape else _claims(shape)


def _claims(shape):
    tensor = constant("w", [0.0])
    del tensor.dims[:]
    tensor.dims.extend(shape)
    return tensor


def of_type(kind, name="averages"):
    return content([SUM], inputs=[info(name, kind, ["rows", 5, "blocks"])])


def repeated(times):
    """One list of nodes whose second half says it once more: other readers would merge them."""
    made = model([SUM]).SerializeToString()
    return made * times


def fanned(n):
    """Each value is the one before, twice: n nodes, 2 ** n values."""
    nodes, name = [], "averages"
    for i in range(n):
        nodes += [node("Concat", [name, name], [f"x{i}"], axis=1)]
        name = f"x{i}"
    return content([*nodes, node("ReduceMean", [name], ["scores"], axes=[1], keepdims=0)])


def squared():
    """Every block with every other."""
    nodes = [
        SUMMED,
        node("Unsqueeze", ["s", "one"], ["a"]),
        node("Unsqueeze", ["s", "two"], ["b"]),
        node("Mul", ["a", "b"], ["ab"]),
        node("ReduceMean", ["ab"], ["scores"], axes=[1], keepdims=0),
    ]
    return content(nodes, [constant("one", [1], np.int64), constant("two", [2], np.int64)])


def by_shape(op, *inputs, constants=(), **attributes):
    return content([node(op, ["averages", *inputs], ["x"], **attributes), SUM], constants)


BIG = constant("n", [1, 1, 2**40], np.int64)
BAD = {
    "loop": (with_loop, "Loop", "sub-graph"),
    "if": (with_if, "If", "sub-graph"),
    "scan": (with_scan, "Scan", "sub-graph"),
    "sequences": (lambda: content([node("SequenceConstruct", ["averages"], ["q"]), SUM]), "SequenceConstruct"),
    "functions": (with_function, "functions"),
    "another domain": (lambda: content([node("Gelu", ["averages"], ["x"], domain="com.microsoft"), SUM]), "com.microsoft"),
    "external data": (external, "another file"),
    "external data, absolute": (lambda: external("/etc/passwd"), "another file"),
    "an address": (lambda: external("*/_ORT_MEM_ADDR_/*"), "another file"),
    "external data in a node": (lambda: external(in_node=True), "another file"),
    "sparse": (sparse, "sparse"),
    "sparse in a node": (lambda: sparse(in_node=True), "sparse"),
    "texts": (lambda: content([SUM], [helper.make_tensor("t", TensorProto.STRING, [1], [b"x"])]), "texts"),
    "doubles": (lambda: content([SUM], [constant("w", [1.0], np.float64)]), "type 11"),
    "halves": (lambda: content([SUM], [constant("w", [1.0], np.float16)]), "type 10"),
    "four bits": (lambda: content([SUM], [helper.make_tensor("w", TensorProto.INT4, [2], [1, 2])]), "type 22"),
    "quantised": (lambda: content([node("DynamicQuantizeLinear", ["averages"], ["a", "b", "c"]), SUM]), "3 outputs"),
    "integers in": (lambda: of_type(TensorProto.INT64), "32-bit floats"),
    "doubles in": (lambda: of_type(TensorProto.DOUBLE), "32-bit floats"),
    "a sequence in": (
        lambda: content([SUM], inputs=[helper.make_tensor_sequence_value_info("averages", TensorProto.FLOAT, None)]),
        "sequence",
    ),
    "expand": (lambda: by_shape("Expand", "n", constants=[BIG]), "Expand"),
    "tile": (lambda: by_shape("Tile", "n", constants=[BIG]), "Tile"),
    "pad": (lambda: by_shape("Pad", "n", constants=[constant("n", [0, 0, 0, 0, 0, 2**40], np.int64)]), "Pad"),
    "resize": (lambda: by_shape("Resize", "", "s", constants=[constant("s", [1, 1, 1e9])]), "Resize"),
    "constant of shape": (lambda: content([node("ConstantOfShape", ["n"], ["x"]), SUM], [BIG]), "ConstantOfShape"),
    "range": (lambda: content([node("Range", ["a", "b", "a"], ["x"]), SUM], [constant("a", 1.0), constant("b", 1e12)]), "Range"),
    "random": (lambda: content([node("RandomNormal", [], ["x"], shape=[1 << 40]), SUM]), "RandomNormal"),
    "reshape to much": (lambda: by_shape("Reshape", "n", constants=[BIG]), "Reshape"),
    "reshape by data": (lambda: by_shape("Reshape", "averages"), "no constant integers"),
    "made for a size": (lambda: content([node("Reshape", ["averages", "n"], ["x"]), SUM], [constant("n", [5, 33], np.int64)]), "one size"),
    "conv pads": (lambda: by_shape("Conv", "w", constants=CONV1, pads=[2**40, 0]), "pads"),
    "conv dilations": (lambda: by_shape("Conv", "w", constants=CONV3, dilations=[2**40], pads=[1, 1]), "dilations"),
    "conv groups": (lambda: by_shape("Conv", "w", constants=CONV1, group=2**40), "groups"),
    "conv group 0": (lambda: by_shape("Conv", "w", constants=CONV1, group=0), "groups"),
    "conv stride 0": (lambda: by_shape("Conv", "w", constants=CONV1, strides=[0]), "strides"),
    "conv channels": (lambda: by_shape("Conv", "w", constants=[constant("w", np.ones((1 << 18, 5, 1)))]), "operations|values"),
    "a giant": (lambda: content(*convolutions(16, 200)), "operations"),
    "a giant matrix": (lambda: content(*perceptron(1100), opset=20), "operations"),
    "doubled and doubled": (lambda: fanned(30), "values"),
    "doubled 200 times": (lambda: fanned(200), "values"),
    "squared": (squared, "values"),
    "of its weights alone": (
        lambda: content([node("MatMul", ["w", "w"], ["x"]), SUM], [constant("w", np.ones((1000, 1000)))]),
        "constants alone",
    ),
    "100,000 nodes": (functools.cache(lambda: content(chain(100_000))), "100,001 nodes"),
    "200,000 inputs": (lambda: content([node("Max", ["averages"] * 200_000, ["x"]), SUM]), "more parts"),
    "a circle": (lambda: content([node("Add", ["averages", "y"], ["x"]), node("Relu", ["x"], ["y"]), SUM]), "circle"),
    "itself": (lambda: content([node("Add", ["averages", "x"], ["x"]), SUM]), "circle"),
    "one name twice": (lambda: content([node("Relu", ["averages"], ["x"]), node("Exp", ["averages"], ["x"]), SUM]), "name 'x'"),
    "an input's name": (lambda: content([node("Relu", ["averages"], ["averages"]), SUM]), "name 'averages'"),
    "constants of one name": (lambda: content([SUM], [constant("w", [1.0]), constant("w", [2.0])]), "name 'w'"),
    "two inputs of one name": (lambda: content([SUM], inputs=[AVERAGES, AVERAGES]), "name 'averages'"),
    "two outputs of one name": (lambda: content([SUM], outputs=[SCORES, SCORES]), "name 'scores'"),
    "no output": (lambda: content([SUM], outputs=[]), "takes"),
    "an output that nobody makes": (lambda: content([SUM], outputs=[info("x", TensorProto.FLOAT, None)]), "no node makes"),
    "the input as output": (lambda: content([SUM], outputs=[SCORES, AVERAGES]), "no node makes"),
    "no nodes": (lambda: content([]), "no node makes"),
    "nothing in it": (lambda: content([SUM], [sized([0])]), "shape"),
    "a negative size": (lambda: content([SUM], [sized([-1])]), "shape"),
    "a size of 2**62": (lambda: content([SUM], [sized([2**62])]), "shape"),
    "a product of 2**64": (lambda: content([SUM], [sized([2**22, 2**22, 2**20])]), "shape"),
    "more than it says": (lambda: content([SUM], [sized([2])]), "4 bytes|1 values"),
    "ten dimensions": (lambda: content([SUM], [constant("w", np.ones([1] * 10))]), "shape"),
    "nan": (lambda: content([SUM], [constant("w", [np.nan])]), "not numbers"),
    "inf": (lambda: content([SUM], [constant("w", [np.inf])]), "not numbers"),
    "inf in an attribute": (lambda: by_shape("LeakyRelu", alpha=float("inf")), "not a number"),
    "integers divided by 0": (
        lambda: content([node("Div", ["a", "b"], ["x"]), SUM], [constant("a", 1, np.int64), constant("b", 0, np.int64)]),
        "integers",
    ),
    "a place that is not there": (lambda: by_shape("Gather", "i", constants=[constant("i", 5, np.int64)], axis=1), "places"),
    "a negative place": (lambda: by_shape("Gather", "i", constants=[constant("i", -6, np.int64)], axis=1), "places"),
    "a block's place": (lambda: by_shape("Gather", "i", constants=[constant("i", 3, np.int64)], axis=2), "places"),
    "an axis that is not there": (lambda: by_shape("Softmax", axis=7), "axis 7"),
    "backwards": (lambda: by_shape("Slice", "a", "b", "c", "d", constants=[constant(x, [-1], np.int64) for x in "abcd"]), "backwards"),
    "an attribute of no use": (lambda: by_shape("Relu", consumed_inputs=[1]), "consumed_inputs"),
    "an attribute of another type": (lambda: by_shape("Softmax", axis=1.5), "axis"),
    "opset 12": (lambda: content([SUM], opset=12), "opset is 12"),
    "opset 99": (lambda: content([SUM], opset=99), "opset is 99"),
    "opset -1": (lambda: content([SUM], opset=-1), "opset is -1"),
    "IR version 3": (lambda: content([SUM], ir_version=3), "IR version is 3"),
    "IR version 2**62": (lambda: content([SUM], ir_version=2**62), "IR version"),
    "twice in one": (lambda: repeated(2), "two values"),
    "17 MB": (lambda: content([SUM], [constant("w", np.ones(17 << 18))]), "bytes"),
    "more weights than a file of lists has": (
        lambda: content([SUM], [helper.make_tensor("w", 1, [300_000], [0.5] * 300_000)]),
        "more parts",
    ),
    "escapes": (lambda: content([node("Relu", ["\x1b[2J\u202e"], ["x"]), SUM]), "circle"),
    "a long name": (lambda: content([node("Relu", ["x" * 100_000], ["x"]), SUM]), "characters"),
    "ORT's own format": (lambda: b"\x00\x00\x00\x00ORTM" + bytes(200), "file"),
    "nothing": (lambda: b"", "no graph"),
    "groups": (lambda: b"\x3b" * 100_000, "unknown type"),
    "endless number": (lambda: b"\x08" + b"\xff" * 100, "64 bits"),
    "cut": (lambda: resolve("paper").read_bytes()[:-7], "cut short"),
    "a length beyond the end": (lambda: b"\x3a\xff\xff\xff\xff\x0f", "cut short"),
    "two million empty fields": (lambda: b"\x12\x00" * 2_000_000, "more parts"),
}  # fmt: skip


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


@pytest.mark.parametrize("version", ["1.20.1", "1.23.1", "0.9", "nonsense"])
def test_an_old_onnx_runtime_is_refused(version, monkeypatch, smollm2):
    monkeypatch.setattr(ort, "__version__", version)
    with pytest.raises(PredictorError, match=rf"{version} has known holes; pip install --upgrade"):
        open_predictor(resolve("stream"))
    with pytest.warns(UserWarning, match="the predictor is 'ema': ONNX Runtime .* has known holes"):
        llm = Llama(smollm2, n_ctx=256, sparse=SparseConfig(), n_threads=2, verbose=False)
    llm.close()


def test_versions():
    assert runtime.version_of("1.32.0") == runtime.version_of("1.32.0+cuda") == (1, 32, 0)
    assert runtime.version_of("1.28.0.dev20260701") == (1, 28, 0) and runtime.version_of("2") == (2,)


# ---- in a model


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
