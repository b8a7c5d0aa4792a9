"""Error of attention's output: what a set leaves out, measured where it matters to the layers behind.

For the queries of a dense pass: the output over the keys of a set beside the output over all of them, relative to its length.
Mean over query heads, layers and steps. In NumPy, from the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..blocks import BLOCK_TOKENS

if TYPE_CHECKING:
    from ..llama.model import Llama

F16 = 1


class Outputs:
    """Queries, keys and values of a dense pass that starts at ``n_context``.

    Raises
    ------
    ValueError
        The session keeps no queries, or its store is not f16.
    """

    def __init__(self, llm: Llama, n_context: int):
        self._attached = llm.session.attached
        info = self._attached.info
        if self._attached.trace_q is None or (info.type_k, info.type_v) != (F16, F16):
            raise ValueError("the output error needs an f16 store and a model loaded with SparseConfig(trace=True)")
        self._n_context = n_context
        self._queries: list[np.ndarray] = []
        self._rows: list[tuple[np.ndarray, np.ndarray]] = []

    def note(self) -> None:
        """After each dense step."""
        self._queries.append(self._attached.trace_q[:, 0].copy())

    def end_of_dense_pass(self) -> None:
        """Keep the rows of its tokens, which later passes write anew."""
        cells = slice(self._n_context, self._n_context + len(self._queries))
        self._rows = [tuple(x[cells].copy() for x in self._attached.rows(layer)) for layer in range(self._attached.info.n_layer)]

    def errors(self, cells: Sequence[Sequence[np.ndarray]], ends: Sequence[tuple[int, int]]) -> list[tuple[float, np.ndarray]]:
        """Of each configuration the mean error, and for each step what ``recovery.steps_of`` gives, token by token.

        Parameters
        ----------
        cells : sequences of uint8 arrays, shape (n_rows, n_cells / 8)
            By configuration and step: the tokens that were attended to, as bits (numpy.packbits).
        ends : sequence of (int, int)
            By configuration: tokens at the beginning and at the end that are not the middle, in whole blocks.
        """
        info = self._attached.info
        queries = np.stack(self._queries)  # (n_steps, n_layer, n_head, head_dim)
        n_steps, group = len(queries), info.n_head // info.n_head_kv
        n_cells = self._n_context + n_steps
        future = np.arange(n_cells) > self._n_context + np.arange(n_steps)[:, None]
        sums, held = np.zeros(len(cells)), np.zeros((len(cells), n_steps, 4))
        n_used = (self._n_context + np.arange(n_steps)) // BLOCK_TOKENS + 1
        at = np.arange(n_cells)
        middles = [(at >= first) & (at < np.maximum(first, n_used * BLOCK_TOKENS - last)[:, None]) for first, last in ends]
        for layer in range(info.n_layer):
            k, v = (
                np.concatenate([rows[: self._n_context], new]).view(np.float16).reshape(n_cells, info.n_head_kv, -1).astype(np.float32)
                for rows, new in zip(self._attached.rows(layer), self._rows[layer])
            )
            for head in range(info.n_head_kv):
                q = queries[:, layer, head * group : (head + 1) * group] * info.kq_scale
                logits = q.reshape(n_steps * group, -1) @ k[:, head].T
                logits = logits.reshape(n_steps, group, n_cells)
                logits[np.broadcast_to(future[:, None], logits.shape)] = -np.inf
                p = np.exp(logits - logits.max(-1, keepdims=True))
                whole = p @ v[:, head] / p.sum(-1, keepdims=True)
                length = np.linalg.norm(whole, axis=-1)
                shares = (p / p.sum(-1, keepdims=True)).mean(1)
                for i, (steps, middle) in enumerate(zip(cells, middles, strict=True)):
                    row = layer * info.n_head_kv + head
                    kept = np.unpackbits(np.stack([m[row] for m in steps]), axis=1)[:, :n_cells].astype(bool)
                    part = p * kept[:, None]
                    part = part @ v[:, head] / part.sum(-1, keepdims=True)
                    sums[i] += (np.linalg.norm(part - whole, axis=-1) / length).mean()
                    sparse = ~(kept | future).all(1)
                    of_row = np.stack([(shares * kept).sum(1), (shares * (kept & middle)).sum(1), (shares * middle).sum(1)], 1)
                    held[i, sparse, :3] += of_row[sparse]
                    held[i, sparse, 3] += 1
        held[..., 0] /= np.where(held[..., 3], held[..., 3], np.nan)
        return [(float(error), steps[:, :3]) for error, steps in zip(sums / (info.n_layer * info.n_head_kv), held)]
