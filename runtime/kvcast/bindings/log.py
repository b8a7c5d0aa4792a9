"""llama.cpp's messages, shown or not."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

from ..terminal import plain
from .library import LOG_LEVELS, use_own_libraries

use_own_libraries()

import llama_cpp.llama as llama_module  # noqa: E402
import llama_cpp.llama_cpp as llama_cpp  # noqa: E402
from llama_cpp import _logger  # noqa: E402

__all__ = ["MutedLog", "by_one", "is_lost", "llama_cpp", "muted_llama_log", "one_argument", "take_lost"]

one_argument = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
_lost: list[BaseException] = []  # what a signal handler raised while llama.cpp logged


def by_one(work: Callable[[int], int], failed: Callable[[BaseException], int]) -> Any:
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
    level_of = LOG_LEVELS.get(level, _logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL[level])
    if not _muted_logs and _logger.logger.level <= level_of:
        try:
            print(plain(text.decode(errors="replace")), end="", flush=True, file=sys.stderr)
        except (OSError, ValueError) as error:  # nobody can read it
            if isinstance(error, TimeoutError):  # of a signal handler
                raise


def _log_failed(error: BaseException) -> int:
    _lost.append(error)
    return 0


def set_verbose(verbose: bool) -> None:
    """llama-cpp-python's, without logging's lock: where a signal ends ``Logger.setLevel``, Python 3.11 holds that lock for ever."""
    _logger.logger.level = logging.DEBUG if verbose else logging.ERROR


llama_module.set_verbose = set_verbose  # type: ignore[attr-defined]
_log_by_one = by_one(_log, _log_failed)
_native_log = llama_cpp.llama_log_callback(("kvcast_log_by_one", llama_cpp._lib))


llama_cpp.llama_log_set(_native_log, ctypes.cast(_log_by_one, ctypes.c_void_p))
atexit.register(llama_cpp.llama_log_set, _native_log, ctypes.c_void_p(0))  # what is freed after this says nothing


class MutedLog:
    """llama.cpp's messages are not shown as long as one of these lives: a signal that ends what it was made for ends it as well."""

    def __init__(self) -> None:
        _muted_logs.add(self)


_muted_logs: weakref.WeakSet[MutedLog] = weakref.WeakSet()


@contextlib.contextmanager
def muted_llama_log() -> Iterator[None]:
    """llama.cpp's messages are not shown: where what fails is said in a sentence of ours."""
    muted = MutedLog()
    try:
        yield
    finally:
        _muted_logs.discard(muted)  # now, whoever holds a traceback
    if (error := take_lost()) is not None:
        raise error
