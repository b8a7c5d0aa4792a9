"""The routes, and running them.

Request types and the resources of a request are llama-cpp-python's. The routes are our own: theirs begin a stream before they know
whether there is an answer, see that a client is gone only between two chunks, and load models where nothing else can run meanwhile.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from .. import __version__
from .desk import Answer, Desk
from .errors import ApiError, add_handlers, error_body
from .guard import Guard
from .served import ServedLlama
from .settings import ServerSettings

from llama_cpp.server.types import (  # isort: skip  (after kvcast's own, which say where the libraries are)
    CreateChatCompletionRequest,
    CreateCompletionRequest,
    CreateEmbeddingRequest,
    DetokenizeInputRequest,
    DetokenizeInputResponse,
    TokenizeInputCountResponse,
    TokenizeInputRequest,
    TokenizeInputResponse,
)

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
IGNORED = {"n", "best_of", "logit_bias_type", "user", "min_tokens"}
LOOK_S, BEAT_S = 0.25, 5.0  # how often the stream looks for news; longest silence
EVENTS = {"media_type": "text/event-stream", "headers": {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}}


def make_app(settings: ServerSettings, desk: Desk) -> FastAPI:
    """The application: API, page, map."""
    guard = Middleware(Guard, hosts=settings.allow_hosts, origins=settings.allow_origins)
    cors = Middleware(CORSMiddleware, allow_origins=settings.allow_origins, allow_methods=["*"], allow_headers=["*"])
    app = FastAPI(
        title="kvcast",
        version=__version__,
        root_path=settings.root_path,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        middleware=[guard, cors] if settings.allow_origins else [guard],
    )
    add_handlers(app)
    bearer = HTTPBearer(auto_error=False)

    async def authenticate(given: HTTPAuthorizationCredentials | None = Depends(bearer)) -> None:  # noqa: B008 - FastAPI's way
        key = settings.api_key
        if key is not None and not hmac.compare_digest(key.encode(), given.credentials.encode() if given else b""):
            message = "the API key is wrong" if given else "this server wants an API key"
            raise ApiError(401, f"{message}; send the one that the server was started with", code="invalid_api_key")

    allowed = {"dependencies": [Depends(authenticate)]}
    _add_completions(app, desk, allowed)
    _add_live(app, desk, allowed)
    _add_page(app)
    return app


def _add_completions(app: FastAPI, desk: Desk, allowed: dict[str, Any]) -> None:
    async def respond(request: Request, body: Any, call: Callable[..., Any]) -> Response:
        if body.n not in (None, 1):
            raise ApiError(400, f"n is {body.n}; a request has one answer", param="n")
        answer = desk.answer(request, body, call, IGNORED)
        first = await answer.first()
        if first is None:
            raise ApiError(503, "the answer was stopped before its first token; ask again", code="stopped")
        return StreamingResponse(_events(answer, first), **EVENTS) if body.stream else JSONResponse(first)

    @app.post("/v1/chat/completions", **allowed)
    async def chat(request: Request, body: CreateChatCompletionRequest) -> Response:
        if not body.messages:
            raise ApiError(400, "messages is empty; send at least one", param="messages")
        for message in body.messages:
            _only_text(message)
        return await respond(request, body, ServedLlama.create_chat_completion)

    @app.post("/v1/completions", **allowed)
    async def complete(request: Request, body: CreateCompletionRequest) -> Response:
        if isinstance(body.prompt, list):
            if len(body.prompt) != 1:
                raise ApiError(400, f"prompt is a list of {len(body.prompt)}; send one prompt a request", param="prompt")
            body.prompt = body.prompt[0]
        if not body.prompt:
            raise ApiError(400, "prompt is empty; send some text", param="prompt")
        return await respond(request, body, ServedLlama.create_completion)

    @app.post("/v1/embeddings", **allowed)
    async def embed(body: CreateEmbeddingRequest) -> dict[str, Any]:
        async with desk.model() as proxy:
            llm = await run_in_threadpool(proxy, body.model)
            if not llm.context_params.embeddings:
                raise ApiError(400, "this model has no embeddings; configure one with embedding true and sparse null", param="model")
            return await run_in_threadpool(llm.create_embedding, body.input)

    async def tokens_of(body: TokenizeInputRequest) -> list[int]:
        async with desk.model() as proxy:
            llm = await run_in_threadpool(proxy, body.model)
            return llm.tokenize(body.input.encode("utf-8"), special=True)

    @app.post("/extras/tokenize", **allowed)
    async def tokenize(body: TokenizeInputRequest) -> TokenizeInputResponse:
        return TokenizeInputResponse(tokens=await tokens_of(body))

    @app.post("/extras/tokenize/count", **allowed)
    async def count_tokens(body: TokenizeInputRequest) -> TokenizeInputCountResponse:
        return TokenizeInputCountResponse(count=len(await tokens_of(body)))

    @app.post("/extras/detokenize", **allowed)
    async def detokenize(body: DetokenizeInputRequest) -> DetokenizeInputResponse:
        async with desk.model() as proxy:
            llm = await run_in_threadpool(proxy, body.model)
            if wrong := [token for token in body.tokens if not 0 <= token < llm.n_vocab()]:  # llama.cpp would end the process
                raise ApiError(400, f"there is no token {wrong[0]}; the model has 0 to {llm.n_vocab() - 1}", param="tokens")
            return DetokenizeInputResponse(text=llm.detokenize(body.tokens).decode("utf-8", errors="replace"))

    @app.get("/v1/models", **allowed)
    async def list_models() -> dict[str, Any]:
        found = [{"id": name, "object": "model", "created": 0, "owned_by": "kvcast"} for name in desk.proxy]
        return {"object": "list", "data": found}


def _only_text(message: Any) -> None:
    """A content in parts becomes their text."""
    parts = message.get("content")
    if parts is None or isinstance(parts, str):
        return
    parts = list(parts)
    if any(part["type"] != "text" for part in parts):
        raise ApiError(400, "kvcast runs text models only; send messages of text", param="messages")
    message["content"] = "\n".join(part["text"] for part in parts)


async def _events(answer: Answer, first: Any) -> AsyncIterator[str]:
    yield _event(first)
    async for item in answer.rest():
        yield _event(error_body(item)[1] if isinstance(item, BaseException) else item)
    yield "data: [DONE]\n\n"


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _add_live(app: FastAPI, desk: Desk, allowed: dict[str, Any]) -> None:
    def snapshot() -> dict[str, Any]:
        llm = desk.proxy.current
        return {"state": "loading"} if llm is None else llm.live.snapshot()

    @app.get("/v1/kv", **allowed)
    async def kv() -> dict[str, Any]:
        return await run_in_threadpool(snapshot)

    @app.get("/v1/kv/stream", **allowed)
    async def kv_stream() -> Response:
        async def news() -> AsyncIterator[str]:
            sent, silent = None, 0.0
            while not desk.closing:
                llm = desk.proxy.current
                version = (id(llm), llm.live.version) if llm else None
                if sent is None or version != sent or silent >= BEAT_S:
                    sent, silent = version, 0.0
                    yield _event(await run_in_threadpool(snapshot))
                await asyncio.sleep(LOOK_S)
                silent += LOOK_S

        return StreamingResponse(news(), **EVENTS)

    def text_of(block: int) -> dict[str, Any]:
        with desk.proxy.lock:  # a closed model has no vocabulary
            llm = desk.proxy.current
            n_blocks = 0 if llm is None else llm.live.snapshot()["n_blocks"]
            if llm is None or not 0 <= block < n_blocks:
                raise ApiError(404, f"block {block} is not in use; there are {n_blocks}", param="block")
            return {"block": block, "text": llm.live.text(block)}

    @app.get("/v1/kv/text", **allowed)
    async def kv_text(block: int) -> dict[str, Any]:
        return await run_in_threadpool(text_of, block)


def _add_page(app: FastAPI) -> None:
    def add(path: str, file: str) -> None:
        app.add_api_route(path, lambda: FileResponse(PAGE / file, headers=PAGE_HEADERS), include_in_schema=False)

    add("/", "index.html")
    for file in PAGE.iterdir():
        add(f"/{file.name}", file.name)
