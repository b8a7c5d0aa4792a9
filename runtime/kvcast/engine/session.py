"""The decode loop of one context: predict, select, step, observe.

One token a step; prompts run dense but for their last tokens, whose scores prime the history. A token and its draft run dense
in one batch, and those that stay enter the history. The store is llama.cpp's own KV cache and is complete after every step; what
is kept here (history, lists) can always be made again from it by running the last tokens once more.

Whatever ends a step or a prompt before its end - an error of llama.cpp, a callback that raises, an interrupt - leaves the session
``busy``; ``undo`` then brings it back to ``n_done`` tokens, the last ones of which all is known. Whoever calls is to call it, and what
begins next does so first where nobody did.
"""

from __future__ import annotations

import contextlib
import operator
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from predictor_onnx.features import DECAYS

from ..bindings import api as native
from ..bindings.context import Attached
from ..blocks import BLOCK_TOKENS
from ..config import SparseConfig
from ..errors import KvcastError
from ..gguf.embedded_predictor import Embedded
from ..gguf.memory import HISTORY_TOKENS, n_taps_within
from ..sparse import predictors
from ..sparse.history import History
from ..sparse.selection import append_block, list_all, select, select_free
from . import checkpoints
from .checkpoints import Checkpoints, State

GUARD_TOKENS = 8  # of those, held back to try the predictor on
GUARD_MARGIN = 0.98  # of what the average holds of their attention, that a network must hold
COUNT_MAX = 1 << 40  # of steps, in a file
LOOK_S = 1.0  # how often one who waits looks whether the thread beside still lives
OVERLAP_MIN = 1 << 18  # rows * blocks from which selecting is worth a thread of its own (a millisecond or more)

AttentionFn = Callable[[int, int, np.ndarray], None]
KvFn = Callable[[int, int, np.ndarray, np.ndarray], None]


@dataclass
class StepTimes:
    """Sums over sparse steps, seconds."""

    n_steps: int = 0
    n_calibrations: int = 0
    total: float = 0.0
    predict: float = 0.0
    select: float = 0.0
    observe: float = 0.0
    gather: float = 0.0  # device path: from the store, and up
    wait: float = 0.0  # for what runs beside the step, after the step's own computing was done; an upper bound where that is a GPU's
    calibrate: float = 0.0  # whole duration of the calibrating steps
    blocks_read: int = 0
    blocks_dense: int = 0  # that a dense step would have read
    share_sum: float = 0.0  # of the estimated recovery
    attention_us: int = 0
    choose_us: int = 0
    summary_bytes_read: int = 0
    moves: list[int] = field(default_factory=list)  # device path: blocks brought into the pool, by step

    def ms(self, seconds: float) -> float:
        return 1e3 * seconds / max(1, self.n_steps)


@dataclass
class Set:
    """The lists of a step, and what it may choose itself; shapes as in ``selection``."""

    blocks: np.ndarray
    n_listed: np.ndarray
    n_free: np.ndarray
    shares: np.ndarray
    weights: np.ndarray | None
    free_range: tuple[int, int] = (0, 0)

    def map(self, make: Callable[[np.ndarray], np.ndarray]) -> Set:
        """One made of these arrays."""
        weights = None if self.weights is None else make(self.weights)
        return Set(make(self.blocks), make(self.n_listed), make(self.n_free), make(self.shares), weights)

    def copy(self, other: Set) -> None:
        """Take over what ``other`` holds."""
        longest = int(other.n_listed.max())
        self.blocks[:, :longest] = other.blocks[:, :longest]
        self.n_listed[:], self.n_free[:], self.shares[:], self.free_range = other.n_listed, other.n_free, other.shares, other.free_range
        if self.weights is not None and other.weights is not None:
            self.weights[:, : self.free_range[1]] = other.weights[:, : self.free_range[1]]


