"""What will be attended next: ``predict(history) -> scores``. A predictor knows nothing of budgets or of where blocks are."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Protocol

import numpy as np
import numpy.typing as npt

from predictor_onnx.features import DECAYS
from predictor_onnx.infer import PredictorError, open_predictor, resolve
from predictor_onnx.runtime import onnxruntime

from ..bindings.context import NativeContext
from ..config import SparseConfig
from ..cores import usable_cores
from ..errors import KvcastError
from ..gguf.embedded_predictor import Embedded
from . import baselines as published
from .history import History

ALL = slice(None)
LOOK_AHEAD = ("oracle", "quest")  # run each step twice, to see the step's own attention or query before selecting; for evaluation


class Predictor(Protocol):
    """Scores of the blocks for the steps to come."""

    n_steps_kept: int  # of raw scores that it wants the history to keep
    state_bytes_per_block: int
    by_rows: bool  # whether it can be asked for some rows only
    on_gpu: bool  # one call for all rows then, not one for every thread that selects

    def predict(self, history: History, n_blocks: int, rows: slice = ALL) -> npt.NDArray[np.float32]:
        """float32, shape (n_rows, >= n_blocks): larger means more attention; only the order within a row counts.

        rows: those asked for, where ``by_rows``. Who reads ``history.averages`` has the history ``catch_up`` first.
        """
        ...


class EmaPredictor:
    """The exponential average of one decay; decay 0 is the score of the last step."""

    n_steps_kept = 0
    state_bytes_per_block = 4
    by_rows = True
    on_gpu = False

    def __init__(self, decay: float):
        self._index = DECAYS.index(decay)

    def predict(self, history: History, n_blocks: int, rows: slice = ALL) -> npt.NDArray[np.float32]:
        history.catch_up(rows)
        return history.averages[rows, self._index, :]


class SinkWindowOnly:
    """No block between sink and window is worth keeping (sink and window only)."""

    n_steps_kept = 0
    state_bytes_per_block = 0
    by_rows = False  # nothing to save
    on_gpu = False

    def predict(self, history: History, n_blocks: int, rows: slice = ALL) -> npt.NDArray[np.float32]:
        return np.full((len(history.averages), n_blocks), -1.0, np.float32)


class OnnxPredictor:
    """A network of ``predictor_onnx``, by name or path, or an ONNX file's content.

    Where a prediction fails, takes too long or is none, that is said once, and the average takes the network's place.

    Raises
    ------
    predictor_onnx.infer.PredictorError
        The file is missing or unusable, or ONNX Runtime is not installed.
    """

    def __init__(self, name: str | bytes, n_threads: int, cuda: bool):
        self._network = open_predictor(resolve(name) if isinstance(name, str) else name, n_threads, cuda=cuda)
        self._average: EmaPredictor | None = None  # in the network's place
        self.n_steps_kept = self._network.n_steps_kept
        self.state_bytes_per_block = self._network.state_bytes_per_block
        self.by_rows = self._network.by_rows
        self.on_gpu = self._network.on_gpu

    def predict(self, history: History, n_blocks: int, rows: slice = ALL) -> npt.NDArray[np.float32]:
        if self._average is None:
            try:
                return self._network.predict(history, n_blocks, rows)
            except PredictorError as error:
                self._give_up(error)
        assert self._average is not None
        return self._average.predict(history, n_blocks, rows)

    def _give_up(self, error: PredictorError) -> None:
        if self._average is None:  # several threads may come to it
            self._average = EmaPredictor(0.9)
            warnings.warn(f"'ema' is used from here on: {error}", stacklevel=1)  # one place, so that it is said once


def default() -> str:
    """What ``auto`` stands for: ``onnx:stream`` where ONNX Runtime can be used, else ``ema``, with a warning."""
    if importlib.util.find_spec("onnxruntime") is None:
        warnings.warn("ONNX Runtime is not installed, so the predictor is 'ema'; pip install onnxruntime", stacklevel=2)
        return "ema"
    try:
        onnxruntime()
    except PredictorError as error:
        warnings.warn(f"the predictor is 'ema': {error}", stacklevel=2)
        return "ema"
    return "onnx:stream"


def make(config: SparseConfig, attached: NativeContext, embedded: Embedded | None = None) -> Predictor:
    """The predictor of a SparseConfig; ``oracle`` ranks the true scores that the session put last.

    ``auto`` is the predictor that travels in the model's file where there is one that can be used.
    """
    name = config.predictor
    # a quarter of the cores: the others are the model's; where several threads ask, beside a GPU, one for each of them
    shared = attached.pool_info.device not in (None, b"CPU")
    n_threads = 1 if shared else max(1, usable_cores() // 4)
    cuda = config.predictor_device == "cuda"
    if name == "auto":
        name = default()
        if embedded is not None and name != "ema":
            try:
                return OnnxPredictor(embedded.checked(), n_threads, cuda)
            except (KvcastError, PredictorError) as error:
                warnings.warn(f"the model's own predictor is left out and {name!r} used instead: {error}", stacklevel=1)
    if name.startswith("onnx:"):
        return OnnxPredictor(name.removeprefix("onnx:"), n_threads, cuda)
    if name in published.BY_NAME:
        return published.BY_NAME[name](attached)
    if name == "window":
        return SinkWindowOnly()
    return EmaPredictor({"ema": 0.9, "last": 0.0, "oracle": 0.0}[name])
