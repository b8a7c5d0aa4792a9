"""The exact attention of a token, from its query and the keys of the store."""

from __future__ import annotations

import numpy as np

from ..engine.session import Session


def attention_row(session: Session, layer: int) -> np.ndarray:
    """See ``Llama.attention_row``."""
    attached, n = session.attached, session.n_tokens
    layer = attached.index_of(layer)
    info = attached.info
    if attached.trace_q is None or info.type_k != 1:
        raise ValueError("exact attention rows need the queries and an f16 store; load the model with sparse=SparseConfig(trace=True)")
    if n == 0:
        raise ValueError("nothing has been evaluated yet; call eval or generate first")
    keys = attached.rows_of(layer, 0, n)[0].astype(np.float32)  # (n, n_head_kv, d)
    tap = 0 if session.in_sparse_step else session.n_history_taps - 1
    q = attached.trace_q[layer, tap].reshape(info.n_head_kv, -1, info.head_dim_k) * info.kq_scale
    logits = np.einsum("hgd,nhd->hgn", q, keys).reshape(info.n_head, n)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
