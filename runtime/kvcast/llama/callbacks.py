"""Users' callbacks, as the session and native code call them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np

from ..bindings import api as native
from ..bindings.context import NativeContext
from ..blocks import BLOCK_TOKENS
from ..engine.observers import AttentionFn, KvFn
from ..engine.session import Session
from ..errors import CallbackError

CallingBack = Callable[[], AbstractContextManager[None]]


def kv_caller(attached: NativeContext, fn: KvFn | int, calling_back: CallingBack) -> Callable[[int, int], None]:
    """What calls ``fn`` of ``Llama.on_kv`` for a served layer and a block; ``calling_back`` is entered around Python code."""
    info = attached.info
    native_fn = native.kv_callback(fn) if isinstance(fn, int) else None

    def call(index: int, block: int) -> None:
        try:
            layer = int(attached.layers[index])
            if native_fn is None:
                assert not isinstance(fn, int)
                rows = attached.rows_of(index, block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
                with calling_back():
                    fn(layer, block, *rows)
                return
            k, v = (rows[block * BLOCK_TOKENS :].ctypes.data for rows in attached.rows(index))
            failed = native_fn(layer, block, k, v, info.k_row_bytes, info.v_row_bytes)
        except Exception as error:
            raise CallbackError(f"a KV callback raised {type(error).__name__}: {error}; the tokens are in the store") from error
        if failed:
            raise CallbackError(f"a KV callback returned {failed}; the tokens are in the store")

    return call


def attention_caller(session: Session, fn: AttentionFn, calling_back: CallingBack) -> Callable[[native.AttentionCall], int]:
    """What calls ``fn`` of ``Llama.on_attention`` for one layer, in the middle of a step."""
    attached = session.attached

    def call(of: native.AttentionCall) -> int:
        given = np.ctypeslib.as_array(of.scores, shape=(of.n_taps, of.n_head_kv, of.stride))[-1]
        n_used = of.pos // BLOCK_TOKENS + 1
        if session.in_sparse_step:
            full = np.zeros((of.n_head_kv, n_used), np.float32)
            index = attached.index_of(of.layer)
            for head in range(of.n_head_kv):
                n = attached.n_listed[index, head] + attached.n_chosen[index, head]
                full[head, attached.blocks[index, head, :n]] = given[head, :n]
        else:
            full = given[:, :n_used].copy()
        with calling_back():
            fn(of.layer, of.pos, full)
        return 0

    return call
