"""The decode loop of one context: prepare a step, decode, finish it, learn from it.

One token a step; prompts run dense but for their last tokens, whose scores prime the history. A token and its draft run dense
in one batch, and those that stay enter the history. The store is llama.cpp's own KV cache and is complete after every step; what
is kept here (history, lists) can always be made again from it by running the last tokens once more.

Whatever ends a step or a prompt before its end - an error of llama.cpp, a callback that raises, an interrupt - leaves the session
``busy``; ``undo`` then brings it back to ``n_done`` tokens, the last ones of which all is known. Whoever calls is to call it, and what
begins next does so first where nobody did.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

import numpy as np

from ..bindings import api as native
from ..bindings.context import on_all_threads
from ..bindings.loaded import llama_cpp
from ..blocks import BLOCK_TOKENS
from ..config import SparseConfig
from ..errors import KvcastError
from ..gguf.embedded_predictor import Embedded
from ..gguf.memory import HISTORY_TOKENS, n_taps_within
from ..sparse import predictors
from ..sparse.history import History
from .checkpoints import Checkpoints, State
from .device_path import DevicePath
from .guard import GUARD_TOKENS, Guard
from .host_path import HostPath
from .known import Known
from .observers import Observers
from .path import AttentionPath, Policy, StepResult
from .stats import StepTimes


class Session:
    """Sparse attention on one llama_context: position, history, guard, statistics, and one path.

    Parameters
    ----------
    ctx : llama_context_p
    decode : callable
        ``decode(tokens, n_past)`` runs llama_decode on a batch after the first ``n_past`` tokens and returns when the logits are there.
    config : SparseConfig
    n_batch : int
        Tokens of one dense batch of a prompt.
    n_bytes_per_tap : int
        Bytes of scores of one history token; bounds the history batch.
    embedded : Embedded or None
        The predictor that travels in the model's file.

    Attributes
    ----------
    path : AttentionPath
    n_tokens, n_done : int
        In the store, as far as the session knows; of them, those whose step or batch is done with.
    busy : bool
        A step or a prompt has begun and not ended.
    in_sparse_step : bool
        Which order the scores of the running step have.
    n_history_taps : int
        Tokens of the last batch in history mode.
    observers : Observers
    lost : bool
        A prompt ended before its end, so that what is known is not that of the tokens: go back first.
    passed_over : Predictor or None
        The network in whose place the average is used, for this prompt.

    Raises
    ------
    SparseUnsupported
        The context cannot be served.
    """

    def __init__(
        self,
        ctx: int,
        decode: Callable[[Sequence[int], int], None],
        config: SparseConfig,
        n_batch: int,
        n_bytes_per_tap: int = 0,
        embedded: Embedded | None = None,
    ):
        self.ctx, self.decode, self.n_batch, self._embedded = ctx, decode, n_batch, embedded
        trace = native.TRACE_HEAD if config.trace or config.predictor == "quest" else native.TRACE_NONE
        # a batch in history mode is one of llama.cpp's, which cuts larger ones
        n_taps = min(n_taps_within(n_bytes_per_tap), llama_cpp.llama_n_ubatch(ctx))
        self.path: AttentionPath = (DevicePath if config.device else HostPath)(ctx, config, n_taps, trace)
        self.attached = self.path.attached
        try:
            self._set_up(config)
        except BaseException:
            self.path.close()
            raise

    def _set_up(self, config: SparseConfig) -> None:
        info = self.attached.info
        self.n_rows = self.path.n_rows
        self._n_swa = llama_cpp.llama_model_n_swa(llama_cpp.llama_get_model(self.ctx))
        self.history = History(info.n_layer, info.n_head_kv, info.n_blocks)
        self.known = Known(self.history, self.attached)
        self.checkpoints = Checkpoints(self.n_batch)
        self.n_tokens = self.n_done = 0
        self.busy = False
        self.policy = Policy(config, predictors.make(config, self.attached, self._embedded))
        self._guard = Guard()
        self.suspended_network: predictors.Predictor | None = None
        self.use(self.predictor)
        self.lost = False
        self.in_sparse_step = False
        self.n_history_taps = 0
        self.observers = Observers(info.n_layer)
        self._draft_span = (0, 0)  # first position and number of the tokens of a batch that may yet be taken back
        self._last: StepResult | None = None  # whose scores the history does not have yet
        none = np.zeros(self.n_rows, np.int32)
        self.result = StepResult(0, self.path.blocks, none, self.path.shares, 0, True, lambda _: None, taken=True)
        self.path.start(self.policy, self.history)

    @property
    def config(self) -> SparseConfig:
        return self.policy.config

    @property
    def times(self) -> StepTimes:
        return self.policy.times

    @property
    def predictor(self) -> predictors.Predictor:
        return self.policy.predictor

    @predictor.setter
    def predictor(self, predictor: predictors.Predictor) -> None:
        self.policy.predictor = predictor

    def close(self) -> None:
        self.path.close()

    def configure(self, config: SparseConfig, *, frozen: bool = False) -> None:
        """Go on with other settings, and with times from zero; ``frozen`` keeps the next selected lists for ever.

        Raises
        ------
        ValueError
            The settings need what this session was not made with.
        KvcastError
            There is no memory for what they remember; the session goes on with those that it had.
        """
        self.path.check(config)
        try:
            predictor = predictors.make(config, self.attached, self._embedded)
            self.use(predictor)
        except MemoryError as error:
            raise KvcastError(f"there is no memory for predictor={config.predictor!r}; the session goes on with the one it had") from error
        before, self.policy.config, self.policy.frozen = self.config, config, frozen
        self.reset_stats()
        self.path.warm_up_selection()
        self.path.drop()
        self.path.configured(before)
        self.known.n_since = 0

    def reset_stats(self) -> StepTimes:
        """Count and time from zero; returns the new sums."""
        self.policy.times = StepTimes()
        return self.times

    # ---- edits

    def truncate(self, n_tokens: int) -> None:
        """The store now ends at ``n_tokens``: drop what was known of the rest. What the dropped tokens taught of others stays; to go on as
        if they had never been, ``go_back``."""
        self.busy = True
        self.path.settle()
        if self._last is not None and self._last.position >= n_tokens:  # the step is taken back
            self._last = None
        self.take_in()
        self._confirm(n_tokens)
        if n_tokens < self.n_tokens:
            self.history.truncate(n_tokens)
        self.n_tokens = self.n_done = n_tokens
        self.path.truncate(n_tokens)
        self.checkpoints.cut(n_tokens)
        self.known.truncate(n_tokens)
        self.observers.truncate(n_tokens)
        self.busy = False

    def forget(self) -> None:
        """The store's content is unknown (a load): nothing that was known holds."""
        self.truncate(0)

    def undo(self, n_tokens: int) -> None:
        """After whatever ended a step or a prompt before its end: the session is that of ``n_tokens`` again, ``n_done`` at most."""
        self.path.reset()
        self.truncate(n_tokens)

    def goes_on(self, n_tokens: int) -> bool:
        """Whether the next step or prompt may simply follow the ``n_tokens`` in the store. Tokens of a draft that are taken back are
        dropped here."""
        first, n = self._draft_span
        if first <= n_tokens < first + n and self.n_tokens == first + n and not self.busy:
            self.truncate(n_tokens)
        known = self.history.primed or n_tokens == 0
        return self.n_tokens == n_tokens and known and not self.lost

    def go_back(self, n_tokens: int, n_total: int) -> int:
        """The store was cut at ``n_tokens``, or holds so many that the session does not know, and is to be read on to ``n_total``: be
        again what the session was where prompts began and ended, as if the tokens after that had never been.

        Returns
        -------
        int
            Tokens that stay; those from there to ``n_tokens`` have to be read again.
        """
        self.path.settle()
        self.busy = self.lost = True
        if n_tokens > self.n_tokens:
            self.checkpoints.adopt(n_tokens)
        checkpoint, n_stay = self.checkpoints.back(n_tokens, n_total)
        n_reported = self.observers.n_reported
        self.path.clear()
        self.truncate(n_stay)
        self.known.take(checkpoint.state)
        if n_stay == n_tokens > 0 and not self.history.primed and n_total - n_tokens < HISTORY_TOKENS:  # too few to prime it
            self.checkpoints.adopt(n_tokens)
            return self.go_back(n_tokens, n_total)
        self.observers.n_reported = min(n_reported, n_tokens // BLOCK_TOKENS)  # what is read again is the same
        self.lost = n_stay < n_tokens
        return n_stay

    # ---- evaluating

    def evaluate(self, tokens: list[int], n_tokens: int, ids: np.ndarray, *, n_whole: int = 1, held: bool = True) -> None:
        """Run tokens after the ``n_tokens`` in the store, as what they are: a prompt, a token with its draft, or a step. Where the session
        knows of other tokens than those, some are read again.

        Parameters
        ----------
        ids : int32, shape (n_ctx,)
            The tokens in the store.
        n_whole : int
            So many are taken whole or not at all: a token, or one with its draft.
        held : bool
            They are not the prompt of an answer.
        """
        n_total = n_tokens + len(tokens)
        goes_on = self.goes_on(n_tokens) and (len(tokens) <= n_whole or not self.checkpoints.ends_a_prompt(n_tokens))
        n_stay = n_tokens if goes_on else self.go_back(n_tokens, n_total)
        if self._window_is_gone(n_stay):
            n_stay = self.go_back(0, n_total)
        tokens = ids[n_stay:n_tokens].tolist() + tokens
        if not self.history.primed or len(tokens) > n_whole:
            self.prompt(tokens, held=held)
        elif len(tokens) > 1 or self.config.exact:
            self.verify(tokens)
        else:
            if self.config.predictor in predictors.LOOK_AHEAD:
                self.observe_truth(tokens[0])
                self.n_tokens = self.n_done = self.n_tokens - 1  # and it is taken back
            self.step(tokens[0])

    def prompt(self, tokens: Sequence[int], *, held: bool = True) -> None:
        """Run a batch of tokens dense; the last ones prime the history. Not ``held``: they are the prompt of an answer."""
        self.path.forget_query()
        self._begin()
        self._confirm(self.n_tokens)
        begun = self.checkpoints.begin(self.n_tokens, held, self._state)
        self.lost = True
        if self.suspended_network is not None:  # for the prompt before
            self.use(self.suspended_network)
        self.history.renew()
        n_taps, n_all = self.attached.info.max_taps, len(tokens)
        n_dense = max(0, n_all - HISTORY_TOKENS)
        for i in range(0, n_dense, self.n_batch):
            part = tokens[i : min(i + self.n_batch, n_dense)]
            self._run_batch(native.DENSE, part)
            if len(part) == self.n_batch:
                begun.n_whole = self.n_tokens - begun.n_tokens
            self._tell(i + len(part), n_all)
        last_batch = self.n_tokens
        for i in range(n_dense, n_all, n_taps):
            part = tokens[i : i + n_taps]
            self._run_batch(native.HISTORY, part)
            n_check = min(GUARD_TOKENS, len(part) // 2) if i + n_taps >= n_all else 0
            self._prime(len(part) - n_check, len(part))
            if i + n_taps < n_all:
                self._tell(i + n_taps, n_all)
        self.attached.end_prompt()
        self.path.drop()
        self.path.clear()
        self.known.n_since = 0  # the last tokens were dense: every score is new
        if self.path.weights is not None:
            self.known.summarise(self.n_tokens)
        self.checkpoints.ended(begun, last_batch, self.n_tokens, held, self._state())
        self.lost = False
        self._end()
        self._tell(n_all, n_all)

    def _prime(self, n_shown: int, n: int) -> None:
        """Take in the scores of a batch of ``n`` tokens; of those after ``n_shown`` only when the predictor was tried on them."""
        scores, n_blocks = self.attached.history_scores, self._n_blocks()
        self.history.observe_all(scores, 0, n_shown, n_blocks)
        if n_shown < n:
            if self._guard.fails(self.predictor, self.history, scores[:, n_shown:n].mean(1), self.n_tokens, self.config):
                self.fall_back()
            self.history.observe_all(scores, n_shown, n, n_blocks)
        if self.observers.on_primed is not None:
            self.observers.on_primed(scores[:, :n])

    def verify(self, tokens: Sequence[int]) -> None:
        """Run a token and its draft dense, in one batch of at most ``max_taps``. Scores of those that are not taken back by a
        ``truncate`` enter the history at the next call."""
        self.path.forget_query()
        self._begin()
        first = self.n_tokens
        self._run_batch(native.VERIFY if self.config.exact else native.HISTORY, tokens)
        self._draft_span = first, len(tokens)
        self.path.drop()
        self.known.n_since = 0
        self._end()
        self.observers.tell_kv(self.n_tokens)

    def draft(self, token: int, n: int, following: Callable[[], int], ends: Callable[[int], bool]) -> list[int]:
        """What ``n`` sparse steps from ``token`` on say comes next, at most; the steps are taken back.

        Parameters
        ----------
        following : callable
            Asked after each step for the token that follows.
        ends : callable
            Whether nothing follows a token.
        """
        first, found = self.n_tokens, list[int]()
        try:
            while len(found) < n and not (found and ends(token)):
                self.step(token, draft=True)
                found.append(token := following())
        except BaseException:
            self.undo(first)
            raise
        self.truncate(first)
        return found

    def step(self, token: int, *, draft: bool = False) -> None:
        """Run one token over what the path attends to; nobody is told of a ``draft``."""
        begin = time.perf_counter()
        self._begin()
        self._confirm(self.n_tokens)
        self.known.n_since += 1
        position, before = self.n_tokens, self.attached.stats
        step = self.path.prepare(position, self.known.n_since, self.known.poor, self._last)
        self._last = None
        self.in_sparse_step = step.mode == native.SPARSE
        with self.attached.running(step.mode):
            with on_all_threads(self.ctx) if step.mode == native.HISTORY else contextlib.nullcontext():  # it attends beside the store
                self.decode([token], position)
            result = self.path.finish(step)
        self.n_tokens += 1
        self.n_done = self.n_tokens  # whatever comes now: the store and the logits are those of the token
        self.result = result
        if step.calibrates or step.mode == native.HISTORY:
            self.known.n_since = 0
        self._observe(result, before, begin, step.calibrates)
        self._end()
        if not draft:  # last, as what is called may raise
            if self.observers.on_attended is not None:
                self.observers.on_attended(position)
            self.observers.tell_kv(self.n_tokens)

    def observe_truth(self, token: int) -> None:
        """Run one token dense and take its scores: before the history is primed, and for the oracle."""
        self._begin()
        self._run_batch(native.HISTORY, [token])
        self.history.observe_all(self.attached.history_scores, 0, 1, self._n_blocks())
        self.path.drop()
        self._end()

    def dense_step(self, token: int, mode: int = native.DENSE) -> None:
        """Run one token dense; ``mode=native.HISTORY`` leaves its scores in ``attached.history_scores``. For evaluation."""
        self._begin()
        self._run_batch(mode, [token])
        if not self.history.primed:
            self.checkpoints.adopt(self.n_tokens)
        self._end()
        self.observers.tell_kv(self.n_tokens)

    def _state(self) -> State | None:
        """What the store alone does not give again; None when nothing is known of attention."""
        self.take_in()
        return self.known.state(self.n_tokens)

    def take_in(self) -> None:
        """Have the last step's scores, and the history, up to date now; on the device path that happens beside the next step."""
        self.path.flush(self._last)

    # ---- inside

    def _n_blocks(self) -> int:
        return -(-self.n_tokens // BLOCK_TOKENS)

    def _window_is_gone(self, n_tokens: int) -> bool:
        """Whether sliding-window layers have dropped keys that the token after so many attends to: after a long way back."""
        if not self._n_swa or not n_tokens:
            return False
        first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(self.ctx), 0)
        return not 0 <= first <= max(0, n_tokens - self._n_swa)

    def _begin(self) -> None:
        """A step or a prompt begins."""
        if self.busy:  # nobody undid what was before
            self.undo(self.n_done)
        self.busy = True

    def _end(self) -> None:
        """It is done with: nothing of it is undone any more."""
        self.n_done = self.n_tokens
        self.busy = False

    def _run_batch(self, mode: int, tokens: Sequence[int]) -> None:
        """Run tokens dense, and have their rows in the store; in history mode their scores in ``attached.history_scores``."""
        self._confirm(self.n_tokens)
        self.path.before_batch(self.n_tokens)
        self.in_sparse_step = False
        with self.attached.running(mode):
            self.decode(tokens, self.n_tokens)
            self.path.finish_batch(self._last)
        self._last = None
        self.n_tokens += len(tokens)
        if mode != native.DENSE:
            self.n_history_taps = len(tokens)

    def _confirm(self, n_tokens: int) -> None:
        """The store ends at ``n_tokens``: take in the scores of a verified batch's tokens before that."""
        first, n = self._draft_span
        self._draft_span = (0, 0)
        n_stay = min(n_tokens - first, n)
        if n_stay > 0:
            self.history.observe_all(self.attached.history_scores, 0, n_stay, -(-(first + n_stay) // BLOCK_TOKENS))

    def _tell(self, n_done: int, n_tokens: int) -> None:
        """Whoever wants to know of progress: last, as what is called may raise."""
        self.n_done = self.n_tokens
        self.observers.tell_kv(self.n_tokens)
        if self.observers.on_progress is not None:
            self.observers.on_progress(n_done, n_tokens)

    def _observe(self, result: StepResult, before: native.kvcast_stats, begin: float, calibrated: bool) -> None:
        """Learn from a step that began at ``begin``, and count it."""
        observed = time.perf_counter()
        if not self.policy.frozen:
            if result.at_once:
                result.learn()
            else:
                self._last = result
            self.known.poor = float(result.shares.mean()) < self.config.min_recovery
        n_dense = (result.position // BLOCK_TOKENS + 1) * self.n_rows
        self.times.count(begin, observed, result.n_read, n_dense, float(result.shares.mean()), calibrated, before, self.attached.stats)

    def use(self, predictor: predictors.Predictor) -> None:
        if self.history.keep_steps(predictor.n_steps_kept):  # first: it may not fit into memory
            self.checkpoints.adopt(self.n_tokens)  # which have no such steps
        self.policy.predictor = predictor
        self.suspended_network = None

    def fall_back(self) -> None:
        network = self.predictor
        self.use(predictors.EmaPredictor(0.9))
        self.suspended_network = network
