"""Streams of the server: how they begin, fail, stop and end; and what is spoken below HTTP clients."""

import http.client
import json
import socket
import threading

import pytest
from openai import APIError

from kvcast import GenerationError, SparseConfig
from kvcast.server.served import ServedLlama
from kvcast.server.settings import ModelSettings
from served import NO_END, SHORT, ask, serve


@pytest.fixture(scope="module")
def served(smollm2):
    settings = ModelSettings(
        model=str(smollm2), n_ctx=1024, n_threads=2, n_threads_batch=2, model_alias="sparse", sparse=SparseConfig(budget=256)
    )
    with serve([settings], api_key="secret") as it:
        yield it


@pytest.fixture(scope="module")
def client(served):
    return served.client(timeout=60)


class Held:
    """The model computes nothing before it is told."""

    def __init__(self, monkeypatch):
        self.reading, self.go_on, self.error = threading.Event(), threading.Event(), None
        real = ServedLlama.eval

        def eval_when_told(llm, tokens):
            self.reading.set()
            assert self.go_on.wait(20)
            if self.error:
                raise self.error
            real(llm, tokens)

        monkeypatch.setattr(ServedLlama, "eval", eval_when_told)


@pytest.fixture
def held(monkeypatch, client):
    ask(client)  # the model is loaded
    return Held(monkeypatch)


def open_stream(served, body=None, path="/v1/chat/completions"):
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    body = body or {"messages": SHORT, "max_tokens": 3, "stream": True, "temperature": 0}
    connection.request("POST", path, json.dumps(body), {"Authorization": "Bearer secret", "Content-Type": "application/json"})
    return connection.getresponse()


def events(response):
    lines = [line.removeprefix("data: ") for line in response.read().decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_stream_begins_before_its_first_token(served, held):
    response = open_stream(served)
    assert response.status == 200 and response.getheader("Content-Type").startswith("text/event-stream")
    assert response.readline() == b": ping\n" and not held.go_on.is_set()
    waiting = open_stream(served)  # one that waits for its turn, too
    assert waiting.status == 200 and waiting.readline() == b": ping\n"
    held.go_on.set()
    assert all(events(stream)[-1]["choices"][0]["finish_reason"] == "length" for stream in (response, waiting))


def test_an_error_after_the_beginning_is_an_event(served, held):
    response = open_stream(served)
    assert response.readline() == b": ping\n"
    held.error = GenerationError("the device failed")
    held.go_on.set()
    assert events(response) == [{"error": {"message": "the device failed", "type": "server_error", "param": None, "code": None}}]


def test_pings_can_be_left_out(smollm2, monkeypatch):
    settings = ModelSettings(model=str(smollm2), n_ctx=256, n_threads=1, n_threads_batch=1)
    held = Held(monkeypatch)
    with serve([settings], disable_ping_events=True) as served:
        response = open_stream(served)
        held.go_on.set()
        assert response.status == 200 and b"ping" not in response.read()


def test_a_stream_that_is_stopped_says_so(served, client, monkeypatch):
    monkeypatch.setattr(served.desk, "_interrupt", True)
    endless = {"messages": SHORT, "max_tokens": 900, "stream": True, "logit_bias": NO_END}
    for path, body in (
        ("/v1/chat/completions", endless),
        ("/v1/completions", {"prompt": "1,", **{k: endless[k] for k in list(endless)[1:]}}),
    ):
        response = open_stream(served, {**body, "stream_options": {"include_usage": True}}, path)
        while not response.readline().startswith(b"data: "):
            pass
        ask(client)
        *_, last, usage = events(response)
        assert last["choices"][0]["finish_reason"] == "length" and usage["usage"]["completion_tokens"] < 900
    other = threading.Timer(0.5, lambda: ask(client))
    other.start()
    with pytest.raises(APIError, match="stopped, as another request came") as caught:  # in one piece
        ask(client, max_tokens=900, logit_bias=NO_END)
    other.join()
    assert caught.value.code == "stopped"


def test_a_stream_ends_when_the_server_does(smollm2):
    settings = ModelSettings(model=str(smollm2), n_ctx=1024, n_threads=1, n_threads_batch=1)
    with serve([settings]) as served:
        endless = {"messages": SHORT, "max_tokens": 900, "stream": True, "logit_bias": NO_END}
        running = open_stream(served, endless)
        while not running.readline().startswith(b"data: "):
            pass
        waiting = open_stream(served, endless)
        assert waiting.readline() == b": ping\n"
        served.desk.close()
        for response in (running, waiting):
            assert events(response)[-1]["error"]["code"] == "stopped"


def raw(served, data):
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(data)
        return connection.recv(1000)


def test_an_old_client_without_a_host(served):
    for request in (b"GET /v1/models HTTP/1.0\r\nAuthorization: Bearer secret\r\n\r\n", b"GET / HTTP/1.0\r\nHost: \r\n\r\n"):
        response = raw(served, request)
        assert response.startswith(b"HTTP/1.1 200")
    assert raw(served, b"GET / HTTP/1.0\r\nHost: evil.example\r\n\r\n").startswith(b"HTTP/1.1 403")
    assert raw(served, b"GET / HTTP/1.0\r\nOrigin: https://evil.example\r\n\r\n").startswith(b"HTTP/1.1 403")


def test_a_key_of_any_characters(smollm2):
    settings = ModelSettings(model=str(smollm2), n_ctx=256, n_threads=1, n_threads_batch=1)
    key = "schlüssel mit leerzeichen"
    with serve([settings], api_key=key) as served:
        for given, status in (
            (key.encode(), 200), (key.encode("latin-1"), 200), (b"schl?ssel mit leerzeichen", 401), (b"", 401), (b"schl\xc3\xbcssel", 401)
        ):  # fmt: skip
            response = raw(served, b"GET /v1/models HTTP/1.0\r\nAuthorization: bearer " + given + b"\r\n\r\n")
            assert response.startswith(b"HTTP/1.1 %d" % status)
