"""Requests take turns at the model: each is answered in a worker thread, and stopped when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from .errors import OF_THE_REQUEST, of_the_request
from .proxy import Proxy
from .served import ServedLlama, Turn

from llama_cpp.server.app import prepare_request_resources  # isort: skip


@dataclass(eq=False)
class Answer(Turn):
    """A request and what came of it so far: chunks, then None or an exception."""

    items: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    async def first(self) -> Any:
        """The first chunk; for an answer in one piece, the answer.

        Raises
        ------
        ApiError, KvcastError
            There is none.
        """
        item = await self.items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    async def rest(self) -> AsyncIterator[Any]:
        """The other chunks; an exception comes as the last of them."""
        while (item := await self.items.get()) is not None:
            yield item
            if isinstance(item, BaseException):
                return


class Desk:
    """Hands the model from request to request.

    Parameters
    ----------
    proxy : Proxy
    interrupt : bool
        A new request stops the one that runs; else it waits.
    """

    def __init__(self, proxy: Proxy, interrupt: bool = False):
        self.proxy = proxy
        self.closing = False
        self.working = threading.Lock()  # held while a thread uses the model
        self._interrupt = interrupt
        self._lock = asyncio.Lock()
        self._running: Answer | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def answer(self, request: Request, body: Any, call: Callable[..., Any], exclude: set[str]) -> Answer:
        """Answer a completion request of llama-cpp-python's types, when its turn comes.

        Parameters
        ----------
        call : callable
            The method of ``Llama`` that answers it.
        exclude : set of str
            Fields of the body that are not its arguments.
        """
        answer = Answer(messages=[dict(m) for m in getattr(body, "messages", [])])
        arguments = body.model_dump(exclude=exclude)
        if self._interrupt and self._running is not None:
            self.stop(self._running)
        task = asyncio.create_task(self._run(answer, request, lambda llm, more: call(llm, **{**arguments, **more}), body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    def stop(self, answer: Answer) -> None:
        """End an answer, running or waiting. From any thread, and from a signal handler."""
        answer.stopped = True
        if (llm := self.proxy.current) is not None:
            llm.stop(answer)

    def close(self) -> None:
        """End what runs, and everything that waits. From a signal handler."""
        self.closing = True
        if self._running is not None:
            self.stop(self._running)

    @contextlib.asynccontextmanager
    async def model(self) -> AsyncIterator[Proxy]:
        """The models, while no request is answered."""
        async with self._lock:
            yield self.proxy

    async def _run(self, answer: Answer, request: Request, call: Callable[..., Any], body: Any) -> None:
        loop = asyncio.get_running_loop()
        watcher = asyncio.create_task(self._watch(answer, request))

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(answer.items.put_nowait, item)

        end: BaseException | None = None
        try:
            async with self._lock:
                self._running = answer
                try:
                    if not (answer.stopped or self.closing):
                        await run_in_threadpool(self._work, answer, call, body, put)
                finally:
                    self._running = None
        except Exception as error:  # noqa: BLE001 - it is the answer
            end = None if answer.stopped else error
        finally:
            watcher.cancel()
            answer.items.put_nowait(end)

    def _work(self, answer: Answer, call: Callable[..., Any], body: Any, put: Callable[[Any], None]) -> None:
        with self.working:
            self._answer(answer, call, body, put)

    def _answer(self, answer: Answer, call: Callable[..., Any], body: Any, put: Callable[[Any], None]) -> None:
        begun = False
        llm: ServedLlama = self.proxy(body.model)
        more = {"model": llm.name}
        try:
            prepare_request_resources(body, self.proxy, body.model, more)
            with llm.turn(answer):
                result = call(llm, more)
                for item in result if isinstance(result, Iterator) else [result]:
                    put(item)
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
