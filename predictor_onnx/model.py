"""The ``stream`` network: a 1-D convolution over blocks on the logs of five exponential averages.

It learns a correction to the average that the runtime would use alone: scores = average(0.9) * exp(correction). With a
correction of zero it *is* that average.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

N_AVERAGES = 5
BASE = 3  # index of the average that is corrected (decay 0.9)
EPSILON = 1e-6


class Stream(nn.Module):
    """Conv 5-16 (k=3), 16-8 (k=3), 8-1 (k=1): 657 parameters, 632 multiply-adds per block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv1d(N_AVERAGES, 16, 3, padding=1)
        self.conv1 = nn.Conv1d(16, 8, 3, padding=1)
        self.conv2 = nn.Conv1d(8, 1, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, averages: Tensor) -> Tensor:
        """averages (n_rows, 5, n_blocks) -> scores (n_rows, n_blocks)"""
        logs = torch.log(averages + EPSILON)
        x = torch.relu(self.conv0(logs * 0.1 + 0.5))
        x = torch.relu(self.conv1(x))
        return torch.exp(logs[:, BASE] + torch.clamp(self.conv2(x)[:, 0], -4.0, 4.0))
