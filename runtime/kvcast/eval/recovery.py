"""Recovery: how much of the true attention falls on the sets that the live loop used.

Two passes over the same tokens, teacher-forced from the same prompt: a sparse one that notes the set of every step, and
a dense one whose exact scores are the truth. Means over query heads, layers and steps; *middle* leaves sink and window
out of both terms (and is weighted by mass, as shares of it are tiny where sink and window hold nearly everything).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..bindings import api as native
from ..blocks import BLOCK_TOKENS
from ..config import SparseConfig
from ..llama.model import Llama
from .output_error import Outputs


@dataclass(frozen=True, slots=True)
class Recovery:
    """One configuration over one document. Intervals are 95 %, from a bootstrap over runs of 8 steps.

    *Copied* counts the steps whose next token continues a passage that stands earlier in the text (5 tokens or more): how much
    of the attention that dense heads give to the block of the next token falls on sets that hold it, and how often that
    token is the likeliest, sparse and dense.
    """

    predictor: str
    path: str
    budget: int
    budgets: str
    hold: int
    calibrate: str
    recovery: float
    recovery_interval: tuple[float, float]
    middle_recovery: float
    middle_interval: tuple[float, float]
    churn: float  # share of the set that is new at a step
    estimated: float  # the runtime's own estimate of recovery
    kl: float  # mean over tokens of the divergence of the next-token distribution from dense, nats
    kl_median: float
    kl_p99: float  # that the worst percent of tokens exceeds
    ppl_dense: float  # perplexity of the text, of dense and of this one
    ppl_sparse: float
    output_error: float | None  # of attention, see output_error.py; None where it was not asked for
    n_steps: int
    n_dense_steps: int  # of them, over everything: calibrations and fallbacks
    top1: float  # share of tokens where the likeliest next token is the same
    ms_per_step: float  # mean over the sparse pass
    state_bytes_per_block: int  # of the predictor
    n_copied: int
    copied_in_set: float | None
    copied_right: float | None
    copied_right_dense: float | None
    ratio_to_oracle: float | None = None  # of middle recovery, to an oracle of the same budget and, if run, `budgets`


class Recorder:
    """Notes the set of every sparse step; set it as ``session.observers.on_attended``."""

    def __init__(self, llm: Llama, keep_cells: bool = False):
        self._session = llm.session
        self._keep_cells = keep_cells
        self.lists: list[tuple[np.ndarray, np.ndarray]] = []
        self.cells: list[np.ndarray] = []  # one per step: the tokens as bits, uint8, shape (n_rows, n_cells / 8)

    def __call__(self, _position: int) -> None:
        session = self._session
        self.lists.append((session.result.blocks[:, : int(session.result.n_attended.max())].copy(), session.result.n_attended.copy()))
        if self._keep_cells:
            self.cells.append(self._bits())

    def _bits(self) -> np.ndarray:
        session, info = self._session, self._session.attached.info
        mask = np.repeat(self._mask(*self.lists[-1]), BLOCK_TOKENS, axis=1)
        for row in range(session.n_rows):
            chosen = session.attached.chosen_cells(row // info.n_head_kv, row % info.n_head_kv)
            if len(chosen):
                mask[row].reshape(-1, BLOCK_TOKENS)[np.unique(chosen // BLOCK_TOKENS)] = False
                mask[row, chosen] = True
        return np.packbits(mask, axis=1)

    def _mask(self, blocks: np.ndarray, n_attended: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(np.arange(blocks.shape[1]) < n_attended[:, None])
        mask = np.zeros(self._session.path.blocks.shape, bool)
        mask[rows, blocks[rows, columns]] = True
        return mask

    @property
    def masks(self) -> list[np.ndarray]:
        """One per step: bool, shape (n_rows, n_blocks). A block of which some tokens were attended to counts."""
        return [self._mask(*of_step) for of_step in self.lists]


def next_logits(llm: Llama) -> np.ndarray:
    """Logits of the token evaluated last: float32, shape (n_vocab,)."""
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()


def log_softmax(x: np.ndarray) -> np.ndarray:
    """float32, of the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True, dtype=np.float64)).astype(np.float32)


