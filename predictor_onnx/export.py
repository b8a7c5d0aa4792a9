"""Write a trained ``Stream`` as ONNX, operator by operator, and check it against torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from .infer import INPUT, OUTPUT, OnnxPredictor
from .model import BASE, EPSILON, N_AVERAGES, Stream

OPSET = 17


def export(model: Stream, path: Path) -> float:
    """Write ``path``; returns the largest relative difference to torch on random input.

    Raises
    ------
    ValueError
        The file and torch disagree by more than 1e-4.
    """
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    constants = {
        **weights,
        "epsilon": np.float32(EPSILON),
        "scale": np.float32(0.1),
        "shift": np.float32(0.5),
        "low": np.float32(-4),
        "high": np.float32(4),
        "base": np.array(BASE, np.int64),
        "axis": np.array([1], np.int64),
    }

    def conv(i: int, pads: int, source: str, target: str) -> onnx.NodeProto:
        return helper.make_node("Conv", [source, f"conv{i}.weight", f"conv{i}.bias"], [target], pads=[pads, pads])

    nodes = [
        helper.make_node("Add", [INPUT, "epsilon"], ["positive"]),
        helper.make_node("Log", ["positive"], ["logs"]),
        helper.make_node("Mul", ["logs", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "shift"], ["x0"]),
        conv(0, 1, "x0", "y0"),
        helper.make_node("Relu", ["y0"], ["x1"]),
        conv(1, 1, "x1", "y1"),
        helper.make_node("Relu", ["y1"], ["x2"]),
        conv(2, 0, "x2", "y2"),
        helper.make_node("Squeeze", ["y2", "axis"], ["raw"]),
        helper.make_node("Clip", ["raw", "low", "high"], ["correction"]),
        helper.make_node("Gather", ["logs", "base"], ["log_base"], axis=1),
        helper.make_node("Add", ["log_base", "correction"], ["log_scores"]),
        helper.make_node("Exp", ["log_scores"], [OUTPUT]),
    ]
    graph = helper.make_graph(
        nodes,
        "stream",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["rows", N_AVERAGES, "blocks"])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["rows", "blocks"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())

    rng = np.random.default_rng(0)
    worst = 0.0
    predictor = OnnxPredictor(path, N_AVERAGES)
    for shape in ((1, N_AVERAGES, 1), (3, N_AVERAGES, 70), (90, N_AVERAGES, 512)):
        x = (rng.random(shape) ** 6).astype(np.float32)
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        worst = max(worst, float((np.abs(predictor.predict(x) - expected) / expected).max()))
    if worst > 1e-4:
        raise ValueError(f"{path} differs from torch by {worst:.1e}")
    return worst
