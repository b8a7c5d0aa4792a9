"""A network in ONNX, read with bounds and written anew: what ONNX Runtime sees was made here, of parts that were looked at.

Read is what a predictor needs: one graph of nodes of the default domain, constants in the file itself, attributes that are numbers.
Anything else (sub-graphs, functions, other domains, data outside the file, sparse, quantised or text tensors, other types of value) is
refused. Names are not carried over, but for those of inputs and outputs; texts and metadata are dropped. Which operators there are, and
what they may cost, is in ``operators``. (onnx.proto3 of ONNX 1.23, https://github.com/onnx/onnx/blob/main/docs/IR.md)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .protobuf import Damaged, Reader, Table
from .protobuf import field as write

BYTES_MAX = 16 << 20  # of a file
FIELDS_MAX = 1 << 17  # of messages and packed numbers in it
NODES_MAX = 512
VALUES_MAX = 1 << 22  # of all constants
RANK_MAX = 6
NAME_MAX = 512  # characters
IR_VERSIONS = range(7, 15)
OPSETS = range(13, 29)

FLOAT, INT32, INT64 = 1, 6, 7  # TensorProto.DataType
DTYPES: Mapping[int, np.dtype] = {FLOAT: np.dtype("<f4"), INT32: np.dtype("<i4"), INT64: np.dtype("<i8")}
Attribute = float | int | str | list[float] | list[int] | npt.NDArray

_MODEL: Table = {
    1: ("ir_version", "int"), 7: ("graph", "bytes"), 8: ("opset_import", "bytes*"),
    2: ("", ""), 3: ("", ""), 4: ("", ""), 5: ("", ""), 6: ("", ""), 14: ("", ""),
    20: ("what it takes to train it", "!"), 25: ("functions", "!"), 26: ("devices", "!"),
}  # fmt: skip
_OPSET: Table = {1: ("domain", "text"), 2: ("version", "int")}
_GRAPH: Table = {
    1: ("node", "bytes*"), 5: ("initializer", "bytes*"), 11: ("input", "bytes*"), 12: ("output", "bytes*"),
    2: ("", ""), 10: ("", ""), 13: ("", ""), 16: ("", ""), 14: ("quantised values", "!"), 15: ("sparse constants", "!"),
}  # fmt: skip
_NODE: Table = {
    1: ("input", "text*"), 2: ("output", "text*"), 4: ("op_type", "text"), 5: ("attribute", "bytes*"), 7: ("domain", "text"),
    8: ("overload", "text"), 3: ("", ""), 6: ("", ""), 9: ("", ""), 10: ("devices", "!"),
}  # fmt: skip
_ATTRIBUTE: Table = {
    1: ("name", "text"), 20: ("type", "int"), 2: ("f", "float"), 3: ("i", "int"), 4: ("s", "bytes"), 5: ("t", "bytes"),
    7: ("floats", "float*"), 8: ("ints", "int*"), 13: ("", ""), 6: ("a sub-graph", "!"), 11: ("sub-graphs", "!"), 9: ("texts", "!"),
    10: ("several constants", "!"), 14: ("a type", "!"), 15: ("types", "!"), 21: ("the name of another", "!"),
    22: ("a sparse constant", "!"), 23: ("sparse constants", "!"),
}  # fmt: skip
_TENSOR: Table = {
    1: ("dims", "int*"), 2: ("data_type", "int"), 4: ("float_data", "float*"), 5: ("int32_data", "int*"), 7: ("int64_data", "int*"),
    8: ("name", "text"), 9: ("raw_data", "bytes"), 14: ("data_location", "int"), 12: ("", ""), 16: ("", ""),
    3: ("a segment", "!"), 6: ("texts", "!"), 10: ("64-bit floats", "!"), 11: ("unsigned integers", "!"),
    13: ("data in another file", "!"),
}  # fmt: skip
_VALUE: Table = {1: ("name", "text"), 2: ("type", "bytes"), 3: ("", ""), 4: ("", "")}
_TYPE: Table = {
    1: ("tensor_type", "bytes"), 6: ("", ""), 4: ("a sequence", "!"), 5: ("a map", "!"), 7: ("an opaque type", "!"),
    8: ("a sparse tensor", "!"), 9: ("an optional value", "!"),
}  # fmt: skip
_TENSOR_TYPE: Table = {1: ("elem_type", "int"), 2: ("shape", "bytes")}
_SHAPE: Table = {1: ("dim", "bytes*")}
_DIMENSION: Table = {1: ("dim_value", "int"), 2: ("dim_param", "text"), 3: ("", "")}
# AttributeProto.AttributeType to the field that holds the value
_ATTRIBUTE_FIELDS = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints"}


@dataclass(frozen=True, slots=True)
class Node:
    """An operator; a missing optional input is ""."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, Attribute]


