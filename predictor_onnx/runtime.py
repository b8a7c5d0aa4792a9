"""ONNX Runtime, imported here and nowhere else: without telemetry, not older than is safe, and with an end to every run."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import telemetry

# Before 1.24.1 a network could name any file and any address in memory as the place of its weights, before 1.24.3 ".." in a network that
# comes as bytes, and Gather read past its end; before 1.25 links, before 1.27 sparse constants, before 1.28 nodes of the kind Constant.
# No network of that kind passes ``network``, so the last version for Python 3.10 will do there.
OLDEST = (1, 23, 2) if sys.version_info < (3, 11) else (1, 28)
CUDA = "CUDAExecutionProvider"
PREDICTION_S = 4.0  # that a network which does not come with kvcast may take for one prediction
CALL_VALUES = 1 << 26  # float32 that one call computes: 256 MiB
CALL_OPERATIONS = 1 << 30  # a tenth of a second on one core, seconds where numbers are denormal; an interrupt is seen between calls
ROW_VALUES, ROW_OPERATIONS = 1 << 29, 1 << 33  # of the blocks of one KV head, which cannot be divided
WATCHED = 1 << 28  # operations: a shorter call needs nobody who ends it
Floats = npt.NDArray[np.float32]


class PredictorError(ValueError):
    """A predictor file is missing or cannot be used; the message is one sentence."""


def onnxruntime() -> ModuleType:
    """The module.

    Raises
    ------
    PredictorError
        It is not installed, or too old.
    """
    telemetry.switch_off()
    try:
        import onnxruntime as module
    except ModuleNotFoundError:
        raise PredictorError("ONNX predictors need ONNX Runtime: pip install onnxruntime, or onnxruntime-gpu for CUDA") from None
    except ImportError as error:
        raise PredictorError(f"ONNX Runtime cannot be imported ({reason(error)}); install it again") from error
    module.disable_telemetry_events()  # of Windows' own kind, which looks at no variable
    if version_of(module.__version__) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise PredictorError(
            f"ONNX Runtime {module.__version__} has known holes; pip install --upgrade 'onnxruntime>={oldest}', or use predictor='ema'"
        )
    return module


def version_of(text: str) -> tuple[int, ...]:
    """The numbers of a version, as far as there are any."""
    numbers = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def unusable() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises on networks that it cannot load or run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = [x for x in vars(state).values() if isinstance(x, type) and issubclass(x, Exception)]
    return (*own, RuntimeError, UnicodeDecodeError, MemoryError)  # the last but one, of a message that quotes the file


def open_session(network: bytes, n_threads: int, cuda: bool) -> Any:
    """A session of a network that ``network.Network.written`` made."""
    module = onnxruntime()
    options = module.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores that wait belong to the model
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    if cuda and CUDA in module.get_available_providers():
        module.preload_dlls()
        providers.insert(0, CUDA)
    return module.InferenceSession(network, options, providers=providers)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a network's calls.

    Attributes
    ----------
    n_values, n_operations : int
        Of one block of one row.
    seconds : float or None
        Of one prediction.
    """

    n_values: int
    n_operations: int
    seconds: float | None

    @property
    def n_cells(self) -> int:
        """Rows times blocks of one call."""
        return max(1, min(CALL_VALUES // self.n_values, CALL_OPERATIONS // self.n_operations))

    def n_rows(self, n_blocks: int, name: str) -> int:
        """Of one call.

        Raises
        ------
        PredictorError
            There is no room for one.
        """
        if self.n_values * n_blocks > ROW_VALUES or self.n_operations * n_blocks > ROW_OPERATIONS:
            raise PredictorError(f"predictor {name!r} is too large for a context of {n_blocks:,} blocks; use predictor='ema'")
        return max(1, self.n_cells // n_blocks)


class Prediction:
    """The calls of one prediction, which end together when the time is over."""

    def __init__(self, bounds: Bounds, name: str):
        self._bounds, self._name = bounds, name
        self._end = None if bounds.seconds is None else time.monotonic() + bounds.seconds

    def call(
        self, session: Any, outputs: list[str], given: dict[str, Any], shapes: list[tuple[int, ...]], on_gpu: bool = False
    ) -> list[Floats]:
        """A network's outputs, of these shapes, the first of which says how large the call is.

        Raises
        ------
        PredictorError
            It yields others, values that are no numbers or nothing, or takes too long.
        """
        try:
            with self._ended(shapes[0]) as options:
                found = _on_gpu(session, outputs, given, options) if on_gpu else session.run(outputs, given, options)
        except unusable() as error:
            self._check_time()
            raise PredictorError(
                f"predictor {self._name!r} cannot be run ({reason(error)}); export it again or use predictor='ema'"
            ) from error
        if [(x.shape, x.dtype) for x in found] != [(shape, np.float32) for shape in shapes]:
            raise PredictorError(f"predictor {self._name!r} yields arrays of other shapes than it was asked for; export it again")
        if not all(np.isfinite(x).all() for x in found):
            raise PredictorError(f"predictor {self._name!r} yields values that are not numbers; its weights are damaged, export it again")
        self._check_time()
        return found

    def _check_time(self) -> None:
        if self._end is not None and time.monotonic() > self._end:
            raise PredictorError(
                f"predictor {self._name!r} takes longer than {self._bounds.seconds:g} s for a prediction; use predictor='ema'"
            )

    @contextlib.contextmanager
    def _ended(self, shape: tuple[int, ...]) -> Iterator[Any]:
        """Options of a run, which somebody ends in time if it may be a long one."""
        n_operations = shape[0] * shape[1] * self._bounds.n_operations
        if self._end is None or n_operations < WATCHED:
            yield None
            return
        options = onnxruntime().RunOptions()
        timer = threading.Timer(self._end - time.monotonic(), setattr, (options, "terminate", True))
        timer.daemon = True
        timer.start()
        try:
            yield options
        finally:
            timer.cancel()


def _on_gpu(session: Any, outputs: list[str], given: dict[str, Any], options: Any) -> list[Floats]:
    binding = session.io_binding()
    for name, value in given.items():
        binding.bind_cpu_input(name, value)
    for name in outputs:
        binding.bind_output(name, "cpu")
    session.run_with_iobinding(binding, options)
    return binding.copy_outputs_to_cpu()


def reason(error: BaseException) -> str:
    """The first line of what an error says, printable."""
    lines = str(error).splitlines() or [type(error).__name__]
    return "".join(x if x.isprintable() else "?" for x in lines[0][:160])
