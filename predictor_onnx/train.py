"""Train a network on recordings: seconds for ``stream``, minutes for ``paper``, on two cores.

``stream``: the loss is the generalised Kullback-Leibler divergence between predicted and true attention mass over the middle
blocks, so a row counts by its mass and masses stay comparable between rows, which spread budgets need; and the correction
is shrunk towards none.
``paper``: mean squared error, as published, over the middle blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from .data import Sample
from .model import BASE, EPSILON, Paper, Stream

N_BLOCKS = 24  # at which middle recovery is reported: a budget of 512 tokens
SHRINK = 0.2  # towards the plain average: costs a little on models that were trained on, and carries over to others
ROWS_AT_ONCE = 16  # of the paper's network, which is slow


def divergence(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the sum over blocks of scores - target*log(scores)."""
    return (scores - target * torch.log(scores + EPSILON)).sum(-1).mean()


def middle_recovery(scores: np.ndarray, target: np.ndarray, k: int = N_BLOCKS) -> float:
    """Share of the target on each row's k best blocks."""
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float(np.take_along_axis(target, best, 1).sum() / target.sum())


def train(
    architecture: type[Stream] | type[Paper], data: Sequence[Sample], n_iterations: int, seed: int, say: Callable[[str], None]
) -> Stream | Paper:
    """Fit a new network."""
    torch.manual_seed(seed)
    if architecture is Stream:
        torch.set_num_threads(1)  # too small to share
    rng = np.random.default_rng(seed)
    model = architecture()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, n_iterations)
    for i in range(n_iterations):
        sample = data[int(rng.integers(len(data)))]
        if isinstance(model, Stream):
            averages, target = torch.from_numpy(sample.averages), torch.from_numpy(sample.target)
            correction = model.correction(averages)
            scores = (averages[:, BASE] + EPSILON) * torch.exp(correction)
            loss = divergence(scores, target) + SHRINK * ((scores.detach() + target) * correction.square()).sum(-1).mean()
        else:
            assert sample.rows is not None
            few = rng.choice(len(sample.rows), min(ROWS_AT_ONCE, len(sample.rows)), replace=False)
            scores = model(torch.from_numpy(sample.rows[few]))[:, sample.middle]
            loss = ((scores - torch.from_numpy(sample.target[few])) * Paper.SCALE).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % 50 == 0:
            say(f"iteration {i}: loss {loss.item():.4f}")
    return model.eval()


def metrics(model: Stream | Paper, documents: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, float]]:
    """Middle recovery on each document: of the next steps' mean by the prediction, the average and the target itself; and of the
    next step alone when prediction (or average, or nothing) is combined with the estimate that the step makes of itself."""
    found = {}
    for name, samples in documents.items():
        rows = []
        for s in samples:
            with torch.no_grad():
                if isinstance(model, Stream):
                    scores = model(torch.from_numpy(s.averages)).numpy()
                else:
                    scores = model(torch.from_numpy(s.rows)).numpy()[:, s.middle]
            ema = s.averages[:, BASE]
            row = [middle_recovery(x, s.target) for x in (scores, ema, s.target)]
            for prior in (np.maximum(scores, 0), ema, np.ones_like(ema)):
                row.append(middle_recovery(np.sqrt(prior + 1e-6) * s.estimate, s.now))
            rows.append([*row, middle_recovery(s.now, s.now)])
        names = ("network", "ema", "oracle", "network_and_query", "ema_and_query", "query", "oracle_of_the_step")
        found[name] = dict(zip(names, np.mean(rows, 0).round(4).tolist()))
    return found
