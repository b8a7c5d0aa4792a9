"""What is remembered of attention: a few exponential averages of each block's score, per layer and KV head.

A score is the sum of attention probability over a block's tokens, mean over the query heads of the group. Blocks that a
step did not attend to keep their last known averages (never zeros for what was not seen). Kernels take plain arrays and
write into the caller's; the naive twins are in tests/naive.py.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from .native import BLOCK_TOKENS

DECAYS = (0.0, 0.5, 0.8, 0.9, 0.97)  # the first is the last score itself


@numba.njit(nogil=True, cache=True)
def _observe_listed(averages, decays, blocks, n_listed, scores, shares):
    for row in range(blocks.shape[0]):
        for i in range(n_listed[row]):
            b = blocks[row, i]
            score = scores[row, i] * shares[row]
            for d in range(decays.shape[0]):
                averages[row, d, b] = decays[d] * averages[row, d, b] + (np.float32(1) - decays[d]) * score


@numba.njit(nogil=True, cache=True)
def _observe_all(averages, decays, scores, n_taps, n_blocks):
    n_layer, _, n_head_kv, _ = scores.shape
    for layer in range(n_layer):
        for tap in range(n_taps):
            for head in range(n_head_kv):
                row = layer * n_head_kv + head
                for d in range(decays.shape[0]):
                    keep = decays[d]
                    add = np.float32(1) - keep
                    for b in range(n_blocks):
                        averages[row, d, b] = keep * averages[row, d, b] + add * scores[layer, tap, head, b]


class History:
    """Averages of block scores, updated in place.

    Parameters
    ----------
    n_layer, n_head_kv, n_blocks : int
        Shape of the cache; a *row* is one KV head of one layer.

    Attributes
    ----------
    averages : float32, shape (n_layer * n_head_kv, len(DECAYS), n_blocks)
    epoch : int
        Counts the edits that dropped something.
    """

    def __init__(self, n_layer: int, n_head_kv: int, n_blocks: int):
        self.averages = np.zeros((n_layer * n_head_kv, len(DECAYS), n_blocks), np.float32)
        self._decays = np.array(DECAYS, np.float32)
        self.n_observed = 0
        self.epoch = 0

    @property
    def primed(self) -> bool:
        """Whether anything is known."""
        return self.n_observed > 0

    def observe_listed(self, blocks: npt.NDArray, n_listed: npt.NDArray, scores: npt.NDArray, shares: npt.NDArray) -> None:
        """Take in a sparse step.

        Parameters
        ----------
        blocks : int32, shape (n_rows, n_blocks)
        n_listed : int32, shape (n_rows,)
        scores : float32, shape (n_rows, n_blocks), in list order
        shares : float32, shape (n_rows,)
            Estimated share of the whole attention that the listed blocks hold: scores of a sparse step sum to one over
            the listed blocks, those of a dense step over all.
        """
        _observe_listed(self.averages, self._decays, blocks, n_listed, scores, shares)
        self.n_observed += 1

    def observe_all(self, scores: npt.NDArray, n_taps: int, n_used_blocks: int) -> None:
        """Take in a history batch: scores float32, shape (n_layer, max_taps, n_head_kv, n_blocks)."""
        _observe_all(self.averages, self._decays, scores, n_taps, n_used_blocks)
        self.n_observed += n_taps

    def truncate(self, n_tokens: int) -> None:
        """Drop what is known of blocks at or past the cell ``n_tokens``; everything when it is 0."""
        self.averages[:, :, n_tokens // BLOCK_TOKENS :] = 0
        if n_tokens == 0:
            self.n_observed = 0
        self.epoch += 1
