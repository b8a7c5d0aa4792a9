"""What will be attended next: ``predict(history) -> scores``. A predictor knows nothing of budgets or of where blocks are."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Protocol

import numpy as np
import numpy.typing as npt
import psutil

from . import native, published
from .history import DECAYS, History

ALL = slice(None)
LOOK_AHEAD = ("oracle", "quest")  # run each step twice, to see the step's own attention or query before selecting; for evaluation


class Predictor(Protocol):
    """Scores of the blocks for the steps to come."""

    n_steps_kept: int  # of raw scores that it wants the history to keep
    state_bytes_per_block: int
    by_rows: bool  # whether it can be asked for some rows only

    def predict(self, history: History, n_blocks: int, rows: slice = ALL) -> npt.NDArray[np.float32]:
        """float32, shape (n_rows, >= n_blocks): larger means more attention; only the order within a row counts.

        rows: those asked for, where ``by_rows``.
        """
        ...


class Average:
    """The exponential average of one decay; decay 0 is the score of the last step."""

    n_steps_kept = 0
    state_bytes_per_block = 4
    by_rows = True

    def __init__(self, decay: float):
        self._index = DECAYS.index(decay)

    def predict(self, history: History, n_blocks: int, rows: slice = ALL) -> npt.NDArray[np.float32]:
        return history.averages[rows, self._index, :]


class Nothing:
    """No block between sink and window is worth keeping (sink and window only)."""

    n_steps_kept = 0
    state_bytes_per_block = 0
    by_rows = False  # nothing to save

    def predict(self, history: History, n_blocks: int, rows: slice = ALL) -> npt.NDArray[np.float32]:
        return np.full((len(history.averages), n_blocks), -1.0, np.float32)


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
        self.by_rows = self._network.by_rows

    def predict(self, history: History, n_blocks: int, rows: slice = ALL) -> npt.NDArray[np.float32]:
        if self.by_rows:
            return self._network.predict(history, n_blocks, rows)
        return np.maximum(self._network.predict(history, n_blocks), 0)  # no share of attention is negative


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
    if name in published.BY_NAME:
        return published.BY_NAME[name](attached)
    if name == "window":
        return Nothing()
    return Average({"ema": 0.9, "last": 0.0, "oracle": 0.0}[name])
