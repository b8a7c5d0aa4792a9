"""Listening, starting and ending the server."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

from ..chat.documents import DocumentCache
from ..errors import KvcastError
from ..terminal import PLAIN
from .app import make_app
from .connection import BACKLOG, bounded
from .model_manager import ModelManager
from .request_queue import RequestQueue
from .settings import ModelSettings, ServerSettings


class Server(uvicorn.Server):
    """uvicorn's server; a signal also ends what the model computes and the streams that never end by themselves."""

    def __init__(self, config: uvicorn.Config, desk: RequestQueue):
        super().__init__(config)
        self._desk = desk

    def handle_exit(self, sig: int, frame: Any) -> None:
        self._desk.close()
        super().handle_exit(sig, frame)


def listen(settings: ServerSettings) -> socket.socket:
    """A socket to serve on, before a model is loaded.

    Raises
    ------
    KvcastError
        The port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise KvcastError(
            f"cannot listen on {settings.host}, port {settings.port} ({error.strerror or error}); choose another --port or --host"
        ) from error


def make_server(settings: ServerSettings, desk: RequestQueue, say: Callable[[str], None] = print) -> Server:
    """The server, ready to ``run(sockets=[...])``."""
    bounds = settings.bounds
    config = uvicorn.Config(
        make_app(settings, desk),
        http=bounded(bounds, say),
        ws="none",
        log_level="error",  # a warning for every odd request is a way to fill a disk
        access_log=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=bounds.header_bytes,
        timeout_keep_alive=bounds.idle_seconds,  # type: ignore[arg-type]  # any number
        timeout_graceful_shutdown=5,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_certfile=settings.ssl_certfile,
    )
    for handler in logging.getLogger("uvicorn").handlers:
        handler.addFilter(PLAIN)
    return Server(config, desk)


def run(settings: ServerSettings, models: list[ModelSettings], say: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Raises
    ------
    KvcastError
        The address is not free, or the first model cannot be loaded.
    """
    with listen(settings) as listening:
        proxy = ModelManager(models, DocumentCache() if settings.keep_documents else None, say)
        desk = RequestQueue(proxy, settings.interrupt_requests, settings.bounds)
        try:
            server = make_server(settings, desk, say)
            host, port = listening.getsockname()[:2]
            scheme = "https" if settings.ssl_certfile else "http"
            say(f"{', '.join(proxy)} at {scheme}://{f'[{host}]' if ':' in host else host}:{port}/ (API under /v1); Ctrl-C ends it")
            if settings.api_key is None and not host.startswith("127.") and host != "::1":
                say("everybody who reaches this address can use it and read what is in the context; --api-key KEY keeps others out")
            try:
                server.run(sockets=[listening])
            except KeyboardInterrupt:  # uvicorn raises the signal again when it has ended
                pass
        finally:
            with desk.working:  # uvicorn does not wait for a thread that is in llama.cpp
                proxy.free()
