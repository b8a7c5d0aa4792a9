"""Run a predictor's network with ONNX Runtime: what was seen of attention in, expected attention out. No torch."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kvcast.history import History

HERE = Path(__file__).resolve().parent
OUTPUT = "scores"
PROBE = 32  # blocks to either side of the one that is changed, to see how far a network looks
CUDA = "CUDAExecutionProvider"
Floats = npt.NDArray[np.float32]


class PredictorError(ValueError):
    """A predictor file is missing or cannot be used; the message is one sentence."""


def unusable() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises on networks that it cannot load or run."""
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    names = ("Fail", "InvalidProtobuf", "InvalidGraph", "NotImplemented", "InvalidArgument", "RuntimeException")
    return (*(getattr(errors, name) for name in names), RuntimeError, UnicodeDecodeError)  # the last, of a message that quotes the file


class StreamPredictor:
    """A network on the runtime's exponential averages: ``averages`` (n_rows, n_averages, n_blocks) to ``scores`` (n_rows, n_blocks).

    Where it looks at a few neighbours only, the scores of blocks that nothing was observed of are kept, and the others are computed as
    one long row of segments. At a row's first blocks they differ a little from those of a whole row, whose edge the network pads.
    """

    inputs = ("averages",)
    n_steps_kept = 0
    state_bytes_per_block = 20
    by_rows = True

    def __init__(self, session: Any, name: str):
        self._session, self._name = session, name
        self.on_gpu = session.get_providers()[0] == CUDA
        shape = session.get_inputs()[0].shape
        if len(shape) != 3:
            raise PredictorError(f"predictor {name!r} takes averages of {len(shape)} dimensions; kvcast gives 3, export it again")
        n_wanted, n_given = shape[1], 5
        if isinstance(n_wanted, int) and n_wanted != n_given:
            raise PredictorError(f"predictor {name!r} wants {n_wanted} averages per block; this runtime keeps {n_given}")
        for shape in ((2, 33), (3, 70)):  # one that is made for a shape is found out by the other
            check(self.run(np.full((shape[0], n_given, shape[1]), 0.01, np.float32)), shape, name)
        self._reach = None if self.on_gpu else self._find_reach(n_given)  # a GPU takes long for each new length
        self._kept: Floats | None = None
        self._kept_at = np.empty(0, np.int64)  # by row: history.clock when its scores were computed
        self._lock = threading.Lock()  # several threads ask for rows of their own

    def _find_reach(self, n_given: int) -> int | None:
        """How many blocks away a change still matters; None: further than is worth it."""
        probe = np.full((1, n_given, 2 * PROBE + 1), 0.01, np.float32)
        before = self.run(probe)[0]
        probe[0, :, PROBE] = 0.5
        moved = np.flatnonzero(self.run(probe)[0] != before)
        reach = int(np.abs(moved - PROBE).max(initial=1))
        return reach if reach <= PROBE // 4 else None

    def predict(self, history: History, n_blocks: int, rows: slice = slice(None)) -> Floats:
        reach = self._reach
        if reach is None:
            history.catch_up(rows)
            return self.run(np.ascontiguousarray(history.averages[rows, :, :n_blocks]))
        n_blocks = min(n_blocks, history.averages.shape[2])
        with self._lock:
            shape = len(history.averages), history.averages.shape[2]
            if self._kept is None or self._kept.shape != shape:
                self._kept, self._kept_at = np.zeros(shape, np.float32), np.full(shape[0], -1, np.int64)
            kept = self._kept
        now = history.clock
        segments, averages = history.changed(rows, n_blocks, self._kept_at[rows], reach)
        if len(segments):
            history.scatter(self.run(averages[None])[0], segments, reach, kept[rows])
        self._kept_at[rows] = now
        return kept[rows, :n_blocks]

    def run(self, averages: Floats) -> Floats:
        if not self.on_gpu:
            return run(self._session, [OUTPUT], {"averages": averages}, [averages.shape[::2]], self._name)[0]
        binding = self._session.io_binding()
        binding.bind_cpu_input("averages", averages)
        binding.bind_output(OUTPUT, "cpu")
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()[0]


