"""What will be attended next: ``predict(history) -> scores``. A predictor knows nothing of budgets or of where blocks are."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Protocol

import numpy as np
import numpy.typing as npt
import psutil

from . import native
from .history import DECAYS, History

LOOK_AHEAD = ("oracle", "quest")  # run each step twice, to see the step's own attention or query before selecting; for evaluation


class Predictor(Protocol):
    """Scores of the blocks for the steps to come."""

    n_steps_kept: int  # of raw scores that it wants the history to keep
    state_bytes_per_block: int

    def predict(self, history: History, n_blocks: int) -> npt.NDArray[np.float32]:
        """float32, shape (n_rows, >= n_blocks): larger means more attention; only the order within a row counts."""
        ...


class Average:
    """The exponential average of one decay; decay 0 is the score of the last step."""

    n_steps_kept = 0
    state_bytes_per_block = 4

    def __init__(self, decay: float):
        self._index = DECAYS.index(decay)

    def predict(self, history: History, n_blocks: int) -> npt.NDArray[np.float32]:
        return history.averages[:, self._index, :]


class Nothing:
    """No block between sink and window is worth keeping (sink and window only)."""

    n_steps_kept = 0
    state_bytes_per_block = 0

    def predict(self, history: History, n_blocks: int) -> npt.NDArray[np.float32]:
        return np.full((len(history.averages), n_blocks), -1.0, np.float32)


class Quest:
    """Upper bounds of attention from each block's smallest and largest key, by channel, and the step's own query (Tang et al.
    2024, arXiv 2406.10774). For evaluation: exact keys in NumPy, the query from a step that is taken back.

    Raises
    ------
    ValueError
        The session keeps no queries, or its store is not f16.
    """

    n_steps_kept = 0

    def __init__(self, attached: native.Attached):
        if attached.trace_q is None or attached.info.type_k != 1:
            raise ValueError("predictor 'quest' needs an f16 store and a session made for it; load the model with predictor='quest'")
        self._attached = attached
        info = attached.info
        self.state_bytes_per_block = 2 * 2 * info.head_dim_k
        shape = (info.n_layer, info.n_blocks, info.n_head_kv, info.head_dim_k)
        self._low, self._high = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._n_done = 0
        self._epoch = -1

    def predict(self, history: History, n_blocks: int) -> npt.NDArray[np.float32]:
        info = self._attached.info
        if history.epoch != self._epoch:
            self._n_done, self._epoch = 0, history.epoch
        scores = []
        group = info.n_head // info.n_head_kv
        for layer in range(info.n_layer):
            keys = self._attached.rows(layer)[0].view(np.float16)
            new = slice(self._n_done, n_blocks)
            k = keys[self._n_done * native.BLOCK_TOKENS : n_blocks * native.BLOCK_TOKENS].astype(np.float32)
            k = k.reshape(-1, native.BLOCK_TOKENS, info.n_head_kv, info.head_dim_k)
            self._low[layer, new], self._high[layer, new] = k.min(1), k.max(1)
            q = self._attached.trace_q[layer, 0].reshape(info.n_head_kv, group, -1) * info.head_dim_k**-0.5
            low, high = (x[layer, :n_blocks].transpose(1, 2, 0) for x in (self._low, self._high))  # (n_head_kv, d, n_blocks)
            bound = np.maximum(q, 0) @ high + np.minimum(q, 0) @ low  # (n_head_kv, group, n_blocks)
            bound = np.exp(bound - bound.max(-1, keepdims=True))
            scores.append((bound / bound.sum(-1, keepdims=True)).mean(1))
        self._n_done = max(0, n_blocks - 1)  # the last block still grows
        return np.concatenate(scores).astype(np.float32)


class Learned:
    """A network of ``predictor_onnx``, by name or path.

    Raises
    ------
    predictor_onnx.infer.PredictorError
        The file is missing or unusable, or ONNX Runtime is not installed.
    """

    def __init__(self, name: str):
        from predictor_onnx.infer import open_predictor, resolve

        # a quarter of the cores: the others are the model's
        self._network = open_predictor(resolve(name), max(1, (psutil.cpu_count(logical=False) or 1) // 4))
        self.n_steps_kept = self._network.n_steps_kept
        self.state_bytes_per_block = self._network.state_bytes_per_block

    def predict(self, history: History, n_blocks: int) -> npt.NDArray[np.float32]:
        return self._network.predict(history, n_blocks)


def default() -> str:
    """What ``auto`` stands for: ``onnx:stream`` where ONNX Runtime is installed, else ``ema``, with a warning."""
    if importlib.util.find_spec("onnxruntime") is not None:
        return "onnx:stream"
    warnings.warn("ONNX Runtime is not installed, so the predictor is 'ema'; kvcast[cpu] or kvcast[cuda] bring it", stacklevel=2)
    return "ema"


def make(name: str, attached: native.Attached) -> Predictor:
    """The predictor of a SparseConfig's ``predictor``; ``oracle`` ranks the true scores that the session put last."""
    if name == "auto":
        name = default()
    if name.startswith("onnx:"):
        return Learned(name.removeprefix("onnx:"))
    if name == "quest":
        return Quest(attached)
    return {"ema": Average(0.9), "last": Average(0.0), "oracle": Average(0.0), "window": Nothing()}[name]
