"""Run a predictor's network with ONNX Runtime: what was seen of attention in, expected attention out. No torch."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .network import BYTES_MAX, Network, read_network, shown
from .operators import Cost, Shape, cost_of_block
from .protobuf import Damaged
from .runtime import CUDA, PREDICTION_S, Bounds, Floats, Prediction, PredictorError, onnxruntime, open_session, reason, unusable

if TYPE_CHECKING:
    from kvcast.sparse.history import History

HERE = Path(__file__).resolve().parent
OUTPUT = "scores"
N_AVERAGES = 5  # of a block, one per decay
PROBE = 32  # blocks to either side of the one that is changed, to see how far a network looks
SCORE_MAX = np.float32(1 << 20)  # what selects adds scores up

__all__ = ["PaperPredictor", "PredictorError", "StreamPredictor", "examine", "open_predictor", "read_file", "resolve", "shipped"]


class StreamPredictor:
    """A network on the runtime's exponential averages: ``averages`` (n_rows, n_averages, n_blocks) to ``scores`` (n_rows, n_blocks).

    Where it looks at a few neighbours only, the scores of blocks that nothing was observed of are kept, and the others are computed as
    one long row of segments. At a row's first blocks they differ a little from those of a whole row, whose edge the network pads.
    """

    inputs = ("averages",)
    declared: tuple[tuple[str | int, ...], ...] = (("rows", N_AVERAGES, "blocks"),)
    outputs = (OUTPUT,)
    n_steps_kept = 0
    state_bytes_per_block = 20
    by_rows = True

    def __init__(self, session: Any, name: str, bounds: Bounds):
        self._session, self._name, self._bounds = session, name, bounds
        self.on_gpu = session.get_providers()[0] == CUDA
        self._reach: int | None = None
        for n_rows, n_blocks in ((2, 33), (3, 70)):  # one that is made for a shape is found out by the other
            self.run(np.full((n_rows, N_AVERAGES, n_blocks), 0.01, np.float32))
        self._reach = None if self.on_gpu else self._find_reach(N_AVERAGES)  # a GPU takes long for each new length
        self._kept: Floats | None = None
        self._kept_at = np.empty(0, np.int64)  # by row: history.clock when its scores were computed
        self._lock = threading.Lock()  # several threads ask for rows of their own

    @staticmethod
    def shapes(n_rows: int, n_blocks: int) -> Iterator[tuple[dict[str, Shape], dict[str, Shape]]]:
        """Of inputs and outputs."""
        yield {"averages": (n_rows, N_AVERAGES, n_blocks)}, {OUTPUT: (n_rows, n_blocks)}

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
        n_rows, _, n_blocks = averages.shape
        prediction = Prediction(self._bounds, self._name)

        def call(part: Floats) -> Floats:
            given = {"averages": np.ascontiguousarray(part)}
            (scores,) = prediction.call(self._session, [OUTPUT], given, [part.shape[::2]], self.on_gpu)
            return np.clip(scores, 0, SCORE_MAX, out=scores)  # no share of attention is negative

        n, reach = self._bounds.n_cells, self._reach
        if n_rows * n_blocks <= n:
            return call(averages)
        if reach is not None and n_rows == 1 and n > 4 * reach:  # pieces of a long row, each with what it looks at beside it
            step, parts = n - 2 * reach, []
            for begin in range(0, n_blocks, step):
                low = max(0, begin - reach)
                part = call(averages[:, :, low : begin + step + reach])
                parts.append(part[:, begin - low :][:, :step])
            return np.concatenate(parts, 1)
        step = self._bounds.n_rows(n_blocks, self._name)
        return np.concatenate([call(averages[i : i + step]) for i in range(0, n_rows, step)])


class PaperPredictor:
    """The published network over the last 64 steps, computed exactly from the steps that are new since the last prediction.

    Its second convolution is followed by a mean over time. A step of its output is the same wherever the window of 64
    begins or ends, but for the two steps at either end, which see the zero padding. So the sum over the inner steps is kept
    (``inner``, (n_rows, 32, n_blocks)): m new steps add m rows, computed from the m + 4 newest; m rows leave, from the m + 4
    oldest of the window before; the ends are computed from 4 rows each. For m = 1: stacks of 5, 5 and 4 rows instead of 64.
    """

    inputs = ("newest", "leaving", "oldest", "inner", "n_steps")
    declared: tuple[tuple[str | int, ...], ...] = (*(("rows", "steps", "blocks"),) * 3, ("rows", 32, "blocks"), ())
    outputs = (OUTPUT, "new_inner")
    n_steps = 64
    most_new = 24  # from here on the whole window is cheaper
    n_steps_kept = n_steps + most_new
    state_bytes_per_block = 4 * (n_steps_kept + 32)
    by_rows = False  # what is kept from one prediction to the next is that of all rows
    on_gpu = False
    width = 64  # blocks are taken in multiples of this, so that the right edge seldom moves

    def __init__(self, session: Any, name: str, bounds: Bounds):
        self._session, self._name, self._bounds = session, name, bounds
        self._inner: Floats | None = None
        self._n_seen, self._epoch = 0, -1
        for n_steps, shape in ((9, (2, 33)), (70, (3, 70))):
            self.run(np.full((n_steps, *shape), 0.01, np.float32), n_steps)
        self._inner = None

    @classmethod
    def shapes(cls, n_rows: int, n_blocks: int) -> Iterator[tuple[dict[str, Shape], dict[str, Shape]]]:
        """Of inputs and outputs, with the fewest and with the most steps."""
        inner = n_rows, 32, n_blocks
        for newest, leaving in ((4, 4), (cls.n_steps, cls.most_new + 4)):
            stacks = {name: (n_rows, n, n_blocks) for name, n in (("newest", newest), ("leaving", leaving), ("oldest", 4))}
            yield {**stacks, "inner": inner, "n_steps": ()}, {OUTPUT: (n_rows, n_blocks), "new_inner": inner}

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
        given["inner"] = inner
        n_steps = np.array(len(window), np.float32)
        prediction = Prediction(self._bounds, self._name)
        step, found = self._bounds.n_rows(rows.shape[2], self._name), []
        for i in range(0, rows.shape[1], step):
            part = {name: x[i : i + step] for name, x in given.items()}
            shape = part["inner"].shape
            found.append(prediction.call(self._session, list(self.outputs), {**part, "n_steps": n_steps}, [shape[::2], shape]))
        scores, inner = found[0] if len(found) == 1 else map(np.concatenate, zip(*found))
        if len(window) == self.n_steps:  # a shorter window grows at its end only
            self._inner, self._n_seen = inner, n_seen
        return np.clip(scores, 0, SCORE_MAX)


def open_predictor(path: Path | bytes, n_threads: int = 1, *, cuda: bool = False) -> StreamPredictor | PaperPredictor:
    """Load a network; its inputs say which kind it is. A network is read and written anew before ONNX Runtime sees it: see ``network``.

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
        ONNX Runtime is not installed or too old, or the file is missing, not ONNX, of another shape, more than a predictor needs
        (``network``, ``operators``), or yields NaN. A prediction raises it, too, where it fails or takes longer than
        ``runtime.PREDICTION_S``.
    """
    name = path.name if isinstance(path, Path) else "embedded"
    onnxruntime()
    network, kind, cost = examine(path if isinstance(path, bytes) else read_file(path), name)
    inputs = {given: len(sizes) for given, sizes in zip(kind.inputs, kind.declared)}
    try:
        session = open_session(network.written(inputs, dict(zip(kind.outputs, (2, 3)))), n_threads, cuda)
    except unusable() as error:
        raise PredictorError(_cannot_be_loaded(name, error)) from error
    if cuda and session.get_providers()[0] != CUDA:
        warnings.warn("ONNX Runtime has no usable CUDA provider, so the predictor runs on the CPU; onnxruntime-gpu has one", stacklevel=2)
    ours = isinstance(path, Path) and path.resolve().parent == HERE
    return kind(session, name, Bounds(cost.n_values, cost.n_operations, None if ours else PREDICTION_S))


def examine(content: bytes, name: str) -> tuple[Network, type[StreamPredictor] | type[PaperPredictor], Cost]:
    """Look at a network without ONNX Runtime: what was read, what runs it, and what a block costs.

    Raises
    ------
    PredictorError
        ``open_predictor`` would not load it.
    """
    try:
        network = read_network(content)
        kind = _kind(network, name)
        return network, kind, cost_of_block(network, kind.shapes)
    except Damaged as error:
        raise PredictorError(_cannot_be_loaded(name, error)) from error


def _cannot_be_loaded(name: str, error: Exception) -> str:
    return f"predictor {name!r} cannot be loaded ({reason(error)}); export it again or use predictor='ema'"


def _kind(network: Network, name: str) -> type[StreamPredictor] | type[PaperPredictor]:
    """What takes inputs like these."""
    for kind in (StreamPredictor, PaperPredictor):
        if network.inputs.keys() != set(kind.inputs) or not set(kind.outputs) <= set(network.outputs):
            continue
        for given, wanted in zip(kind.inputs, kind.declared):
            sizes = network.inputs[given]
            if sizes is not None and len(sizes) != len(wanted):
                raise PredictorError(
                    f"predictor {name!r} takes {given} of {len(sizes)} dimensions; kvcast gives {len(wanted)}, export it again"
                )
            for size, want in zip(sizes or (), wanted):
                if size is not None and isinstance(want, int) and size != want:
                    raise PredictorError(f"predictor {name!r} wants {size} {given} per block; this runtime keeps {want}")
                if size is not None and isinstance(want, str):
                    raise PredictorError(f"predictor {name!r} is made for {size} {want}; their number changes, export it without")
        return kind
    kinds = " or ".join(str(kind.inputs) for kind in (StreamPredictor, PaperPredictor))
    given = ", ".join(shown(x) for x in [*network.inputs][:6])
    raise PredictorError(f"predictor {name!r} takes ({given},); kvcast gives {kinds}; export it again or use predictor='ema'")


def read_file(path: Path) -> bytes:
    """A network's file, if it is one of bearable size.

    Raises
    ------
    PredictorError
    """
    if not path.is_file():
        raise PredictorError(f"there is no predictor {str(path)!r}; those that come with kvcast: {', '.join(shipped())}")
    try:
        with path.open("rb") as file:
            return file.read(BYTES_MAX + 1)
    except OSError as error:
        raise PredictorError(f"predictor {str(path)!r} cannot be read ({error.strerror or error}); check the file") from error


def shipped() -> list[str]:
    """Names of the predictors that come with kvcast."""
    return sorted(p.stem for p in HERE.glob("*.onnx"))


def resolve(name: str) -> Path:
    """The file of a shipped predictor's name, or of a path."""
    return HERE / f"{name}.onnx" if "/" not in name and not name.endswith(".onnx") else Path(name)
