"""Networks and their cards: refused in a sentence, or loaded, asked for a prediction within bounds, and what they predict selected by."""

from __future__ import annotations

import json
import math
import random
import resource
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from kvcast.cli.predictor import card as show_card
from kvcast.gguf.embedded_predictor import Embedded
from kvcast.planning.inspect_gguf import _about_predictor
from kvcast.sparse.history import History
from kvcast.sparse.predictors import OnnxPredictor
from kvcast.sparse.selection import select
from predictor_onnx.infer import PredictorError, StreamPredictor, examine, resolve
from predictor_onnx.operators import follow
from predictor_onnx.runtime import PREDICTION_S, open_session, unusable

from . import mutate
from .graphs import grown

N_LAYER, N_HEAD_KV, N_BLOCKS = 2, 2, 80
REFUSAL_S, RESIDENT_BYTES = 5.0, 3 << 30
SENTENCE_MAX = 500
CARD = b"{"  # the first byte of a card; a network's is another
OPERATORS = ("Conv", "Relu", "Add", "Concat", "Gather", "Reshape", "Squeeze", "Slice", "Transpose", "Resize", "Expand", "Tile", "MatMul",
             "ReduceMean", "Identity", "Cast", "Pad", "Shape", "ConstantOfShape", "Loop", "If", "Softmax", "NonZero", "Scan")  # fmt: skip


class Predictor:
    """A surface; see ``harness.Surface``."""

    def __init__(self, folder: Path):
        self._bases = [resolve(name).read_bytes() for name in ("stream", "paper")]
        self._cards = [json.loads(resolve(name).with_suffix(".json").read_text()) for name in ("stream", "paper")]
        self._path = folder / "case.onnx"
        self._path.write_bytes(self._bases[0])
        self._history = History(N_LAYER, N_HEAD_KV, N_BLOCKS)
        self._predict(OnnxPredictor(self._bases[0], 1, cuda=False), math.inf)  # Numba compiles what follows a prediction

    def make(self, rng: random.Random) -> bytes:
        i = rng.randrange(2)
        kind = rng.random()
        if kind > 0.5:
            return grown(rng)
        if kind < 0.05:
            card = self._cards[i]
            for _ in range(rng.randint(1, 3)):
                card = mutate.value(rng, card)
            return json.dumps(card if isinstance(card, dict) else {"name": card}).encode("utf-8", "replace")
        data = self._bases[i]
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = mutate.some_bytes(rng, data) if kind < 0.25 else _another(rng, data)
        return data

    def run(self, data: bytes) -> str:
        if data.startswith(CARD):
            _about_predictor(Embedded(b"", data.decode(), ""))
            self._path.with_suffix(".json").write_bytes(data)
            try:
                show_card(str(self._path))
            except ValueError as error:
                _check_sentence(str(error))
                return "card refused"
            return "card shown"
        begin = time.monotonic()
        try:
            network = OnnxPredictor(data, 1, cuda=False)
        except PredictorError as error:
            _check_sentence(str(error))
            assert time.monotonic() - begin < REFUSAL_S, "refused too late"
            return "refused by kvcast" if error.__cause__ is None or isinstance(error.__cause__, ValueError) else "refused by ONNX Runtime"
        _check_shapes(data)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self._predict(network)
        assert len(said) <= 1, "said more than once"
        for warning in said:
            _check_sentence(str(warning.message))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10 < RESIDENT_BYTES, "too much memory"
        return "gives up" if said else "predicts"

    def _predict(self, network: OnnxPredictor, limit_s: float = PREDICTION_S + 2) -> None:
        history, rng = self._history, np.random.default_rng(0)
        history.truncate(0)
        history.keep_steps(network.n_steps_kept)
        history.observe_all(rng.random((N_LAYER, 8, N_HEAD_KV, N_BLOCKS), np.float32), 0, 8, 60)
        blocks = np.zeros((N_LAYER * N_HEAD_KV, N_BLOCKS), np.int32)
        n_listed, shares = np.zeros(len(blocks), np.int32), np.zeros(len(blocks), np.float32)
        for n_used in (41, 60, 60):
            begin = time.monotonic()
            scores = network.predict(history, n_used)
            assert time.monotonic() - begin < limit_s, "predicted too late"
            assert np.isfinite(scores[:, :n_used]).all(), "not numbers"
            select(scores, n_used, 12, 1, 4, blocks, n_listed, shares, "spread")
            assert np.isfinite(shares).all(), "shares that are not numbers"
            for row, n in zip(blocks, n_listed):
                assert 5 <= n <= n_used and row[0] == 0 and row[n - 1] == n_used - 1 and (np.diff(row[:n]) > 0).all(), "not a list"


