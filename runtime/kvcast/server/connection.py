"""Connections: uvicorn's, with limits of time for clients that send or read slowly, and one of number that shuts nobody out."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .bounds import Bounds

BACKLOG = 256  # connections that wait to be accepted, which happens to all of them at once
OTHER_FILES = 128  # that the process may have open
DRAIN_S = 2.0  # for the rest of a body that nobody wants, which may be as long as one that is wanted: its client comes to read the answer


class Connection(H11Protocol):
    """A connection. It waits for its client while a header or a body comes, between two requests, and while the client does not read.

    Attributes
    ----------
    bounds : Bounds
        Set in a subclass: uvicorn makes its protocols itself.
    n_most : int
        Connections at once.
    """

    bounds: Bounds
    n_most: int

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._waits, self._since = "", 0.0  # for what, "" where the client waits for us; and since when
        self._timer: asyncio.TimerHandle | None = None
        self._fresh = True  # a header is to come, or has begun
        self._n_rest = 0  # bytes of a body that nobody wants
        self._look()
        self._make_room()

    def data_received(self, data: bytes) -> None:
        self._fresh = True
        super().data_received(data)
        self._look()
        self._n_rest = self._n_rest + len(data) if self._waits == "rest" else 0
        if self._n_rest > self.bounds.body_bytes:
            self.transport.abort()

    def on_response_complete(self) -> None:
        self._fresh = False
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():  # closing would wait for its client
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _state(self) -> tuple[str, float | None]:
        """What it waits for, and how long it may."""
        if self.flow.write_paused:
            return "reading", self.bounds.send_seconds
        if self.conn.their_state is h11.SEND_BODY:
            unwanted = self.cycle is not None and self.cycle.response_complete
            return ("rest", DRAIN_S) if unwanted else ("body", self.bounds.body_seconds + DRAIN_S)  # a sentence comes first
        if self.conn.their_state is h11.IDLE:
            return ("header", self.bounds.header_seconds) if self._fresh else ("request", None)  # uvicorn's own limit
        return "", None

    def _look(self) -> None:
        waits, seconds = self._state()
        if waits == self._waits:
            return
        self._waits, self._since = waits, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _make_room(self) -> None:
        others = [c for c in self.connections if isinstance(c, Connection) and not c.transport.is_closing()]
        if len(others) > self.n_most:
            min((c for c in others if c._waits), key=lambda c: c._since).transport.abort()


def bounded(bounds: Bounds, say: Any = None) -> type[Connection]:
    """The protocol for uvicorn, with as many files as it needs if they are to be had; fewer connections are said."""
    n_most = bounds.connections
    room = _open_files(n_most + BACKLOG + OTHER_FILES) - BACKLOG - OTHER_FILES
    if room < n_most:
        n_most = max(room, 8)
        if say is not None:
            say(f"this process may have few files open: {n_most} connections at once; ulimit -n says how many")
    return type("BoundedConnection", (Connection,), {"bounds": bounds, "n_most": n_most})


def _open_files(n_wanted: int) -> int:
    """How many files the process may have open, more than before if that is allowed."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return n_wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < n_wanted:
        soft = n_wanted if hard == unlimited else min(n_wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return n_wanted if soft == unlimited else soft
