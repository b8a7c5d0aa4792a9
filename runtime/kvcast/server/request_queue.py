"""Requests take turns at the model: each is answered in a worker thread, and stopped when its client goes away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Request

from .bounds import Bounds, busy
from .errors import OF_THE_REQUEST, ApiError, of_the_request
from .model_manager import ModelManager
from .served import ServedLlama, Turn

WAITS_S = 0.06  # for its turn, before a stream is begun without knowing whether the request can be answered
CHECKS_S = 5.0  # for the checks when its turn has come; the model may have to be loaded first
FIRST_S = 0.03  # for the first chunk when it can be answered
NOTHING_YET = object()

Work = Callable[[ServedLlama, "Answer"], Any]


@dataclass(eq=False)
class Answer(Turn):
    """A request and what came of it so far: chunks, then None or an exception."""

    items: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    accepted: asyncio.Event = field(default_factory=asyncio.Event)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)

    def accept(self) -> None:
        """From the worker's thread."""
        self.loop.call_soon_threadsafe(self.accepted.set)

    async def whole(self) -> Any:
        """An answer in one piece.

        Raises
        ------
        ApiError, KvcastError
            There is none.
        """
        return self._given(await self.items.get())

    async def first(self) -> Any:
        """The first chunk, or ``NOTHING_YET`` as soon as the client can be told that its answer comes.

        Raises
        ------
        ApiError, KvcastError
            There is none.
        """
        getting = asyncio.ensure_future(self.items.get())
        try:
            await asyncio.wait({getting}, timeout=WAITS_S)
            if not getting.done() and self.begun.is_set():
                accepted = asyncio.ensure_future(self.accepted.wait())
                await asyncio.wait({getting, accepted}, timeout=CHECKS_S, return_when=asyncio.FIRST_COMPLETED)
                accepted.cancel()
                await asyncio.wait({getting}, timeout=FIRST_S)
            return self._given(getting.result()) if getting.done() else NOTHING_YET
        finally:
            getting.cancel()

    async def chunks(self, first: Any, pause_s: float) -> AsyncIterator[Any]:
        """The chunks from the first on, and ``NOTHING_YET`` after each pause without one; an exception comes as the last of them."""
        item = first
        while item is not None:
            yield item
            if isinstance(item, BaseException):
                return
            try:
                item = await asyncio.wait_for(self.items.get(), pause_s)
            except asyncio.TimeoutError:
                item = NOTHING_YET

    def _given(self, item: Any) -> Any:
        if isinstance(item, BaseException):
            raise item
        return item


class Stopped(ApiError):
    """An answer was stopped before its end; ``by_request``: by another request, as the server was set to."""

    def __init__(self, by_request: bool):
        why = "another request came" if by_request else "the server ends"
        super().__init__(503, f"the answer was stopped, as {why}; ask again", code="stopped")
        self.by_request = by_request


class RequestQueue:
    """Hands the model from request to request.

    Parameters
    ----------
    proxy : ModelManager
    interrupt : bool
        A new request stops the one that runs; else it waits.
    bounds : Bounds
    """

    def __init__(self, proxy: ModelManager, interrupt: bool = False, bounds: Bounds | None = None):
        self.proxy = proxy
        self.closing = False
        self.working = threading.Lock()  # held while a thread uses the model
        self._interrupt = interrupt
        self._bounds = bounds or Bounds()
        self._lock = asyncio.Lock()
        self._running: Answer | None = None
        self._waiting: set[Answer] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def answer(self, request: Request, model: str | None, work: Work, messages: list[dict[str, Any]] | None = None) -> Answer:
        """Do some work with a model when the request's turn comes.

        Parameters
        ----------
        model : str or None
            Its name.
        work : callable
            Of the model and the answer; it gives an answer, or an iterator of chunks. From a worker's thread.
        messages : list of dict, optional
            Of a chat.

        Raises
        ------
        ApiError
            So many wait already that this one is turned away.
        """
        if (self._running is not None or self._waiting) and len(self._waiting) >= self._bounds.queue:
            raise busy(f"{len(self._waiting)} requests wait for the model")
        answer = Answer(messages=messages or [])
        if self._interrupt and self._running is not None:
            self.stop(self._running)
        self._waiting.add(answer)
        task = asyncio.create_task(self._run(answer, request, model, work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    def stop(self, answer: Answer) -> None:
        """End an answer, running or waiting. From a signal handler, too."""
        answer.stopped = True
        self._waiting.discard(answer)
        if (llm := self.proxy.current) is not None:
            llm.stop(answer)

    def close(self) -> None:
        """End what runs, and everything that waits. From a signal handler."""
        self.closing = True
        if self._running is not None:
            self.stop(self._running)

    async def _run(self, answer: Answer, request: Request, model: str | None, work: Work) -> None:
        watcher = asyncio.create_task(self._watch(answer, request))
        end: BaseException | None = None
        done = False
        try:
            async with self._lock:
                self._waiting.discard(answer)
                self._running = answer
                try:
                    answer.stopped |= self.closing
                    if not answer.stopped:
                        answer.begun.set()
                        # not one of the threads that others wait for
                        await anyio.to_thread.run_sync(self._work, answer, model, work, limiter=anyio.CapacityLimiter(1))
                        done = True
                finally:
                    self._running = None
        except Exception as error:  # noqa: BLE001 - it is the answer
            end = error
        finally:
            watcher.cancel()
            self._waiting.discard(answer)
            answer.items.put_nowait(Stopped(not self.closing) if answer.stopped and not done else end)

    def _work(self, answer: Answer, model: str | None, work: Work) -> None:
        begun = False
        with self.working:
            llm = self.proxy(model)
            try:
                with llm.turn(answer):
                    result = work(llm, answer)
                    for item in result if isinstance(result, Iterator) else [result]:
                        answer.loop.call_soon_threadsafe(answer.items.put_nowait, item)
                        begun = True
            except OF_THE_REQUEST as error:
                if begun:
                    raise
                raise of_the_request(error) from error

    async def _watch(self, answer: Answer, request: Request) -> None:
        """Stop the answer when its client goes away, also while a prompt is read and nothing is sent."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.stop(answer)
