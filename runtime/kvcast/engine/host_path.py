"""The host path: the CPU attends over the lists of each row, in the store itself."""

from __future__ import annotations

import operator
import time

import numpy as np

from ..bindings import api as native
from ..bindings.context import NativeContext
from ..blocks import BLOCK_TOKENS
from ..config import SparseConfig
from ..sparse.selection import append_block, list_all, select, select_candidates
from .lists import Lists
from .path import AttentionPath, Step, StepResult

OVERLAP_MIN = 1 << 18  # rows * blocks from which selecting is worth a thread of its own (a millisecond or more)


class HostPath(AttentionPath):
    """Lists of blocks, made anew every ``hold`` steps; see ``AttentionPath``.

    Parameters
    ----------
    ctx : llama_context_p
    config : SparseConfig
    n_taps : int
        Tokens of a batch whose scores are kept.
    trace : int
        ``native.TRACE_HEAD`` to keep queries.
    """

    worker_name = "kvcast-select"

    def __init__(self, ctx: int, config: SparseConfig, n_taps: int, trace: int):
        super().__init__(NativeContext(ctx, n_taps, trace, config.keeps_summary))
        self._lists = Lists(self.blocks, self.n_listed, self.n_topk, self.shares, self.weights)
        self._next = self._lists.map(lambda x: np.empty((0, *x.shape[1:]), x.dtype))  # what is selected beside a step
        self._next_n_used = 0  # blocks in use that it was made for; 0: there is none
        self._age: int | None = None  # steps since the last selection; None: select before the next step
        self._n_known = 0  # blocks in use that the lists know of
        self._widened: tuple[np.ndarray, ...] | None = None  # the lists of the rows that calibrate in this step

    @property
    def topk_range(self) -> tuple[int, int]:
        """The blocks that the current lists let steps choose from; (0, 0): none."""
        return self._lists.topk_range

    def _warm_up(self) -> None:
        self.configured(self.policy.config)
        self.history.observe_listed(self.blocks[:0], self.n_listed[:0], self.scores[:0], self.shares[:0])
        self.history.observe_all(self.attached.history_scores, 0, 0, 0)
        self.history.n_observed = 0

    def warm_up_selection(self) -> None:
        n = self.blocks.shape[1] - 1
        for few in (slice(0, 1), slice(0, 2)):  # one row, as all rows of whole arrays, is laid out otherwise than two
            scores = self.policy.predictor.predict(self.history, n)[few]
            some = self._lists.map(operator.itemgetter(few))
            for summary in (False, self.policy.config.summary):
                self._fill(some, scores, n, min(3, n), 1, 1, summary)
        self.n_listed[:2] = self.n_topk[:2] = 0
        self.history.epoch += 1  # what a predictor has kept of this is void

    def configured(self, before: SparseConfig) -> None:
        if self.weights is not None:
            self.attached.set_grain(self.policy.config.grain)  # what was chosen is forgotten

    def check(self, config: SparseConfig) -> None:
        if config.summary and self.weights is None:
            raise ValueError(f"calibrate={config.calibrate!r} needs a summary of the keys; load the model with it")

    def prepare(self, n_tokens: int, n_since: int, poor: bool, last: StepResult | None) -> Step:
        config, frozen = self.policy.config, self.policy.frozen
        n_used = n_tokens // BLOCK_TOKENS + 1
        every = config.calibrate_every
        some_layers = False
        everything = poor
        self._narrow()
        if not frozen and every and config.budget_blocks(n_tokens) < n_used:
            some_layers = config.calibrate.startswith("layers")
            everything |= not some_layers and n_since >= every
        if some_layers or not everything:
            self._place(n_tokens, n_used)
        if everything:
            list_all(n_used, self.blocks, self.n_listed)
            self.n_topk[:] = 0
            self.shares[:] = 1.0
            self.drop()
        elif some_layers:
            self._widen(n_used, n_since % every, every)
        self._n_known = n_used
        return Step(n_tokens, n_used, native.SPARSE, everything, last)

    def finish(self, step: Step) -> StepResult:
        self.finish_batch(step.last)  # before the scores that it reads are renewed
        self.n_attended = self.n_listed + self.n_chosen
        n_read = int(self.n_listed.sum() + self.n_topk.sum())
        return StepResult(step.n_tokens, self.blocks, self.n_attended, self.shares, n_read, True, self._learn)

    def drop(self) -> None:
        self._age = None
        self._next_n_used = 0

    def clear(self) -> None:
        self._widened = None
        self.configured(self.policy.config)
        self.blocks[:], self.n_listed[:], self.n_topk[:], self.shares[:] = 0, 0, 0, 1

    # ---- inside

    def _learn(self, result: StepResult) -> None:
        self.history.observe_listed(result.blocks, result.n_attended, self.scores, result.shares)

    def _place(self, n_tokens: int, n_used: int) -> None:
        """The lists of this step: new ones when the last were held long enough, else those and the newest block."""
        steps_held, frozen = self.policy.config.steps_held, self.policy.frozen
        if self._age is None or (self._age >= steps_held and not frozen):
            self._renew(n_tokens, n_used)
            self._age = 0
            self.attached.reselect()
        elif n_used > self._n_known:
            append_block(n_used - 1, self.blocks, self.n_listed)
            self.attached.reselect()
        self._age += 1
        if self._age == steps_held and not frozen and self.n_rows * n_used >= OVERLAP_MIN:
            self._select_beside(n_tokens)

    def _renew(self, n_tokens: int, n_used: int) -> None:
        """Put new lists in place: those that were selected beside the last step, or some selected now."""
        if self._next_n_used == n_used:
            self._lists.copy(self._next)
        else:
            self._select(n_tokens, n_used, self._lists)
        self.attached.set_topk_range(*self._lists.topk_range)
        self._next_n_used = 0

    def _select_beside(self, n_tokens: int) -> None:
        """Start selecting the next step's lists while this one is computed, from the scores up to the step before."""
        if len(self._next.blocks) == 0:
            self._next = self._lists.map(np.empty_like)
        n_used = min((n_tokens + 1) // BLOCK_TOKENS + 1, self.attached.info.n_blocks)
        self.worker.start(self._select, n_tokens, n_used, self._next)
        self._next_n_used = n_used

    def _select(self, n_tokens: int, n_used: int, into: Lists) -> None:
        config, times = self.policy.config, self.policy.times
        t0 = time.perf_counter()
        scores = self.policy.predictor.predict(self.history, n_used)
        t1 = time.perf_counter()
        n_sink, n_window = config.sink // BLOCK_TOKENS, config.window // BLOCK_TOKENS
        summary = config.summary and not self.policy.frozen
        self._fill(into, scores, n_used, config.budget_blocks(n_tokens), n_sink, n_window, summary)
        times.predict += t1 - t0
        times.select += time.perf_counter() - t1

    def _fill(self, into: Lists, scores: np.ndarray, n_used: int, n_budget: int, n_sink: int, n_window: int, summary: bool) -> None:
        config = self.policy.config
        if summary:
            assert into.weights is not None
            into.topk_range = select_candidates(
                scores, n_used, n_budget, n_sink, n_window, into.blocks, into.n_listed, into.n_topk, into.weights, config.allocation
            )
            into.shares[:] = 1.0  # rows that choose put their own in its place
        else:
            select(scores, n_used, n_budget, n_sink, n_window, into.blocks, into.n_listed, into.shares, config.allocation)
            into.n_topk[:], into.topk_range = 0, (0, 0)
        if n_dense := int(np.searchsorted(self.attached.layers, config.dense_layers)) * self.attached.info.n_head_kv:
            list_all(n_used, into.blocks[:n_dense], into.n_listed[:n_dense])
            into.n_topk[:n_dense], into.shares[:n_dense] = 0, 1.0

    def _widen(self, n_used: int, turn: int, every: int) -> None:
        """Let one layer in ``every`` attend to everything, in this step."""
        layers = np.arange(self.attached.info.n_layer) % every == turn
        rows = np.repeat(layers, self.attached.info.n_head_kv).nonzero()[0]
        self._widened = rows, self.blocks[rows, :n_used].copy(), self.n_listed[rows], self.n_topk[rows], self.shares[rows]
        self.blocks[rows, :n_used] = np.arange(n_used)
        self.n_listed[rows], self.n_topk[rows], self.shares[rows] = n_used, 0, 1.0

    def _narrow(self) -> None:
        """Give those that attended to everything their lists back."""
        if self._widened is not None:
            rows, blocks, self.n_listed[rows], self.n_topk[rows], self.shares[rows] = self._widened
            self.blocks[rows, : blocks.shape[1]] = blocks
            self._widened = None
            self.attached.reselect()
