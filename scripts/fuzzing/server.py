"""Requests to `kvcast serve`, in process, on a real model of two tiny layers: every answer is one of the API's, and comes in time."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

from kvcast import SparseConfig
from kvcast.chat.documents import DocumentCache
from kvcast.server.app import make_app
from kvcast.server.model_manager import ModelManager
from kvcast.server.request_queue import RequestQueue
from kvcast.server.settings import ModelSettings, ServerSettings
from shapes import write_shape

from . import mutate
from .gguf_file import SHAPE

ANSWER_S = 15.0
FUNCTION = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
COMMON: dict[str, Any] = {
    "model": "tiny", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "stop": ["x", "y"], "stream": True,
    "seed": 1, "logit_bias": {"5": 1.0}, "logit_bias_type": "input_ids", "presence_penalty": 0.5, "frequency_penalty": 0.5,
    "repeat_penalty": 1.1, "mirostat_mode": 1, "mirostat_tau": 5.0, "mirostat_eta": 0.1, "min_tokens": 2, "n": 1, "user": "me",
    "grammar": 'root ::= "a" | [b-c]+', "stream_options": {"include_usage": True}, "store": None,
}  # fmt: skip
CHAT: dict[str, Any] = {
    **COMMON, "tools": [{"type": "function", "function": FUNCTION}], "tool_choice": {"type": "function", "function": {"name": "f"}},
    "functions": [FUNCTION], "function_call": {"name": "f"}, "logprobs": True, "top_logprobs": 2,
    "response_format": {"type": "json_object", "schema": FUNCTION["parameters"]}, "max_completion_tokens": 3, "parallel_tool_calls": False,
}  # fmt: skip
COMPLETION: dict[str, Any] = {**COMMON, "suffix": "z", "echo": True, "logprobs": 2, "best_of": 1, "prompt": [1, 2, 77]}
MESSAGES = [
    {"role": "developer", "content": "Answer from this document.\n\nAbc."},
    {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": "1", "tool_call_id": "1"},
    {"role": "user", "content": "Why?"},
]
BODIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is needed, and what may be added
    "/v1/chat/completions": ({"messages": MESSAGES}, CHAT),
    "/v1/completions": ({"prompt": "Once"}, COMPLETION),
    "/v1/embeddings": (
        {"input": "Once"},
        {"model": "tiny", "user": "me", "input": ["Once", ""], "encoding_format": "base64", "dimensions": 64},
    ),
    "/extras/tokenize": ({"input": "Once"}, {"model": "tiny"}),
    "/extras/tokenize/count": ({"input": "Once"}, {"model": "tiny"}),
    "/extras/detokenize": ({"tokens": [1, 2, 77]}, {"model": "tiny"}),
}
ROUTES = (
    "/",
    "/app.js",
    "/v1/models",
    "/v1/kv",
    "/v1/kv/text",
    "/v1/kv/stream",
    "/openapi.json",
    "/v1/models/",
    "/v1/models/tiny",
    "/health",
    "/../etc/passwd",
    "//",
    "/é",
)
HEADERS = {
    "host": ("localhost:8000", "127.0.0.1", "[::1]", "[", "evil.example", "", "localhost:x"),
    "origin": ("http://localhost:8000", "null", "https://evil.example", "http://[", ""),
    "content-type": ("application/json", "text/plain", "multipart/form-data", "application/json; charset=utf-16", ""),
    "authorization": ("Bearer x", "Basic x", "Bearer", "\xff"),
}


class Server:
    """A surface; see ``harness.Surface``. An input is a request as JSON; its body in Latin-1, so that it may be any bytes."""

    def __init__(self, folder: Path):
        model = write_shape(folder / "tiny.gguf", **SHAPE, vocabulary="llama")
        sparse = SparseConfig(budget=96, predictor="ema")
        settings = ModelSettings(model=str(model), model_alias="tiny", sparse=sparse, n_ctx=256, n_threads=1, n_threads_batch=1)
        self._desk = RequestQueue(ModelManager([settings], DocumentCache(folder / "documents")))
        self._app = make_app(ServerSettings(), self._desk)
        self._loop = asyncio.new_event_loop()

    def make(self, rng: random.Random) -> bytes:
        headers = {"host": "localhost:8000", "content-type": "application/json"}
        if rng.random() < 0.15:
            name = rng.choice(list(HEADERS))
            headers[name] = rng.choice(HEADERS[name])
        request: dict[str, Any] = {"method": "POST", "query": "", "headers": headers, "leaves": rng.random() < 0.05, "body": ""}
        if rng.random() < 0.1:
            request["method"] = rng.choice(("GET", "GET", "GET", "HEAD", "PUT", "OPTIONS", "x"))
            request["path"] = rng.choice(ROUTES)
            request["query"] = rng.choice(("", "block=0", "block=-1", f"block={2**70}", "block=x", "block=", "%ff", "block=1&block=2"))
            request["leaves"] |= request["path"] == "/v1/kv/stream"
            return json.dumps(request).encode()
        request["path"] = rng.choice((*BODIES, *["/v1/chat/completions"] * 5, *["/v1/completions"] * 2))
        needed, more = BODIES[request["path"]]
        body: Any = {**needed, **{k: more[k] for k in rng.sample(list(more), rng.randint(0, min(4, len(more))))}}
        if "messages" in body:
            body["messages"] = rng.choice((MESSAGES, MESSAGES[:2], MESSAGES[4:]))
            body.setdefault("max_tokens", 4)
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            body = mutate.value(rng, body)
        if isinstance(body, dict) and rng.random() < 0.1:
            body["tool_choice"] = rng.choice(("auto", "none", "required", None, {"type": "function", "function": {"name": "f"}}))
            body["response_format"] = rng.choice((None, {"type": "json_schema", "json_schema": {"schema": FUNCTION["parameters"]}}))
        data = json.dumps(body, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
        if rng.random() < 0.1:
            data = mutate.some_bytes(rng, data)
        request["body"] = data.decode("latin-1")
        return json.dumps(request).encode()

    def run(self, data: bytes) -> str:
        request = json.loads(data)
        status, kind, body = self._loop.run_until_complete(asyncio.wait_for(self._ask(request), ANSWER_S))
        if request["leaves"]:
            return "left"
        assert status < 500, f"status {status}: {body[:200].decode(errors='replace')}"
        if kind.startswith("text/event-stream"):
            events = [line.removeprefix("data: ") for line in body.decode().splitlines() if line.startswith("data: ")]
            assert events[-1] == "[DONE]", "a stream without an end"
            for event in map(json.loads, events[:-1]):
                assert event.get("error", {}).get("type") != "server_error", event
            return "a stream"
        if status >= 400:
            error = json.loads(body)["error"]
            assert error["type"] == "invalid_request_error" and error["message"], error
        elif kind == "application/json":
            json.loads(body)
        return f"status {status}"

    async def _ask(self, request: dict[str, Any]) -> tuple[int, str, bytes]:
        """Status, content type and body of the answer to a client that leaves at its first byte, or stays."""
        gone, asked = asyncio.Event(), False
        begun: dict[str, Any] = {}
        body = bytearray()
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request["method"], "scheme": "http",
            "path": request["path"], "raw_path": request["path"].encode(), "query_string": request["query"].encode(), "root_path": "",
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in request["headers"].items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": request["body"].encode("latin-1"), "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                begun.update(message)
            else:
                body.extend(message.get("body", b""))
                if request["leaves"]:
                    gone.set()

        try:
            await self._app(scope, receive, send)
        except Exception:  # noqa: BLE001 - the handler has answered it with 500
            assert begun, "no answer"
        gone.set()
        await asyncio.gather(*self._desk._tasks)
        return begun["status"], dict(begun["headers"]).get(b"content-type", b"").decode(), bytes(body)