@dataclass
class Session:
    """Sparse attention on one llama_context.

    Parameters
    ----------
    ctx : llama_context_p
    config : SparseConfig
    n_batch : int
        Tokens of one dense batch of a prompt.
    n_bytes_per_tap : int
        Bytes of scores of one history token; bounds the history batch.
    embedded : Embedded or None
        The predictor that travels in the model's file.

    Raises
    ------
    SparseUnsupported
        The context cannot be served.
    """

    ctx: int
    config: SparseConfig
    n_batch: int
    n_bytes_per_tap: int = 0
    embedded: Embedded | None = None
    times: StepTimes = field(default_factory=StepTimes)

    def __post_init__(self) -> None:
        trace = native.TRACE_HEAD if self.config.trace or self.config.predictor == "quest" else native.TRACE_NONE
        # a batch in history mode is one of llama.cpp's, which cuts larger ones
        n_taps = min(n_taps_within(self.n_bytes_per_tap), native.llama_cpp.llama_n_ubatch(self.ctx))
        self.attached = self._attach(n_taps, trace)
        try:
            self._set_up()
        except BaseException:
            self.attached.close()
            raise

    def _set_up(self) -> None:
        info = self.attached.info
        self.n_rows = info.n_layer * info.n_head_kv
        self.blocks = self.attached.blocks.reshape(self.n_rows, info.n_blocks)
        self.n_listed = self.attached.n_listed.reshape(self.n_rows)
        self.scores = self.attached.scores.reshape(self.n_rows, info.n_blocks)
        self.weights, self.estimates = (
            None if x is None else x.reshape(self.n_rows, info.n_blocks) for x in (self.attached.weights, self.attached.estimates)
        )
        self.n_free = self.attached.n_free.reshape(self.n_rows)
        self.shares = self.attached.shares.reshape(self.n_rows)
        self.history = History(info.n_layer, info.n_head_kv, info.n_blocks)
        self.checkpoints = Checkpoints(self.n_batch)
        self.n_tokens = 0  # in the store, as far as the session knows
        self._use(predictors.make(self.config, self.attached, self.embedded))
        self.frozen = False  # keep the lists, take no scores (the ceiling in benchmarks)
        self.n_done = 0  # of them, those whose step or batch is done with
        self.busy = False  # a step or a prompt has begun and not ended
        self._lost = False  # a prompt ended before its end, so that what is known is not that of the tokens: go back first
        self._warned = False  # of a predictor that does worse than the average
        self._age: int | None = None  # steps since the last selection; None: select before the next step
        self._since_calibration = 0
        self._n_listed_blocks = 0  # blocks in use that the lists know of
        self._n_summarised = 0  # tokens in the store when the summary's channels were chosen
        self._poor = False  # the last step's estimated recovery was below the minimum
        self.calibrating = False  # the running step attends to everything, to renew every score
        self.in_sparse_step = False  # which order the scores of the running step have
        self.on_progress: Callable[[int, int], None] | None = None  # prompt tokens done, in all
        self.n_history_taps = 0  # tokens of the last batch in history mode
        self.on_kv: Callable[[int, int], None] | None = None  # called with layer and block
        self._n_reported = 0  # complete blocks that on_kv knows of
        self.on_primed: Callable[[np.ndarray], None] | None = None  # recording: scores (n_layer, n_tokens, n_head_kv, n_blocks)
        self.on_attended: Callable[[int], None] | None = None  # evaluation: called with the position after each sparse step

        self._unconfirmed = (0, 0)  # first position and number of the tokens of a batch that may yet be taken back
        self._worker: ThreadPoolExecutor | None = None
        self._worker_thread: threading.Thread | None = None
        self._pending: Future[None] | None = None  # the selection that runs beside this step
        self._next: Set | None = None  # what it makes
        self._next_n_used = 0  # blocks in use that it was made for; 0: there is none
        self._warm_up()

    def _attach(self, n_taps: int, trace: int) -> Attached:
        return Attached(self.ctx, n_taps, trace, self.config.keeps_summary)

    def _warm_up(self) -> None:
        """Compile or load the kernels now, not in the first step."""
        self._set = Set(self.blocks, self.n_listed, self.n_free, self.shares, self.weights)
        self._warm_up_selection()
        self.history.observe_listed(self.blocks[:0], self.n_listed[:0], self.scores[:0], self.shares[:0])
        self.history.observe_all(self.attached.history_scores, 0, 0, 0)
        self.history.n_observed = 0

    def _warm_up_selection(self) -> None:
        """On a few rows of what this predictor yields: kernels are compiled for the layout of its array."""
        n = self.blocks.shape[1] - 1
        for few in (slice(0, 1), slice(0, 2)):  # one row, as all rows of whole arrays, is laid out otherwise than two
            scores = self.predictor.predict(self.history, n)[few]
            some = self._set.map(operator.itemgetter(few))
            for summary in (False, self.config.summary):
                self._fill(some, scores, n, min(3, n), 1, 1, summary)
        self.n_listed[:2] = self.n_free[:2] = 0
        self.history.epoch += 1  # what a predictor has kept of this is void

    def close(self) -> None:
        self._end_threads()
        self.attached.close()

    def _end_threads(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(wait=True)

    def configure(self, config: SparseConfig, *, frozen: bool = False) -> None:
        """Go on with other settings, and with times from zero; ``frozen`` keeps the next selected set for ever.

        Raises
        ------
        ValueError
            The settings need what this session was not made with.
        KvcastError
            There is no memory for what they remember; the session goes on with those that it had.
        """
        if config.summary and self.weights is None:
            raise ValueError(f"calibrate={config.calibrate!r} needs a summary of the keys; load the model with it")
        try:
            self._use(predictors.make(config, self.attached, self.embedded))
        except MemoryError as error:
            raise KvcastError(f"there is no memory for predictor={config.predictor!r}; the session goes on with the one it had") from error
        self.config = config
        self.frozen = frozen
        self.reset_stats()
        self._warm_up_selection()
        self._drop_set()
        self._since_calibration = 0

    def reset_stats(self) -> StepTimes:
        """Count and time from zero; returns the new sums."""
        self.times = StepTimes()
        return self.times

    # ---- edits

    def truncate(self, n_tokens: int) -> None:
        """The store now ends at ``n_tokens``: drop what was known of the rest. What the dropped tokens taught of others stays; to go on as
        if they had never been, ``go_back``."""
        self.busy = True
        self._settle()
        self._confirm(n_tokens)
        if n_tokens < self.n_tokens:
            self.history.truncate(n_tokens)
        self.n_tokens = self.n_done = n_tokens
        self._drop_set()
        self.attached.invalidate(n_tokens)
        self.checkpoints.cut(n_tokens)
        self._n_summarised = min(self._n_summarised, n_tokens)
        self._n_reported = min(self._n_reported, n_tokens // BLOCK_TOKENS)
        self.busy = False

    def forget(self) -> None:
        """The store's content is unknown (a load): nothing that was known holds."""
        self.truncate(0)

    def undo(self, n_tokens: int) -> None:
        """After whatever ended a step or a prompt before its end: the session is that of ``n_tokens`` again, ``n_done`` at most."""
        if self._worker is not None and self._pending is None:  # an interrupt may have come before what runs beside was noted
            self._pending = self._worker.submit(lambda: None)
        self._settle()
        self._clear_set()
        self.truncate(n_tokens)

    def goes_on(self, n_tokens: int) -> bool:
        """Whether the next step or prompt may simply follow the ``n_tokens`` in the store. Tokens of a draft that are taken back are
        dropped here."""
        first, n = self._unconfirmed
        if first <= n_tokens < first + n and self.n_tokens == first + n and not self.busy:
            self.truncate(n_tokens)
        known = self.history.primed or n_tokens == 0
        return self.n_tokens == n_tokens and known and not self._lost

    def go_back(self, n_tokens: int, n_total: int) -> int:
        """The store was cut at ``n_tokens``, or holds so many that the session does not know, and is to be read on to ``n_total``: be
        again what the session was where prompts began and ended, as if the tokens after that had never been.

        Returns
        -------
        int
            Tokens that stay; those from there to ``n_tokens`` have to be read again.
        """
        self._settle()
        self.busy = self._lost = True
        if n_tokens > self.n_tokens:
            self.checkpoints.adopt(n_tokens)
        checkpoint, n_stay = self.checkpoints.back(n_tokens, n_total)
        n_reported = self._n_reported
        self._clear_set()
        self.truncate(n_stay)
        self._take_state(checkpoint.state)
        if n_stay == n_tokens > 0 and not self.history.primed and n_total - n_tokens < HISTORY_TOKENS:  # too few to prime it
            self.checkpoints.adopt(n_tokens)
            return self.go_back(n_tokens, n_total)
        self._n_reported = min(n_reported, n_tokens // BLOCK_TOKENS)  # what is read again is the same
        self._lost = n_stay < n_tokens
        return n_stay

    def _state(self) -> State | None:
        """What the store alone does not give again; None when nothing is known of attention."""
        self.take_in()
        if not self.history.primed:
            return None
        kept = self.history.kept(self._n_blocks())
        return State(
            history={name: np.array(x) for name, x in kept.items()},
            n_observed=self.history.n_observed,
            summary=self.attached.summary_state if self._n_summarised else None,
            n_summarised=self._n_summarised,
            poor=self._poor,
        )

    def _take_state(self, state: State | None) -> None:
        self.history.truncate(0)
        self._n_summarised, self._poor = 0, False
        if state is not None and self.history.take(state.history, state.n_observed):
            if state.summary is not None:
                self.attached.summary_state = state.summary
                self._n_summarised = state.n_summarised
            self._poor = state.poor

    def _sane(self, state: State, n_tokens: int) -> bool:
        """Whether a state can be one of this model, with any settings, at ``n_tokens``."""
        if state.history.keys() - {"last_steps"} != {"averages"} or (state.summary is not None and state.summary.ndim != 1):
            return False
        try:
            self.history.check(state.history, -(-n_tokens // BLOCK_TOKENS))
        except ValueError:
            return False
        fitting = state.summary is None or not self.attached.n_summary_state or self.attached.takes_summary_state(state.summary)
        known = (state.summary is None) == (state.n_summarised == 0)
        return 0 < state.n_observed < 1 << 62 and 0 <= state.n_summarised <= n_tokens and known and fitting

    def _fits(self, state: State, n_tokens: int) -> bool:
        """Whether a state can be one of this session, at ``n_tokens``."""
        averages, steps = state.history.get("averages"), state.history.get("last_steps")
        n_blocks = -(-n_tokens // BLOCK_TOKENS)
        if averages is None or averages.shape != (self.n_rows, len(DECAYS), n_blocks) or averages.dtype != np.float32:
            return False
        if steps is not None and (steps.ndim != 3 or steps.shape[1:] != (self.n_rows, n_blocks) or steps.dtype != np.float32):
            return False
        if not 0 < state.n_observed < 1 << 62 or not 0 <= state.n_summarised <= n_tokens:
            return False
        if not all(np.isfinite(x).all() for x in state.history.values()) or (steps is None and self.predictor.n_steps_kept):
            return False
        return (state.summary is None) == (state.n_summarised == 0) and (
            state.summary is None or self.attached.takes_summary_state(state.summary)
        )

    def save(self, n_tokens: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Numbers and arrays with which ``restore`` goes on exactly as this session will; empty when nothing is known.

        The next step then depends on them and on the store alone, here too: the set is selected anew, and the device path plans
        and fills its pool anew.

        Parameters
        ----------
        n_tokens : int
            In the store.
        """
        cut = not self.goes_on(n_tokens)
        self.truncate(n_tokens if n_tokens <= self.n_tokens else 0)
        self.history.truncate(self.n_tokens)
        self._clear_set()
        self._lost |= cut
        if not self.history.primed:
            return {}, {}
        places, states = self.checkpoints.kept()
        numbers = {
            "n_observed": self.history.n_observed,
            "since_calibration": self._since_calibration,
            "poor": self._poor,
            "n_summarised": self._n_summarised,
            "fell_back": self._passed_over is not None,
            "lost": self._lost,
            "checkpoints": places,
        }
        arrays = self.history.kept(n_tokens // BLOCK_TOKENS)
        self.history.change_from(0)  # predictions made anew differ in their last digits
        return numbers, {**arrays, **states, "summary": self.attached.summary_state}

    def check(self, numbers: dict[str, Any], arrays: dict[str, np.ndarray], n_tokens: int) -> None:
        """Whether ``restore`` can take this, of anybody's: what ``save`` yields with this model and any settings.

        Raises
        ------
        ValueError
            A number or an array is missing, of another type or shape, or out of range.
        """
        if not numbers and not arrays:
            return
        bounds: dict[str, tuple[type, int, int]] = {
            "n_observed": (int, 1, COUNT_MAX),
            "since_calibration": (int, 0, COUNT_MAX),
            "poor": (bool, 0, 1),
            "n_summarised": (int, 0, n_tokens),
            "fell_back": (bool, 0, 1),
        }
        if numbers.keys() != bounds.keys() | {"checkpoints", "lost"} or type(numbers["lost"]) is not bool:
            raise ValueError("its numbers are others")
        for name, (kind, least, most) in bounds.items():
            if type(numbers[name]) is not kind or not least <= numbers[name] <= most:
                raise ValueError(f"{name} is no number that it can be")
        if not {"averages", "summary"} <= arrays.keys():
            raise ValueError("an array is missing")
        self.history.check(arrays, n_tokens // BLOCK_TOKENS)
        summary, info = arrays["summary"], self.attached.info
        most = 4 * self.n_rows * 5 * info.head_dim_k  # channels, and four numbers of each
        if summary.ndim != 1 or not len(summary) <= most:
            raise ValueError("summary is of another shape")
        if self.attached.n_summary_state and len(summary) and not self.attached.takes_summary_state(summary):
            raise ValueError("summary names a channel that no head has, or holds a number of no sane size")
        checkpoints.check(numbers["checkpoints"], arrays, n_tokens, self._sane)

    def restore(self, numbers: dict[str, Any], arrays: dict[str, np.ndarray], n_tokens: int) -> None:
        """Go on from what was saved and passes ``check``, with the same store. Where it lacks what this session needs, nothing is known
        then."""
        self.forget()
        self._clear_set()
        if not numbers or self.attached.n_summary_state not in (0, len(arrays["summary"])):
            return
        if not self.history.take(arrays, numbers["n_observed"]):
            return
        if self.attached.n_summary_state:
            self.attached.summary_state = arrays["summary"]
        self.n_tokens = self.n_done = n_tokens
        self._n_summarised, self._lost = numbers["n_summarised"], numbers["lost"]
        self._since_calibration, self._poor = numbers["since_calibration"], numbers["poor"]
        with contextlib.suppress(ValueError):  # of a session with other settings: nothing can be gone back to
            self.checkpoints.take(numbers["checkpoints"], arrays, n_tokens, self._fits)
        if numbers["fell_back"] and isinstance(self.predictor, predictors.Learned):
            self._fall_back()
        elif not numbers["fell_back"] and self._passed_over is not None:
            self._use(self._passed_over)

    # ---- steps. ``decode`` runs llama_decode on the tokens it is given and returns when the logits are there.

    def prompt(self, tokens: Sequence[int], decode: Callable[[Sequence[int]], None], *, held: bool = True) -> None:
        """Run a batch of tokens dense; the last ones prime the history. Not ``held``: they are the prompt of an answer."""
        self._begin()
        self._confirm(self.n_tokens)
        begun = self.checkpoints.begin(self.n_tokens, held, self._state)
        self._lost = True
        if self._passed_over is not None:  # for the prompt before
            self._use(self._passed_over)
        self.history.renew()
        n_taps, n_all = self.attached.info.max_taps, len(tokens)
        n_dense = max(0, n_all - HISTORY_TOKENS)
        for i in range(0, n_dense, self.n_batch):
            part = tokens[i : min(i + self.n_batch, n_dense)]
            self._run(native.DENSE, part, decode)
            if len(part) == self.n_batch:
                begun.n_whole = self.n_tokens - begun.n_tokens
            self._tell(i + len(part), n_all)
        last_batch = self.n_tokens
        for i in range(n_dense, n_all, n_taps):
            part = tokens[i : i + n_taps]
            self._run(native.HISTORY, part, decode)
            n_check = min(GUARD_TOKENS, len(part) // 2) if i + n_taps >= n_all else 0
            self.history.observe_all(self.attached.history_scores, 0, len(part) - n_check, self._n_blocks())
            if n_check:
                self._guard(self.attached.history_scores[:, len(part) - n_check : len(part)].mean(1))
                self.history.observe_all(self.attached.history_scores, len(part) - n_check, len(part), self._n_blocks())
            if self.on_primed is not None:
                self.on_primed(self.attached.history_scores[:, : len(part)])
            if i + n_taps < n_all:
                self._tell(i + n_taps, n_all)
        self.attached.end_prompt()
        self._drop_set()
        self._clear_set()
        self._since_calibration = 0  # the last tokens were dense: every score is new
        if self.weights is not None and self.n_tokens >= 2 * self._n_summarised:
            self.attached.prepare_summary()
            self._n_summarised = self.n_tokens
        self.checkpoints.ended(begun, last_batch, self.n_tokens, held, self._state())
        self._lost = False
        self._end()
        self._tell(n_all, n_all)

    def verify(self, tokens: Sequence[int], decode: Callable[[Sequence[int]], None]) -> None:
        """Run a token and its draft dense, in one batch of at most ``max_taps``. Scores of those that are not taken back by a
        ``truncate`` enter the history at the next call."""
        self._begin()
        first = self.n_tokens
        self._run(native.HISTORY, tokens, decode)
        self._unconfirmed = first, len(tokens)
        self._drop_set()
        self._since_calibration = 0
        self._end()
        self._report_kv()

    def _confirm(self, n_tokens: int) -> None:
        """The store ends at ``n_tokens``: take in the scores of a verified batch's tokens before that."""
        first, n = self._unconfirmed
        self._unconfirmed = (0, 0)
        n_stay = min(n_tokens - first, n)
        if n_stay > 0:
            self.history.observe_all(self.attached.history_scores, 0, n_stay, -(-(first + n_stay) // BLOCK_TOKENS))

    def _tell(self, n_done: int, n_tokens: int) -> None:
        """Whoever wants to know of progress: last, as what is called may raise."""
        self.n_done = self.n_tokens
        self._report_kv()
        if self.on_progress is not None:
            self.on_progress(n_done, n_tokens)

    def step(self, token: int, decode: Callable[[Sequence[int]], None]) -> None:
        """Run one token over the selected blocks."""
        begin = time.perf_counter()
        self._begin()
        self._confirm(self.n_tokens)
        n_used = self.n_tokens // BLOCK_TOKENS + 1
        self._since_calibration += 1
        saved = None
        self.calibrating = self._poor
        if not self.frozen and self.config.calibrate_every and self.config.budget_blocks(self.n_tokens) < n_used:
            every = self.config.calibrate_every
            if self.config.calibrate.startswith("host"):
                self._place_set(n_used)
                saved = self._widen(n_used, self._since_calibration % every, every)
            else:
                self.calibrating |= self._since_calibration >= every
        if self.calibrating:
            list_all(n_used, self.blocks, self.n_listed)
            self.n_free[:] = 0
            self.shares[:] = 1.0
            self._since_calibration = 0
            self._drop_set()
        elif saved is None:
            self._place_set(n_used)
        self._n_listed_blocks = n_used

        before = self.attached.stats
        self.attended, self.n_attended, self.step_shares = self.blocks, self.n_listed + self.n_free, self.shares
        position = self.n_tokens
        self._run(native.SPARSE, [token], decode)
        self.n_done = self.n_tokens  # whatever comes now: the store and the logits are those of the token
        self._observe(before, begin, n_used)
        if saved is not None:
            self._restore(saved)
        self._end()
        self._stepped(position)

    def _begin(self) -> None:
        """A step or a prompt begins."""
        if self.busy:  # nobody undid what was before
            self.undo(self.n_done)
        self.busy = True

    def _end(self) -> None:
        """It is done with: nothing of it is undone any more."""
        self.n_done = self.n_tokens
        self.busy = False

    def _stepped(self, position: int) -> None:
        """Whoever wants to know of a step, or of the blocks that it completed: last, as what is called may raise."""
        if self.on_attended is not None:
            self.on_attended(position)
        self._report_kv()

    def _observe(self, before: native.kvcast_stats, begin: float, n_used: int) -> None:
        """Take in a sparse step that began at ``begin``, and count it."""
        times, observed = self.times, time.perf_counter()
        if not self.frozen:
            self._learn()
            self._poor = float(self.step_shares.mean()) < self.config.min_recovery
        after = self.attached.stats
        end = time.perf_counter()
        times.n_steps += 1
        times.observe += end - observed
        times.total += end - begin
        times.blocks_read += int(self.n_attended.sum())
        times.blocks_dense += n_used * self.n_rows
        times.share_sum += float(self.step_shares.mean())
        times.attention_us += after.attention_us - before.attention_us
        times.choose_us += after.choose_us - before.choose_us
        times.summary_bytes_read += after.summary_bytes_read - before.summary_bytes_read
        if self.calibrating:
            times.n_calibrations += 1
            times.calibrate += end - begin

    def _learn(self) -> None:
        """Take the scores of a sparse step into the history."""
        self.history.observe_listed(self.attended, self.n_attended, self.scores, self.step_shares)

    def take_in(self) -> None:
        """Have the last step's ``scores``, and the history, up to date now; on the device path that happens beside the next step."""

    def finish_decode(self) -> None:
        """When llama_decode has returned: what must succeed for the step to count. A RuntimeError undoes the step."""
        self._wait()  # before the scores that it reads are renewed
        self.attached.collect()

    def observe_truth(self, token: int, decode: Callable[[Sequence[int]], None]) -> None:
        """Run one token dense and take its scores: before the history is primed, and for the oracle."""
        self._begin()
        self._run(native.HISTORY, [token], decode)
        self.history.observe_all(self.attached.history_scores, 0, 1, self._n_blocks())
        self._age = None
        self._end()

    def dense_step(self, token: int, decode: Callable[[Sequence[int]], None], mode: int = native.DENSE) -> None:
        """Run one token dense; ``mode=native.HISTORY`` leaves its scores in ``attached.history_scores``. For evaluation."""
        self._begin()
        self._run(mode, [token], decode)
        if not self.history.primed:
            self.checkpoints.adopt(self.n_tokens)
        self._end()
        self._report_kv()

    @property
    def free_range(self) -> tuple[int, int]:
        """The blocks that the current set lets steps choose from; (0, 0): none."""
        return self._set.free_range

    # ---- inside

    def _n_blocks(self) -> int:
        return -(-self.n_tokens // BLOCK_TOKENS)

    @property
    def _n_used_next(self) -> int:
        """Blocks in use in the step after the one that runs; when the context is full there is none."""
        return min((self.n_tokens + 1) // BLOCK_TOKENS + 1, self.attached.info.n_blocks)

    def _run(self, mode: int, tokens: Sequence[int], decode: Callable[[Sequence[int]], None]) -> None:
        self._confirm(self.n_tokens)
        self.attached.set_mode(mode)
        self.in_sparse_step = mode == native.SPARSE
        try:
            decode(tokens)
        finally:
            if mode == native.HISTORY:
                self.attached.set_mode(native.DENSE)
        self.n_tokens += len(tokens)
        if mode == native.HISTORY:
            self.n_history_taps = len(tokens)

    def _report_kv(self) -> None:
        report = self.on_kv
        while report is not None and self._n_reported < self.n_tokens // BLOCK_TOKENS:
            block = self._n_reported
            self._n_reported += 1
            for layer in range(self.attached.info.n_layer):
                report(layer, block)

    def _place_set(self, n_used: int) -> None:
        """The lists of this step: a new set when the last one was held long enough, else that one and the newest block."""
        if self._age is None or (self._age >= self.config.steps_held and not self.frozen):
            self._take_set(n_used)
            self._age = 0
            self.attached.choose_anew()
        elif n_used > self._n_listed_blocks:
            append_block(n_used - 1, self.blocks, self.n_listed)
            self.attached.choose_anew()
        self._age += 1
        if self._age == self.config.steps_held and not self.frozen and self.n_rows * n_used >= OVERLAP_MIN:
            self._select_beside()

    def _widen(self, n_used: int, turn: int, every: int) -> tuple[np.ndarray, ...]:
        """Let one layer in ``every`` attend to everything; returns what ``_restore`` needs."""
        layers = np.arange(self.attached.info.n_layer) % every == turn
        rows = np.repeat(layers, self.attached.info.n_head_kv).nonzero()[0]
        saved = rows, self.blocks[rows, :n_used].copy(), self.n_listed[rows].copy(), self.n_free[rows].copy(), self.shares[rows].copy()
        self.blocks[rows, :n_used] = np.arange(n_used)
        self.n_listed[rows], self.n_free[rows], self.shares[rows] = n_used, 0, 1.0
        return saved

    def _restore(self, saved: tuple[np.ndarray, ...]) -> None:
        rows, blocks, self.n_listed[rows], self.n_free[rows], self.shares[rows] = saved
        self.blocks[rows, : blocks.shape[1]] = blocks
        self.attached.choose_anew()

    def _use(self, predictor: predictors.Predictor) -> None:
        if self.history.keep_steps(predictor.n_steps_kept):  # first: it may not fit into memory
            self.checkpoints.adopt(self.n_tokens)  # which have no such steps
        self.predictor = predictor
        self._passed_over: predictors.Predictor | None = None  # the network in whose place the average is used

    def _fall_back(self) -> None:
        network = self.predictor
        self._use(predictors.Average(0.9))
        self._passed_over = network

    def _guard(self, truth: np.ndarray) -> None:
        """Before the last tokens of a prompt enter the history: would the network have chosen for them as well as the average?

        truth : float32, shape (n_layer, n_head_kv, n_blocks)
        """
        n_used = self._n_blocks()
        n_sink, n_window = self.config.sink // BLOCK_TOKENS, self.config.window // BLOCK_TOKENS
        n_keep = self.config.budget_blocks(self.n_tokens) - n_sink - n_window
        middle = slice(n_sink, n_used - n_window)
        if not isinstance(self.predictor, predictors.Learned) or n_keep >= n_used - n_window - n_sink:
            return
        held = []
        for predictor in (self.predictor, predictors.Average(0.9)):
            scores = predictor.predict(self.history, n_used)[:, middle]
            best = np.argpartition(-scores, n_keep - 1, axis=1)[:, :n_keep]
            held.append(float(np.take_along_axis(truth.reshape(self.n_rows, -1)[:, middle], best, 1).sum()))
        if held[0] < GUARD_MARGIN * held[1]:
            self._fall_back()
            if self._warned:
                return
            self._warned = True
            warnings.warn(
                f"predictor {self.config.predictor!r} does worse than the plain average on this model and text "
                f"({held[0] / held[1]:.0%} of the attention that the average holds); 'ema' is used instead",
                stacklevel=2,
            )

    def _drop_set(self) -> None:
        """Select anew before the next step."""
        self._age = None
        self._next_n_used = 0

    def _clear_set(self) -> None:
        """Leave nothing of the current set that the next one might depend on."""
        self.blocks[:], self.n_listed[:], self.n_free[:], self.shares[:] = 0, 0, 0, 1

    def _take_set(self, n_used: int) -> None:
        """Put the lists of a new set in place: what was selected beside the last step, or one selected now."""
        if self._next_n_used == n_used and self._next is not None:
            self._set.copy(self._next)
        else:
            self._select(n_used, self._set)
        self.attached.set_free_range(*self._set.free_range)
        self._next_n_used = 0

    def _select_beside(self) -> None:
        """Start selecting the next step's set while this one is computed, from the scores up to the step before."""
        if self._next is None:
            self._next = self._set.map(np.empty_like)
        n_used = self._n_used_next
        self._pending = self._open_worker("kvcast-select").submit(self._select, n_used, self._next)
        self._next_n_used = n_used

    def _open_worker(self, name: str) -> ThreadPoolExecutor:
        """The thread that works beside the steps, started when there is none."""

        def note() -> None:
            self._worker_thread = threading.current_thread()

        self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix=name, initializer=note)
        return self._worker

    def _settle(self) -> BaseException | None:
        """Wait for what runs beside, whatever becomes of it; returns why it failed."""
        if self._pending is None:
            return None
        while True:
            try:
                error = self._pending.exception(LOOK_S)  # an interrupt here leaves it to the next call
                break
            except StillRunning:
                if self._worker_thread is not None and not self._worker_thread.is_alive() and not self._pending.done():
                    error, self._worker, self._worker_thread = RuntimeError("its thread has ended"), None, None
                    break
        self._pending = None
        return error

    def _wait(self) -> None:
        if self._pending is not None:
            begin = time.perf_counter()
            error = self._settle()
            if error is not None:
                self._drop_set()
                raise RuntimeError(f"what runs beside the step failed: {type(error).__name__}: {error}") from error
            self.times.wait += time.perf_counter() - begin

    def _select(self, n_used: int, into: Set) -> None:
        config = self.config
        t0 = time.perf_counter()
        scores = self.predictor.predict(self.history, n_used)
        t1 = time.perf_counter()
        n_sink, n_window = config.sink // BLOCK_TOKENS, config.window // BLOCK_TOKENS
        summary = config.summary and not self.frozen
        self._fill(into, scores, n_used, config.budget_blocks(self.n_tokens), n_sink, n_window, summary)
        self.times.predict += t1 - t0
        self.times.select += time.perf_counter() - t1

    def _fill(self, into: Set, scores: np.ndarray, n_used: int, n_budget: int, n_sink: int, n_window: int, summary: bool) -> None:
        budgets = self.config.budgets
        if summary:
            assert into.weights is not None
            into.free_range = select_free(
                scores, n_used, n_budget, n_sink, n_window, into.blocks, into.n_listed, into.n_free, into.weights, budgets
            )
            into.shares[:] = 1.0  # rows that choose put their own in its place
        else:
            select(scores, n_used, n_budget, n_sink, n_window, into.blocks, into.n_listed, into.shares, budgets)
            into.n_free[:], into.free_range = 0, (0, 0)
        if n_dense := int(np.searchsorted(self.attached.layers, self.config.dense_layers)) * self.attached.info.n_head_kv:
            list_all(n_used, into.blocks[:n_dense], into.n_listed[:n_dense])
            into.n_free[:n_dense], into.shares[:n_dense] = 0, 1.0
