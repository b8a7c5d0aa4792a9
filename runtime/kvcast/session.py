"""The decode loop of one context: predict, select, step, observe.

One token a step; prompts run dense but for their last tokens, whose scores prime the history. The store is llama.cpp's
own KV cache and is complete after every step; what is kept here (history, lists) can always be made again from it by
running the last tokens once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from . import native, predictors
from .config import SparseConfig
from .history import History
from .selection import append_block, count_changes, list_all, select

HISTORY_TOKENS = 64  # of a prompt, in history mode
HISTORY_BYTES_MAX = 256 << 20  # of their scores, on the host
OVERLAP_MIN = 1 << 18  # rows * blocks from which selecting is worth a thread of its own (a millisecond or more)

AttentionFn = Callable[[int, int, np.ndarray], None]


def n_taps_within(info_bytes_per_tap: int) -> int:
    """Tokens of a history batch whose scores fit the bound."""
    return max(1, min(HISTORY_TOKENS, HISTORY_BYTES_MAX // max(1, info_bytes_per_tap)))


@dataclass
class StepTimes:
    """Sums over sparse steps, seconds."""

    n_steps: int = 0
    n_calibrations: int = 0
    total: float = 0.0
    predict: float = 0.0
    select: float = 0.0
    observe: float = 0.0
    wait: float = 0.0  # for a selection that ran beside the step
    calibrate: float = 0.0  # whole duration of the calibrating steps
    n_changed: int = 0  # blocks that a selection brought in
    n_selected: int = 0  # blocks in those selections
    blocks_read: int = 0
    blocks_dense: int = 0  # that a dense step would have read
    share_sum: float = 0.0  # of the estimated recovery
    attention_us: int = 0

    def ms(self, seconds: float) -> float:
        return 1e3 * seconds / max(1, self.n_steps)


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
    trace : int
        See ``native.Attached``.

    Raises
    ------
    SparseUnsupported
        The context cannot be served.
    """

    ctx: int
    config: SparseConfig
    n_batch: int
    n_bytes_per_tap: int = 0
    trace: int = native.TRACE_NONE
    times: StepTimes = field(default_factory=StepTimes)

    def __post_init__(self) -> None:
        self.attached = native.Attached(self.ctx, n_taps_within(self.n_bytes_per_tap), self.trace)
        info = self.attached.info
        self.n_rows = info.n_layer * info.n_head_kv
        self.blocks = self.attached.blocks.reshape(self.n_rows, info.n_blocks)
        self.n_listed = self.attached.n_listed.reshape(self.n_rows)
        self.scores = self.attached.scores.reshape(self.n_rows, info.n_blocks)
        self.shares = np.ones(self.n_rows, np.float32)
        self.history = History(info.n_layer, info.n_head_kv, info.n_blocks)
        self.predictor = predictors.make(self.config.predictor)
        self.frozen = False  # keep the lists, take no scores (the ceiling in benchmarks)
        self.n_tokens = 0  # in the store, as far as the session knows
        self._age: int | None = None  # steps since the last selection; None: select before the next step
        self._since_calibration = 0
        self._n_listed_blocks = 0  # blocks in use that the lists know of
        self._mask = np.zeros((self.n_rows, info.n_blocks), np.bool_)  # the set selected last
        self.calibrating = False  # the running step attends to everything, to renew every score
        self.in_sparse_step = False  # which order the scores of the running step have
        self.on_progress: Callable[[int, int], None] | None = None  # prompt tokens done, in all
        self.on_selected: Callable[[int], None] | None = None  # evaluation: called with the position before each step

        self._worker: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None  # the selection that runs beside this step
        self._next: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # its blocks, n_listed, shares
        self._next_n_used = 0  # blocks in use that it was made for; 0: there is none
        self._warm_up()

    def _warm_up(self) -> None:
        """Compile or load the kernels now, not in the first step."""
        self._warm_up_selection()
        self.history.observe_listed(self.blocks[:0], self.n_listed[:0], self.scores[:0], self.shares[:0])
        self.history.observe_all(self.attached.history_scores, 0, 0)
        self.history.n_observed = 0

    def _warm_up_selection(self) -> None:
        """On a few rows of what this predictor yields: kernels are compiled for the layout of its array."""
        n, few = self.blocks.shape[1], slice(0, 2)
        scores = self.predictor.predict(self.history, n)[few]
        select(scores, n, min(3, n), 1, 1, self.blocks[few], self.n_listed[few], self.shares[few], self.config.budgets)
        count_changes(self.blocks[:0], self.n_listed[:0], self._mask[:0])

    def close(self) -> None:
        if self._worker is not None:
            self._worker.shutdown(wait=True)
        self.attached.close()

    def configure(self, config: SparseConfig, *, frozen: bool = False) -> None:
        """Go on with other settings, and with times from zero; ``frozen`` keeps the next selected set for ever."""
        self.predictor = predictors.make(config.predictor)
        self.config = config
        self.frozen = frozen
        self.times = StepTimes()
        self._warm_up_selection()
        self._drop_set()
        self._since_calibration = 0
        self._mask[:] = False

    # ---- edits

    def truncate(self, n_tokens: int) -> None:
        """The store now ends at ``n_tokens``: drop what was known of the rest."""
        self.history.truncate(n_tokens)
        self.n_tokens = n_tokens
        self._drop_set()
        self.attached.invalidate()

    def forget(self) -> None:
        """The store's content is unknown (a load): nothing that was known holds."""
        self.truncate(0)

    # ---- steps. ``decode`` runs llama_decode on the tokens it is given and returns when the logits are there.

    def prompt(self, tokens: Sequence[int], decode: Callable[[Sequence[int]], None]) -> None:
        """Run a batch of tokens dense; the last ones prime the history."""
        n_taps = self.attached.info.max_taps
        n_dense = max(0, len(tokens) - HISTORY_TOKENS)
        for i in range(0, n_dense, self.n_batch):
            self._decode(native.DENSE, tokens[i : min(i + self.n_batch, n_dense)], decode)
            self._report(i + self.n_batch, len(tokens))
        for i in range(n_dense, len(tokens), n_taps):
            part = tokens[i : i + n_taps]
            self._decode(native.HISTORY, part, decode)
            self.history.observe_all(self.attached.history_scores, len(part), self._n_blocks())
            self._report(i + n_taps, len(tokens))
        self._drop_set()
        self._since_calibration = 0  # the last tokens were dense: every score is new

    def _report(self, n_done: int, n_tokens: int) -> None:
        if self.on_progress is not None:
            self.on_progress(min(n_done, n_tokens), n_tokens)

    def step(self, token: int, decode: Callable[[Sequence[int]], None]) -> None:
        """Run one token over the selected blocks."""
        begin = time.perf_counter()
        times = self.times
        config = self.config
        n_used = self.n_tokens // native.BLOCK_TOKENS + 1
        every = config.calibrate_every(self.n_tokens)
        due = not self.frozen and bool(every) and self._since_calibration + 1 >= every
        self.calibrating = due and config.budget_blocks(self.n_tokens) < n_used
        if self.calibrating:
            list_all(n_used, self.blocks, self.n_listed, self.shares)
            self._since_calibration = 0
            self._drop_set()
        else:
            self._since_calibration += 1
            if self._age is None or (self._age >= config.hold and not self.frozen):
                self._take_set(n_used)
                self._age = 0
            elif n_used > self._n_listed_blocks:
                append_block(n_used - 1, self.blocks, self.n_listed)
            self._age += 1
            if self._age == config.hold and not self.frozen and self.n_rows * n_used >= OVERLAP_MIN:
                self._select_beside()
        self._n_listed_blocks = n_used
        if self.on_selected is not None:
            self.on_selected(self.n_tokens)

        attention_us = self.attached.stats.attention_us
        read = int(self.n_listed.sum())
        try:
            self._decode(native.SPARSE, [token], decode)
        finally:
            self._wait()  # before the scores it reads are renewed

        observed = time.perf_counter()
        if not self.frozen:
            self.history.observe_listed(self.blocks, self.n_listed, self.scores, self.shares)
        end = time.perf_counter()
        times.n_steps += 1
        times.observe += end - observed
        times.total += end - begin
        times.blocks_read += read
        times.blocks_dense += n_used * self.n_rows
        times.share_sum += float(self.shares.mean())
        times.attention_us += self.attached.stats.attention_us - attention_us
        if self.calibrating:
            times.n_calibrations += 1
            times.calibrate += end - begin

    def observe_truth(self, token: int, decode: Callable[[Sequence[int]], None]) -> None:
        """Run one token dense and take its scores: before the history is primed, and for the oracle."""
        self._decode(native.HISTORY, [token], decode)
        self.history.observe_all(self.attached.history_scores, 1, self._n_blocks())
        self._age = None

    # ---- inside

    def _n_blocks(self) -> int:
        return -(-self.n_tokens // native.BLOCK_TOKENS)

    def _decode(self, mode: int, tokens: Sequence[int], decode: Callable[[Sequence[int]], None]) -> None:
        self.attached.set_mode(mode)
        self.in_sparse_step = mode == native.SPARSE
        try:
            decode(tokens)
        finally:
            if mode == native.HISTORY:
                self.attached.set_mode(native.DENSE)
        self.n_tokens += len(tokens)

    def _drop_set(self) -> None:
        """Select anew before the next step."""
        self._age = None
        self._next_n_used = 0

    def _take_set(self, n_used: int) -> None:
        """Put the lists of a new set in place: what was selected beside the last step, or one selected now."""
        if self._next_n_used == n_used and self._next is not None:
            blocks, n_listed, shares = self._next
            longest = int(n_listed.max())
            self.blocks[:, :longest] = blocks[:, :longest]
            self.n_listed[:] = n_listed
            self.shares[:] = shares
        else:
            self._select(n_used, self.blocks, self.n_listed, self.shares)
        self._next_n_used = 0
        self.times.n_changed += count_changes(self.blocks, self.n_listed, self._mask)
        self.times.n_selected += int(self.n_listed.sum())

    def _select_beside(self) -> None:
        """Start selecting the next step's set while this one is computed, from the scores up to the step before."""
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvcast-select")
            self._next = (np.empty_like(self.blocks), np.empty_like(self.n_listed), np.empty_like(self.shares))
        assert self._next is not None
        n_used = (self.n_tokens + 1) // native.BLOCK_TOKENS + 1
        self._pending = self._worker.submit(self._select, n_used, *self._next)
        self._next_n_used = n_used

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            begin = time.perf_counter()
            try:
                pending.result()
            except BaseException:
                self._drop_set()
                raise
            self.times.wait += time.perf_counter() - begin

    def _select(self, n_used: int, blocks: np.ndarray, n_listed: np.ndarray, shares: np.ndarray) -> None:
        config = self.config
        t0 = time.perf_counter()
        scores = self.predictor.predict(self.history, n_used)
        t1 = time.perf_counter()
        n_sink, n_window = config.sink // native.BLOCK_TOKENS, config.window // native.BLOCK_TOKENS
        select(scores, n_used, config.budget_blocks(self.n_tokens), n_sink, n_window, blocks, n_listed, shares, config.budgets)
        self.times.predict += t1 - t0
        self.times.select += time.perf_counter() - t1
