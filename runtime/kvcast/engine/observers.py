"""Who is told of what a session does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..blocks import BLOCK_TOKENS

AttentionFn = Callable[[int, int, np.ndarray], None]
KvFn = Callable[[int, int, np.ndarray, np.ndarray], None]


@dataclass
class Observers:
    """Functions that a session calls, on its thread and last of all, as they may raise; None: nobody.

    Attributes
    ----------
    n_layer : int
        Served layers.
    on_progress
        Called with the tokens of a prompt that are done, and in all.
    on_kv
        Called with served layer and block, when one is complete.
    on_primed
        For recording: called with scores, float32, shape (n_layer, n_tokens, n_head_kv, n_blocks).
    on_attended
        For evaluation: called with the position after each sparse step.
    n_reported : int
        Complete blocks that ``on_kv`` knows of.
    """

    n_layer: int
    on_progress: Callable[[int, int], None] | None = None
    on_kv: Callable[[int, int], None] | None = None
    on_primed: Callable[[np.ndarray], None] | None = None
    on_attended: Callable[[int], None] | None = None
    n_reported: int = 0

    def tell_kv(self, n_tokens: int) -> None:
        """The store has grown to ``n_tokens``."""
        report = self.on_kv
        while report is not None and self.n_reported < n_tokens // BLOCK_TOKENS:
            block = self.n_reported
            self.n_reported += 1
            for layer in range(self.n_layer):
                report(layer, block)

    def truncate(self, n_tokens: int) -> None:
        """It was cut there: blocks after that will be reported again."""
        self.n_reported = min(self.n_reported, n_tokens // BLOCK_TOKENS)
