"""Recovery: how much of the true attention falls on the sets that the live loop used.

Two passes over the same tokens, teacher-forced from the same prompt: a sparse one that notes the set of every step, and
a dense one whose exact scores are the truth. Means over query heads, layers and steps; *middle* leaves sink and window
out of both terms (and is weighted by mass, as shares of it are tiny where sink and window hold nearly everything).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    kl: float  # mean over tokens of the divergence of the next-token distribution from dense, nats
    top1: float  # share of tokens where the likeliest next token is the same
    step_ms: float


class Recorder:
    """Notes the set of every sparse step; set it as ``session.on_attended``."""

    def __init__(self, llm: Llama):
        self._session = llm.session
        self.lists: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(self, _position: int) -> None:
        session = self._session
        self.lists.append((session.blocks[:, : int(session.n_attended.max())].copy(), session.n_attended.copy()))

    @property
    def masks(self) -> list[np.ndarray]:
        """One per step: bool, shape (n_rows, n_blocks)."""
        masks = []
        for blocks, n_attended in self.lists:
            rows, columns = np.nonzero(np.arange(blocks.shape[1]) < n_attended[:, None])
            mask = np.zeros(self._session.blocks.shape, bool)
            mask[rows, blocks[rows, columns]] = True
            masks.append(mask)
        return masks


def next_logits(llm: Llama) -> np.ndarray:
    """Logits of the token evaluated last: float32, shape (n_vocab,)."""
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def true_scores(llm: Llama, tokens: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Run tokens dense, one by one.

    Returns
    -------
    scores : list of float32 arrays, shape (n_rows, blocks in use), one per token
    logits : float32, shape (len(tokens), n_vocab)
    """
    session = llm.session
    found, logits = [], []
    for token in tokens:
        session._decode(native.HISTORY, [token], llm._decode)
        n_used = -(-session.n_tokens // native.BLOCK_TOKENS)
        found.append(session.attached.history_scores[:, 0, :, :n_used].reshape(session.n_rows, n_used).copy())
        logits.append(next_logits(llm))
    return found, np.stack(logits)


def recovery_of(masks: Sequence[np.ndarray], truth: Sequence[np.ndarray], config: SparseConfig) -> tuple[float, float]:
    """Recovery and middle recovery of the noted sets; rows that attended to everything would flatter them and are left out."""
    n_sink, n_window = config.sink // native.BLOCK_TOKENS, config.window // native.BLOCK_TOKENS
    total, middle_held, middle_all = [], 0.0, 0.0
    for mask, scores in zip(masks, truth, strict=True):
        n_used = scores.shape[1]
        sparse = ~mask[:, :n_used].all(1)
        if not sparse.any():
            continue
        scores = scores[sparse]
        held = np.where(mask[sparse, :n_used], scores, 0)
        total.append(held.sum(1).mean())
        middle = slice(n_sink, max(n_sink, n_used - n_window))
        middle_held += float(held[:, middle].sum())
        middle_all += float(scores[:, middle].sum())
    return float(np.mean(total or [1.0])), middle_held / middle_all if middle_all else 1.0


def churn_of(masks: Sequence[np.ndarray]) -> float:
    """Share of the set that is new at a step; steps over everything and those after them are left out."""
    new, held = 0, 0
    for before, now in zip(masks, masks[1:]):
        if not (before.all() or now.all()) and now.sum() < 2 * before.sum() < 4 * now.sum():
            new += int((now & ~before).sum())
            held += int(now.sum())
    return new / max(1, held)


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

    truth, dense_logits = true_scores(llm, tokens[n_context:])
    dense = log_softmax(dense_logits)
    rewind()
    results = []
    for name in predictors:
        now = replace(config, predictor=name)
        session.configure(now)
        session.on_attended = recorder = Recorder(llm)
        logits = []
        try:
            for token in tokens[n_context:]:
                llm.eval([token])
                logits.append(next_logits(llm))
        finally:
            session.on_attended = None
        sparse = log_softmax(np.stack(logits))
        times = session.times
        masks = recorder.masks
        recovery, middle = recovery_of(masks, truth, now)
        results.append(
            Recovery(
                predictor=name,
                recovery=recovery,
                middle_recovery=middle,
                churn=churn_of(masks),
                estimated=times.share_sum / times.n_steps,
                kl=float((np.exp(dense) * (dense - sparse)).sum(-1).mean()),
                top1=float((dense.argmax(-1) == sparse.argmax(-1)).mean()),
                step_ms=times.ms(times.total),
            )
        )
        rewind()
    session.configure(config)
    return results
