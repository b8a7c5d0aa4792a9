"""The routes.

The resources of a request are llama-cpp-python's. The routes are our own: theirs begin a stream before they know whether there is an
answer, see that a client is gone only between two chunks, read any body before they look at the key, and load models where nothing else
can run meanwhile.
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
from llama_cpp.server.app import prepare_request_resources
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from .. import __version__
from ..llama.messages import for_template
from .bounds import Bodies, busy
from .errors import ApiError, add_handlers, error_body
from .origin_guard import OriginGuard
from .request_queue import NOTHING_YET, Answer, RequestQueue, Stopped
from .requests import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .served import ServedLlama
from .settings import ServerSettings

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOOK_S, BEAT_S = 0.25, 5.0  # how often the stream of the map looks for news; longest silence of any stream
EVENTS = {"media_type": "text/event-stream", "headers": {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}}
PING = ": ping\n\n"  # a comment


def make_app(settings: ServerSettings, desk: RequestQueue) -> FastAPI:
    """The application: API, page, map."""
    guard = Middleware(OriginGuard, hosts=settings.allow_hosts, origins=settings.allow_origins, bounds=settings.bounds)
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

    async def authenticate(request: Request) -> None:
        if settings.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # bytes, as they came: clients write what is not ASCII as UTF-8 or as Latin-1
        sent = given.strip().encode("latin-1") if scheme.lower() == "bearer" else b""
        right = [hmac.compare_digest(sent, settings.api_key.encode(code, "replace")) for code in ("utf-8", "latin-1")]
        if not any(right):
            message = "the API key is wrong" if sent else "this server wants an API key"
            raise ApiError(401, f"{message}; send the one that the server was started with", code="invalid_api_key")

    allowed = {"dependencies": [Depends(authenticate)]}
    _add_completions(app, desk, settings, allowed)
    _add_live(app, desk, settings, allowed)
    _add_page(app)
    return app


def _add_completions(app: FastAPI, desk: RequestQueue, settings: ServerSettings, allowed: dict[str, Any]) -> None:
    bodies = Bodies(settings.bounds)
    kinds: list[type[BaseModel]] = [ChatRequest, CompletionRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest]
    of = {kind: bodies.of(kind) for kind in kinds}

    async def complete_with(request: Request, body: Any, call: Callable[..., Any], messages: list[Any] | None = None) -> Response:
        arguments = body.arguments()

        def work(llm: ServedLlama, answer: Answer) -> Any:
            more: dict[str, Any] = {"model": llm.name}
            prepare_request_resources(body, desk.proxy, body.model, more)
            done = call(llm, **{**arguments, **more})
            return done if body.stream else done and {**done, "usage": answer.usage()}

        answer = desk.answer(request, body.model, work, messages)
        if not body.stream:
            return JSONResponse(await answer.whole())
        first = await answer.first()
        usage = bool(body.stream_options.include_usage)
        return StreamingResponse(_events(answer, first, not settings.disable_ping_events, usage), **EVENTS)

    async def done_with(request: Request, body: Any, work: Callable[[ServedLlama], Any]) -> Any:
        return await desk.answer(request, body.model, lambda llm, _: work(llm)).whole()

    @app.post("/v1/chat/completions", **allowed)
    async def chat(request: Request, body: Any = of[ChatRequest]) -> Response:
        messages = for_template([message.model_dump(exclude_none=True) for message in body.messages])
        return await complete_with(request, body, ServedLlama.create_chat_completion, messages)

    @app.post("/v1/completions", **allowed)
    async def complete(request: Request, body: Any = of[CompletionRequest]) -> Response:
        return await complete_with(request, body, ServedLlama.create_completion)

    @app.post("/v1/embeddings", **allowed)
    async def embed(request: Request, body: Any = of[EmbeddingRequest]) -> dict[str, Any]:
        return await done_with(request, body, lambda llm: llm.embeddings(body.input, body.dimensions, body.encoding_format == "base64"))

    def tokens_of(body: TokenizeRequest) -> Callable[[ServedLlama], list[int]]:
        return lambda llm: llm.tokenize(body.input.encode("utf-8"), special=True)

    @app.post("/extras/tokenize", **allowed)
    async def tokenize(request: Request, body: Any = of[TokenizeRequest]) -> dict[str, list[int]]:
        return {"tokens": await done_with(request, body, tokens_of(body))}

    @app.post("/extras/tokenize/count", **allowed)
    async def count_tokens(request: Request, body: Any = of[TokenizeRequest]) -> dict[str, int]:
        return {"count": len(await done_with(request, body, tokens_of(body)))}

    @app.post("/extras/detokenize", **allowed)
    async def detokenize(request: Request, body: Any = of[DetokenizeRequest]) -> dict[str, str]:
        return {"text": await done_with(request, body, lambda llm: llm.text_of(body.tokens))}

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "kvcast"}

    @app.get("/v1/models", **allowed)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [described(name) for name in desk.proxy]}

    @app.get("/v1/models/{name:path}", **allowed)
    async def find_model(name: str) -> dict[str, Any]:
        if name not in list(desk.proxy):
            raise ApiError(404, f"there is no model {name!r}; GET /v1/models lists them", code="model_not_found")
        return described(name)

    @app.get("/health")
    async def health() -> Response:
        state = desk.proxy.state
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)


async def _events(answer: Answer, first: Any, pings: bool, with_usage: bool) -> AsyncIterator[str]:
    last: dict[str, Any] | None = None
    async for item in answer.chunks(first, BEAT_S):
        if item is NOTHING_YET:
            if pings:
                yield PING
            continue
        if isinstance(item, Stopped) and item.by_request and last is not None:
            item = _cut_off(last)
        if isinstance(item, BaseException):
            yield _event(error_body(item)[1])
            break
        last = {**item, "usage": None} if with_usage else item
        yield _event(last)
    if with_usage and last is not None:
        yield _event({**last, "choices": [], "usage": answer.usage()})
    yield "data: [DONE]\n\n"


def _cut_off(chunk: dict[str, Any]) -> dict[str, Any]:
    """The last chunk of an answer that ends here, as one does whose tokens are used up."""
    (choice,) = chunk["choices"]
    nothing = {"text": ""} if "text" in choice else {"delta": {}}
    return {**chunk, "choices": [{"index": 0, **nothing, "logprobs": None, "finish_reason": "length"}]}


def _event(value: Any) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _add_live(app: FastAPI, desk: RequestQueue, settings: ServerSettings, allowed: dict[str, Any]) -> None:
    n_streams = 0

    def snapshot() -> dict[str, Any]:
        llm = desk.proxy.current
        return {"state": desk.proxy.state} if llm is None else llm.live.snapshot()

    @app.get("/v1/kv", **allowed)
    async def kv() -> dict[str, Any]:
        return await run_in_threadpool(snapshot)

    @app.get("/v1/kv/stream", **allowed)
    async def kv_stream() -> Response:
        async def news() -> AsyncIterator[str]:
            nonlocal n_streams
            n_streams += 1
            try:
                sent, silent = None, 0.0
                while not desk.closing:
                    llm = desk.proxy.current
                    version = (id(llm), llm.live.version) if llm else desk.proxy.state
                    if version != sent or silent >= BEAT_S:
                        sent, silent = version, 0.0
                        yield _event(await run_in_threadpool(snapshot))
                    await asyncio.sleep(LOOK_S)
                    silent += LOOK_S
            finally:
                n_streams -= 1

        if n_streams >= settings.bounds.streams:
            raise busy(f"{n_streams} streams of the map are open")
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
