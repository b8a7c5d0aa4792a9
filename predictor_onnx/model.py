"""The networks. ``Stream`` is the default; ``Paper`` is the method as published, for comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

N_AVERAGES = 5
BASE = 3  # index of the average that is corrected (decay 0.9)
EPSILON = 1e-6


class Stream(nn.Module):  # type: ignore[misc]  # torch need not be installed
    """Conv 5-16 (k=3), 16-8 (k=3), 8-1 (k=1) over blocks, on the logs of five exponential averages.

    It learns a correction to the average that the runtime would use alone: scores = average(0.9) * exp(correction). With
    a correction of zero it *is* that average.
    """

    multiply_adds_per_block = 632

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv1d(N_AVERAGES, 16, 3, padding=1)
        self.conv1 = nn.Conv1d(16, 8, 3, padding=1)
        self.conv2 = nn.Conv1d(8, 1, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, averages: Tensor) -> Tensor:
        """averages (n_rows, 5, n_blocks) -> scores (n_rows, n_blocks)"""
        return (averages[:, BASE] + EPSILON) * torch.exp(self.correction(averages))

    def correction(self, averages: Tensor) -> Tensor:
        """averages (n_rows, 5, n_blocks) -> what is added to the average's logarithm, (n_rows, n_blocks)"""
        x = torch.relu(self.conv0(torch.log(averages + EPSILON) * 0.1 + 0.5))
        x = torch.relu(self.conv1(x))
        return torch.clamp(self.conv2(x)[:, 0], -4.0, 4.0)


class Paper(nn.Module):  # type: ignore[misc]  # torch need not be installed
    """AttentionPredictor's CNN (arXiv 2502.04077, section 4.2): Conv 1-16-32 (3x3) on 64 steps of block scores, mean over time, 1x1.

    Trained on block sums, which is what the runtime observes; the paper pools by maximum.
    """

    n_steps = 64
    multiply_adds_per_block = 64 * (9 * 16 + 9 * 16 * 32) + 32
    SCALE = 100.0  # scores are shares of attention, most of them tiny

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv2 = nn.Conv1d(32, 1, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """rows (n_rows, 64, n_blocks), oldest first -> scores (n_rows, n_blocks)"""
        x = torch.relu(self.conv0(rows[:, None] * self.SCALE))
        x = torch.relu(self.conv1(x))
        return self.conv2(x.mean(2))[:, 0] / self.SCALE


ARCHITECTURES: dict[str, type[Stream] | type[Paper]] = {"stream": Stream, "paper": Paper}
