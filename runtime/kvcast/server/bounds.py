"""What one client may ask of the server: sizes, numbers and times, all in one place, and reading a body within them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import numba
import numpy as np
from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from .errors import ApiError

QUOTE, BACKSLASH, COMMA, COLON, OPEN_LIST, CLOSE_LIST, OPEN_OBJECT, CLOSE_OBJECT = b'"\\,:[]{}'


class Bounds(BaseModel):
    """The bounds; sizes in bytes, times in seconds.

    Parameters
    ----------
    body_bytes : int
        Of a request's body.
    bodies_bytes : int
        Of the bodies of all requests that run or wait.
    body_seconds : float
        From a request's header to the end of its body.
    json_depth, json_values : int
        Nesting of a body, and the values in its lists and objects; a key counts as one.
    messages : int
        Of a chat.
    header_bytes, headers : int
        Of a request, and their number.
    header_seconds : float
        From the beginning of a connection, or of a further request on it, to the end of the header.
    idle_seconds : float
        Without a further request, until a connection is closed.
    send_seconds : float
        Without reading what the server sends, until a connection is closed.
    connections : int
        At once. One more closes the one that has waited longest for its client.
    queue : int
        Requests that wait for the model, beside the one that it answers.
    streams : int
        ``/v1/kv/stream`` at once.
    """

    model_config = ConfigDict(extra="forbid")

    body_bytes: int = Field(16 << 20, ge=1024)
    bodies_bytes: int = Field(64 << 20, ge=1024)
    body_seconds: float = Field(60.0, gt=0)
    json_depth: int = Field(100, ge=8, le=500)  # Python's own parser ends at about 1,000
    json_values: int = Field(200_000, ge=100)
    messages: int = Field(5_000, ge=1)
    header_bytes: int = Field(32 << 10, ge=1024)
    headers: int = Field(100, ge=10)
    header_seconds: float = Field(10.0, gt=0)
    idle_seconds: float = Field(60.0, gt=0)
    send_seconds: float = Field(60.0, gt=0)
    connections: int = Field(512, ge=4)
    queue: int = Field(64, ge=0)
    streams: int = Field(32, ge=0)


class Bodies:
    """Reads the bodies of requests, after the key was looked at: never more than the bounds allow, and parsed outside of the event loop.

    Parameters
    ----------
    bounds : Bounds
    """

    def __init__(self, bounds: Bounds):
        self._bounds = bounds
        self._n_held = 0  # bytes
        _extent(np.frombuffer(b"[]", np.uint8), 1, 1)  # compile or load it now

    def of(self, kind: type[BaseModel]) -> Any:
        """The dependency of a route: the body as ``kind``."""

        async def body(request: Request) -> AsyncIterator[Any]:
            data = bytearray()
            try:
                await self._read(request, data)
                yield await run_in_threadpool(self._parse, kind, data)
            finally:
                self._n_held -= len(data)

        return Depends(body)

    async def _read(self, request: Request, data: bytearray) -> None:
        b = self._bounds
        given = request.headers.get("content-length", "")
        if given.isdecimal() and int(given) > b.body_bytes:
            raise _too_large(b.body_bytes)
        if request.headers.get("content-encoding", "identity").lower() not in ("identity", ""):
            raise ApiError(415, "the body is compressed; send it as it is")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
            raise ApiError(415, f"the body's Content-Type is {kind or 'missing'}; send JSON as application/json")
        try:
            with anyio.fail_after(b.body_seconds):
                async for part in request.stream():
                    if len(data) + len(part) > b.body_bytes:
                        raise _too_large(b.body_bytes)
                    if self._n_held + len(part) > b.bodies_bytes:
                        raise busy("the server holds as many requests as it may")
                    data += part
                    self._n_held += len(part)
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {b.body_seconds:g} s; send it at once") from error
        except ClientDisconnect as error:
            raise ApiError(400, "the client went away") from error

    def _parse(self, kind: type[BaseModel], data: bytearray) -> BaseModel:
        b = self._bounds
        if not data:
            raise ApiError(400, "the body is empty; send JSON")
        depth, n_values = _extent(np.frombuffer(data, np.uint8), b.json_depth, b.json_values)
        if depth > b.json_depth:
            raise ApiError(400, f"the body is nested more than {b.json_depth} deep; send a flatter one")
        if n_values > b.json_values:
            raise ApiError(400, f"the body holds more than {b.json_values:,} values; send fewer")
        try:
            value = json.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the body is not UTF-8 from byte {error.start} on; send JSON as UTF-8") from error
        except ValueError as error:
            raise ApiError(400, f"the body is no JSON: {error}") from error
        messages = value.get("messages") if isinstance(value, dict) else None
        if isinstance(messages, list) and len(messages) > b.messages:
            raise ApiError(400, f"there are {len(messages):,} messages; at most {b.messages:,} go into a request", param="messages")
        try:
            return kind.model_validate(value)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False)) from error


def busy(why: str) -> ApiError:
    """What a client is told that must come again."""
    return ApiError(503, f"{why}; ask again later", code="server_busy", headers={"Retry-After": "5"})


def _too_large(n_bytes: int) -> ApiError:
    return ApiError(413, f"the body is larger than {n_bytes:,} bytes; send a smaller one", code="request_too_large")


@numba.njit(nogil=True, cache=True)
def _extent(text, depth_most, values_most):
    """Depth and number of values of JSON, no further than where one is too large. Other threads run meanwhile, as they do not while
    Python's own parser does."""
    depth = deepest = n_values = 0
    in_string = False
    i = 0
    while i < len(text) and deepest <= depth_most and n_values <= values_most:
        c = text[i]
        if in_string:
            if c == BACKSLASH:
                i += 1
            elif c == QUOTE:
                in_string = False
        elif c == QUOTE:
            in_string = True
        elif c == OPEN_LIST or c == OPEN_OBJECT:
            depth += 1
            deepest = max(deepest, depth)
            n_values += 1
        elif c == CLOSE_LIST or c == CLOSE_OBJECT:
            depth -= 1
        elif c == COMMA or c == COLON:
            n_values += 1
        i += 1
    return deepest, n_values
