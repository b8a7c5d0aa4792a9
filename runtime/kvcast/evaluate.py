"""Recovery: how much of the true attention falls on the sets that the live loop used.

Two passes over the same tokens, teacher-forced from the same prompt: a sparse one that notes the set of every step, and
a dense one whose exact scores are the truth. Means over query heads, layers and steps; *middle* leaves sink and window
out of both terms (and is weighted by mass, as shares of it are tiny where sink and window hold nearly everything).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Sequence

import numpy as np

from . import native
from .config import SparseConfig
from .llama import Llama


@dataclass(frozen=True, slots=True)
class Recovery:
    """One predictor over one document; ``step_ms`` is the mean of a step of the sparse pass."""

    predictor: str
    recovery: float
    middle_recovery: float
    churn: float  # share of the set replaced per step
    estimated: float  # the runtime's own estimate of recovery
    step_ms: float


class Recorder:
    """Notes the set of every sparse step: ``masks`` bool, shape (n_rows, n_blocks); None for a step over everything."""

    def __init__(self, llm: Llama):
        self._session = llm.session
        self.masks: list[np.ndarray | None] = []

    def __call__(self, _position: int) -> None:
        session = self._session
        if session.calibrating:
            self.masks.append(None)
            return
        listed = np.arange(session.blocks.shape[1]) < session.n_listed[:, None]
        rows, columns = np.nonzero(listed)
        mask = np.zeros(session.blocks.shape, bool)
        mask[rows, session.blocks[rows, columns]] = True
        self.masks.append(mask)


def true_scores(llm: Llama, tokens: Sequence[int]) -> list[np.ndarray]:
    """Run tokens dense, one by one; the scores of each: float32, shape (n_rows, blocks in use)."""
    session = llm.session
    found = []
    for token in tokens:
        session._decode(native.HISTORY, [token], llm._decode)
        n_used = -(-session.n_tokens // native.BLOCK_TOKENS)
        found.append(session.attached.history_scores[:, 0, :, :n_used].reshape(session.n_rows, n_used).copy())
    return found


def recovery_of(masks: Sequence[np.ndarray | None], truth: Sequence[np.ndarray], config: SparseConfig) -> tuple[float, float]:
    """Recovery and middle recovery of the noted sets; steps over everything would flatter them and are left out."""
    n_sink, n_window = config.sink // native.BLOCK_TOKENS, config.window // native.BLOCK_TOKENS
    total, middle_held, middle_all = [], 0.0, 0.0
    for mask, scores in zip(masks, truth, strict=True):
        if mask is None:
            continue
        n_used = scores.shape[1]
        held = np.where(mask[:, :n_used], scores, 0)
        total.append(held.sum(1).mean())
        middle = slice(n_sink, max(n_sink, n_used - n_window))
        middle_held += float(held[:, middle].sum())
        middle_all += float(scores[:, middle].sum())
    return float(np.mean(total or [1.0])), middle_held / middle_all if middle_all else 1.0


def measure(llm: Llama, tokens: Sequence[int], n_context: int, predictors: Sequence[str]) -> list[Recovery]:
    """Recovery of each predictor over ``tokens[n_context:]``, the session's other settings as they are.

    The context must have been evaluated just before (``llm.eval(tokens[:n_context])``); it is left as it was found.

    Raises
    ------
    ValueError
        The model does not stand at ``n_context``.
    """
    if llm.n_tokens != n_context:
        raise ValueError(f"the model holds {llm.n_tokens} tokens; evaluate exactly the first {n_context} first")
    session, config = llm.session, llm.session.config
    primed = session.history.averages.copy(), session.history.n_observed

    def rewind() -> None:
        llm.n_tokens = n_context
        session.truncate(n_context)
        session.history.averages[:], session.history.n_observed = primed

    truth = true_scores(llm, tokens[n_context:])
    rewind()
    results = []
    for name in predictors:
        now = replace(config, predictor=name)
        session.configure(now)
        session.on_selected = recorder = Recorder(llm)
        try:
            for token in tokens[n_context:]:
                llm.eval([token])
        finally:
            session.on_selected = None
        times = session.times
        recovery, middle = recovery_of(recorder.masks, truth, now)
        per_set = max(1, times.blocks_read - times.n_calibrations * times.blocks_dense // times.n_steps)
        results.append(
            Recovery(
                predictor=name,
                recovery=recovery,
                middle_recovery=middle,
                churn=times.n_changed / per_set,
                estimated=times.share_sum / times.n_steps,
                step_ms=times.ms(times.total),
            )
        )
        rewind()
    session.configure(config)
    return results
