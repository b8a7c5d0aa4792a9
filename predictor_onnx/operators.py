"""The operators that a predictor may use, the shapes they make, and what they cost.

Shapes are followed with numbers, for the smallest inputs and for larger ones than there are. Where the cost of a block of a KV head is
within the bound at both ends of rows and of blocks, and at all four corners, no part of it grows faster than rows times blocks: a part
with the square of either would be over the bound at that end. What a call of another size takes is then known in advance.

Every data input is float32. Shapes, axes and indices have to be constants, so that nothing in the data can ask for memory; there is no
control flow, and no operator that makes much of little (Expand, Tile, Pad, Resize, ConstantOfShape, Range).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy.typing as npt

from .network import RANK_MAX, Network, Node, shown
from .protobuf import Damaged

VALUES_PER_BLOCK = 1 << 16  # float32, of everything that is computed for one block of one KV head; ``paper`` has 27,000
OPERATIONS_PER_BLOCK = 1 << 20  # multiply-adds, and one for every other value; ``paper`` has 470,000
FOLDED_MAX = 1 << 24  # the same two of what is computed from constants alone, once
CONV_MAX = 1 << 12  # paddings, dilations and strides
ROWS, BLOCKS = 1 << 17, 1 << 17  # more rows than ``VALUES_PER_BLOCK``, and more than any model has; two million tokens

Shape = tuple[int, ...]


@dataclass(slots=True)
class Cost:
    """Of a network at one size of its inputs: values computed, and operations."""

    n_values: int = 0
    n_operations: int = 0


@dataclass(frozen=True, slots=True)
class Value:
    """What is known of one: its shape, whether it is made from constants alone, and what is in it if it is one itself."""

    shape: Shape
    fixed: bool = False
    constant: npt.NDArray | None = None


@dataclass(frozen=True, slots=True)
class Operator:
    """``shape`` makes the output's shape of a node's inputs and adds to the cost; inputs from ``n_data`` on are constants."""

    shape: Callable[[Node, Sequence[Value | None], Cost], Shape]
    n_inputs: range
    n_data: int
    attributes: Mapping[str, type]
    opset: int = 13


def follow(network: Network, inputs: Mapping[str, Shape]) -> tuple[dict[str, Shape], Cost]:
    """Every value's shape, and what a call costs, with inputs of these shapes.

    Raises
    ------
    Damaged
        An operator is none that a predictor may use, or does not fit its inputs.
    """
    values: dict[str, Value] = {name: Value(x.shape, True, x) for name, x in network.constants.items()}
    values.update({name: Value(shape) for name, shape in inputs.items()})
    cost, folded = Cost(), Cost()
    for node in network.nodes:
        operator = _operator(network, node)
        given = [values[name] if name else None for name in node.inputs]
        _check_inputs(node, operator, given)
        fixed = all(value is None or value.fixed for value in given)
        spent = folded if fixed else cost
        shape = operator.shape(node, given, spent)
        if len(shape) > RANK_MAX or any(n < 0 for n in shape):
            raise Damaged(f"its {node.op} makes the shape {shown(str(list(shape)))}")
        spent.n_values += math.prod(shape)
        spent.n_operations += math.prod(shape)
        values[node.output] = Value(shape, fixed)
        if max(folded.n_values, folded.n_operations) > FOLDED_MAX:
            raise Damaged("what it computes from its constants alone is more than a predictor needs")
    return {name: value.shape for name, value in values.items()}, cost


def cost_of_block(network: Network, shapes: Callable[[int, int], Iterable[tuple[Mapping[str, Shape], Mapping[str, Shape]]]]) -> Cost:
    """What one block of one row costs at most, in a call of any size.

    Parameters
    ----------
    shapes : callable
        Called with numbers of rows and blocks; yields shapes of the inputs and outputs of the smallest and the largest call of that size.

    Raises
    ------
    Damaged
        As ``follow``; or an output has another shape, or it is over the bounds.
    """
    most = Cost()
    for n_rows in (1, ROWS):
        for n_blocks in (1, BLOCKS):
            for inputs, outputs in shapes(n_rows, n_blocks):
                made, cost = follow(network, inputs)
                for name, shape in outputs.items():
                    if made[name] != shape:
                        raise Damaged(f"its output {shown(name)} has the shape {list(made[name])} where kvcast needs {list(shape)}")
                most.n_values = max(most.n_values, -(-cost.n_values // (n_rows * n_blocks)))
                most.n_operations = max(most.n_operations, -(-cost.n_operations // (n_rows * n_blocks)))
    if most.n_values > VALUES_PER_BLOCK:
        raise Damaged(f"it computes {most.n_values:,} values for a block, and a predictor at most {VALUES_PER_BLOCK:,}")
    if most.n_operations > OPERATIONS_PER_BLOCK:
        raise Damaged(f"it takes {most.n_operations:,} operations for a block, and a predictor at most {OPERATIONS_PER_BLOCK:,}")
    return most


def _operator(network: Network, node: Node) -> Operator:
    operator = OPERATORS.get(node.op)
    if operator is None:
        raise Damaged(f"its operator {shown(node.op)} is none that a predictor may use, see docs/gguf.md")
    if network.opset < operator.opset:
        raise Damaged(f"its operator {node.op} is not in its opset, {network.opset}")
    for name, value in node.attributes.items():
        if name not in operator.attributes or not isinstance(value, operator.attributes[name]):
            raise Damaged(f"its {node.op} has an attribute {shown(name)}, which a predictor does not need")
    if operator.shape is _reduce:  # axes became an input
        as_input = node.op == "ReduceSum" or network.opset >= 18
        if {"axes", "noop_with_empty_axes"}.intersection(node.attributes) - ({"noop_with_empty_axes"} if as_input else {"axes"}):
            raise Damaged(f"its {node.op} has axes that its opset, {network.opset}, does not look for")
        if len(node.inputs) > 1 and not as_input:
            raise Damaged(f"its {node.op} has axes that its opset, {network.opset}, does not look for")
    if len(node.inputs) not in operator.n_inputs:
        raise Damaged(f"its {node.op} has {len(node.inputs)} inputs")
    return operator


def _check_inputs(node: Node, operator: Operator, given: Sequence[Value | None]) -> None:
    for i, value in enumerate(given):
        if value is None:
            if i < operator.n_inputs.start:
                raise Damaged(f"its {node.op} lacks an input")
        elif i >= operator.n_data:
            if value.constant is None or value.constant.dtype.kind != "i":
                raise Damaged(f"its {node.op} takes sizes or indices that are no constant integers")
        elif value.constant is not None and value.constant.dtype.kind != "f" and node.op != "Cast":
            raise Damaged(f"its {node.op} computes with integers, and a predictor with 32-bit floats")


# ---- shapes, one function for each kind of operator


def _same(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    return _shape(given, 0)


def _cast(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    if node.attributes.get("to") != 1:
        raise Damaged("its Cast makes another type than 32-bit floats")
    return _shape(given, 0)


def _clip(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    if any(value is not None and value.shape not in ((), (1,)) for value in given[1:]):
        raise Damaged("its Clip has bounds that are more than one number")
    return _shape(given, 0)


def _softmax(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape = _shape(given, 0)
    _axis(node, _int(node, "axis", -1), len(shape))
    return shape


def _broadcast(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    return _together(node, [_shape(given, i) for i in range(len(given))])


def _together(node: Node, shapes: Sequence[Shape]) -> Shape:
    rank = max(map(len, shapes))
    out = []
    for sizes in zip(*((1,) * (rank - len(s)) + s for s in shapes)):
        larger = set(sizes) - {1}
        if len(larger) > 1:
            raise Damaged(f"its {node.op} takes shapes that do not go together: {', '.join(str(list(s)) for s in shapes[:3])}")
        out.append(larger.pop() if larger else 1)
    return tuple(out)


def _concat(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shapes = [_shape(given, i) for i in range(len(given))]
    if "axis" not in node.attributes:
        raise Damaged("its Concat has no axis")
    axis = _axis(node, _int(node, "axis"), len(shapes[0]))
    if any(len(s) != len(shapes[0]) or s[:axis] + s[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for s in shapes):
        raise Damaged(f"its Concat takes shapes that do not go together: {', '.join(str(list(s)) for s in shapes[:3])}")
    return (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])


def _slice(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape = list(_shape(given, 0))
    starts, ends = _ints(node, given, 1), _ints(node, given, 2)
    axes = _ints(node, given, 3) if _there(given, 3) else list(range(len(starts)))
    steps = _ints(node, given, 4) if _there(given, 4) else [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or any(step < 1 for step in steps):
        raise Damaged("its Slice has starts, ends, axes and steps that do not go together, or goes backwards")
    for axis, start, end, step in zip(_axes(node, axes, len(shape)), starts, ends, steps):
        n = shape[axis]
        first, last = (min(max(x + n if x < 0 else x, 0), n) for x in (start, end))
        shape[axis] = -(-(last - first) // step)
    return tuple(shape)


def _reshape(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape, wanted = _shape(given, 0), _ints(node, given, 1)
    out = list(wanted)
    for i, n in enumerate(wanted):
        if n == 0 and not _int(node, "allowzero", 0):
            if i >= len(shape):
                raise Damaged(f"its Reshape keeps a dimension that is not there: {shown(str(wanted))}")
            out[i] = shape[i]
    if wanted.count(-1) > 1 or any(n < -1 for n in wanted):
        raise Damaged(f"its Reshape is to {shown(str(wanted))}")
    n_values = math.prod(shape)
    if -1 in wanted:
        others = math.prod(n for n in out if n != -1)
        out[wanted.index(-1)] = n_values // others if others else 0
    if math.prod(out) != n_values:
        raise Damaged(f"its Reshape is from {list(shape)} to {shown(str(wanted))}; it was made for one size")
    return tuple(out)


def _flatten(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape = _shape(given, 0)
    axis = _int(node, "axis", 1)
    if not -len(shape) <= axis <= len(shape):
        raise Damaged(f"its Flatten has the axis {axis} of {len(shape)} dimensions")
    axis += len(shape) if axis < 0 else 0
    return math.prod(shape[:axis]), math.prod(shape[axis:])


def _transpose(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape = _shape(given, 0)
    order = node.attributes.get("perm", list(range(len(shape)))[::-1])
    if not isinstance(order, list) or sorted(order) != list(range(len(shape))):
        raise Damaged(f"its Transpose has the order {shown(str(order))} of {len(shape)} dimensions")
    return tuple(shape[int(i)] for i in order)


def _squeeze(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape = _shape(given, 0)
    axes = _axes(node, _ints(node, given, 1), len(shape)) if _there(given, 1) else [i for i, n in enumerate(shape) if n == 1]
    if any(shape[axis] != 1 for axis in axes):
        raise Damaged(f"its Squeeze takes away a dimension of more than one: {axes} of {list(shape)}")
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def _unsqueeze(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape = list(_shape(given, 0))
    axes = _ints(node, given, 1)
    if len(shape) + len(axes) > RANK_MAX:
        raise Damaged(f"its Unsqueeze makes {len(shape) + len(axes)} dimensions")
    for axis in sorted(_axes(node, axes, len(shape) + len(axes))):
        shape.insert(axis, 1)
    return tuple(shape)


def _gather(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape, indices = _shape(given, 0), _constant(given, 1)
    axis = _axis(node, _int(node, "axis", 0), len(shape))
    if indices.min() < -shape[axis] or indices.max() >= shape[axis]:
        raise Damaged(f"its Gather takes places that are not there: {indices.min()} to {indices.max()} of {shape[axis]}")
    return (*shape[:axis], *indices.shape, *shape[axis + 1 :])


def _reduce(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape = _shape(given, 0)
    cost.n_operations += math.prod(shape)
    axes = node.attributes.get("axes", [])
    assert isinstance(axes, list)
    if _there(given, 1):
        axes = _ints(node, given, 1)
    reduced = _axes(node, [int(x) for x in axes], len(shape))
    if not reduced and not _int(node, "noop_with_empty_axes", 0):
        reduced = list(range(len(shape)))
    keep = _int(node, "keepdims", 1)
    return tuple(1 if i in reduced else n for i, n in enumerate(shape) if keep or i not in reduced)


def _conv(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    shape, weights = _shape(given, 0), _shape(given, 1)
    n_spatial = len(shape) - 2
    kernel = weights[2:]
    if n_spatial not in (1, 2) or len(weights) != len(shape) or _numbers(node, "kernel_shape", list(kernel)) != list(kernel):
        raise Damaged(f"its Conv takes shapes that do not go together: {list(shape)} and weights of {list(weights)}")
    if given[1] is None or not given[1].fixed:
        raise Damaged("its Conv takes weights that are no constants")
    group = _int(node, "group", 1)
    if group < 1 or weights[1] * group != shape[1] or weights[0] % group:
        raise Damaged(f"its Conv takes {shape[1]} channels in {group} groups with weights of {list(weights)}")
    if _there(given, 2) and _shape(given, 2) != weights[:1]:
        raise Damaged(f"its Conv adds {list(_shape(given, 2))} to {weights[0]} channels")
    strides = _numbers(node, "strides", [1] * n_spatial)
    dilations = _numbers(node, "dilations", [1] * n_spatial)
    pads = _numbers(node, "pads", [0] * (2 * n_spatial))
    lengths = (len(strides), len(dilations), len(pads))
    if lengths != (n_spatial, n_spatial, 2 * n_spatial) or not all(1 <= x <= CONV_MAX for x in (*strides, *dilations)):
        raise Damaged(f"its Conv has strides {shown(str(strides))}, dilations {shown(str(dilations))} and pads {shown(str(pads))}")
    if not all(0 <= x <= CONV_MAX for x in pads):
        raise Damaged(f"its Conv has pads {shown(str(pads))}")
    auto = node.attributes.get("auto_pad", "NOTSET")
    if auto != "NOTSET" and "pads" in node.attributes:
        raise Damaged("its Conv has pads of its own and others to be found")
    out = []
    for i in range(n_spatial):
        if auto in ("SAME_UPPER", "SAME_LOWER"):
            out.append(-(-shape[2 + i] // strides[i]))
            continue
        if auto not in ("NOTSET", "VALID"):
            raise Damaged(f"its Conv has the padding {shown(str(auto))}")
        padded = shape[2 + i] + (pads[i] + pads[n_spatial + i] if auto == "NOTSET" else 0)
        out.append((padded - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1)
    cost.n_operations += shape[0] * weights[0] * math.prod(out) * weights[1] * math.prod(kernel)
    cost.n_values += shape[1] * math.prod(kernel) * math.prod(n for n in out if n > 0)  # the patches of one row, laid out
    return (shape[0], weights[0], *out)


def _matmul(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    a, b = _shape(given, 0), _shape(given, 1)
    if not a or not b or a[-1] != b[-2 if len(b) > 1 else 0]:
        raise Damaged(f"its MatMul takes shapes that do not go together: {list(a)} and {list(b)}")
    out = _together(node, [a[:-2], b[:-2]]) + a[-2:-1] + (b[-1:] if len(b) > 1 else ())
    cost.n_operations += math.prod(out) * a[-1]
    return out


def _gemm(node: Node, given: Sequence[Value | None], cost: Cost) -> Shape:
    a, b = _shape(given, 0), _shape(given, 1)
    if len(a) != 2 or len(b) != 2:
        raise Damaged(f"its Gemm takes {len(a)} and {len(b)} dimensions")
    a = a[::-1] if _int(node, "transA", 0) else a
    b = b[::-1] if _int(node, "transB", 0) else b
    out = a[0], b[1]
    if a[1] != b[0] or (_there(given, 2) and _together(node, [out, _shape(given, 2)]) != out):
        raise Damaged(f"its Gemm takes shapes that do not go together: {list(a)} and {list(b)}")
    cost.n_operations += out[0] * out[1] * a[1]
    return out


# ---- reading a node's parts


def _there(given: Sequence[Value | None], i: int) -> bool:
    return i < len(given) and given[i] is not None


def _shape(given: Sequence[Value | None], i: int) -> Shape:
    value = given[i]
    assert value is not None  # looked at before
    return value.shape


def _constant(given: Sequence[Value | None], i: int) -> npt.NDArray:
    value = given[i]
    assert value is not None and value.constant is not None
    return value.constant


def _ints(node: Node, given: Sequence[Value | None], i: int) -> list[int]:
    values = _constant(given, i)
    if values.ndim > 1 or values.size > 2 * RANK_MAX:
        raise Damaged(f"its {node.op} takes {values.size} sizes or axes")
    return values.reshape(-1).tolist()


def _numbers(node: Node, name: str, default: list[int]) -> list[int]:
    values = node.attributes.get(name, default)
    assert isinstance(values, list)
    return [int(x) for x in values]


def _int(node: Node, name: str, default: int = 0) -> int:
    value = node.attributes.get(name, default)
    assert isinstance(value, int)
    return value


def _axis(node: Node, axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Damaged(f"its {node.op} has the axis {axis} of {rank} dimensions")
    return axis % rank


def _axes(node: Node, axes: Sequence[int], rank: int) -> list[int]:
    found = [_axis(node, axis, rank) for axis in axes]
    if len(set(found)) < len(found):
        raise Damaged(f"its {node.op} has an axis twice: {shown(str(list(axes)))}")
    return found


def _table() -> dict[str, Operator]:
    one, floats = range(1, 2), {"alpha": float}
    plain = ("Abs", "Erf", "Exp", "Identity", "Log", "Neg", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh")
    table = {name: Operator(_same, one, 1, {}) for name in plain}
    table |= {name: Operator(_same, one, 1, floats) for name in ("Elu", "LeakyRelu")}
    table |= {name: Operator(_broadcast, range(2, 3), 2, {}) for name in ("Add", "Div", "Mul", "Pow", "Sub")}
    table |= {name: Operator(_broadcast, range(1, 17), 16, {}) for name in ("Max", "Min")}
    reduce = Operator(_reduce, range(1, 3), 1, {"axes": list, "keepdims": int, "noop_with_empty_axes": int})
    table |= {name: reduce for name in ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum")}
    conv = {"auto_pad": str, "dilations": list, "group": int, "kernel_shape": list, "pads": list, "strides": list}
    return table | {
        "Cast": Operator(_cast, one, 1, {"to": int}),
        "Clip": Operator(_clip, range(1, 4), 3, {}),
        "Concat": Operator(_concat, range(1, 65), 64, {"axis": int}),
        "Conv": Operator(_conv, range(2, 4), 3, conv),
        "Flatten": Operator(_flatten, one, 1, {"axis": int}),
        "Gather": Operator(_gather, range(2, 3), 1, {"axis": int}),
        "Gelu": Operator(_same, one, 1, {"approximate": str}, 20),
        "Gemm": Operator(_gemm, range(2, 4), 3, {"alpha": float, "beta": float, "transA": int, "transB": int}),
        "HardSigmoid": Operator(_same, one, 1, {"alpha": float, "beta": float}),
        "MatMul": Operator(_matmul, range(2, 3), 2, {}),
        "Reshape": Operator(_reshape, range(2, 3), 1, {"allowzero": int}),
        "Slice": Operator(_slice, range(3, 6), 1, {}),
        "Softmax": Operator(_softmax, one, 1, {"axis": int}),
        "Squeeze": Operator(_squeeze, range(1, 3), 1, {}),
        "Transpose": Operator(_transpose, one, 1, {"perm": list}),
        "Unsqueeze": Operator(_unsqueeze, range(2, 3), 1, {}),
    }


OPERATORS = _table()
