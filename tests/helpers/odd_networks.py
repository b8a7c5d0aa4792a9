"""Networks that others train, and such as no predictor needs: GOOD and BAD, by name."""

import functools

import numpy as np
from onnx import TensorProto, helper

from networks import AVERAGES, SCORES, SUM, chain, constant, content, convolutions, info, model, node, perceptron
from predictor_onnx.infer import resolve

CONV1, CONV3 = ([constant("w", np.ones((1, 5, n)))] for n in (1, 3))
SUMMED = node("ReduceMean", ["averages"], ["s"], axes=[1], keepdims=0)


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
