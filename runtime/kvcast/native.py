"""ctypes bindings of kvcast.h, in the style of llama-cpp-python, and ``Attached``, which owns one attachment.

Arrays are NumPy views of native memory: nothing is copied, and they are valid until ``close``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from .library import LIBRARY_DIR, use_own_libraries

use_own_libraries()

import llama_cpp.llama_cpp as llama_cpp  # noqa: E402
from llama_cpp import _logger  # noqa: E402

from .errors import SparseUnsupported  # noqa: E402
from .terminal import plain  # noqa: E402


def _load_plugins() -> None:
    """Builds with GGML_BACKEND_DL look for backends beside the executable only; ours lie beside libllama."""
    reg_count = llama_cpp._lib.ggml_backend_reg_count
    reg_count.restype, reg_count.argtypes = ctypes.c_size_t, ()
    if reg_count() == 0:
        load = llama_cpp._lib.ggml_backend_load_all_from_path
        load.restype, load.argtypes = None, (ctypes.c_char_p,)
        load(os.fsencode(LIBRARY_DIR))


# a null pointer is not None, which llama-cpp-python looks for
llama_cpp.llama_adapter_lora_init.errcheck = lambda adapter, _function, _arguments: adapter if adapter else None


one_argument = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_lost: list[BaseException] = []  # what a signal handler raised while llama.cpp logged


def _by_one(work: Callable[[int], int], failed: Callable[[BaseException], int]) -> Any:
    """``work`` as a native callback of one argument, the address of what it is called with.

    Python handles signals where its own code goes on. As a function begins that is before its ``try``, and what the handler raises is lost
    in the native code that called; where a generator goes on it is inside. What is raised goes to ``failed``, and its answer to the caller.
    """

    def calls() -> Generator[int, int, None]:
        answer = 0
        while True:
            waits = False
            try:
                while True:  # inside, as Python handles signals at a loop's end, too
                    waits = True
                    address = yield answer
                    waits = False
                    answer = work(address)
            except BaseException as error:  # noqa: BLE001 - must not pass through native code
                if waits and isinstance(error, GeneratorExit):
                    return
                answer = failed(error)

    running = calls()
    next(running)
    return one_argument(running.send)


def is_lost() -> bool:
    """Whether a signal handler raised while llama.cpp logged; in the main thread, whose signals they are."""
    return bool(_lost) and threading.current_thread() is threading.main_thread()


def take_lost() -> BaseException | None:
    """What it raised, once."""
    return _lost.pop() if is_lost() else None


class _LogCall(ctypes.Structure):
    _fields_ = [("level", ctypes.c_int32), ("text", ctypes.c_char_p)]


def _log(address: int) -> int:
    call = _LogCall.from_address(address)
    _plain_log(call.level, call.text)
    return 0


def _plain_log(level: int, text: bytes) -> None:
    """llama.cpp quotes names from files; what a terminal would obey does not reach it."""
    if not _hushes and _logger.logger.level <= _logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL[level]:
        try:
            print(plain(text.decode(errors="replace")), end="", flush=True, file=sys.stderr)
        except (OSError, ValueError) as error:  # nobody can read it
            if isinstance(error, TimeoutError):  # of a signal handler
                raise


def _log_failed(error: BaseException) -> int:
    _lost.append(error)
    return 0


_log_by_one = _by_one(_log, _log_failed)
_native_log = llama_cpp.llama_log_callback(("kvcast_log_by_one", llama_cpp._lib))
llama_cpp.llama_log_set(_native_log, ctypes.cast(_log_by_one, ctypes.c_void_p))
atexit.register(llama_cpp.llama_log_set, _native_log, ctypes.c_void_p(0))  # what is freed after this says nothing


class Hush:
    """llama.cpp's messages are not shown as long as one of these lives: a signal that ends what it was made for ends it as well."""

    def __init__(self) -> None:
        _hushes.add(self)


_hushes: weakref.WeakSet[Hush] = weakref.WeakSet()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """llama.cpp's messages are not shown: where what fails is said in a sentence of ours."""
    hush = Hush()
    try:
        yield
    finally:
        _hushes.discard(hush)  # now, whoever holds a traceback
    if (error := take_lost()) is not None:
        raise error


with quiet():
    _load_plugins()

BLOCK_TOKENS = 16

DENSE, HISTORY, SPARSE = 0, 1, 2
TRACE_NONE, TRACE_HEAD = 0, 1

kvcast_p = ctypes.c_void_p
kvcast_watch_p = ctypes.c_void_p
c_float_p = ctypes.POINTER(ctypes.c_float)
c_int32_p = ctypes.POINTER(ctypes.c_int32)
ctypes_function = llama_cpp.ctypes_function

# int fn(user, layer, pos, scores, n_taps, n_head_kv, stride)
attention_callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, c_float_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32
)


_attention_by_one = attention_callback(("kvcast_attention_by_one", llama_cpp._lib))

# int fn(layer, block, k, v, k_row_bytes, v_row_bytes): what Llama.on_kv calls when it is given an address
kv_callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
)


# int64 fn(user, data, n_bytes)
kvcast_io = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_io_by_one = kvcast_io(("kvcast_io_by_one", llama_cpp._lib))
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


class kvcast_stats(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("n_steps", "attention_us", "blocks_read", "choose_us", "summary_bytes_read", "device_us")
    ]


# fmt: off
@ctypes_function("kvcast_version", [], ctypes.c_char_p)
def kvcast_version() -> bytes: ...
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
@ctypes_function("kvcast_n_free", [kvcast_p], c_int32_p)
def kvcast_n_free(kv, /): ...
@ctypes_function("kvcast_weights", [kvcast_p], c_float_p)
def kvcast_weights(kv, /): ...
@ctypes_function("kvcast_set_free_range", [kvcast_p, ctypes.c_int32, ctypes.c_int32], None)
def kvcast_set_free_range(kv, begin, end, /): ...
@ctypes_function("kvcast_choose_anew", [kvcast_p], None)
def kvcast_choose_anew(kv, /): ...
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
    with quiet(), _moving(read) as (fn, user):
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

    callback = _by_one(work, failed)
    try:
        yield _io_by_one, ctypes.cast(callback, ctypes.c_void_p)
    finally:
        if raised:
            raise raised[0]


class Attached:
    """One kvcast context on one llama_context: modes, block lists in, scores out.

    Layers are numbered among those that are served: sliding-window layers are not, and keep a small cache of llama.cpp's own.

    Parameters
    ----------
    ctx : llama_context_p
        Must outlive this object, or be closed after it.
    max_taps : int
        Largest batch in history mode, tokens.
    trace : int
        ``TRACE_HEAD`` keeps q and the scores of every query head.
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
    n_free : int32, shape (n_layer, n_head_kv)
        Blocks that a step chooses itself and appends to the list (always 0 without a summary).
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
        self.n_free = view(kvcast_n_free(kv), rows) if summary else np.zeros(rows, np.int32)
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

    def choose_anew(self) -> None:
        """Let every row choose in the next step: when lists, ``n_free`` or the range were changed. Else steady rows pause."""
        kvcast_choose_anew(self._kv)

    def set_free_range(self, begin: int, end: int) -> None:
        """The blocks that the next steps may choose from, all of them complete."""
        kvcast_set_free_range(self._kv, begin, end)

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
            callback = _by_one(lambda address: function(AttentionCall.from_address(address)), failed)
            kvcast_set_attention_callback(self._kv, _attention_by_one, ctypes.cast(callback, ctypes.c_void_p))
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
