"""When a model's memory may be freed: never while a thread is inside it, and before the interpreter goes."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NoReturn, TypeVar, cast

from .errors import GenerationError

EXIT_WAIT_S = 10.0  # for threads that are still inside a model when the interpreter ends

Method = TypeVar("Method", bound=Callable[..., Any])

_open: weakref.WeakSet[Lifetime] = weakref.WeakSet()


class Closed:
    """Stands for what was freed: asking it for anything says so."""

    def __getattr__(self, name: str) -> NoReturn:
        raise GenerationError("the model was closed; load it again")


def inside(method: Method) -> Method:
    """The method, as a call that needs the native model of a ``Lifetime``."""

    @functools.wraps(method)
    def call(self: Lifetime, *args: Any, **kwargs: Any) -> Any:
        with self._using():
            return method(self, *args, **kwargs)

    return cast(Method, call)


class Lifetime:
    """Mixin: calls that need the native model run inside ``_using``; ``close`` frees it when no call is inside.

    Closing never waits, so that a callback, a signal handler or another thread may close at any moment: what runs is interrupted,
    and the last call that leaves frees. A forked child frees nothing: the memory is its parent's, whose threads it does not have.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close while its thread holds it
        self._n_inside = 0
        self._closing = False
        self._freed = False
        self._home: int | None = None  # the process that may compute with it; None: no thread or device is bound to one yet
        _open.add(self)

    @contextlib.contextmanager
    def _using(self) -> Iterator[None]:
        """The model is not freed in here.

        Raises
        ------
        GenerationError
            It was closed.
        """
        with self._lock:
            self._n_inside += 1
        try:
            if self._closing:
                raise GenerationError("the model was closed; load it again")
            yield
        finally:
            with self._lock:
                self._n_inside -= 1
            if self._closing:
                self.close()

    def _in_turns(self, generator: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        """The generator, inside the model while it runs, and outside between its items."""
        sent = None
        with contextlib.closing(generator):
            while True:
                with self._using():
                    try:
                        item = generator.send(sent)
                    except StopIteration:
                        return
                sent = yield item

    def _bind_to_process(self) -> None:
        """Called before computing.

        Raises
        ------
        GenerationError
            This is a fork of the process that computes with the model.
        """
        if self._home not in (None, os.getpid()):
            raise GenerationError(
                "this process was forked from the one that uses the model, and has none of its threads; "
                "load the model in it, or start it with 'spawn'"
            )
        self._home = os.getpid()

    def close(self) -> None:
        """Free now, or when the last call that is inside leaves."""
        if self._home not in (None, os.getpid()):
            if not self._freed:
                self._freed = True
                self._leave_to_parent()
            return
        with self._lock:
            self._closing = True
            busy = self._n_inside > 0
            free = not busy and not self._freed
            self._freed |= free
        if busy:
            self.interrupt()
        if free:
            self._free()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):
            self._n_inside = 0  # nobody refers to it
            self.close()

    def interrupt(self) -> None:
        raise NotImplementedError

    def _free(self) -> None:
        """Free what is native."""
        raise NotImplementedError

    def _leave_to_parent(self) -> None:
        """Forget what is native, in a forked child."""
        raise NotImplementedError


@atexit.register
def _close_all() -> None:
    end = time.monotonic() + EXIT_WAIT_S
    for model in list(_open):
        model.close()
        while model._n_inside > 0 and model._home in (None, os.getpid()) and time.monotonic() < end:
            time.sleep(0.005)
