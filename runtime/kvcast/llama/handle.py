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

from ..errors import GenerationError
from .turns import Turn, Turns

EXIT_WAIT_S = 4.0  # for threads that are still inside a model when the interpreter ends

Method = TypeVar("Method", bound=Callable[..., Any])

_open: weakref.WeakSet[NativeHandle] = weakref.WeakSet()


class ClosedHandle:
    """Stands for what was freed: asking it for anything says so."""

    def __getattr__(self, name: str) -> NoReturn:
        raise GenerationError("the model was closed; load it again")


def inside(method: Method) -> Method:
    """The method, as a call that needs the native model of a ``NativeHandle``."""

    @functools.wraps(method)
    def call(self: NativeHandle, *args: Any, **kwargs: Any) -> Any:
        with self._using():
            return method(self, *args, **kwargs)

    return cast(Method, call)


def in_turn(method: Method) -> Method:
    """The method, as a call that waits for its turn at a ``NativeHandle``'s one sequence."""

    @functools.wraps(method)
    def call(self: NativeHandle, *args: Any, **kwargs: Any) -> Any:
        with self._in_turn():
            return method(self, *args, **kwargs)

    return cast(Method, call)


class NativeHandle:
    """Mixin: calls that need the native model run inside ``_using``; ``close`` frees it when no call is inside. Those that change its one
    sequence take turns (``_in_turn``).

    Closing never waits, so that a callback, a signal handler or another thread may close at any moment: what runs is interrupted,
    and the last call that leaves frees. A forked child frees nothing: the memory is its parent's, whose threads it does not have.
    """

    def __init__(self) -> None:
        self._renew_locks()
        self._n_inside = 0
        self._in_callback: set[int] = set()  # threads that a native call has called back: the model is in the middle of something
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

    @contextlib.contextmanager
    def _in_turn(self, *, refuse: bool = False) -> Iterator[None]:
        """The model's sequence is this call's, or that of the turn it belongs to.

        Raises
        ------
        GenerationError
            A callback of the model is its caller, which would wait for itself; the model was closed; this is a fork of the process that
            computes with it; or, with ``refuse``, another thread is at it.
        """
        self._refuse_callbacks()
        self._bind_to_process()
        if self._turns.inside():
            with self._using():
                yield
            return
        turn = Turn()
        try:
            self._turns.enter(turn, self._context, at_once=True, refuse=refuse)
            with self._using():
                self._begin_turn()
                yield
        finally:
            self._in_callback.discard(threading.get_ident())  # a signal may have come as it began
            self._turns.end(turn)

    def _in_turns(self, generator: Generator[Any, Any, None]) -> Generator[Any, Any, None]:
        """The generator, as one turn: inside the model while it runs, and outside between its items."""
        turn, sent = Turn(answers=True), None
        try:
            with contextlib.closing(generator):
                while True:
                    with self._running(turn):
                        try:
                            item = generator.send(sent)
                        except StopIteration:
                            return
                    sent = yield item
        finally:
            self._turns.end(turn)

    @contextlib.contextmanager
    def _running(self, turn: Turn) -> Iterator[None]:
        """A generator runs, from one item to the next."""
        self._refuse_callbacks()
        self._bind_to_process()
        if self._turns.inside():  # it belongs to another one, which runs
            with self._using():
                yield
            return
        begins = turn.last_thread is None
        try:
            self._turns.enter(turn, self._context)
            with self._using():
                if begins:
                    self._begin_turn()
                elif turn.context is not None:
                    context, turn.context = turn.context, None
                    self._go_on(context)
                yield
        finally:
            self._in_callback.discard(threading.get_ident())
            self._turns.leave(turn)

    def _refuse_callbacks(self) -> None:
        if threading.get_ident() in self._in_callback:
            raise GenerationError("a callback cannot evaluate with the model that calls it; do so when the call has returned")

    @contextlib.contextmanager
    def _calling_back(self) -> Iterator[None]:
        """Python code of the user runs in the middle of a step."""
        me = threading.get_ident()
        outermost = me not in self._in_callback
        self._in_callback.add(me)
        try:
            yield
        finally:
            if outermost:
                self._in_callback.discard(me)

    def _renew_locks(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close while its thread holds it
        self._turns = Turns()

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
            self._turns.close()
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

    def _begin_turn(self) -> None:
        """Another use of the model begins."""
        raise NotImplementedError

    def _context(self) -> Any:
        """What a generation needs to go on when others have used the model."""
        raise NotImplementedError

    def _go_on(self, context: Any) -> None:
        """Bring that back."""
        raise NotImplementedError

    def _free(self) -> None:
        """Free what is native."""
        raise NotImplementedError

    def _leave_to_parent(self) -> None:
        """Forget what is native, in a forked child."""
        raise NotImplementedError


def _renew_all() -> None:
    """In a forked child: a thread that it does not have may have held a lock."""
    for model in list(_open):
        model._renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


@atexit.register
def _close_all() -> None:
    end = time.monotonic() + EXIT_WAIT_S
    for model in list(_open):
        model.close()
        while model._n_inside > 0 and model._home in (None, os.getpid()) and time.monotonic() < end:
            time.sleep(0.005)
