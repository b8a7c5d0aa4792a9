"""What other published methods would keep, for comparison (kvcast.eval): predictors like those of predictors.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..bindings.context import NativeContext
from ..blocks import BLOCK_TOKENS
from .history import History

if TYPE_CHECKING:
    from .predictors import Predictor

PROMPT_STEPS = 64  # of a prompt's last tokens: what the methods that judge a prompt see of it here


class Quest:
    """Upper bounds of attention from each block's smallest and largest key, by channel, and the step's own query (Tang et al.
    2024, arXiv 2406.10774). For evaluation: exact keys in NumPy, the query from a step that is taken back.

    Raises
    ------
    ValueError
        The session keeps no queries, or its store is not f16.
    """

    n_steps_kept = 0
    by_rows = on_gpu = False

    def __init__(self, attached: NativeContext):
        if attached.trace_q is None or attached.info.type_k != 1:
            raise ValueError("predictor 'quest' needs an f16 store and a session made for it; load the model with predictor='quest'")
        self._attached = attached
        info = attached.info
        self.state_bytes_per_block = 2 * 2 * info.head_dim_k
        shape = (info.n_layer, info.n_blocks, info.n_head_kv, info.head_dim_k)
        self._low, self._high = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._n_done = 0
        self._epoch = -1

    def predict(self, history: History, n_blocks: int, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        info = self._attached.info
        if history.epoch != self._epoch:
            self._n_done, self._epoch = 0, history.epoch
        scores = []
        group = info.n_head // info.n_head_kv
        for layer in range(info.n_layer):
            keys = self._attached.rows(layer)[0].view(np.float16)
            new = slice(self._n_done, n_blocks)
            k = keys[self._n_done * BLOCK_TOKENS : n_blocks * BLOCK_TOKENS].astype(np.float32)
            k = k.reshape(-1, BLOCK_TOKENS, info.n_head_kv, info.head_dim_k)
            self._low[layer, new], self._high[layer, new] = k.min(1), k.max(1)
            q = self._attached.trace_q[layer, 0].reshape(info.n_head_kv, group, -1) * info.kq_scale
            low, high = (x[layer, :n_blocks].transpose(1, 2, 0) for x in (self._low, self._high))  # (n_head_kv, d, n_blocks)
            bound = np.maximum(q, 0) @ high + np.minimum(q, 0) @ low  # (n_head_kv, group, n_blocks)
            bound = np.exp(bound - bound.max(-1, keepdims=True))
            scores.append((bound / bound.sum(-1, keepdims=True)).mean(1))
        self._n_done = max(0, n_blocks - 1)  # the last block still grows
        return np.concatenate(scores).astype(np.float32)


class StreamingLLM:
    """The most recent blocks (StreamingLLM, Xiao et al. 2024, arXiv 2309.17453, without renumbered positions)."""

    n_steps_kept = 0
    state_bytes_per_block = 0
    by_rows = on_gpu = False

    def __init__(self, attached: NativeContext):
        self._n_rows = attached.info.n_layer * attached.info.n_head_kv

    def predict(self, history: History, n_blocks: int, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        return np.tile(np.arange(1, n_blocks + 1, dtype=np.float32), (self._n_rows, 1))


class H2O:
    """Attention accumulated over steps; what was not kept once never returns (H2O, Zhang et al. 2023, arXiv 2306.14048).

    Accumulated from the last 64 tokens of the prompt on, where the authors have all of them. For sets that are selected anew at
    every step (``hold=1``).
    """

    n_steps_kept = PROMPT_STEPS
    state_bytes_per_block = 4
    by_rows = on_gpu = False

    def __init__(self, attached: NativeContext):
        info = attached.info
        self._table = attached.blocks.reshape(-1, info.n_blocks)
        self._n_listed = attached.n_listed.reshape(-1)
        self._sums = np.zeros((len(self._table), info.n_blocks), np.float32)
        self._gone = np.zeros(self._sums.shape, bool)
        self._n_seen = 0
        self._epoch = -1

    def predict(self, history: History, n_blocks: int, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        if history.epoch != self._epoch:
            self._epoch = history.epoch
            self._sums[:] = history.last_rows(PROMPT_STEPS).sum(0)
            self._gone[:] = False
        else:
            self._sums += history.averages[:, 0]
            kept = np.zeros_like(self._gone)
            which, columns = np.nonzero(np.arange(self._table.shape[1]) < self._n_listed[:, None])
            kept[which, self._table[which, columns]] = True
            self._gone[:, : self._n_seen] |= ~kept[:, : self._n_seen]
        self._n_seen = n_blocks
        return np.where(self._gone, np.float32(-1), self._sums)


class SnapKV:
    """What the last tokens of the prompt attended to, and all that came after it (SnapKV, Li et al. 2024, arXiv 2404.14469)."""

    n_steps_kept = PROMPT_STEPS
    state_bytes_per_block = 4
    by_rows = on_gpu = False

    def __init__(self, attached: NativeContext):
        self._scores = np.zeros((attached.info.n_layer * attached.info.n_head_kv, attached.info.n_blocks), np.float32)
        self._epoch = -1

    def predict(self, history: History, n_blocks: int, rows: slice = slice(None)) -> npt.NDArray[np.float32]:
        if history.epoch != self._epoch:
            self._epoch = history.epoch
            self._scores[:] = history.last_rows(PROMPT_STEPS).mean(0)
            self._scores[:, n_blocks - 1 :] = PROMPT_STEPS  # more than any of the prompt
        return self._scores


BY_NAME: dict[str, Callable[[NativeContext], Predictor]] = {
    "quest": Quest,
    "streaming": StreamingLLM,
    "h2o": H2O,
    "snapkv": SnapKV,
}
