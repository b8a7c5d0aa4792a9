"""Write a trained network as ONNX, operator by operator, and check it against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from kvcast import files

from .infer import OUTPUT, PaperPredictor, StreamPredictor, open_predictor
from .model import BASE, EPSILON, N_AVERAGES, Paper, Stream

OPSET = 17
node, info = helper.make_node, helper.make_tensor_value_info


def export(model: Stream | Paper, path: Path) -> float:
    """Write ``path``; returns the largest relative difference to torch on random input.

    Raises
    ------
    ValueError
        The file and torch disagree by more than 1e-3.
    """
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    nodes, inputs, outputs, constants = stream_graph() if isinstance(model, Stream) else paper_graph()
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in {**weights, **constants}.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, type(model).__name__.lower(), inputs, outputs, initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=8,
    )
    onnx.checker.check_model(proto)
    files.write(path, proto.SerializeToString())
    worst = (check_stream if isinstance(model, Stream) else check_paper)(model, path)
    if worst > 1e-3:
        raise ValueError(f"{path} differs from torch by {worst:.1e}")
    return worst


def stream_graph():
    constants = {
        "epsilon": np.float32(EPSILON),
        "scale": np.float32(0.1),
        "shift": np.float32(0.5),
        "low": np.float32(-4),
        "high": np.float32(4),
        "base": np.array(BASE, np.int64),
        "axis": np.array([1], np.int64),
    }
    nodes = [
        node("Add", ["averages", "epsilon"], ["positive"]),
        node("Log", ["positive"], ["logs"]),
        node("Mul", ["logs", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["x0"]),
        node("Conv", ["x0", "conv0.weight", "conv0.bias"], ["y0"], pads=[1, 1]),
        node("Relu", ["y0"], ["x1"]),
        node("Conv", ["x1", "conv1.weight", "conv1.bias"], ["y1"], pads=[1, 1]),
        node("Relu", ["y1"], ["x2"]),
        node("Conv", ["x2", "conv2.weight", "conv2.bias"], ["y2"]),
        node("Squeeze", ["y2", "axis"], ["raw"]),
        node("Clip", ["raw", "low", "high"], ["correction"]),
        node("Gather", ["logs", "base"], ["log_base"], axis=1),
        node("Add", ["log_base", "correction"], ["log_scores"]),
        node("Exp", ["log_scores"], [OUTPUT]),
    ]
    inputs = [info("averages", TensorProto.FLOAT, ["rows", N_AVERAGES, "blocks"])]
    return nodes, inputs, [info(OUTPUT, TensorProto.FLOAT, ["rows", "blocks"])], constants


def paper_graph():
    """The mean over time as a running sum: see ``infer.PaperPredictor``."""
    constants = {
        "scale": np.float32(Paper.SCALE),
        "axis1": np.array([1], np.int64),
        "axis2": np.array([2], np.int64),
        "zero": np.array([0], np.int64),
        "two": np.array([2], np.int64),
        "minus_two": np.array([-2], np.int64),
        "end": np.array([1 << 30], np.int64),
    }
    nodes = []
    for name in ("newest", "leaving", "oldest"):
        nodes += [
            node("Unsqueeze", [name, "axis1"], [f"{name}.image"]),
            node("Mul", [f"{name}.image", "scale"], [f"{name}.x0"]),
            node("Conv", [f"{name}.x0", "conv0.weight", "conv0.bias"], [f"{name}.y0"], pads=[1, 1, 1, 1]),
            node("Relu", [f"{name}.y0"], [f"{name}.x1"]),
            node("Conv", [f"{name}.x1", "conv1.weight", "conv1.bias"], [f"{name}.y1"], pads=[1, 1, 1, 1]),
            node("Relu", [f"{name}.y1"], [f"{name}.features"]),
        ]
    for target, source, begin, end in (
        ("entering_sum", "newest", "two", "minus_two"),
        ("last_sum", "newest", "minus_two", "end"),
        ("leaving_sum", "leaving", "two", "minus_two"),
        ("first_sum", "oldest", "zero", "two"),
    ):
        nodes += [
            node("Slice", [f"{source}.features", begin, end, "axis2"], [f"{target}.rows"]),
            node("ReduceSum", [f"{target}.rows", "axis2"], [target], keepdims=0),
        ]
    nodes += [
        node("Add", ["inner", "entering_sum"], ["grown"]),
        node("Sub", ["grown", "leaving_sum"], ["new_inner"]),
        node("Add", ["new_inner", "last_sum"], ["with_last"]),
        node("Add", ["with_last", "first_sum"], ["all"]),
        node("Div", ["all", "n_steps"], ["mean"]),
        node("Conv", ["mean", "conv2.weight", "conv2.bias"], ["y2"]),
        node("Div", ["y2", "scale"], ["unscaled"]),
        node("Squeeze", ["unscaled", "axis1"], [OUTPUT]),
    ]
    inputs = [info(name, TensorProto.FLOAT, ["rows", f"n_{name}", "blocks"]) for name in ("newest", "leaving", "oldest")]
    inputs += [info("inner", TensorProto.FLOAT, ["rows", 32, "blocks"]), info("n_steps", TensorProto.FLOAT, [])]
    outputs = [info(OUTPUT, TensorProto.FLOAT, ["rows", "blocks"]), info("new_inner", TensorProto.FLOAT, ["rows", 32, "blocks"])]
    return nodes, inputs, outputs, constants


def check_stream(model: Stream, path: Path) -> float:
    rng = np.random.default_rng(0)
    predictor = open_predictor(path)
    assert isinstance(predictor, StreamPredictor)
    worst = 0.0
    for rows, blocks in ((1, 1), (3, 7), (90, 480)):
        x = (rng.random((rows, N_AVERAGES, blocks)) ** 4).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        worst = max(worst, float(np.abs(predictor.run(x) / expected - 1).max()))
    return worst


def check_paper(model: Paper, path: Path) -> float:
    """A window that moves, step by step and by leaps, against the whole network at each place."""
    rng = np.random.default_rng(0)
    predictor = open_predictor(path)
    assert isinstance(predictor, PaperPredictor)
    rows = (rng.random((200, 3, 40)) ** 6).astype(np.float32)
    worst, end = 0.0, 64
    for step in (0, 1, 1, 16, 5, 24, 30, 1, 8):
        end += step
        with torch.no_grad():
            expected = model(torch.from_numpy(rows[end - 64 : end].transpose(1, 0, 2).copy())).numpy()
        got = predictor.run(rows[:end], end)
        worst = max(worst, float(np.abs(got - expected).max() / np.abs(expected).max()))
    return worst