def true_scores(llm: Llama, tokens: Sequence[int], on_step: Callable[[], None] | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """Run tokens dense, one by one, and call ``on_step`` after each.

    Returns
    -------
    scores : list of float32 arrays, shape (n_rows, blocks in use), one per token
    logits : float32, shape (len(tokens), n_vocab)
    """
    session = llm.session
    found, logits = [], []
    for token in tokens:
        session.dense_step(token, native.HISTORY)
        n_used = -(-session.n_tokens // BLOCK_TOKENS)
        found.append(session.attached.history_scores[:, 0, :, :n_used].reshape(session.n_rows, n_used).copy())
        logits.append(next_logits(llm))
        if on_step is not None:
            on_step()
    return found, np.stack(logits)


def steps_of(masks: Sequence[np.ndarray], truth: Sequence[np.ndarray], config: SparseConfig) -> np.ndarray:
    """float64, shape (n_steps, 3): recovery, middle mass held, middle mass, by step.

    Rows that attended to everything would flatter a method and are left out; steps of which nothing is left are nan.
    """
    n_sink, n_window = config.sink // BLOCK_TOKENS, config.window // BLOCK_TOKENS
    found = np.full((len(masks), 3), np.nan)
    for i, (mask, scores) in enumerate(zip(masks, truth, strict=True)):
        n_used = scores.shape[1]
        sparse = ~mask[:, :n_used].all(1)
        if sparse.any():
            scores = scores[sparse]
            held = np.where(mask[sparse, :n_used], scores, 0)
            middle = slice(n_sink, max(n_sink, n_used - n_window))
            found[i] = held.sum(1).mean(), held[:, middle].sum(), scores[:, middle].sum()
    return found


def recovery_of(masks: Sequence[np.ndarray], truth: Sequence[np.ndarray], config: SparseConfig) -> tuple[float, float]:
    """Recovery and middle recovery of the noted sets; 1 where nothing was left out."""
    return _means(steps_of(masks, truth, config))


def _means(steps: np.ndarray) -> tuple[float, float]:
    steps = steps[~np.isnan(steps[:, 0])]
    middle = steps[:, 2].sum()
    return float(steps[:, 0].mean()) if len(steps) else 1.0, float(steps[:, 1].sum() / middle) if middle else 1.0


def intervals(steps: np.ndarray, n_run: int = 8, n_draws: int = 500) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % bootstrap intervals of recovery and middle recovery, over runs of ``n_run`` steps, which are not independent."""
    rng = np.random.default_rng(0)
    runs = [steps[i : i + n_run] for i in range(0, len(steps), n_run)]
    draws = np.array([_means(np.concatenate([runs[k] for k in rng.integers(len(runs), size=len(runs))])) for _ in range(n_draws)])
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def copied_from(tokens: Sequence[int], n_context: int, n_least: int = 5) -> dict[int, int]:
    """Where text repeats itself after ``n_context``.

    Returns
    -------
    dict
        Position of a step -> position of the earlier token that its next token repeats, for passages of ``n_least`` tokens or
        more; the step before a passage counts, as it has to find it.
    """
    where: dict[tuple[int, ...], int] = {}
    for i in range(n_context - n_least):
        where.setdefault(tuple(tokens[i : i + n_least]), i)
    found: dict[int, int] = {}
    for p in range(n_context, len(tokens) - n_least + 1):
        source = where.get(tuple(tokens[p : p + n_least]))
        if source is not None:
            for k in range(n_least):
                found.setdefault(p + k - 1, source + k)
    return {p: s for p, s in found.items() if n_context <= p < len(tokens) - 1}


def churn_of(masks: Sequence[np.ndarray]) -> float:
    """Share of the set that is new at a step; steps over everything and those after them are left out."""
    new, held = 0, 0
    for before, now in itertools.pairwise(masks):
        if now.sum() < 2 * before.sum() < 4 * now.sum():
            new += int((now & ~before).sum())
            held += int(now.sum())
    return new / max(1, held)


def measure(
    llm: Llama,
    tokens: Sequence[int],
    n_context: int,
    configs: Sequence[SparseConfig],
    *,
    outputs: bool = False,
    say: Callable[[int], None] = lambda _: None,
) -> list[Recovery]:
    """Recovery of each configuration over ``tokens[n_context:]``, in the live loop.

    The context must have been evaluated just before (``llm.eval(tokens[:n_context])``); it is left as it was found.

    Parameters
    ----------
    outputs : bool
        Measure the error of attention's output too, and recovery token by token: always done where steps choose tokens. The model must
        have been loaded with ``SparseConfig(trace=True)``.
    say : callable
        Called with the number of configurations done.

    Raises
    ------
    ValueError
        The model does not stand at ``n_context``.
    """
    if llm.n_tokens != n_context:
        raise ValueError(f"the model holds {llm.n_tokens} tokens; evaluate exactly the first {n_context} first")
    session, config = llm.session, llm.session.config
    primed = session.history.save()

    def rewind() -> None:
        llm.n_tokens = n_context
        session.truncate(n_context)
        session.history.restore(primed)

    by_token = outputs or any(c.chooses_tokens for c in configs)
    found = Outputs(llm, n_context) if by_token else None
    truth, dense_logits = true_scores(llm, tokens[n_context:], found.note if found else None)
    if found:
        found.end_of_dense_pass()
    dense = log_softmax(dense_logits)
    n_known = len(tokens) - n_context - 1  # steps whose next token the text tells
    target = np.arange(n_known), np.asarray(tokens[n_context + 1 :])
    nll_dense = -float(dense[target].mean())
    sources = copied_from(tokens, n_context)
    results = []
    all_cells = []
    for i, now in enumerate(configs):
        say(i)
        session.configure(now)
        rewind()
        session.observers.on_attended = recorder = Recorder(llm, keep_cells=by_token)
        logits = []
        try:
            for token in tokens[n_context:]:
                llm.eval([token])
                logits.append(next_logits(llm))
        finally:
            session.observers.on_attended = None
        sparse = log_softmax(np.stack(logits))
        times, masks = session.times, recorder.masks
        all_cells.append(recorder.cells)
        kl = (np.exp(dense) * (dense - sparse)).sum(-1)
        steps = steps_of(masks, truth, now)
        recovery, middle = _means(steps)
        recovery_interval, middle_interval = intervals(steps)
        results.append(
            Recovery(
                predictor=now.predictor,
                path=now.path,
                budget=now.budget_blocks(n_context) * BLOCK_TOKENS,
                budgets=now.allocation,
                hold=now.steps_held,
                calibrate=now.calibrate,
                recovery=recovery,
                recovery_interval=recovery_interval,
                middle_recovery=middle,
                middle_interval=middle_interval,
                churn=churn_of(masks),
                estimated=times.share_sum / times.n_steps,
                kl=float(kl.mean()),
                kl_median=float(np.median(kl)),
                kl_p99=float(np.percentile(kl, 99)),
                ppl_dense=float(np.exp(nll_dense)),
                ppl_sparse=float(np.exp(-sparse[target].mean())),
                output_error=None,
                n_steps=times.n_steps,
                n_dense_steps=times.n_calibrations,
                top1=float((dense.argmax(-1) == sparse.argmax(-1)).mean()),
                ms_per_step=times.ms(times.total),
                state_bytes_per_block=session.predictor.state_bytes_per_block,
                **_copied(sources, tokens, n_context, masks, truth, dense, sparse),
            )
        )
    session.configure(config)
    rewind()
    if found:
        by_config = found.errors(all_cells, [(c.sink, c.window) for c in configs])
        results = [_by_token(r, error, steps) for r, (error, steps) in zip(results, by_config, strict=True)]
    oracles = {r.budget: r.middle_recovery for r in results if r.predictor == "oracle"}  # spread or uniform, where there is one
    same = {(r.budget, r.budgets): r.middle_recovery for r in results if r.predictor == "oracle"}
    best = [same.get((r.budget, r.budgets), oracles.get(r.budget)) for r in results]
    return [replace(r, ratio_to_oracle=r.middle_recovery / o if o else None) for r, o in zip(results, best)]


def _by_token(result: Recovery, output_error: float, steps: np.ndarray) -> Recovery:
    recovery, middle = _means(steps)
    of_recovery, of_middle = intervals(steps)
    result = replace(result, output_error=output_error, recovery=recovery, middle_recovery=middle)
    return replace(result, recovery_interval=of_recovery, middle_interval=of_middle)


def _copied(sources, tokens, n_context, masks, truth, dense, sparse) -> dict:
    held, right, right_dense = [], [], []
    for p, source in sources.items():
        i, block = p - n_context, source // BLOCK_TOKENS
        mass = truth[i][:, block]
        held.append(float(mass[masks[i][:, block]].sum() / mass.sum()))
        right.append(sparse[i].argmax() == tokens[p + 1])
        right_dense.append(dense[i].argmax() == tokens[p + 1])
    if not held:
        return {"n_copied": 0, "copied_in_set": None, "copied_right": None, "copied_right_dense": None}
    means = (float(np.mean(x)) for x in (held, right, right_dense))
    return {"n_copied": len(held), **dict(zip(("copied_in_set", "copied_right", "copied_right_dense"), means))}
