"""Every error in the API's shape: ``{"error": {"message", "type", "param", "code"}}``, with the status that fits."""

from __future__ import annotations

import logging
import re
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from ..errors import ContextFull, GenerationError, KvcastError

log = logging.getLogger("kvcast.server")
REQUEST, SERVER = "invalid_request_error", "server_error"
TOO_LONG = "context_length_exceeded"
OF_THE_REQUEST = (ValueError, TemplateError, KeyError, TypeError, IndexError)  # what llama-cpp-python raises on odd requests
_OF_PYDANTIC = re.compile(r"(body|query|str|.*\[.*|[A-Z].*)$")  # parts of a place that are no names of ours: where it came from, types
_TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed context window of (\d+)")


class ApiError(Exception):
    """What a client is told instead of an answer; ``message`` is one sentence for people."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers


def error_body(error: BaseException) -> tuple[int, dict[str, Any]]:
    """Status and JSON of an error."""
    param = code = None
    if isinstance(error, ApiError):
        status, message, param, code = error.status, str(error), error.param, error.code
    elif isinstance(error, HTTPException):
        status, message = error.status_code, str(error.detail)
    elif isinstance(error, RequestValidationError):
        status, (param, message) = 400, _malformed(error)
    elif isinstance(error, UnicodeEncodeError):
        status, message = 400, "the request holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; send whole ones"
    elif isinstance(error, ContextFull):
        status, message, code = 400, str(error), TOO_LONG
    elif isinstance(error, GenerationError):
        status, message = 500, str(error)
    else:  # its words may name files of the server
        log.error("a request failed: %s", error, exc_info=None if isinstance(error, KvcastError) else error)
        status, message = 500, f"the server failed ({type(error).__name__}); its log says why"
    kind = REQUEST if status < 500 else SERVER
    message = message.encode(errors="replace").decode()
    return status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _malformed(error: RequestValidationError) -> tuple[str | None, str]:
    """Parameter and sentence."""
    first = error.errors()[0]
    places = [str(part) for part in first["loc"] if not _OF_PYDANTIC.match(str(part))]
    where, param = ".".join(places) or "the body", places[0] if places else None
    if first["type"] == "missing":
        return param, f"{where} is missing; send it"
    return param, f"{where}: {first['msg'].removeprefix('Value error, ')}"


def of_the_request(error: Exception) -> ApiError:
    """What a request is to blame for, from one of ``OF_THE_REQUEST`` that was raised before the first token."""
    if found := _TOO_LONG.search(str(error)):
        message = (
            f"the request has {int(found[1]):,} tokens and the context holds {int(found[2]):,}; "
            "shorten it, or start the server with a larger --context"
        )
        return ApiError(400, message, param="messages", code=TOO_LONG)
    reason = str(error) if isinstance(error, ValueError | TemplateError) else f"{type(error).__name__}: {error}"
    return ApiError(400, f"the request cannot be answered: {reason}")


def add_handlers(app: FastAPI) -> None:
    """Answer every error in the API's shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        status, body = error_body(error)
        if isinstance(error, HTTPException) and status in (404, 405):
            body["error"]["message"] = f"there is no {request.method} {request.url.path}; see docs/server.md for the endpoints"
        return JSONResponse(body, status, headers=getattr(error, "headers", None))

    for kind in (ApiError, HTTPException, RequestValidationError, KvcastError, ValueError, Exception):
        app.add_exception_handler(kind, answer)
