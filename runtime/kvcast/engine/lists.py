"""The lists of blocks of a step on the host path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass
class Lists:
    """What a step attends to, and what it may choose itself; shapes as in ``sparse.selection``."""

    blocks: np.ndarray
    n_listed: np.ndarray
    n_topk: np.ndarray
    shares: np.ndarray
    weights: np.ndarray | None
    topk_range: tuple[int, int] = (0, 0)

    def map(self, make: Callable[[np.ndarray], np.ndarray]) -> Lists:
        """One made of these arrays."""
        weights = None if self.weights is None else make(self.weights)
        return Lists(make(self.blocks), make(self.n_listed), make(self.n_topk), make(self.shares), weights)

    def copy(self, other: Lists) -> None:
        """Take over what ``other`` holds."""
        longest = int(other.n_listed.max())
        self.blocks[:, :longest] = other.blocks[:, :longest]
        self.n_listed[:], self.n_topk[:], self.shares[:], self.topk_range = other.n_listed, other.n_topk, other.shares, other.topk_range
        if self.weights is not None and other.weights is not None:
            self.weights[:, : self.topk_range[1]] = other.weights[:, : self.topk_range[1]]
