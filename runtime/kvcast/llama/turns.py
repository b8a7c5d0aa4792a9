"""Whose turn it is: a model holds one sequence, so whole answers use it one after another, in the order in which they were asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import GenerationError

LOOK_S = 0.5  # how often one who waits looks; the end of a turn is told at once
IDLE_S = 0.5  # a generator that nobody has asked for an item for so long lets others go first


class Turn:
    """One use of the model: a call, or a generator from its first item to its end.

    Attributes
    ----------
    thread : int or None
        That computes for it now; None between the items of a generator.
    context
        What ``Turns`` was told to keep of it when another went first; to be brought back before it goes on.
    answers : bool
        It is a generation.
    """

    __slots__ = ("answers", "context", "last_thread", "since", "thread")

    def __init__(self, answers: bool = False) -> None:
        self.answers = answers
        self.thread: int | None = None
        self.last_thread: int | None = None
        self.since = 0.0
        self.context: Any = None


class Turns:
    """The queue of turns.

    A turn that computes is waited for. One between the items of its generator is waited for ``IDLE_S`` seconds after its last item;
    then it gives way - it may be abandoned, or its caller is the one who waits - and goes on in its turn when it is asked for more.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()  # reentrant: generators end wherever they are collected
        self._holder: Turn | None = None
        self._waiting: list[Turn] = []
        self._closed = False

    @property
    def thread(self) -> int | None:
        """The thread that computes now."""
        holder = self._holder
        return None if holder is None else holder.thread

    @property
    def answers(self) -> bool:
        """Whether a generation computes now."""
        holder = self._holder
        return holder is not None and holder.answers

    def inside(self) -> bool:
        """Whether this thread computes now, so that what it calls belongs to the turn."""
        return self.thread == threading.get_ident()

    def enter(self, turn: Turn, keep: Callable[[], Any], *, at_once: bool = False, refuse: bool = False) -> None:
        """Begin, or go on, when it is the turn's turn.

        Parameters
        ----------
        keep : callable
            Returns what a turn that gives way needs to go on later.
        at_once : bool
            Do not wait for a generator that this thread has asked for its last item.
        refuse : bool
            Wait for nobody.

        Raises
        ------
        GenerationError
            The model was closed; or it would have to be waited for.
        """
        with self._changed:
            self._waiting.append(turn)
            try:
                while (seconds := self._to_wait(turn, at_once, refuse)) > 0:
                    if refuse:
                        raise GenerationError(
                            "another thread evaluates with this model, which holds one sequence; take turns, or load it twice"
                        )
                    self._changed.wait(seconds)
                    if self._closed:
                        raise GenerationError("the model was closed; load it again")
                if self._holder is not None and self._holder is not turn:
                    self._holder.context = keep()
                self._holder = turn
                turn.thread = turn.last_thread = threading.get_ident()
            except BaseException:
                self._changed.notify_all()  # the next one is first now
                raise
            finally:
                self._waiting.remove(turn)

    def leave(self, turn: Turn) -> None:
        """The turn stops computing; it goes on with ``enter``, or is at its ``end``."""
        turn.since = time.monotonic()
        turn.thread = None

    def end(self, turn: Turn) -> None:
        """The turn is over."""
        self.leave(turn)  # first, as an interrupt may come before the rest
        with self._changed:
            if self._holder is turn:
                self._holder = None
                self._changed.notify_all()

    def close(self) -> None:
        """Nobody waits any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # ---- inside

    def _to_wait(self, turn: Turn, at_once: bool, refuse: bool) -> float:
        """Seconds, after which to look again."""
        holder = self._holder
        if holder is turn:
            return 0  # Python has seen to it that its generator runs but once
        if not refuse and self._waiting[0] is not turn:
            return LOOK_S
        if holder is None:
            return 0
        if holder.thread is not None:
            return LOOK_S
        if at_once and holder.last_thread == threading.get_ident():
            return 0
        return max(0.0, holder.since + IDLE_S - time.monotonic())