@dataclass(frozen=True, slots=True)
class Network:
    """What was read.

    Attributes
    ----------
    inputs : dict of name to list
        Declared sizes of the inputs' dimensions, None where one has no fixed size; None for an input without a declared shape.
    constants : dict of name to array
        float32, int32 or int64.
    n_parameters : int
        float32 values among them, single numbers left out.
    """

    ir_version: int
    opset: int
    inputs: Mapping[str, list[int | None] | None]
    outputs: Sequence[str]
    nodes: Sequence[Node]
    constants: Mapping[str, npt.NDArray] = field(repr=False)

    @property
    def n_parameters(self) -> int:
        return sum(x.size for x in self.constants.values() if x.dtype == np.float32 and x.ndim)

    def written(self, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> bytes:
        """As an ONNX file of ours, with these inputs and outputs and the numbers of their dimensions."""
        names = {name: name for name in (*inputs, *outputs)}

        def name_of(old: str) -> str:
            return names.setdefault(old, f"v{len(names)}") if old else ""

        graph = b"".join(write(5, _tensor(value, name_of(name))) for name, value in self.constants.items())
        for node in self.nodes:
            message = b"".join(write(1, name_of(name)) for name in node.inputs) + write(2, name_of(node.output)) + write(4, node.op)
            message += b"".join(write(5, _attribute(name, value)) for name, value in node.attributes.items())
            graph += write(1, message)
        graph += write(2, "predictor")
        for number, values in ((11, inputs), (12, outputs)):
            for name, rank in values.items():
                shape = b"".join(write(1, write(2, f"{name}.{i}")) for i in range(rank))
                graph += write(number, write(1, name) + write(2, write(1, write(1, FLOAT) + write(2, shape))))
        return write(1, self.ir_version) + write(7, graph) + write(8, write(2, self.opset))


def read_network(data: bytes) -> Network:
    """Read an ONNX file's content.

    Raises
    ------
    Damaged
        It is no ONNX, or holds what a predictor does not need.
    """
    if len(data) > BYTES_MAX:
        raise Damaged(f"it has {len(data):,} bytes, and a predictor at most {BYTES_MAX:,}")
    reader = Reader(FIELDS_MAX)
    model = reader.read(memoryview(data), "file", _MODEL)
    if model["graph"] is None:
        raise Damaged("it is not ONNX: there is no graph")
    if model["ir_version"] not in IR_VERSIONS:
        raise Damaged(f"its IR version is {model['ir_version']}; known are {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}")
    opset = _opset(reader, model["opset_import"])
    graph = reader.read(model["graph"], "graph", _GRAPH)
    if len(graph["node"]) > NODES_MAX:
        raise Damaged(f"it has {len(graph['node']):,} nodes, and a predictor at most {NODES_MAX}")
    read = [_read_node(reader, message) for message in graph["node"]]
    constants: dict[str, npt.NDArray] = {}
    n_values = 0

    def take(name: str, value: npt.NDArray) -> None:
        nonlocal n_values
        if not name or name in constants:
            raise Damaged(f"two of its constants have the name {shown(name)}" if name else "one of its constants has no name")
        n_values += value.size
        if n_values > VALUES_MAX:
            raise Damaged(f"it has more than {VALUES_MAX:,} weights")
        constants[name] = value

    for message in graph["initializer"]:
        take(*_read_tensor(reader, message))
    inputs: dict[str, list[int | None] | None] = {}
    for message in graph["input"]:
        value = reader.read(message, "input", _VALUE)
        if value["name"] in inputs:
            raise Damaged(f"two of its inputs have the name {shown(value['name'])}")
        if value["name"] not in constants:  # files of older versions list those, too
            inputs[_name(value["name"], "input")] = _read_type(reader, value, "input")
    known = {*constants, *inputs}
    nodes: list[Node] = []
    for node in read:
        for name in node.inputs:
            if name and name not in known:
                raise Damaged(
                    f"its {shown(node.op)} takes {shown(name)}, which no node before makes: one is missing, or they go in a circle"
                )
        if node.output in known:
            raise Damaged(f"two of its values have the name {shown(node.output)}")
        known.add(node.output)
        if node.op == "Constant":
            take(node.output, _constant(node))
        else:
            nodes.append(node)
    made = {node.output for node in nodes}
    outputs = []
    for message in graph["output"]:
        value = reader.read(message, "output", _VALUE)
        name = value["name"]
        _read_type(reader, value, "output")
        if name in outputs:
            raise Damaged(f"two of its outputs have the name {shown(name)}")
        if name not in made:
            raise Damaged(f"no node makes its output {shown(name)}")
        outputs.append(name)
    return Network(model["ir_version"], opset, inputs, outputs, nodes, constants)


def shown(text: str) -> str:
    """A name from a file, in a sentence: short, and printable anywhere."""
    return ascii(text if len(text) <= 40 else text[:37] + "...")


def _opset(reader: Reader, messages: Sequence[memoryview]) -> int:
    versions = []
    for message in messages:
        found = reader.read(message, "opset", _OPSET)
        if found["domain"] in ("", "ai.onnx"):
            versions.append(found["version"])
    if len(versions) != 1 or versions[0] not in OPSETS:
        said = " and ".join(map(str, versions[:2])) or "missing"
        raise Damaged(f"its opset is {said}; known are {OPSETS[0]} to {OPSETS[-1]}")
    return versions[0]


def _read_type(reader: Reader, value: Mapping[str, Any], what: str) -> list[int | None] | None:
    """Declared sizes of an input or output."""
    what = f"{what} {shown(value['name'])}"
    kind = reader.read(value["type"], f"type of {what}", _TYPE)["tensor_type"] if value["type"] is not None else None
    if kind is None:
        raise Damaged(f"its {what} is no tensor")
    tensor = reader.read(kind, f"type of {what}", _TENSOR_TYPE)
    if tensor["elem_type"] != FLOAT:
        raise Damaged(f"its {what} is not of 32-bit floats")
    if tensor["shape"] is None:
        return None
    dims = reader.read(tensor["shape"], "shape", _SHAPE)["dim"]
    if len(dims) > RANK_MAX:
        raise Damaged(f"its {what} has {len(dims)} dimensions")
    return [reader.read(dim, "dimension", _DIMENSION)["dim_value"] or None for dim in dims]


def _read_node(reader: Reader, message: memoryview) -> Node:
    node = reader.read(message, "node", _NODE)
    op = node["op_type"]
    if node["overload"]:
        raise Damaged(f"its operator {shown(op)} is a function of its own, and a predictor's operators are ONNX's")
    if node["domain"] not in ("", "ai.onnx"):
        raise Damaged(f"its operator {shown(op)} is of the domain {shown(node['domain'])}, and a predictor's are ONNX's own")
    attributes: dict[str, Attribute] = {}
    for part in node["attribute"]:
        name, value = _read_attribute(reader, part, op)
        if name in attributes:
            raise Damaged(f"its {shown(op)} has two attributes {shown(name)}")
        attributes[name] = value
    if len(node["output"]) != 1:
        raise Damaged(f"its {shown(op)} has {len(node['output'])} outputs, and a predictor's operators have one")
    inputs = [_name(x, "value") if x else "" for x in node["input"]]
    while inputs and not inputs[-1]:
        inputs.pop()
    return Node(op, tuple(inputs), _name(node["output"][0], "value"), attributes)


def _read_attribute(reader: Reader, message: memoryview, op: str) -> tuple[str, Attribute]:
    found = reader.read(message, f"operator {shown(op)}", _ATTRIBUTE)
    name, kind = _name(found["name"], "attribute"), found["type"]
    if kind not in _ATTRIBUTE_FIELDS:
        raise Damaged(f"the attribute {shown(name)} of its {shown(op)} is of a type that a predictor does not need")
    for number, key in _ATTRIBUTE_FIELDS.items():
        if number != kind and found[key] not in (None, 0, 0.0) and not (isinstance(found[key], list) and not found[key]):
            raise Damaged(f"the attribute {shown(name)} of its {shown(op)} has two values")
    value = found[_ATTRIBUTE_FIELDS[kind]]
    if kind == 3:
        text = bytes(value or b"")
        if len(text) > NAME_MAX or not text.isascii():
            raise Damaged(f"the attribute {shown(name)} of its {shown(op)} is no word")
        return name, text.decode()
    if kind == 4:
        if value is None:
            raise Damaged(f"the attribute {shown(name)} of its {shown(op)} is empty")
        return name, _read_tensor(reader, value)[1]
    if any(not math.isfinite(x) for x in (value if isinstance(value, list) else [value])):
        raise Damaged(f"the attribute {shown(name)} of its {shown(op)} is not a number")
    return name, value


def _constant(node: Node) -> npt.NDArray:
    """The value of a node that has one instead of inputs."""
    if node.inputs or len(node.attributes) != 1:
        raise Damaged(f"the constant {shown(node.output)} has inputs, or not one value")
    ((name, value),) = node.attributes.items()
    kinds = {"value": np.ndarray, "value_float": float, "value_int": int, "value_floats": list, "value_ints": list}
    if name not in kinds or not isinstance(value, kinds[name]):
        raise Damaged(f"the constant {shown(node.output)} has a value of a type that a predictor does not need")
    if isinstance(value, np.ndarray):
        return value
    found = np.asarray(value, np.float32 if "float" in name else np.int64)
    if not found.size:
        raise Damaged(f"the constant {shown(node.output)} is empty")
    return found


def _read_tensor(reader: Reader, message: memoryview) -> tuple[str, npt.NDArray]:
    tensor = reader.read(message, "constant", _TENSOR)
    name = tensor["name"] and _name(tensor["name"], "constant")
    what = f"its constant {shown(name)}"
    if tensor["data_location"]:
        raise Damaged(f"{what} lies in another file, and a predictor is one file")
    if tensor["data_type"] not in DTYPES:
        raise Damaged(f"{what} is of the type {tensor['data_type']}, and a predictor's are 32-bit floats and 32- or 64-bit integers")
    dtype, dims = DTYPES[tensor["data_type"]], tensor["dims"]
    if len(dims) > RANK_MAX or any(not 0 < n <= VALUES_MAX for n in dims) or math.prod(dims) > VALUES_MAX:
        raise Damaged(f"{what} has the shape {shown(str(dims))}, which a predictor does not need")
    lists = {FLOAT: tensor["float_data"], INT32: tensor["int32_data"], INT64: tensor["int64_data"]}
    listed = lists.pop(tensor["data_type"])
    if any(lists.values()) or (listed and tensor["raw_data"]):
        raise Damaged(f"{what} has more than one list of values")
    if listed:
        limits = np.iinfo(dtype) if dtype.kind == "i" else None
        if limits and any(not limits.min <= x <= limits.max for x in listed):
            raise Damaged(f"{what} has values that its type has no room for")
        values = np.array(listed, dtype)
    else:
        raw = tensor["raw_data"] or b""
        if len(raw) % dtype.itemsize:
            raise Damaged(f"{what} is cut short")
        values = np.frombuffer(raw, dtype)
    if values.size != math.prod(dims):
        raise Damaged(f"{what} has {values.size} values for the shape {shown(str(dims))}")
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise Damaged(f"{what} has values that are not numbers")
    return name, values.reshape(dims)


def _name(text: str, what: str) -> str:
    if not text or len(text) > NAME_MAX:
        raise Damaged(f"a name of {what} has {len(text)} characters")
    return text


def _tensor(value: npt.NDArray, name: str) -> bytes:
    kind = next(number for number, dtype in DTYPES.items() if dtype == value.dtype)
    return b"".join(write(1, n) for n in value.shape) + write(2, kind) + write(8, name) + write(9, value.tobytes())


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, float):
        return write(1, name) + write(20, 1) + write(2, value)
    if isinstance(value, int):
        return write(1, name) + write(20, 2) + write(3, value)
    if isinstance(value, str):
        return write(1, name) + write(20, 3) + write(4, value)
    if isinstance(value, list):
        floats = any(isinstance(x, float) for x in value)
        return write(1, name) + write(20, 6 if floats else 7) + b"".join(write(7 if floats else 8, x) for x in value)
    raise TypeError(f"no attribute of an operator is a {type(value).__name__}")