def _check_sentence(text: str) -> None:
    assert text.isprintable() and len(text) <= SENTENCE_MAX, "no sentence"


def _check_shapes(data: bytes) -> None:
    """ONNX Runtime makes the shapes that were foretold, of every value and at any size."""
    network, kind, cost = examine(data, "x")
    if kind is not StreamPredictor:
        return
    for n_rows, n_blocks in ((1, 1), (3, 7)):
        shapes, _ = follow(network, {"averages": (n_rows, 5, n_blocks)})
        made = [node.output for node in network.nodes]
        try:
            session = open_session(network.written({"averages": 3}, {name: len(shapes[name]) for name in made}), 1, False)
            found = session.run(made, {"averages": np.full((n_rows, 5, n_blocks), 0.01, np.float32)})
        except unusable():
            return
        wrong = [name for name, value in zip(made, found) if value.shape != shapes[name]]
        assert not wrong, f"another shape than foretold: {[node.op for node in network.nodes if node.output == wrong[0]]}"
        changing = sum(value.size for name, value in zip(made, found) if not _is_fixed(network, name))
        assert changing <= cost.n_values * n_rows * n_blocks, "costs more than foretold"


def _is_fixed(network: Any, name: str) -> bool:
    """Whether a value is made from constants alone."""
    fixed = set(network.constants)
    for node in network.nodes:
        if all(x in fixed or not x for x in node.inputs):
            fixed.add(node.output)
    return name in fixed


def _another(rng: random.Random, data: bytes) -> bytes:
    """A network with one thing changed that is still ONNX."""
    model = onnx.ModelProto.FromString(data)
    graph: Any = model.graph
    node, constant = rng.choice(graph.node), rng.choice(graph.initializer)
    kind = rng.randrange(9)
    if kind == 0:
        node.op_type = rng.choice(OPERATORS)
    elif kind == 1 and node.attribute:
        attribute = rng.choice(node.attribute)
        if attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice((-1, 0, 1, 2, 3, 64, 2**31, 2**62))
        else:
            attribute.i = rng.choice((-1, 0, 1, 2, 2**31, 2**62))
    elif kind == 2 and constant.dims:
        constant.dims[rng.randrange(len(constant.dims))] = rng.choice((-1, 0, 1, 2, 5, 2**31, 2**40))
    elif kind == 3:
        constant.raw_data = mutate.some_bytes(rng, constant.raw_data)
    elif kind == 4:
        graph.node.remove(node)
    elif kind == 5 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice([*(n.output[0] for n in graph.node), *(c.name for c in graph.initializer)])
    elif kind == 6:
        dim = rng.choice(rng.choice([*graph.input, *graph.output]).type.tensor_type.shape.dim or [onnx.TensorShapeProto.Dimension()])
        dim.dim_value = rng.choice((0, 1, 5, 33, 64, -1, 2**31))
    elif kind == 7:
        model.opset_import[0].version = rng.choice((0, 1, 7, 13, 21, 99, -1))
    else:
        constant.data_type = rng.randrange(20)
    return model.SerializeToString()
