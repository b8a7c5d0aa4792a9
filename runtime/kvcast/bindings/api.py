"""ctypes bindings of kvcast.h, in the style of llama-cpp-python, and ``NativeContext``, which owns one attachment.

Arrays are NumPy views of native memory: nothing is copied, and they are valid until ``close``.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import IO, Any

from .loaded import llama_cpp
from .log import by_one, muted_llama_log

DENSE, HISTORY, SPARSE, VERIFY = 0, 1, 2, 3
TRACE_NONE, TRACE_HEAD, TRACE_SCORES = 0, 1, 2

kvcast_p = ctypes.c_void_p
kvcast_watch_p = ctypes.c_void_p
c_float_p = ctypes.POINTER(ctypes.c_float)
c_int32_p = ctypes.POINTER(ctypes.c_int32)
ctypes_function = llama_cpp.ctypes_function

# int fn(user, layer, pos, scores, n_taps, n_head_kv, stride)
attention_callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, c_float_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32
)


attention_by_one = attention_callback(("kvcast_attention_by_one", llama_cpp._lib))

# int fn(layer, block, k, v, k_row_bytes, v_row_bytes): what Llama.on_kv calls when it is given an address
kv_callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
)


# int64 fn(user, data, n_bytes)
kvcast_io = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
io_by_one = kvcast_io(("kvcast_io_by_one", llama_cpp._lib))
watch_poll = ctypes.CFUNCTYPE(ctypes.c_int32)  # int fn(): 0 to stop


class AttentionCall(ctypes.Structure):
    """``kvcast_attention_call``."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("layer", "pos")),
        ("scores", c_float_p),
        *((name, ctypes.c_int32) for name in ("n_taps", "n_head_kv", "stride")),
    ]


class kvcast_params(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("max_taps", "trace", "summary", "pool_blocks", "staging_share")]


class kvcast_info(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("n_layer", "n_head", "n_head_kv", "head_dim_k", "head_dim_v", "n_cells")),
        *((name, ctypes.c_int32) for name in ("n_blocks", "max_taps", "type_k", "type_v")),
        ("kq_scale", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("k_row_bytes", "v_row_bytes", "scratch_bytes", "summary_bytes", "pinned_bytes")),
    ]


class kvcast_pool_info(ctypes.Structure):
    _fields_ = [
        ("device", ctypes.c_char_p),
        ("n_slots", ctypes.c_int32),
        ("n_staging", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("k_block_bytes", "v_block_bytes", "pool_bytes", "staging_bytes", "tap_bytes")),
        ("n_on_device", ctypes.c_int32),
    ]


class kvcast_sizes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("scratch", "summary", "pool", "staging", "taps", "mirrors", "stream", "landing")]


class kvcast_stats(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("n_steps", "attention_us", "blocks_read", "choose_us", "summary_bytes_read", "device_us")
    ]


