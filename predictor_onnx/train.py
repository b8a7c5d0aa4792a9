"""Train ``Stream`` on recorded samples: seconds on one core.

The loss is the generalised Kullback-Leibler divergence between predicted and true attention mass over the middle blocks,
so a row counts by its mass and masses stay comparable between rows, which spread budgets need.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from .data import Sample
from .model import BASE, EPSILON, Stream


def divergence(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over rows of the sum over blocks of scores - target*log(scores)."""
    return (scores - target * torch.log(scores + EPSILON)).sum(-1).mean()


def middle_recovery(scores: np.ndarray, target: np.ndarray, k: int) -> float:
    """Share of the target on each row's k best blocks."""
    k = min(k, scores.shape[1])
    best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return float(np.take_along_axis(target, best, 1).sum() / target.sum())


def train(
    data: dict[str, list[Sample]], held_out: set[str], n_iterations: int, seed: int, say: Callable[[str], None]
) -> tuple[Stream, dict]:
    """Train on all documents but the held-out ones.

    Returns
    -------
    model : Stream
    metrics : dict
        Middle recovery at 24 blocks on the held-out documents: the network, the average alone, the target itself.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    samples = [s for name, found in data.items() if name not in held_out for s in found]
    model = Stream()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, n_iterations)
    for i in range(n_iterations):
        averages, target = (torch.from_numpy(x.astype(np.float32) / 1e3) for x in samples[rng.integers(len(samples))])
        loss = divergence(model(averages), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if i % 100 == 0:
            say(f"iteration {i}: loss {loss.item():.4f}")
    metrics = {}
    for name in sorted(held_out & data.keys()):
        sums = np.zeros(3)
        for a, t in data[name]:
            averages, target = a.astype(np.float32) / 1e3, t.astype(np.float32) / 1e3
            with torch.no_grad():
                scores = model(torch.from_numpy(averages)).numpy()
            sums += [
                middle_recovery(scores, target, 24),
                middle_recovery(averages[:, BASE], target, 24),
                middle_recovery(target, target, 24),
            ]
        metrics[name] = dict(zip(("stream", "ema", "oracle"), (sums / len(data[name])).round(4).tolist()))
    return model.eval(), metrics
