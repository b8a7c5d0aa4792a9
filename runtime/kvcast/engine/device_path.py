"""The device path: what the pool holds, and what is brought there while a step is computed.

What changes for step t+1 is predicted, selected, gathered from the store and uploaded beside step t, from what was seen up to
step t-1; between two steps there is only a scatter on the device. A layer's set is held for ``hold`` steps, and each step renews
one in ``hold`` of the layers; all at once where the predictor cannot be asked for some.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from ..bindings import api as native
from ..bindings.context import NativeContext
from ..bindings.loaded import llama_cpp
from ..blocks import BLOCK_TOKENS
from ..config import SparseConfig
from ..cores import usable_cores
from ..gguf.memory import STAGING_SHARE
from ..sparse.pool import Pool, plan_slots
from ..sparse.predictors import ALL
from ..sparse.selection import _select, list_all
from .path import AttentionPath, Step, StepResult

PREFER = np.float32(1.25)  # what a block in the pool counts more than one that has to be fetched
N_HELPERS = max(1, min(4, usable_cores() // 2))  # threads that select beside a GPU: more wait for each other
PART_MIN = 1 << 14  # rows * blocks from which a share of that is worth a thread: more threads wait for each other
STILL_BUSY = 200  # microseconds; when a step's results take longer to come, the device was computing all the time
CAP = 8  # a layer's slots: at most so many times the mean


@numba.njit(nogil=True, cache=True)
def _prefer(scores, table, first, n_listed, begin, end, n_used, factor, out):
    """Scores; of the blocks [begin, end), those in the pool times ``factor``."""
    for row in range(scores.shape[0]):
        out[row, :n_used] = scores[row, :n_used]
        for i in range(first, n_listed[row]):
            b = table[row, i]
            if begin <= b < end and out[row, b] > 0:
                out[row, b] *= factor


@numba.njit(nogil=True, cache=True)
def _select_critical(scores, table, n_listed, n_sink, n_window, n_used, n_keep, ranks, lists, lengths, shares, wanted, n_wanted):
    """Write what is critical between sink and window, where blocks in the pool are preferred: one call, as threads wait at each."""
    window_begin, n_fixed = n_used - n_window, n_sink + n_window
    _prefer(scores, table, n_fixed, n_listed, n_sink, window_begin, n_used, PREFER, ranks)
    _select(ranks, n_sink, window_begin, n_used, n_keep, lists, lengths, shares)
    for row in range(len(lengths)):
        n_wanted[row] = lengths[row] - n_fixed
        wanted[row, : n_wanted[row]] = lists[row, n_sink : n_sink + n_wanted[row]]


def _pool_blocks(config: SparseConfig, n_cells: int) -> int:
    """Slots per KV head of a layer, in the mean."""
    return min(config.budget, n_cells) // BLOCK_TOKENS


@numba.njit(nogil=True, cache=True)
def _copy_lists(table, n_listed, out):
    for row in range(len(n_listed)):
        out[row, : n_listed[row]] = table[row, : n_listed[row]]


@dataclass(slots=True)
class Staged:
    """Blocks in a staging buffer on the device, for the lists of some rows: what ran beside a step has brought them there.

    Attributes
    ----------
    rows : slice
    buffer : int
    n : int
        Moves; as many as the buffer holds when there may be more to make.
    """

    rows: slice
    buffer: int
    n: int = 0


class DevicePath(AttentionPath):
    """A pool of blocks on the device; see ``AttentionPath``.

    Parameters
    ----------
    ctx : llama_context_p
    config : SparseConfig
    n_taps : int
        Tokens of a batch whose scores are kept.
    trace : int
        ``native.TRACE_HEAD`` to keep queries.

    Attributes
    ----------
    pool : Pool
    n_filled : int
        Blocks moved by the step that filled the pool.
    """

    worker_name = "kvcast-prefetch"

    def __init__(self, ctx: int, config: SparseConfig, n_taps: int, trace: int):
        n_blocks = _pool_blocks(config, llama_cpp.llama_n_ctx(ctx))
        super().__init__(NativeContext(ctx, n_taps, trace, False, n_blocks, STAGING_SHARE))
        n_blocks = self.blocks.shape[1]
        self._wanted = np.zeros((self.n_rows, n_blocks), np.int32)  # critical blocks of the next lists
        self._n_wanted = np.zeros(self.n_rows, np.int32)
        self._listed = np.zeros((self.n_rows, n_blocks), np.int32)
        self._lengths = np.zeros(self.n_rows, np.int32)
        self._attended = np.zeros((self.n_rows, n_blocks), np.int32)  # the lists of the last step
        self._ranks = np.zeros((self.n_rows, n_blocks), np.float32)
        self._truth = np.zeros((self.attached.info.n_layer, 1, self.attached.info.n_head_kv, n_blocks), np.float32)
        self._next_shares = np.ones(self.n_rows, np.float32)
        self._all_rows = np.arange(self.n_rows, dtype=np.int32)
        self._planned = False  # the pool has slots for this prompt
        self._seen = False  # a step's query was collected since the last edit
        self._age: int | None = None  # steps since all rows were selected for; None: do that before the next step
        self._buffer = 0  # that is staged into next
        self._staged: Staged | None = None  # for the next step
        self._n_place_used = 0  # blocks in use that the pool's window is made for
        self._before = (0, False)  # blocks moved, and whether the pool was planned, before the step that runs
        self.n_filled = 0
        # beside a GPU the cores have nothing else to do
        on_cpu = self.attached.pool_info.device == b"CPU"
        self._helpers = None if on_cpu or N_HELPERS == 1 else ThreadPoolExecutor(N_HELPERS - 1, thread_name_prefix="kvcast-select")
        self._spreading: list[Future] = []  # what the helpers were given last
        self.pool = Pool(self.attached, self._spread)

    def _warm_up(self) -> None:
        self.history.observe_later(self.blocks, self.n_listed, self.scores, self.shares)  # of no block
        self.history.observe_listed(self.blocks[:0], self.n_listed[:0], self.scores[:0], self.shares[:0])
        self.history.observe_all(self.attached.history_scores, 0, 0, 0)
        self.history.n_observed = 0
        _copy_lists(self.blocks, self.n_listed, self._attended)
        self.pool.stage(0, self._wanted, self._n_wanted, self._n_wanted, 0, self._all_rows)
        self.pool.drop(self._n_wanted, self._n_wanted, self._all_rows)

    def warm_up_selection(self) -> None:
        for few in (slice(0, 1), slice(0, 2)):  # one row, as all rows of whole arrays, is laid out otherwise than two
            scores = self.policy.predictor.predict(self.history, self.blocks.shape[1] - 1)[few]
            none = np.zeros(len(scores), np.int32)
            _select_critical(
                scores, self.blocks[few], none, 0, 0, 1, none, self._ranks[few], self._listed[few], self._lengths[few],
                np.zeros(len(none), np.float32), np.zeros((len(none), 1), np.int32), none,
            )  # fmt: skip
        self.history.epoch += 1  # what a predictor has kept of this is void

    def check(self, config: SparseConfig) -> None:
        n_blocks = self.attached.pool_info.n_slots // self.n_rows
        if not config.device or _pool_blocks(config, self.attached.info.n_cells) > n_blocks:
            raise ValueError(
                f"this session has a pool of {n_blocks * BLOCK_TOKENS} tokens on the device; load the model anew for "
                f"path={config.path!r}, budget={config.budget}"
            )

    def configured(self, before: SparseConfig) -> None:
        config = self.policy.config
        self._planned &= all(
            getattr(config, name) == getattr(before, name) for name in ("budget", "compression", "allocation", "sink", "window")
        )

    def prepare(self, n_tokens: int, n_since: int, poor: bool, last: StepResult | None) -> Step:
        config, frozen = self.policy.config, self.policy.frozen
        n_used = n_tokens // BLOCK_TOKENS + 1
        due = config.calibrate.startswith("dense") and n_since >= config.calibrate_every
        calibrates = not frozen and (poor or due)
        self._before = self.pool.n_moved, self._planned
        if calibrates or n_used <= self._n_fixed + 1:
            self.before_batch(n_tokens)
            return Step(n_tokens, n_used, native.HISTORY, calibrates, last)
        self._place(n_tokens, n_used, n_since, last)
        return Step(n_tokens, n_used, native.SPARSE, False, last)

    def finish(self, step: Step) -> StepResult:
        times = self.policy.times
        waited = times.wait
        self._wait()
        if step.last is not None:
            step.last.learn()  # before the next scores come
        if step.mode == native.SPARSE:
            result = self._finish_sparse(step, waited)
        else:
            result = self._finish_dense(step)
        moved, planned = self._before
        times.moves.append(self.pool.n_moved - moved)
        if self._planned and not planned:
            self.n_filled = times.moves[-1]
        return result

    def before_batch(self, n_tokens: int) -> None:
        self.pool.forget_from(n_tokens // BLOCK_TOKENS)  # the new rows are in the store only
        self.drop()

    def flush(self, last: StepResult | None) -> None:
        if not self.worker.busy:  # else an interrupt came between two steps, and the thread beside is at it
            super().flush(last)
            self.history.catch_up()

    def forget_query(self) -> None:
        self._seen = False

    def drop(self) -> None:
        self._age = None
        self._staged = None

    def clear(self) -> None:
        self._planned = False  # a new plan empties the pool

    def settle(self) -> BaseException | None:
        error = super().settle()
        wait(self._spreading)  # an interrupt may have come while they were waited for
        return error

    def truncate(self, n_tokens: int) -> None:
        super().truncate(n_tokens)
        self.pool.forget_from(n_tokens // BLOCK_TOKENS)
        self._seen = False

    def reset(self) -> None:
        super().reset()
        self.pool.forget_from(0)  # slots may have been written of which the table does not know

    def close(self) -> None:
        self.worker.close()
        if self._helpers is not None:
            self._helpers.shutdown()
        self.attached.close()

    # ---- a step's end

    def _finish_sparse(self, step: Step, waited: float) -> StepResult:
        _copy_lists(self.blocks, self.n_listed, self._attended)
        self.n_attended = self.n_listed.copy()
        shares = self.shares.copy()
        if not self.attached.has_callback:  # which looks at the table
            self._take_staged()  # while the device still computes, which comes first on its queue
        before = self.attached.stats.device_us
        self.attached.collect()
        if self.attached.stats.device_us - before > STILL_BUSY:
            self.policy.times.wait = waited
        self._seen = True
        return StepResult(step.n_tokens, self._attended, self.n_attended, shares, int(self.n_attended.sum()), False, self._learn_later)

    def _finish_dense(self, step: Step) -> StepResult:
        """Its exact scores go to the history as those of full lists."""
        self.attached.collect()
        list_all(step.n_used, self._listed, self._lengths)
        self.n_attended = self._lengths
        self.scores[:, : step.n_used] = self.attached.history_scores[:, 0].reshape(self.n_rows, -1)[:, : step.n_used]
        self.shares[:] = 1.0
        return StepResult(step.n_tokens, self._listed, self._lengths, self.shares, int(self._lengths.sum()), True, self._learn)

    def _learn(self, result: StepResult) -> None:
        self.history.observe_listed(result.blocks, result.n_attended, self.scores, result.shares)

    def _learn_later(self, result: StepResult) -> None:
        """The history is told of the step; it takes that in when it is asked."""
        self.attached.take_taps(result.n_attended)
        self.history.observe_later(result.blocks, result.n_attended, self.scores, result.shares)

    # ---- what the pool holds

    @property
    def _n_sink(self) -> int:
        return self.policy.config.sink // BLOCK_TOKENS

    @property
    def _n_window(self) -> int:
        return self.policy.config.window // BLOCK_TOKENS

    @property
    def _n_fixed(self) -> int:
        return self._n_sink + self._n_window

    def _plan(self, n_tokens: int, last: StepResult | None) -> None:
        """Slots of every layer, for this prompt."""
        self.flush(last)  # taps lie as the plan before says
        n_mean = _pool_blocks(self.policy.config, self.attached.info.n_cells)
        n_layer = self.attached.info.n_layer
        slots = np.full(n_layer, n_mean, np.int32)
        least = -(-(self._n_fixed + 1) // 16) * 16
        n_used = -(-n_tokens // BLOCK_TOKENS)
        if self.policy.config.allocation == "spread" and least < n_mean < n_used:
            middle = self.policy.predictor.predict(self.history, n_used)[:, self._n_sink : n_used - self._n_window]
            mass = np.maximum(-np.sort(-middle, 1), 0).reshape(n_layer, -1, middle.shape[1]).sum(1)
            # the first blocks of every layer's slots are sink and window: no gain in those
            mass = np.concatenate([np.zeros((n_layer, self._n_fixed), np.float32), mass], 1)
            slots = plan_slots(mass, n_mean, least, min(self.blocks.shape[1], CAP * n_mean))
        self.pool.plan(slots, self._n_sink, self._n_window)
        self._planned = True
        self._age = None

    def _group(self, number: int) -> slice:
        """The rows whose sets are renewed together: whole layers; empty past the last group."""
        n_layer, n_heads = self.attached.info.n_layer, self.attached.info.n_head_kv
        n_groups = self.policy.config.steps_held if self.policy.predictor.by_rows else 1
        return slice(min(n_layer, n_layer * number // n_groups) * n_heads, min(n_layer, n_layer * (number + 1) // n_groups) * n_heads)

    def _place(self, n_tokens: int, n_used: int, n_since: int, last: StepResult | None) -> None:
        """Bring the pool into the state that the step needs."""
        config, frozen = self.policy.config, self.policy.frozen
        if not self._planned:
            self._plan(n_tokens, last)
        if self._age is None:
            self._select_wanted(n_used, ALL, last)
            self._place_fixed(n_tokens, n_used)
            self._take_wanted(self._all_rows)
            self._age = 0
        else:
            self._take_staged()
            if not config.prefetch and not frozen:
                due = self._group(self._age % config.steps_held)
                self._select_wanted(n_used, due, last)
                self._take_wanted(self._all_rows[due])
            if n_used > self._n_place_used:
                self._open_block(n_used)
        self._n_place_used = n_used
        self._age += 1
        if not frozen:
            calibrates = config.calibrate.startswith("layers")
            rows = self._group(self._age % config.steps_held)
            if config.prefetch and (rows.start < rows.stop or calibrates):
                n_next = min((n_tokens + 1) // BLOCK_TOKENS + 1, self.attached.info.n_blocks)
                staged = Staged(rows, self._buffer)
                self._staged = staged if rows.start < rows.stop else None
                self.worker.start(self._prefetch, staged, n_next, n_tokens, n_since, last)
            elif calibrates:
                self._calibrate(n_tokens, n_since)

    def _take_staged(self) -> None:
        """What was staged beside a step goes into its slots."""
        if self._staged is not None:
            self.pool.apply(self._staged.buffer, self._staged.n)
            self._buffer = 1 - self._staged.buffer
            due, self._staged = self._staged, None
            self._take_wanted(self._all_rows[due.rows], missing=due.n == self.pool.n_staging)

    def _take_wanted(self, which: np.ndarray, missing: bool = True) -> None:
        """Bring what may still be missing of the rows' wanted sets into the pool, and attend to them from now on."""
        in_use = self._n_fixed + self._n_wanted
        self.pool.drop(in_use, self.n_listed, which)
        if missing:
            self.pool.move(self._wanted, self._n_wanted, in_use, self._n_fixed, which)
        self.n_listed[which] = in_use[which]
        self.shares[which] = self._next_shares[which]

    def _place_fixed(self, n_tokens: int, n_used: int) -> None:
        """Sink and window, where they are not."""
        n_sink, n_window = self._n_sink, self._n_window
        window = range(n_used - n_window, n_used)
        for slot, block in [*enumerate(range(n_sink)), *((n_sink + b % n_window, b) for b in window)]:
            if (self.blocks[:, slot] != block).any():
                if block * BLOCK_TOKENS < n_tokens:
                    self.pool.put(slot, block)
                self.blocks[:, slot] = block

    def _open_block(self, n_used: int) -> None:
        """A new block takes the place of the oldest one of the window, which is kept where there is room."""
        room = (self.n_listed == n_used - 1) & (self.n_listed < self.pool.n_slots)  # those that hold everything
        if room.any():
            which = self._all_rows[room]
            self._wanted[which, self._n_wanted[which]] = n_used - 1 - self._n_window
            self._n_wanted[which] += 1
            self._take_wanted(which)
        self.blocks[:, self._n_sink + (n_used - 1) % self._n_window] = n_used - 1

    def _select_wanted(self, n_used: int, rows: slice, last: StepResult | None) -> None:
        """The critical blocks of the next set of some rows, for a step with ``n_used`` blocks in use."""
        if rows.start == rows.stop and rows != ALL:
            return
        if last is not None:
            last.learn()
        begin = time.perf_counter()
        first, end, _ = rows.indices(self.n_rows)
        n_parts = max(1, min(N_HELPERS, (end - first) * n_used // PART_MIN)) if self._helpers is not None else 1
        bounds = [first + (end - first) * i // n_parts for i in range(n_parts + 1)]
        parts = [slice(*ends) for ends in itertools.pairwise(bounds) if ends[0] < ends[1]]
        predictor, scores = self.policy.predictor, None
        if not predictor.by_rows:
            scores = predictor.predict(self.history, n_used)
        elif predictor.on_gpu:
            scores = np.empty((self.n_rows, n_used), np.float32)
            scores[rows] = predictor.predict(self.history, n_used, rows)[:, :n_used]
        self.policy.times.predict += time.perf_counter() - begin
        took = self._spread([(self._select_rows, n_used, part, scores) for part in parts])
        self.policy.times.predict += max(t[0] for t in took)
        self.policy.times.select += max(t[1] for t in took)

    def _select_rows(self, n_used: int, rows: slice, scores: npt.NDArray[np.float32] | None) -> tuple[float, float]:
        """Select for some rows by ``scores``, or by what the predictor says of them; seconds of predicting and of selecting."""
        t0 = time.perf_counter()
        n_sink, window_begin = self._n_sink, n_used - self._n_window
        n_middle = window_begin - n_sink
        n_keep = np.minimum(self.pool.n_slots[rows] - self._n_fixed, n_middle)
        if (n_keep == n_middle).all():
            self._wanted[rows, :n_middle] = np.arange(n_sink, window_begin)
            self._n_wanted[rows] = n_middle
            self._next_shares[rows] = 1.0
            return 0.0, time.perf_counter() - t0
        of_rows = self.policy.predictor.predict(self.history, n_used, rows) if scores is None else scores[rows]
        t1 = time.perf_counter()
        _select_critical(
            of_rows, self.blocks[rows], self.n_listed[rows], n_sink, self._n_window, n_used, n_keep, self._ranks[rows],
            self._listed[rows], self._lengths[rows], self._next_shares[rows], self._wanted[rows], self._n_wanted[rows],
        )  # fmt: skip
        return t1 - t0, time.perf_counter() - t1

    def _calibrate(self, n_tokens: int, n_since: int) -> None:
        """Exact scores of the last step's query over the store, one M-th of the layers at a time."""
        if not self._seen:
            return
        every, info, n_used = self.policy.config.calibrate_every, self.attached.info, -(-n_tokens // BLOCK_TOKENS)
        layers = range(n_since % every, info.n_layer, every)
        self._spread([(self.attached.score_store, il, h, self._truth[il, 0, h]) for il in layers for h in range(info.n_head_kv)])
        for layer in layers:
            self.history.observe_rows(layer, self._truth[layer], n_used)

    def _spread(self, calls: list[tuple]) -> list[Any]:
        """Results of calls, each a function and its arguments, by the helpers where there are any."""
        if self._helpers is None or len(calls) < 2:
            return [call(*arguments) for call, *arguments in calls]
        (here, *arguments), others = calls[0], calls[1:]
        self._spreading = [self._helpers.submit(*call) for call in others]
        try:
            first = here(*arguments)
        finally:
            wait(self._spreading)
        return [first, *(p.result() for p in self._spreading)]

    def _prefetch(self, staged: Staged, n_used: int, n_tokens: int, n_since: int, last: StepResult | None) -> None:
        """Beside a step: calibrate, select for some rows of the next one, and stage what they lack."""
        if last is not None:
            last.learn()
        if self.policy.config.calibrate.startswith("layers"):
            self._calibrate(n_tokens, n_since)
        rows = staged.rows
        if rows.start < rows.stop:
            self._select_wanted(n_used, rows, None)
            in_use = self._n_fixed + self._n_wanted
            begin = time.perf_counter()
            staged.n = self.pool.stage(staged.buffer, self._wanted, self._n_wanted, in_use, self._n_fixed, self._all_rows[rows])
            self.policy.times.gather += time.perf_counter() - begin
