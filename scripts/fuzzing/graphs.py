"""Networks grown node by node: most of what a predictor may be, some of what it may not, and some that lie about themselves."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

node, info = helper.make_node, helper.make_tensor_value_info
Dim = int | str  # "rows", "blocks" or a number
UNARY = ("Abs", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "Identity", "LeakyRelu", "Log", "Neg", "Reciprocal", "Relu", "Sigmoid",
         "Softplus", "Softsign", "Sqrt", "Tanh", "Cast", "Clip", "Softmax")  # fmt: skip
BINARY = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub")
REDUCE = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")
FORBIDDEN = (
    "ConstantOfShape", "DequantizeLinear", "Einsum", "Expand", "GatherElements", "GridSample", "GRU", "If", "Loop", "LSTM", "NonZero",
    "OneHot", "Pad", "QuantizeLinear", "RandomNormal", "RandomNormalLike", "Range", "Resize", "Scan", "ScatterND",
    "SequenceConstruct", "SequenceMap", "Shape", "Size", "Split", "StringNormalizer", "Tile", "TopK", "Unique", "Upsample", "Where",
    "ImageDecoder", "BatchNormalization", "LayerNormalization", "MaxPool", "AveragePool", "ConvTranspose", "CumSum", "Round", "Not",
    "Made",
)  # fmt: skip
NUMBERS = (-(2**63), -(2**31), -7, -2, -1, 0, 1, 2, 3, 5, 7, 33, 255, 4096, 2**16, 2**31, 2**32, 2**40, 2**62, 2**63 - 1)


class Growth:
    """One network in the making."""

    def __init__(self, rng: random.Random, opset: int):
        self.rng = rng
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.dims: dict[str, list[Dim]] = {"averages": ["rows", 5, "blocks"]}
        self.seed = np.random.default_rng(rng.getrandbits(32))

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def weights(self, *shape: int) -> str:
        return self.constant(self.seed.normal(0, 0.3, shape))

    def add(self, op: str, inputs: list[str], dims: list[Dim], **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(node(op, inputs, [name], **attributes))
        self.dims[name] = dims
        return name

    def ints(self, *values: int) -> str:
        odd = self.rng.random() < 0.02
        return self.constant([self.rng.choice(NUMBERS) if odd else x for x in values], np.int64)

    def some(self) -> str:
        return self.rng.choice([*self.dims][-6:])

    def grow(self) -> None:
        rng, name = self.rng, self.some()
        dims = self.dims[name]
        rank = len(dims)
        kind = rng.randrange(14)
        sized = [i for i, n in enumerate(dims) if isinstance(n, int) and n > 0]
        if kind <= 2:
            self.unary(name, dims)
        elif kind <= 4:
            others = [x for x, d in self.dims.items() if d == dims]
            wide = self.weights(*(n if isinstance(n, int) and rng.random() < 0.7 else 1 for n in dims))
            other = rng.choice([*others, self.constant(rng.choice((0.5, -1.0, 1e-6, 3e38))), wide, self.some()])
            self.add(rng.choice(BINARY), rng.sample([name, other], 2), dims)
        elif kind <= 6 and rank in (3, 4) and isinstance(dims[1], int):
            self.convolve(name, dims)
        elif kind == 7 and sized and dims[-1] == dims[sized[-1]] and sized[-1] == rank - 1:
            n_out = rng.choice((1, 3, 8, 64))
            self.add("MatMul", [name, self.weights(int(dims[-1]), n_out)], [*dims[:-1], n_out])
        elif kind == 8 and rank > 1:
            order = rng.sample(range(rank), rank)
            self.add("Transpose", [name], [dims[i] for i in order], perm=order)
        elif kind == 9 and sized:
            axis = rng.choice(sized)
            self.reduce(rng.choice(REDUCE), name, axis)
        elif kind == 10 and sized:
            axis = rng.choice(sized)
            of = int(dims[axis])
            if rng.random() < 0.5:
                begin = rng.randrange(of)
                some = [self.ints(x) for x in (begin, rng.randint(begin + 1, of), axis)]
                self.add("Slice", [name, *some], [*dims[:axis], "?", *dims[axis + 1 :]])
            else:
                indices = [rng.randrange(-of, of) for _ in range(rng.randint(1, 4))]
                self.add("Gather", [name, self.ints(*indices)], [*dims[:axis], len(indices), *dims[axis + 1 :]], axis=axis)
        elif kind == 11 and sized:
            axis = rng.choice(sized)
            self.add("Concat", [name] * 2, [*dims[:axis], 2 * int(dims[axis]), *dims[axis + 1 :]], axis=axis)
        elif kind == 12:
            axis = rng.randint(0, rank)
            wider = self.add("Unsqueeze", [name, self.ints(axis)], [*dims[:axis], 1, *dims[axis:]])
            if rng.random() < 0.5:
                self.add("Squeeze", [wider, self.ints(axis)], dims)
        else:
            self.reshape(name, dims)

    def reshape(self, name: str, dims: list[Dim]) -> None:
        how = self.rng.choice(([0, -1], [0, 0, -1], [-1], [0, -1, 1], [-1, 5], None, None, None))
        if how is None:  # what is there, with something of one more
            self.add("Reshape", [name, self.ints(*[0] * len(dims), 1)], [*dims, 1])
        else:
            self.add("Reshape", [name, self.ints(*how)], ["?"] * len(how))

    def reduce(self, op: str, name: str, axis: int) -> str:
        dims = [n for i, n in enumerate(self.dims[name]) if i != axis]
        if op == "ReduceSum" or self.opset >= 18:
            return self.add(op, [name, self.ints(axis)], dims, keepdims=0)
        return self.add(op, [name], dims, axes=[axis], keepdims=0)

    def unary(self, name: str, dims: list[Dim]) -> None:
        op = self.rng.choice(UNARY)
        if op == "Gelu" and self.opset < 20 and self.rng.random() < 0.9:
            op = "Tanh"
        if op == "Clip":
            self.add(op, [name, self.constant(0.0), self.constant(1.0)], dims)
        elif op == "Cast":
            self.add(op, [name], dims, to=TensorProto.FLOAT)
        elif op == "Softmax":
            self.add(op, [name], dims, axis=self.rng.randint(-len(dims), len(dims) - 1) if dims else 0)
        else:
            self.add(op, [name], dims)

    def convolve(self, name: str, dims: list[Dim]) -> None:
        rng = self.rng
        n_in, n_spatial = int(dims[1]), len(dims) - 2
        if n_in > 512 or n_in < 1:
            return
        group = rng.choice((1, 1, 1, n_in))
        n_out = rng.choice((1, 2, 8, 16, 64, 500)) * (group if group > 1 else 1)
        kernel = [rng.choice((1, 3, 5)) for _ in range(n_spatial)]
        dilation = rng.choice((1, 1, 2))
        more: dict[str, Any] = {"group": group} if group > 1 else {}
        if rng.random() < 0.2:
            more["auto_pad"] = rng.choice(("SAME_UPPER", "SAME_LOWER", "VALID"))
        else:
            more |= {"pads": [dilation * (k // 2) for k in kernel] * 2, "dilations": [dilation] * n_spatial}
        if rng.random() < 0.05:
            key = rng.choice(("pads", "dilations", "strides", "kernel_shape", "group"))
            more[key] = rng.choice(NUMBERS) if key == "group" else [rng.choice(NUMBERS) for _ in range(n_spatial * (1 + (key == "pads")))]
        weights = [name, self.weights(n_out, n_in // group, *kernel)]
        self.add("Conv", [*weights, self.weights(n_out)] if rng.random() < 0.5 else weights, [dims[0], n_out, *dims[2:]], **more)

    def end(self) -> None:
        """Scores of the last value that can be made into some."""
        for name in reversed(self.dims):
            dims = self.dims[name]
            if sorted(map(str, dims)) == ["blocks", "rows"]:
                name = name if dims == ["rows", "blocks"] else self.add("Transpose", [name], ["rows", "blocks"], perm=[1, 0])
                break
            if len(dims) == 3 and isinstance(dims[1], int) and [dims[0], dims[2]] == ["rows", "blocks"]:
                name = self.reduce("ReduceSum", name, 1)
                break
        self.nodes.append(node("Identity", [name], ["scores"]))


def grown(rng: random.Random) -> bytes:
    """A network as a file."""
    opset = rng.choice((13, 17, 17, 18, 20, 21))
    growth = Growth(rng, opset)
    for _ in range(rng.choice((1, 2, 4, 8, 16, 40))):
        growth.grow()
    growth.end()
    inputs, outputs = [info("averages", TensorProto.FLOAT, ["rows", 5, "blocks"])], [info("scores", TensorProto.FLOAT, ["rows", "blocks"])]
    graph = helper.make_graph(growth.nodes, "g", inputs, outputs, growth.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        damage(rng, model)
    return model.SerializeToString()


def damage(rng: random.Random, model: onnx.ModelProto) -> None:
    """Make it one that is none, or claims to be another."""
    graph: Any = model.graph
    if not graph.node:
        return
    one = rng.choice(graph.node)
    kind = rng.randrange(18)
    if kind == 0:
        one.op_type = rng.choice(FORBIDDEN)
    elif kind == 1:
        one.op_type = rng.choice((*UNARY, *BINARY, *REDUCE, "Conv", "Gemm", "MatMul", "Gather", "Reshape", "Slice", "Flatten", "Constant"))
    elif kind == 2:
        branch = helper.make_graph([node("Identity", ["averages"], ["x"])], "b", [], [info("x", TensorProto.FLOAT, None)])
        one.attribute.append(helper.make_attribute(rng.choice(("body", "then_branch", "x")), branch))
        one.op_type = rng.choice((one.op_type, "Loop", "If", "Scan"))
    elif kind == 3 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        tensor.data_location = TensorProto.EXTERNAL
        place = rng.choice(("secret", "/etc/passwd", "../x", "*/_ORT_MEM_ADDR_/*", "/dev/zero", ""))
        for key, value in (("location", place), ("offset", str(rng.choice(NUMBERS))), ("length", str(rng.choice(NUMBERS)))):
            tensor.external_data.add(key=key, value=value)
    elif kind == 4:
        one.input.append(rng.choice(graph.node).output[0])  # perhaps one behind it
    elif kind == 5:
        one.output[0] = rng.choice(graph.node).output[0]
    elif kind == 6 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
        tensor.dims.extend(rng.choice(NUMBERS) for _ in range(rng.randrange(3)))
    elif kind == 7 and graph.initializer:
        rng.choice(graph.initializer).data_type = rng.randrange(24)
    elif kind == 8 and one.attribute:
        attribute = rng.choice(one.attribute)
        attribute.i, attribute.f = rng.choice(NUMBERS), rng.choice((0.0, float("nan"), float("inf"), 1e38))
        attribute.ints.extend(rng.choice(NUMBERS) for _ in range(rng.choice((0, 1, 9))))
    elif kind == 9:
        model.opset_import[0].version = rng.choice((*NUMBERS, 6, 12, 13, 18, 22, 28))
    elif kind == 10:
        model.ir_version = rng.choice((*NUMBERS, 3, 4, 10, 13, 14))
    elif kind == 11:
        del graph.node[rng.randrange(len(graph.node))]
    elif kind == 12:
        one.domain = rng.choice(("ai.onnx", "ai.onnx.ml", "com.microsoft", "\x1b[31m"))
    elif kind == 13:
        dim = rng.choice([*graph.input, *graph.output]).type.tensor_type.shape.dim.add()
        dim.dim_value = rng.choice(NUMBERS)
    elif kind == 14:  # doubled again and again
        name = one.output[0]
        for i in range(rng.choice((5, 40, 300, 600))):
            graph.node.append(node(rng.choice(("Concat", "Concat", "Add")), [name, name], [f"d{i}"], axis=rng.choice((0, 1, 2))))
            if graph.node[-1].op_type == "Add":
                del graph.node[-1].attribute[:]
            name = f"d{i}"
    elif kind == 15 and graph.initializer:
        tensor = rng.choice(graph.initializer)
        values = np.frombuffer(tensor.raw_data, np.uint8).copy()
        if tensor.data_type == TensorProto.FLOAT and len(values) >= 4:
            at = 4 * rng.randrange(len(values) // 4)
            odd = np.float32(rng.choice((np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45)))
            values[at : at + 4] = np.frombuffer(odd.tobytes(), np.uint8)
            tensor.raw_data = values.tobytes()
    elif kind == 16:
        model.functions.add(name="Made", domain=rng.choice(("", "mine")))
        model.graph.sparse_initializer.add()
    else:
        one.name = one.output[0] = rng.choice(("", "averages", "scores", "x" * 70000, "\x1b]0;title\x07", "\u202e"))
