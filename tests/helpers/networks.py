"""Networks for the tests, made node by node."""

import itertools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

node, info = helper.make_node, helper.make_tensor_value_info
AVERAGES = info("averages", TensorProto.FLOAT, ["rows", 5, "blocks"])
SCORES = info("scores", TensorProto.FLOAT, ["rows", "blocks"])
SUM = node("ReduceMean", ["averages"], ["scores"], axes=[1], keepdims=0)  # the smallest predictor


def constant(name, value, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(value, dtype), name)


def model(nodes, constants=(), inputs=(AVERAGES,), outputs=(SCORES,), opset=17, ir_version=8):
    graph = helper.make_graph(list(nodes), "g", list(inputs), list(outputs), list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def content(nodes, constants=(), **more):
    return model(nodes, constants, **more).SerializeToString()


def chain(n, op="Relu", **attributes):
    """``n`` nodes, one behind another, and a mean."""
    names = ["averages", *(f"x{i}" for i in range(n))]
    nodes = [node(op, [a], [b], **attributes) for a, b in itertools.pairwise(names)]
    return [*nodes, node("ReduceMean", [names[-1]], ["scores"], axes=[1], keepdims=0)]


def convolutions(n_layers, n_channels, width=3, seed=0):
    """Layers over blocks, each with a bias, then one of a single channel."""
    rng = np.random.default_rng(seed)
    nodes, constants, name, n_in = [], [], "averages", 5
    for i in range(n_layers + 1):
        n_out = n_channels if i < n_layers else 1
        constants += [
            constant(f"w{i}", rng.normal(0, (n_in * width) ** -0.5, (n_out, n_in, width))),
            constant(f"b{i}", np.full(n_out, 0.01)),
        ]
        nodes.append(node("Conv", [name, f"w{i}", f"b{i}"], [f"y{i}"], pads=[width // 2] * 2))
        nodes.append(node("LeakyRelu", [f"y{i}"], [f"x{i}"], alpha=0.1))
        name, n_in = f"x{i}", n_out
    return [*nodes, node("Squeeze", [name, "axis"], ["raw"]), node("Sigmoid", ["raw"], ["scores"])], [
        *constants,
        constant("axis", [1], np.int64),
    ]


def perceptron(n_hidden):
    """The same three matrices for every block."""
    rng = np.random.default_rng(1)
    sizes = (5, n_hidden, n_hidden, 1)
    constants = [constant(f"w{i}", rng.normal(0, a**-0.5, (a, b))) for i, (a, b) in enumerate(itertools.pairwise(sizes))]
    nodes = [node("Transpose", ["averages"], ["x0"], perm=[0, 2, 1])]
    for i in range(3):
        nodes += [node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"]), node("Gelu" if i < 2 else "Sigmoid", [f"y{i}"], [f"x{i + 1}"])]
    return [*nodes, node("Reshape", ["x3", "shape"], ["scores"])], [*constants, constant("shape", [0, -1], np.int64)]


def edited(path, edit):
    """A network's content, with something changed."""
    changed = onnx.load(path)
    edit(changed)
    return changed.SerializeToString()
