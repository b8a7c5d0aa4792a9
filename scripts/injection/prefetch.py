"""What runs beside a step of the device path comes late, fails, or ends."""

from __future__ import annotations

import ctypes
import logging
import random
import threading
import time
from collections.abc import Callable

from injection.subject import N_TOKENS, replaced, subject
from kvcast import GenerationError
from kvcast.sparse import pool


def _prefetch(i: int, rng: random.Random, fault: Callable[[], None], failure: str | None) -> None:
    subject_, n_left, stage = subject("device"), rng.randrange(1, N_TOKENS - 1), pool.Pool.stage

    def spoiled(self, *arguments):
        nonlocal n_left
        if threading.current_thread() is not threading.main_thread():
            n_left -= 1
            if n_left == 0:
                fault()
        return stage(self, *arguments)

    with replaced(pool.Pool, "stage", spoiled):
        try:
            subject_.answer()
        except GenerationError as error:
            assert failure and failure in str(error), error
        else:
            assert failure is None, "the prefetch's error was lost"
    assert n_left <= 0
    subject_.check()


def late_prefetch(i: int, rng: random.Random) -> None:
    _prefetch(i, rng, lambda: time.sleep(rng.random() * 0.1), None)


def failing_prefetch(i: int, rng: random.Random) -> None:
    def fail() -> None:
        raise (OSError, MemoryError, SystemExit)[i % 3]("no more uploads")

    _prefetch(i, rng, fail, "beside the step failed")


def dying_prefetch(i: int, rng: random.Random) -> None:
    """An exception that is set from outside ends the thread before it takes up its next work."""
    subject_, at = subject("device"), rng.randrange(1, N_TOKENS - 1)

    def before(n: int) -> None:
        if n == at:
            thread = subject_.llm.session.path.worker.thread
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1

    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL + 1)
    try:
        subject_.answer(before)
    except GenerationError as error:
        assert "its thread has ended" in str(error), error
    else:
        raise AssertionError("the thread's end was not seen")
    finally:
        logging.getLogger("concurrent.futures").setLevel(logging.NOTSET)
    subject_.check()
