"""``NativeContext``, which owns one attachment of kvcast to a llama_context."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from ..errors import SparseUnsupported
from .api import (
    DENSE,
    HISTORY,
    TRACE_NONE,
    VERIFY,
    AttentionCall,
    attention_by_one,
    attention_callback,
    c_float_p,
    c_int32_p,
    kvcast_abort,
    kvcast_attach,
    kvcast_blocks,
    kvcast_check_summary_state,
    kvcast_chosen_cells,
    kvcast_clear_abort,
    kvcast_collect,
    kvcast_detach,
    kvcast_end_prompt,
    kvcast_estimates,
    kvcast_get_info,
    kvcast_get_pool_info,
    kvcast_get_stats,
    kvcast_get_summary_state,
    kvcast_history_scores,
    kvcast_invalidate,
    kvcast_k_data,
    kvcast_last_error,
    kvcast_lse,
    kvcast_model_layers,
    kvcast_n_chosen,
    kvcast_n_listed,
    kvcast_n_topk,
    kvcast_params,
    kvcast_pool_info,
    kvcast_pool_plan,
    kvcast_pool_scatter,
    kvcast_pool_upload,
    kvcast_pool_verify,
    kvcast_prepare_summary,
    kvcast_reselect,
    kvcast_reset_stats,
    kvcast_score_store,
    kvcast_scores,
    kvcast_set_attention_callback,
    kvcast_set_grain,
    kvcast_set_mode,
    kvcast_set_summary_state,
    kvcast_set_topk_range,
    kvcast_set_watch,
    kvcast_shares,
    kvcast_staging,
    kvcast_staging_slots,
    kvcast_stats,
    kvcast_summary_state_bytes,
    kvcast_take_taps,
    kvcast_trace_q,
    kvcast_trace_scores,
    kvcast_v_data,
    kvcast_weights,
)
from .loaded import llama_cpp
from .log import by_one


@contextlib.contextmanager
def on_all_threads(ctx: int) -> Iterator[None]:
    """A step of this context takes as many threads as a prompt."""
    n_threads, n_all = llama_cpp.llama_n_threads(ctx), llama_cpp.llama_n_threads_batch(ctx)
    llama_cpp.llama_set_n_threads(ctx, n_all, n_all)
    try:
        yield
    finally:
        llama_cpp.llama_set_n_threads(ctx, n_threads, n_all)


class NativeContext:
    """One kvcast context on one llama_context: modes, block lists in, scores out.

    Layers are numbered among those that are served: sliding-window layers are not, and keep a small cache of llama.cpp's own.

    Parameters
    ----------
    ctx : llama_context_p
        Must outlive this object, or be closed after it.
    max_taps : int
        Largest batch in history mode, tokens.
    trace : int
        ``TRACE_HEAD`` keeps the queries, ``TRACE_SCORES`` the scores of every query head.
    summary : bool
        Keep a summary of the keys, so that steps can choose blocks by their own query.
    pool_blocks : int
        0, or the device path: slots per layer and KV head in the mean.
    staging_share : int
        One upload can carry the pool's slots divided by this.

    Attributes
    ----------
    layers : int32, shape (n_layer,)
        The model's numbers of the served layers, ascending.
    blocks : int32, shape (n_layer, n_head_kv, n_blocks)
        Block lists of the next sparse steps; ids ascending, the first ``n_listed`` count.
    n_listed : int32, shape (n_layer, n_head_kv)
    n_topk : int32, shape (n_layer, n_head_kv)
        Blocks that a step chooses itself, or as many tokens (``set_grain``); always 0 without a summary.
    n_chosen : int32, shape (n_layer, n_head_kv)
        Blocks that the last step appended to the list: those it chose, or those that hold a token that it chose.
    weights : float32, shape (n_layer, n_head_kv, n_blocks), or None
        The step chooses by weight times estimated attention.
    estimates : float32, shape (n_layer, n_head_kv, n_blocks), or None
        Of the last sparse step: attention estimated from the summary, in units of what the first and the newest block got.
    shares : float32, shape (n_layer, n_head_kv)
        Share of the whole attention that the listed blocks hold: the selection's estimate, replaced by the step's own in
        rows that choose.
    scores : float32, shape (n_layer, n_head_kv, n_blocks)
        Of the last sparse step, in list order, mean over the query heads of the group.
    history_scores : float32, shape (n_layer, max_taps, n_head_kv, n_blocks)
        Of the last history batch, in block order.
    lse : float32, shape (n_layer, max_taps, n_head)
        Natural log of the sum of exp(logit), by query head.
    trace_q, trace_scores : float32, (n_layer, max_taps, n_head, head_dim_k), (n_layer, max_taps, n_head, n_blocks), or None

    Raises
    ------
    SparseUnsupported
        The model or context cannot be served; the message says why.
    """

    def __init__(
        self, ctx, max_taps: int = 64, trace: int = TRACE_NONE, summary: bool = False, pool_blocks: int = 0, staging_share: int = 1
    ):
        self._kv = None
        error = ctypes.create_string_buffer(512)
        kv = kvcast_attach(ctx, kvcast_params(max_taps, trace, int(summary), pool_blocks, staging_share), error, len(error))
        if not kv:
            raise SparseUnsupported(error.value.decode())
        self._kv = kv
        self._callback = attention_callback()
        self.info = info = kvcast_get_info(kv)
        rows = (info.n_layer, info.n_head_kv)
        taps = (info.n_layer, info.max_taps)

        def view(pointer, shape):
            return np.ctypeslib.as_array(pointer, shape=shape if isinstance(shape, tuple) else (shape,)) if pointer else None

        self.layers = view(kvcast_model_layers(kv), info.n_layer)
        self.blocks = view(kvcast_blocks(kv), (*rows, info.n_blocks))
        self.n_listed = view(kvcast_n_listed(kv), rows)
        self.n_topk = view(kvcast_n_topk(kv), rows) if summary else np.zeros(rows, np.int32)
        self.n_chosen = view(kvcast_n_chosen(kv), rows) if summary else np.zeros(rows, np.int32)
        self.weights = view(kvcast_weights(kv), (*rows, info.n_blocks))
        self.estimates = view(kvcast_estimates(kv), (*rows, info.n_blocks))
        self.shares = view(kvcast_shares(kv), rows) if summary else np.ones(rows, np.float32)
        self.scores = view(kvcast_scores(kv), (*rows, info.n_blocks))
        self.history_scores = view(kvcast_history_scores(kv), (*taps, info.n_head_kv, info.n_blocks))
        self.lse = view(kvcast_lse(kv), (*taps, info.n_head))
        pool = self.pool_info
        self.staging = []
        if pool.device:
            n_bytes = pool.n_staging * (pool.k_block_bytes + pool.v_block_bytes)
            self.staging = [(view(kvcast_staging(kv, i), n_bytes), view(kvcast_staging_slots(kv, i), pool.n_staging)) for i in (0, 1)]
        self.trace_q = view(kvcast_trace_q(kv), (*taps, info.n_head, info.head_dim_k))
        self.trace_scores = view(kvcast_trace_scores(kv), (*taps, info.n_head, info.n_blocks))

    def close(self) -> None:
        kv, self._kv = self._kv, None
        if kv:
            kvcast_detach(kv)

    @contextlib.contextmanager
    def running(self, mode: int) -> Iterator[None]:
        """llama_decode runs in this mode of the graph; after it dense, or sparse if it was that."""
        self.set_mode(mode)
        try:
            yield
        finally:
            if mode in (HISTORY, VERIFY):
                self.set_mode(DENSE)

    def set_mode(self, mode: int) -> None:
        kvcast_set_mode(self._kv, mode)

    def invalidate(self, first_cell: int = 0) -> None:
        kvcast_invalidate(self._kv, first_cell)

    def prepare_summary(self) -> None:
        """Choose the channels that the summary keeps: before its first use, and when the content has changed much."""
        kvcast_prepare_summary(self._kv)

    @property
    def n_summary_state(self) -> int:
        """Bytes of ``summary_state``; 0 without a summary."""
        return kvcast_summary_state_bytes(self._kv)

    @property
    def summary_state(self) -> npt.NDArray[np.uint8]:
        """What the choice of channels left, which the store alone does not give again: uint8, shape (n_summary_state,)."""
        state = np.empty(self.n_summary_state, np.uint8)
        kvcast_get_summary_state(self._kv, state.ctypes.data)
        return state

    @summary_state.setter
    def summary_state(self, state: npt.NDArray[np.uint8]) -> None:
        state = np.ascontiguousarray(state, np.uint8)
        if state.shape != (self.n_summary_state,):
            raise ValueError(f"the summary's state has {len(state)} bytes; {self.n_summary_state} are wanted")
        if not kvcast_set_summary_state(self._kv, state.ctypes.data, len(state)):
            raise ValueError("the summary's state names a channel that a head does not have, or holds a number of no sane size")

    def takes_summary_state(self, state: npt.NDArray[np.uint8]) -> bool:
        """Whether ``summary_state`` can be set to this."""
        if state.dtype != np.uint8 or state.shape != (self.n_summary_state,):
            return False
        state = np.ascontiguousarray(state)
        return kvcast_check_summary_state(self._kv, state.ctypes.data, len(state))

    def reselect(self) -> None:
        """Let every row choose in the next step: when lists, ``n_topk`` or the range were changed. Else steady rows pause."""
        kvcast_reselect(self._kv)

    def set_topk_range(self, begin: int, end: int) -> None:
        """The blocks that the next steps may choose from, all of them complete."""
        kvcast_set_topk_range(self._kv, begin, end)

    def set_grain(self, grain: int) -> None:
        """Let steps choose blocks (16), or as many tokens in pieces of 4 or singly (1).

        Raises
        ------
        ValueError
            It is none of these, or there is no summary of the keys.
        """
        if kvcast_set_grain(self._kv, grain):
            raise ValueError(f"grain is {grain}; use 16, or with a summary of the keys 4 or 1")

    def chosen_cells(self, layer: int, head: int) -> npt.NDArray[np.int32]:
        """The tokens that a row chose in the last sparse step, by their cells: ascending, none with a grain of blocks."""
        n = ctypes.c_int32()
        cells = kvcast_chosen_cells(self._kv, layer, head, ctypes.byref(n))
        return np.ctypeslib.as_array(cells, shape=(n.value,)).copy() if n.value else np.empty(0, np.int32)

    def plan_pool(self, n_slots: npt.NDArray[np.int32], n_sink: int, n_window: int) -> None:
        """Give every layer its slots per KV head: multiples of 16. Empties the table.

        Raises
        ------
        ValueError
            They do not fit the pool.
        """
        n_slots = np.ascontiguousarray(n_slots, np.int32)
        if kvcast_pool_plan(self._kv, n_slots.ctypes.data_as(c_int32_p), n_sink, n_window):
            raise ValueError(f"{int(n_slots.sum())} slots per KV head over all layers do not fit the pool, or are not multiples of 16")

    def upload(self, buffer: int, n: int) -> None:
        """Bring n staged blocks to the device; returns when they are there. From any thread."""
        kvcast_pool_upload(self._kv, buffer, n)

    def scatter(self, buffer: int, n: int) -> None:
        """Put n uploaded blocks into their slots, before the next step.

        Raises
        ------
        RuntimeError
            The device failed.
        """
        if kvcast_pool_scatter(self._kv, buffer, n):
            raise RuntimeError(f"the device could not take in {n} blocks")

    def collect(self) -> None:
        """After llama_decode: bring rows that are still on a GPU to the store; ``take_taps`` then has a sparse step's scores.

        Raises
        ------
        RuntimeError
            An attention callback failed or the step was stopped: it does not count.
        """
        failed = kvcast_collect(self._kv)
        if failed:
            raise RuntimeError("an attention callback failed" if failed == 1 else "the step was stopped")

    def end_prompt(self) -> None:
        """Free what only prompts need on the device."""
        kvcast_end_prompt(self._kv)

    def verify_pool(self) -> int:
        """Slots in use that differ from the block of the store that the table names."""
        return kvcast_pool_verify(self._kv)

    def take_taps(self, n_listed: npt.NDArray[np.int32]) -> None:
        """Device path: put the scores of the last collected step into ``scores``. n_listed: int32, shape (n_rows,), of that step."""
        kvcast_take_taps(self._kv, n_listed.ctypes.data_as(c_int32_p))

    def score_store(self, layer: int, head: int, scores: npt.NDArray[np.float32]) -> None:
        """What the last collected query gives every block of the store, exactly: float32, shape (n_blocks,), contiguous. Thread-safe."""
        kvcast_score_store(self._kv, layer, head, scores.ctypes.data_as(c_float_p))

    def abort(self) -> None:
        """Stop the running or next decode between two nodes. Safe from any thread and from a signal handler."""
        if self._kv:
            kvcast_abort(self._kv)

    def clear_abort(self) -> None:
        kvcast_clear_abort(self._kv)

    def set_watch(self, watch: int) -> None:
        """Ask a ``kvcast_watch``, too, whether to go on."""
        kvcast_set_watch(self._kv, watch)

    @property
    def last_error(self) -> str:
        return kvcast_last_error(self._kv).decode()

    @property
    def pool_info(self) -> kvcast_pool_info:
        """The device path's pool; ``device`` is None without one."""
        return kvcast_get_pool_info(self._kv)

    @property
    def stats(self) -> kvcast_stats:
        return kvcast_get_stats(self._kv)

    def reset_stats(self) -> None:
        kvcast_reset_stats(self._kv)

    @property
    def has_callback(self) -> bool:
        """Whether an attention callback is set."""
        return bool(self._callback)

    def set_attention_callback(
        self, fn: Callable[[AttentionCall], int] | int | None, failed: Callable[[BaseException], int] = lambda error: 1
    ) -> None:
        """Call ``fn``, or what lies at its address, as in kvcast.h; None removes it. ``failed`` gets what it raised, or a signal handler
        as it began, and says what native code is to get, 0 to go on."""
        if fn is None or isinstance(fn, int):
            callback = attention_callback(fn) if fn is not None else attention_callback()
            kvcast_set_attention_callback(self._kv, callback, None)
        else:
            function = fn
            callback = by_one(lambda address: function(AttentionCall.from_address(address)), failed)
            kvcast_set_attention_callback(self._kv, attention_by_one, ctypes.cast(callback, ctypes.c_void_p))
        self._callback = callback  # keeps it alive while native code may call it

    def index_of(self, layer: int) -> int:
        """The number among the served layers of the model's ``layer``.

        Raises
        ------
        IndexError
            It is not served.
        """
        found = np.flatnonzero(self.layers == layer)
        if len(found) == 0:
            raise IndexError(f"layer {layer} is not served; choose one of {', '.join(map(str, self.layers))}")
        return int(found[0])

    def rows_of(self, layer: int, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of K and V of the cells [begin, end): float16, shape (n, n_head_kv, head_dim), when the store is f16; else its raw
        rows, uint8, shape (n, row_bytes)."""
        found = []
        for rows, kind, dim in zip(self.rows(layer), (self.info.type_k, self.info.type_v), (self.info.head_dim_k, self.info.head_dim_v)):
            copy = rows[begin:end].copy()
            found.append(copy.view(np.float16).reshape(end - begin, self.info.n_head_kv, dim) if kind == 1 else copy)
        return found[0], found[1]

    def rows(self, layer: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """K and V of a layer in the store: uint8, shapes (n_cells, k_row_bytes) and (n_cells, v_row_bytes)."""
        if not 0 <= layer < self.info.n_layer:
            raise IndexError(f"layer {layer} is not in 0..{self.info.n_layer - 1}")

        def view(address, row_bytes):
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
            return np.ctypeslib.as_array(pointer, shape=(self.info.n_cells, row_bytes))

        k = view(kvcast_k_data(self._kv, layer), self.info.k_row_bytes)
        return k, view(kvcast_v_data(self._kv, layer), self.info.v_row_bytes)