# fmt: off
@ctypes_function("kvcast_version", [], ctypes.c_char_p)
def kvcast_version() -> bytes: ...
@ctypes_function("kvcast_sizes_of", [kvcast_info, kvcast_params, ctypes.c_int32], kvcast_sizes)
def kvcast_sizes_of(shape, params, n_batch, /) -> kvcast_sizes: ...
@ctypes_function("kvcast_attach", [llama_cpp.llama_context_p_ctypes, kvcast_params, ctypes.c_char_p, ctypes.c_int32], kvcast_p)
def kvcast_attach(ctx, params, error, n_error, /): ...
@ctypes_function("kvcast_detach", [kvcast_p], None)
def kvcast_detach(kv, /): ...
@ctypes_function("kvcast_get_info", [kvcast_p], kvcast_info)
def kvcast_get_info(kv, /) -> kvcast_info: ...
@ctypes_function("kvcast_model_layers", [kvcast_p], c_int32_p)
def kvcast_model_layers(kv, /): ...
@ctypes_function("kvcast_set_mode", [kvcast_p, ctypes.c_int32], None)
def kvcast_set_mode(kv, mode, /): ...
@ctypes_function("kvcast_invalidate", [kvcast_p, ctypes.c_int32], None)
def kvcast_invalidate(kv, first_cell, /): ...
@ctypes_function("kvcast_n_topk", [kvcast_p], c_int32_p)
def kvcast_n_topk(kv, /): ...
@ctypes_function("kvcast_weights", [kvcast_p], c_float_p)
def kvcast_weights(kv, /): ...
@ctypes_function("kvcast_set_topk_range", [kvcast_p, ctypes.c_int32, ctypes.c_int32], None)
def kvcast_set_topk_range(kv, begin, end, /): ...
@ctypes_function("kvcast_set_grain", [kvcast_p, ctypes.c_int32], ctypes.c_int32)
def kvcast_set_grain(kv, grain, /): ...
@ctypes_function("kvcast_n_chosen", [kvcast_p], c_int32_p)
def kvcast_n_chosen(kv, /): ...
@ctypes_function("kvcast_chosen_cells", [kvcast_p, ctypes.c_int32, ctypes.c_int32, c_int32_p], c_int32_p)
def kvcast_chosen_cells(kv, layer, head, n, /): ...
@ctypes_function("kvcast_reselect", [kvcast_p], None)
def kvcast_reselect(kv, /): ...
@ctypes_function("kvcast_prepare_summary", [kvcast_p], None)
def kvcast_prepare_summary(kv, /): ...
@ctypes_function("kvcast_summary_state_bytes", [kvcast_p], ctypes.c_int64)
def kvcast_summary_state_bytes(kv, /) -> int: ...
@ctypes_function("kvcast_get_summary_state", [kvcast_p, ctypes.c_void_p], None)
def kvcast_get_summary_state(kv, dst, /): ...
@ctypes_function("kvcast_check_summary_state", [kvcast_p, ctypes.c_void_p, ctypes.c_int64], ctypes.c_bool)
def kvcast_check_summary_state(kv, src, n_bytes, /) -> bool: ...
@ctypes_function("kvcast_set_summary_state", [kvcast_p, ctypes.c_void_p, ctypes.c_int64], ctypes.c_bool)
def kvcast_set_summary_state(kv, src, n_bytes, /) -> bool: ...
@ctypes_function("kvcast_estimates", [kvcast_p], c_float_p)
def kvcast_estimates(kv, /): ...
@ctypes_function("kvcast_shares", [kvcast_p], c_float_p)
def kvcast_shares(kv, /): ...
@ctypes_function("kvcast_abort", [kvcast_p], None)
def kvcast_abort(kv, /): ...
@ctypes_function("kvcast_clear_abort", [kvcast_p], None)
def kvcast_clear_abort(kv, /): ...
@ctypes_function("kvcast_grammar_error", [], ctypes.c_char_p)
def kvcast_grammar_error() -> bytes: ...
@ctypes_function("kvcast_watch_new", [watch_poll], kvcast_watch_p)
def kvcast_watch_new(poll, /): ...
@ctypes_function("kvcast_watch_free", [kvcast_watch_p], None)
def kvcast_watch_free(watch, /): ...
@ctypes_function("kvcast_watch_stop", [kvcast_watch_p, ctypes.c_int32], None)
def kvcast_watch_stop(watch, stop, /): ...
@ctypes_function("kvcast_set_watch", [kvcast_p, kvcast_watch_p], None)
def kvcast_set_watch(kv, watch, /): ...
@ctypes_function("kvcast_last_error", [kvcast_p], ctypes.c_char_p)
def kvcast_last_error(kv, /) -> bytes: ...
@ctypes_function("kvcast_set_attention_callback", [kvcast_p, attention_callback, ctypes.c_void_p], None)
def kvcast_set_attention_callback(kv, fn, user, /): ...
@ctypes_function("kvcast_blocks", [kvcast_p], c_int32_p)
def kvcast_blocks(kv, /): ...
@ctypes_function("kvcast_n_listed", [kvcast_p], c_int32_p)
def kvcast_n_listed(kv, /): ...
@ctypes_function("kvcast_scores", [kvcast_p], c_float_p)
def kvcast_scores(kv, /): ...
@ctypes_function("kvcast_history_scores", [kvcast_p], c_float_p)
def kvcast_history_scores(kv, /): ...
@ctypes_function("kvcast_lse", [kvcast_p], c_float_p)
def kvcast_lse(kv, /): ...
@ctypes_function("kvcast_trace_q", [kvcast_p], c_float_p)
def kvcast_trace_q(kv, /): ...
@ctypes_function("kvcast_trace_scores", [kvcast_p], c_float_p)
def kvcast_trace_scores(kv, /): ...
@ctypes_function("kvcast_k_data", [kvcast_p, ctypes.c_int32], ctypes.c_void_p)
def kvcast_k_data(kv, layer, /): ...
@ctypes_function("kvcast_v_data", [kvcast_p, ctypes.c_int32], ctypes.c_void_p)
def kvcast_v_data(kv, layer, /): ...
@ctypes_function("kvcast_get_pool_info", [kvcast_p], kvcast_pool_info)
def kvcast_get_pool_info(kv, /) -> kvcast_pool_info: ...
@ctypes_function("kvcast_pool_plan", [kvcast_p, c_int32_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_int32)
def kvcast_pool_plan(kv, n_slots, n_sink, n_window, /) -> int: ...
@ctypes_function("kvcast_staging", [kvcast_p, ctypes.c_int32], ctypes.POINTER(ctypes.c_uint8))
def kvcast_staging(kv, buffer, /): ...
@ctypes_function("kvcast_staging_slots", [kvcast_p, ctypes.c_int32], ctypes.POINTER(ctypes.c_int64))
def kvcast_staging_slots(kv, buffer, /): ...
@ctypes_function("kvcast_pool_upload", [kvcast_p, ctypes.c_int32, ctypes.c_int32], None)
def kvcast_pool_upload(kv, buffer, n, /): ...
@ctypes_function("kvcast_pool_scatter", [kvcast_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_int32)
def kvcast_pool_scatter(kv, buffer, n, /) -> int: ...
@ctypes_function("kvcast_end_prompt", [kvcast_p], None)
def kvcast_end_prompt(kv, /): ...
@ctypes_function("kvcast_collect", [kvcast_p], ctypes.c_int32)
def kvcast_collect(kv, /) -> int: ...


@ctypes_function("kvcast_take_taps", [kvcast_p, c_int32_p], None)
def kvcast_take_taps(kv, n_listed, /): ...
@ctypes_function("kvcast_pool_verify", [kvcast_p], ctypes.c_int64)
def kvcast_pool_verify(kv, /) -> int: ...
@ctypes_function("kvcast_score_store", [kvcast_p, ctypes.c_int32, ctypes.c_int32, c_float_p], None)
def kvcast_score_store(kv, layer, head, scores, /): ...
@ctypes_function("kvcast_get_stats", [kvcast_p], kvcast_stats)
def kvcast_get_stats(kv, /) -> kvcast_stats: ...
@ctypes_function("kvcast_reset_stats", [kvcast_p], None)
def kvcast_reset_stats(kv, /): ...
@ctypes_function("kvcast_write_state", [llama_cpp.llama_context_p_ctypes, kvcast_io, ctypes.c_void_p], ctypes.c_int64)
def kvcast_write_state(ctx, write, user, /) -> int: ...
@ctypes_function(
    "kvcast_check_state",
    [llama_cpp.llama_context_p_ctypes, kvcast_io, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32],
    ctypes.c_bool,
)
def kvcast_check_state(ctx, read, user, n_bytes, n_tokens, error, n_error, /) -> bool: ...
@ctypes_function(
    "kvcast_read_state",
    [llama_cpp.llama_context_p_ctypes, kvcast_io, ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_int32],
    ctypes.c_bool,
)
def kvcast_read_state(ctx, read, user, n_bytes, error, n_error, /) -> bool: ...
# fmt: on


class StateRefused(Exception):
    """A state cannot be taken in; the message is part of a sentence."""


def write_state(ctx: int, file: IO[bytes]) -> int:
    """Write llama.cpp's state of a context where ``file`` stands; returns its bytes. Raises what writing raises."""

    def move(part: memoryview) -> None:
        file.write(part)

    with _moving(move) as (fn, user):
        n_bytes = kvcast_write_state(ctx, fn, user)
    if n_bytes < 0:
        raise OSError("llama.cpp could not write its state")
    return n_bytes


def check_state(ctx: int, read: Callable[[memoryview], None], n_bytes: int, n_tokens: int) -> None:
    """Read a state of ``n_bytes`` bytes, of anybody's, without taking it in.

    Parameters
    ----------
    ctx : llama_context_p
        Stays as it is.
    read : callable
        Fills what it is given with the next bytes.
    n_tokens : int
        That the state is to be of.

    Raises
    ------
    StateRefused
        It is no whole state of this model with so many tokens, or a key or a value is no number of a sane size.
    """
    error = ctypes.create_string_buffer(128)
    with _moving(read) as (fn, user):
        if not kvcast_check_state(ctx, fn, user, n_bytes, n_tokens, error, len(error)):
            raise StateRefused(error.value.decode())


def read_state(ctx: int, read: Callable[[memoryview], None], n_bytes: int) -> None:
    """Take in a state that ``check_state`` let pass.

    Raises
    ------
    StateRefused
        It is another one meanwhile; this, and whatever ``read`` raises, leaves the context empty.
    """
    error = ctypes.create_string_buffer(128)
    with muted_llama_log(), _moving(read) as (fn, user):
        if not kvcast_read_state(ctx, fn, user, n_bytes, error, len(error)):
            raise StateRefused(error.value.decode())


class _IoCall(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("n_bytes", ctypes.c_int64)]


@contextlib.contextmanager
def _moving(move: Callable[[memoryview], None]) -> Iterator[tuple[Any, ctypes.c_void_p]]:
    """``move`` as a ``kvcast_io`` and its user; what it raises must not pass through native code and is raised when that has returned."""
    raised: list[BaseException] = []

    def work(address: int) -> int:
        call = _IoCall.from_address(address)
        move(memoryview((ctypes.c_uint8 * call.n_bytes).from_address(call.data)).cast("B"))
        return call.n_bytes

    def failed(error: BaseException) -> int:
        raised.append(error)
        return -1

    callback = by_one(work, failed)
    try:
        yield io_by_one, ctypes.cast(callback, ctypes.c_void_p)
    finally:
        if raised:
            raise raised[0]
