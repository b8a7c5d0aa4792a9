"""Keeps web pages of others out: a browser must reach the server by a name of its own, from a page of its own."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .bounds import Bounds
from .errors import ApiError, error_body


class OriginGuard:
    """ASGI middleware against DNS rebinding, requests across origins and headers beyond the bounds.

    A rebound name is neither localhost, nor an address, nor this machine's name: its requests are refused with 403. So are
    those with an ``Origin`` other than the host itself. Requests without a host come from no browser.

    Parameters
    ----------
    hosts : sequence of str
        Further names that are allowed.
    origins : sequence of str
        Further origins that are allowed.
    bounds : Bounds
        Those of headers.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str] = (), origins: Sequence[str] = (), bounds: Bounds | None = None):
        self.app = app
        self._bounds = bounds or Bounds()
        own = socket.gethostname().lower()
        self._hosts = {"localhost", own, f"{own}.local", *(name.lower() for name in hosts)}
        self._origins = set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (wrong := self._too_large(scope["headers"]) or self._forbidden(Headers(scope=scope))):
            status, body = error_body(wrong)
            await JSONResponse(body, status)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _too_large(self, headers: list[tuple[bytes, bytes]]) -> ApiError | None:
        n_bytes = sum(len(name) + len(value) + 4 for name, value in headers)  # h11 counts only those of a header that comes in parts
        if n_bytes <= self._bounds.header_bytes and len(headers) <= self._bounds.headers:
            return None
        most = f"{self._bounds.headers} headers of together {self._bounds.header_bytes:,} bytes"
        return ApiError(431, f"the request has more than {most}; send fewer", code="headers_too_large")

    def _forbidden(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        name = _split(f"//{host}")[0]
        if host and name not in self._hosts and not _is_address(name):
            why = f"this server is not called {host!r}; start it with --allow-host {name or 'NAME'} if it should be"
            return ApiError(403, why, code="forbidden")
        origin = headers.get("origin")
        if origin is not None and _split(origin)[1] != host.lower() and origin not in self._origins:
            why = f"pages of {origin!r} may not use this server; start it with --allow-origin {origin} if they should"
            return ApiError(403, why, code="forbidden")
        return None


def _split(url: str) -> tuple[str, str]:
    """Host, and host with port, in lower case; "" where there is none."""
    try:
        parts = urlsplit(url)
        return (parts.hostname or "").lower(), parts.netloc.lower()
    except ValueError:
        return "", ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