class PaperPredictor:
    """The published network over the last 64 steps, computed exactly from the steps that are new since the last prediction.

    Its second convolution is followed by a mean over time. A step of its output is the same wherever the window of 64
    begins or ends, but for the two steps at either end, which see the zero padding. So the sum over the inner steps is kept
    (``inner``, (n_rows, 32, n_blocks)): m new steps add m rows, computed from the m + 4 newest; m rows leave, from the m + 4
    oldest of the window before; the ends are computed from 4 rows each. For m = 1: stacks of 5, 5 and 4 rows instead of 64.
    """

    inputs = ("newest", "leaving", "oldest", "inner", "n_steps")
    n_steps = 64
    most_new = 24  # from here on the whole window is cheaper
    n_steps_kept = n_steps + most_new
    state_bytes_per_block = 4 * (n_steps_kept + 32)
    by_rows = False  # what is kept from one prediction to the next is that of all rows
    on_gpu = False
    width = 64  # blocks are taken in multiples of this, so that the right edge seldom moves

    def __init__(self, session: Any, name: str):
        self._session, self._name = session, name
        self._inner: Floats | None = None
        self._n_seen, self._epoch = 0, -1
        for n_steps, shape in ((9, (2, 33)), (70, (3, 70))):
            check(self.run(np.full((n_steps, *shape), 0.01, np.float32), n_steps), shape, name)
        self._inner = None

    def predict(self, history: History, n_blocks: int, rows: slice = slice(None)) -> Floats:
        if history.epoch != self._epoch:
            self._inner, self._epoch = None, history.epoch
        n = min(-(-n_blocks // self.width) * self.width, history.averages.shape[2])
        return self.run(history.last_rows(self.n_steps_kept)[:, :, :n], history.n_observed)

    def run(self, rows: Floats, n_seen: int) -> Floats:
        """``rows`` (n_steps, n_rows, n_blocks), oldest first, of which the last is step number ``n_seen``."""
        if len(rows) < 4:
            rows = np.concatenate([np.repeat(rows[:1], 4 - len(rows), 0), rows])
        n_new = n_seen - self._n_seen
        inner = self._inner
        if inner is not None and inner.shape[2] == rows.shape[2] and n_new == 0:
            newest = rows[-4:]
            leaving = rows[-4:]
        elif inner is None or inner.shape[2] != rows.shape[2] or n_new > self.most_new or len(rows) < self.n_steps + n_new:
            inner = np.zeros((rows.shape[1], 32, rows.shape[2]), np.float32)
            newest, leaving = rows[-self.n_steps :], rows[:4]
        else:
            newest = rows[-n_new - 4 :]
            leaving = rows[-self.n_steps - n_new :][: n_new + 4]
        window = rows[-self.n_steps :]
        stacks = {"newest": newest, "leaving": leaving, "oldest": window[:4]}
        given: dict[str, Any] = {name: np.ascontiguousarray(x.transpose(1, 0, 2)) for name, x in stacks.items()}
        given |= {"inner": inner, "n_steps": np.array(len(window), np.float32)}
        scores, inner = run(self._session, [OUTPUT, "new_inner"], given, [inner.shape[::2], inner.shape], self._name)
        if len(window) == self.n_steps:  # a shorter window grows at its end only
            self._inner, self._n_seen = inner, n_seen
        return scores


def run(session: Any, outputs: list[str], given: dict[str, Any], shapes: list[tuple[int, ...]], name: str) -> list[Floats]:
    """A network's outputs, of these shapes; PredictorError when it yields others or none."""
    try:
        found = session.run(outputs, given)
    except unusable() as error:
        raise PredictorError(f"predictor {name!r} cannot be run ({reason(error)}); export it again or use predictor='ema'") from error
    if [(x.shape, x.dtype) for x in found] != [(shape, np.float32) for shape in shapes]:
        raise PredictorError(f"predictor {name!r} yields arrays of other shapes than it was asked for; export it again")
    return found


def check(probe: Floats, shape: tuple[int, int], name: str) -> None:
    if probe.shape != shape or not np.isfinite(probe).all():
        raise PredictorError(f"predictor {name!r} yields values that are not numbers; its weights are damaged, export it again")


def open_predictor(path: Path | bytes, n_threads: int = 1, *, cuda: bool = False) -> StreamPredictor | PaperPredictor:
    """Load a network; its inputs say which kind it is.

    Parameters
    ----------
    path : Path or bytes
        An ONNX file, or its content, with float32 inputs as in ``StreamPredictor`` or ``PaperPredictor``.
    n_threads : int
        Of ONNX Runtime; 1 leaves the other cores to the model.
    cuda : bool
        Run it on the GPU, on a stream of ONNX Runtime's own; on the CPU with a warning where its CUDA provider cannot be used.

    Raises
    ------
    PredictorError
        ONNX Runtime is not installed, or the file is missing, not ONNX, of another shape, or yields NaN.
    """
    try:
        import onnxruntime
    except ImportError:
        raise PredictorError("ONNX predictors need ONNX Runtime: pip install onnxruntime, or onnxruntime-gpu for CUDA") from None
    name = path.name if isinstance(path, Path) else "embedded"
    if isinstance(path, Path) and not path.is_file():
        raise PredictorError(f"there is no predictor {str(path)!r}; those that come with kvcast: {', '.join(shipped())}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # cores that wait belong to the model
    options.log_severity_level = 4
    providers = ["CPUExecutionProvider"]
    if cuda and CUDA in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()
        providers.insert(0, CUDA)
    try:
        session = onnxruntime.InferenceSession(str(path) if isinstance(path, Path) else path, options, providers=providers)
        shapes = {i.name: i.shape for i in session.get_inputs()}  # their names may be no text
        outputs = [o.name for o in session.get_outputs()]
    except unusable() as error:
        raise PredictorError(f"predictor {name!r} cannot be loaded ({reason(error)}); export it again or use predictor='ema'") from error
    if cuda and session.get_providers()[0] != CUDA:
        warnings.warn("ONNX Runtime has no usable CUDA provider, so the predictor runs on the CPU; onnxruntime-gpu has one", stacklevel=2)
    given = tuple(shapes)
    for kind in (StreamPredictor, PaperPredictor):
        if given == kind.inputs and OUTPUT in outputs:
            return kind(session, name)
    wanted = " or ".join(str(kind.inputs) for kind in (StreamPredictor, PaperPredictor))
    raise PredictorError(f"predictor {name!r} takes {given}; kvcast gives {wanted}; export it again or use predictor='ema'")


def reason(error: BaseException) -> str:
    return str(error).splitlines()[0][:160]


def shipped() -> list[str]:
    """Names of the predictors that come with kvcast."""
    return sorted(p.stem for p in HERE.glob("*.onnx"))


def resolve(name: str) -> Path:
    """The file of a shipped predictor's name, or of a path."""
    return HERE / f"{name}.onnx" if "/" not in name and not name.endswith(".onnx") else Path(name)
