"""The decode loop of the device path: what the pool holds, and what is brought there while a step is computed.

What changes for step t+1 is predicted, selected, gathered from the store and uploaded beside step t, from what was seen up to
step t-1; between two steps there is only a scatter on the device. A layer's set is held for ``hold`` steps, and each step renews
one in ``hold`` of the layers; all at once where the predictor cannot be asked for some.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from ..bindings import api as native
from ..bindings.context import Attached
from ..blocks import BLOCK_TOKENS
from ..config import SparseConfig
from ..cores import usable_cores
from ..gguf.memory import STAGING_SHARE
from ..sparse.pool import Pool, plan_slots
from ..sparse.predictors import ALL
from ..sparse.selection import _select, list_all
from .session import Session

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


@dataclass
class DeviceSession(Session):
    """Sparse attention over a pool of blocks on the device; see ``Session``."""

    def _attach(self, n_taps: int, trace: int) -> Attached:
        n_cells = native.llama_cpp.llama_n_ctx(self.ctx)
        n_blocks = _pool_blocks(self.config, n_cells)
        return Attached(self.ctx, n_taps, trace, False, n_blocks, STAGING_SHARE)

    def _warm_up(self) -> None:
        n_blocks = self.blocks.shape[1]
        self._wanted = np.zeros((self.n_rows, n_blocks), np.int32)  # critical blocks of the next set
        self._n_wanted = np.zeros(self.n_rows, np.int32)
        self._lists = np.zeros((self.n_rows, n_blocks), np.int32)
        self._lengths = np.zeros(self.n_rows, np.int32)
        self._attended = np.zeros((self.n_rows, n_blocks), np.int32)  # the lists of the last step
        self._ranks = np.zeros((self.n_rows, n_blocks), np.float32)
        self._truth = np.zeros((self.attached.info.n_layer, 1, self.attached.info.n_head_kv, n_blocks), np.float32)
        self._planned = False
        self.n_filled = 0  # blocks moved by the step that filled the pool
        self._seen = False  # a step's query was collected since the last edit
        # of the last step: its position, lists, their lengths and shares
        self._unlearned: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None
        self._buffer = 0
        self._n_staged = 0
        self._all_rows = np.arange(self.n_rows, dtype=np.int32)
        self._staged: slice | None = None  # rows with a set that is not yet in the pool, but for what did not fit the buffer
        self._n_place_used = 0  # blocks in use that the pool's window is made for
        self._next_shares = np.ones(self.n_rows, np.float32)
        # beside a GPU the cores have nothing else to do
        on_cpu = self.attached.pool_info.device == b"CPU"
        self._helpers = None if on_cpu or N_HELPERS == 1 else ThreadPoolExecutor(N_HELPERS - 1, thread_name_prefix="kvcast-select")
        self._spreading: list[Future] = []  # what the helpers were given last
        self.pool = Pool(self.attached, self._spread)
        self.history.observe_later(self.blocks, self.n_listed, self.scores, self.shares)  # of no block
        super()._warm_up()
        _copy_lists(self.blocks, self.n_listed, self._attended)
        self.pool.stage(0, self._wanted, self._n_wanted, self._n_wanted, 0, self._all_rows)
        self.pool.drop(self._n_wanted, self._n_wanted, self._all_rows)

    def _warm_up_selection(self) -> None:
        for few in (slice(0, 1), slice(0, 2)):  # one row, as all rows of whole arrays, is laid out otherwise than two
            scores = self.predictor.predict(self.history, self.blocks.shape[1] - 1)[few]
            none = np.zeros(len(scores), np.int32)
            _select_critical(
                scores, self.blocks[few], none, 0, 0, 1, none, self._ranks[few], self._lists[few], self._lengths[few],
                np.zeros(len(none), np.float32), np.zeros((len(none), 1), np.int32), none,
            )  # fmt: skip
        self.history.epoch += 1  # what a predictor has kept of this is void

    def configure(self, config: SparseConfig, *, frozen: bool = False) -> None:
        n_blocks = self.attached.pool_info.n_slots // self.n_rows
        if not config.device or _pool_blocks(config, self.attached.info.n_cells) > n_blocks:
            raise ValueError(
                f"this session has a pool of {n_blocks * BLOCK_TOKENS} tokens on the device; load the model anew for "
                f"path={config.path!r}, budget={config.budget}"
            )
        same = all(getattr(config, name) == getattr(self.config, name) for name in ("budget", "compression", "budgets", "sink", "window"))
        super().configure(config, frozen=frozen)
        self._planned &= same

    def prompt(self, tokens: Sequence[int], decode: Callable[[Sequence[int]], None], *, held: bool = True) -> None:
        self._seen = False
        self._planned = False
        super().prompt(tokens, decode, held=held)

    def verify(self, tokens: Sequence[int], decode: Callable[[Sequence[int]], None]) -> None:
        self._seen = False
        super().verify(tokens, decode)

    def truncate(self, n_tokens: int) -> None:
        self.busy = True
        self._settle()
        if self._unlearned is not None and self._unlearned[0] >= n_tokens:  # the step is taken back
            self._unlearned = None
        self.take_in()
        super().truncate(n_tokens)
        self.pool.forget_from(n_tokens // BLOCK_TOKENS)
        self._seen = False

    def undo(self, n_tokens: int) -> None:
        self._planned = False
        super().undo(n_tokens)
        self.pool.forget_from(0)  # slots may have been written of which the table does not know

    def step(self, token: int, decode: Callable[[Sequence[int]], None]) -> None:
        """Run one token over the pool."""
        begin = time.perf_counter()
        self._begin()
        self._confirm(self.n_tokens)
        n_used = self.n_tokens // BLOCK_TOKENS + 1
        config, position = self.config, self.n_tokens
        self._since_calibration += 1
        due = config.calibrate.startswith("dense") and self._since_calibration >= config.calibrate_every
        self.calibrating = not self.frozen and (self._poor or due)
        before = self.attached.stats
        moved, planned = self.pool.n_moved, self._planned
        if self.calibrating or n_used <= self._n_fixed + 1:
            self._dense_step(token, decode, n_used)
        else:
            self._place_set(n_used)
            self._run(native.SPARSE, [token], decode)
            self._seen = True
        self.n_done = self.n_tokens  # as on the host path
        self.times.moves.append(self.pool.n_moved - moved)
        if self._planned and not planned:
            self.n_filled = self.times.moves[-1]
        self._observe(before, begin, n_used)
        self._end()
        self._stepped(position)

    def _end_threads(self) -> None:
        super()._end_threads()
        if self._helpers is not None:
            self._helpers.shutdown()

    def finish_decode(self) -> None:
        waited = self.times.wait
        self._wait()
        self._take_scores()  # before the next scores come
        if not self.in_sparse_step:
            self.attached.collect()
            return
        _copy_lists(self.blocks, self.n_listed, self._attended)
        self.attended, self.n_attended = self._attended, self.n_listed.copy()
        self.step_shares = self.shares.copy()
        if not self.attached.has_callback:  # which looks at the table
            self._take_staged()  # while the device still computes, which comes first on its queue
        before = self.attached.stats.device_us
        self.attached.collect()
        if self.attached.stats.device_us - before > STILL_BUSY:
            self.times.wait = waited
        if not self.frozen:
            self._unlearned = self.n_tokens, self.attended, self.n_attended, self.step_shares

    # ---- inside

    def _run(self, mode: int, tokens: Sequence[int], decode: Callable[[Sequence[int]], None]) -> None:
        if mode != native.SPARSE:  # the new rows are in the store only
            self.pool.forget_from(self.n_tokens // BLOCK_TOKENS)
            self._drop_set()
        super()._run(mode, tokens, decode)

    @property
    def _n_sink(self) -> int:
        return self.config.sink // BLOCK_TOKENS

    @property
    def _n_window(self) -> int:
        return self.config.window // BLOCK_TOKENS

    @property
    def _n_fixed(self) -> int:
        return self._n_sink + self._n_window

    def _learn(self) -> None:
        """The scores of a sparse step are taken into the history beside the next one."""
        if not self.in_sparse_step:
            super()._learn()

    def take_in(self) -> None:
        if self._pending is None:  # else an interrupt came between two steps, and the thread beside is at it
            self._take_scores()
            self.history.catch_up()

    def _take_scores(self) -> None:
        """The history is told of the last step; it takes that in when it is asked."""
        if self._unlearned is not None:
            _, blocks, n_listed, shares = self._unlearned
            self._unlearned = None
            self.attached.take_taps(n_listed)
            self.history.observe_later(blocks, n_listed, self.scores, shares)

    def _drop_set(self) -> None:
        super()._drop_set()
        self._staged = None

    def _clear_set(self) -> None:
        self._planned = False  # a new plan empties the pool

    def _dense_step(self, token: int, decode: Callable[[Sequence[int]], None], n_used: int) -> None:
        """Attend to the whole store; its exact scores go to the history as those of a full list."""
        n_threads = native.llama_cpp.llama_n_threads(self.ctx)
        n_all = native.llama_cpp.llama_n_threads_batch(self.ctx)
        native.llama_cpp.llama_set_n_threads(self.ctx, n_all, n_all)  # attention runs beside the store
        try:
            self._run(native.HISTORY, [token], decode)
        finally:
            native.llama_cpp.llama_set_n_threads(self.ctx, n_threads, n_all)
        list_all(n_used, self._lists, self._lengths)
        self.attended, self.n_attended = self._lists, self._lengths
        self.scores[:, :n_used] = self.attached.history_scores[:, 0].reshape(self.n_rows, -1)[:, :n_used]
        self.shares[:] = 1.0
        self.step_shares = self.shares
        self._since_calibration = 0

    def _plan(self) -> None:
        """Slots of every layer, for this prompt."""
        self.take_in()  # taps lie as the plan before says
        n_mean = _pool_blocks(self.config, self.attached.info.n_cells)
        n_layer = self.attached.info.n_layer
        slots = np.full(n_layer, n_mean, np.int32)
        least = -(-(self._n_fixed + 1) // 16) * 16
        n_used = self._n_blocks()
        if self.config.budgets == "spread" and least < n_mean < n_used:
            middle = self.predictor.predict(self.history, n_used)[:, self._n_sink : n_used - self._n_window]
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
        n_groups = self.config.steps_held if self.predictor.by_rows else 1
        return slice(min(n_layer, n_layer * number // n_groups) * n_heads, min(n_layer, n_layer * (number + 1) // n_groups) * n_heads)

    def _place_set(self, n_used: int) -> None:
        """Bring the pool into the state that the step needs."""
        if not self._planned:
            self._plan()
        if self._age is None:
            self._select_wanted(n_used, ALL)
            self._place_fixed(n_used)
            self._take_wanted(self._all_rows)
            self._age = 0
        else:
            self._take_staged()
            if not self.config.prefetch and not self.frozen:
                due = self._group(self._age % self.config.steps_held)
                self._select_wanted(n_used, due)
                self._take_wanted(self._all_rows[due])
            if n_used > self._n_place_used:
                self._open_block(n_used)
        self._n_place_used = n_used
        self._age += 1
        if not self.frozen:
            calibrates = self.config.calibrate.startswith("host")
            rows = self._group(self._age % self.config.steps_held)
            if self.config.prefetch and (rows.start < rows.stop or calibrates):
                self._beside(self._n_used_next, rows)
            elif calibrates:
                self._calibrate()

    def _take_staged(self) -> None:
        """What was staged beside a step goes into its slots."""
        if self._staged is not None:
            self.pool.apply(self._buffer, self._n_staged)
            self._buffer = 1 - self._buffer
            due, self._staged = self._staged, None
            self._take_wanted(self._all_rows[due], missing=self._n_staged == self.pool.n_staging)

    def _take_wanted(self, which: np.ndarray, missing: bool = True) -> None:
        """Bring what may still be missing of the rows' wanted sets into the pool, and attend to them from now on."""
        in_use = self._n_fixed + self._n_wanted
        self.pool.drop(in_use, self.n_listed, which)
        if missing:
            self.pool.move(self._wanted, self._n_wanted, in_use, self._n_fixed, which)
        self.n_listed[which] = in_use[which]
        self.shares[which] = self._next_shares[which]

    def _place_fixed(self, n_used: int) -> None:
        """Sink and window, where they are not."""
        n_sink, n_window = self._n_sink, self._n_window
        window = range(n_used - n_window, n_used)
        for slot, block in [*enumerate(range(n_sink)), *((n_sink + b % n_window, b) for b in window)]:
            if (self.blocks[:, slot] != block).any():
                if block * BLOCK_TOKENS < self.n_tokens:
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

    def _select_wanted(self, n_used: int, rows: slice) -> None:
        """The critical blocks of the next set of some rows, for a step with ``n_used`` blocks in use."""
        if rows.start == rows.stop and rows != ALL:
            return
        self._take_scores()
        begin = time.perf_counter()
        first, last, _ = rows.indices(self.n_rows)
        n_parts = max(1, min(N_HELPERS, (last - first) * n_used // PART_MIN)) if self._helpers is not None else 1
        bounds = [first + (last - first) * i // n_parts for i in range(n_parts + 1)]
        parts = [slice(*ends) for ends in itertools.pairwise(bounds) if ends[0] < ends[1]]
        predictor, scores = self.predictor, None
        if not predictor.by_rows:
            scores = predictor.predict(self.history, n_used)
        elif predictor.on_gpu:
            scores = np.empty((self.n_rows, n_used), np.float32)
            scores[rows] = predictor.predict(self.history, n_used, rows)[:, :n_used]
        self.times.predict += time.perf_counter() - begin
        took = self._spread([(self._select_rows, n_used, part, scores) for part in parts])
        self.times.predict += max(t[0] for t in took)
        self.times.select += max(t[1] for t in took)

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
        of_rows = self.predictor.predict(self.history, n_used, rows) if scores is None else scores[rows]
        t1 = time.perf_counter()
        _select_critical(
            of_rows, self.blocks[rows], self.n_listed[rows], n_sink, self._n_window, n_used, n_keep, self._ranks[rows],
            self._lists[rows], self._lengths[rows], self._next_shares[rows], self._wanted[rows], self._n_wanted[rows],
        )  # fmt: skip
        return t1 - t0, time.perf_counter() - t1

    def _calibrate(self) -> None:
        """Exact scores of the last step's query over the store, one M-th of the layers at a time."""
        if not self._seen:
            return
        every, info, n_used = self.config.calibrate_every, self.attached.info, self._n_blocks()
        layers = range(self._since_calibration % every, info.n_layer, every)
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

    def _settle(self) -> BaseException | None:
        error = super()._settle()
        wait(self._spreading)  # an interrupt may have come while they were waited for
        return error

    def _beside(self, n_used: int, rows: slice) -> None:
        """Calibrate, select and stage the set of some rows for the next step while this one is computed."""
        self._staged = rows if rows.start < rows.stop else None
        self._pending = self._open_worker("kvcast-prefetch").submit(self._prefetch, n_used, rows)

    def _prefetch(self, n_used: int, rows: slice) -> None:
        self._take_scores()
        if self.config.calibrate.startswith("host"):
            self._calibrate()
        if rows.start < rows.stop:
            self._select_wanted(n_used, rows)
            in_use = self._n_fixed + self._n_wanted
            begin = time.perf_counter()
            self._n_staged = self.pool.stage(self._buffer, self._wanted, self._n_wanted, in_use, self._n_fixed, self._all_rows[rows])
            self.times.gather += time.perf_counter() - begin
