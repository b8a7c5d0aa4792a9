"""What a server does for clients that send too much, too slowly or too often: others get their answers, and nothing grows."""

import contextlib
import http.client
import json
import select
import socket
import threading
import time
from urllib.parse import urlsplit

import psutil
import pytest

from kvcast import SparseConfig
from kvcast.server.bounds import Bounds
from kvcast.server.served import ServedLlama
from kvcast.server.settings import ModelSettings
from served import serve
from shapes import write_shape

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
SMALL = dict(body_bytes=200_000, connections=8, queue=2, streams=2, header_seconds=0.5, body_seconds=0.5, messages=50)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_shape(tmp_path_factory.mktemp("tiny") / "tiny.gguf", vocabulary="llama")
    return ModelSettings(model=str(path), sparse=SparseConfig(budget=96, predictor="ema"), n_ctx=256, n_threads=1, n_threads_batch=1)


@pytest.fixture(scope="module")
def served(model):
    with serve([model], api_key="secret", bounds=Bounds(**SMALL)) as it:
        yield it


def connect(served):
    address = urlsplit(served.url)
    return socket.create_connection((address.hostname, address.port), timeout=10)


def head(path="/v1/chat/completions", method="POST", key="secret", **headers):
    given = {"Host": "localhost", "Authorization": f"Bearer {key}", "Content_Type": "application/json", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name.replace('_', '-')}: {value}" for name, value in given.items() if value is not None)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8")


def answer(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    body = response.read()
    return response.status, json.loads(body)["error"]["message"] if response.status >= 400 else body


def post(served, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with connect(served) as connection:
        connection.sendall(head(**{"Content_Length": len(data), **headers}) + data)
        return answer(connection)


def still_answers(served):
    assert post(served, CHAT)[0] == 200


def test_a_body_is_refused_before_it_comes(served):
    for headers, status, words in (
        ({"Content_Length": 1 << 30}, 413, "larger than 200,000 bytes"),
        ({"Content_Length": "9" * 20}, 413, "larger than"),
        ({"Content_Length": 1 << 30, "key": "wrong"}, 401, "key is wrong"),
        ({"Content_Length": 50, "key": "wrong"}, 401, "key is wrong"),
        ({"Transfer_Encoding": "chunked", "Authorization": None}, 401, "wants an API key"),
        ({"Content_Length": 1 << 30, "path": "/v1/nothing"}, 404, "there is no"),
        ({"Content_Length": 50, "Content_Encoding": "gzip"}, 415, "compressed"),
        ({"Content_Length": 50, "Content_Type": "text/plain"}, 415, "application/json"),
        ({"Content_Length": 50, "Content_Type": None}, 415, "missing"),
        ({"Content_Length": 50, "Expect": "100-continue", "key": "wrong"}, 401, "key is wrong"),
    ):
        with connect(served) as connection:
            connection.sendall(head(**headers))
            found, message = answer(connection)
            assert found == status and words in message
    with connect(served) as connection:  # it is not read for long either
        connection.sendall(head(Content_Length=1 << 40))
        assert answer(connection)[0] == 413
        with pytest.raises(OSError):
            while True:
                connection.sendall(b"x" * 65536)
    still_answers(served)


def test_a_body_in_chunks_is_refused_where_it_is_too_large(served):
    before = psutil.Process().memory_info().rss
    with connect(served) as connection:
        connection.sendall(head(Transfer_Encoding="chunked"))
        with contextlib.suppress(OSError):
            for _ in range(2000):
                connection.sendall(b"8000\r\n" + b"[" * 0x8000 + b"\r\n")
        assert answer(connection) == (413, "the body is larger than 200,000 bytes; send a smaller one")
    assert psutil.Process().memory_info().rss - before < 30e6
    still_answers(served)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "nested more than 100 deep"),
        (b"[" * 90_000, "nested more than 100 deep"),
        (b'{"a":' * 15_000, "nested more than 100 deep"),
        (b'"' + b"[" * 90_000 + b'\\"', "no JSON"),  # in a text they are characters
        ({"messages": CHAT["messages"] * 51}, "51 messages; at most 50"),
        ({**CHAT, "stop": ["x"] * 1000}, "at most 64"),
        ({**CHAT, "stop": [5] * 30_000}, "stop"),
        ({**CHAT, "logit_bias": {str(i): 1 for i in range(10_001)}}, "at most 10,000"),
        ({**CHAT, "logprobs": True, "top_logprobs": 10**9}, "top_logprobs"),
        (b"", "empty"),
        (b"\xff", "UTF-8"),
        ("{}".encode("utf-16"), "UTF-8"),
        (b"5", "the body"),
        (b"{}", "messages is missing"),
        (b"9" * 5000, "no JSON"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_body_is_refused_in_a_sentence(served, capfd, body, words):
    status, message = post(served, body)
    assert status == 400 and words in message and len(message) < 300
    assert capfd.readouterr().err == ""


def test_a_body_may_have_a_mark_and_many_values(served):
    assert post(served, b"\xef\xbb\xbf" + json.dumps(CHAT).encode())[0] == 200
    status, message = post(served, {"prompt": [5] * 20_000}, path="/v1/completions")
    assert status == 400 and "20,000 tokens" in message and "the context holds 256" in message
    for body in ({"prompt": "word " * 19_000}, {"messages": [{"role": "user", "content": "word " * 19_000}]}):
        status, message = post(served, body, path="/v1/chat/completions" if "messages" in body else "/v1/completions")
        assert status == 400 and "tokens or more" in message


def test_values_are_counted(model):
    with serve([model], bounds=Bounds(json_values=1000)) as served:
        assert "more than 1,000 values" in post(served, {"prompt": [5] * 1001}, path="/v1/completions")[1]
        assert "more than 1,000 values" in post(served, {"logit_bias": {str(i): 1 for i in range(501)}}, path="/v1/completions")[1]
        assert post(served, {"prompt": "," * 200}, path="/v1/completions")[0] == 200


def test_headers_have_bounds(served):
    many = {f"X-{i}": "y" for i in range(120)}
    for headers in (many, {"X": "y" * 40_000}):
        with connect(served) as connection:
            connection.sendall(head("/v1/models", "GET", **headers))
            assert answer(connection)[0] in (400, 431)
    with connect(served) as connection:  # in parts
        with contextlib.suppress(OSError):
            for _ in range(1000):
                connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10)
        connection.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100).startswith(b"HTTP/1.1 4")
    still_answers(served)


def test_what_is_no_http_is_refused(served, capfd):
    body = json.dumps(CHAT).encode()
    for raw in (
        b"\x16\x03\x01" + b"x" * 50 + b"\r\n\r\n",
        head(Content_Length="5\r\nContent-Length: 6"),
        head(Content_Length="-1"),
        head(Content_Length="1_0"),
        head(Transfer_Encoding="chunked, chunked"),
        head(Transfer_Encoding="gzip"),
        head(Transfer_Encoding="chunked") + b"fffffffffffffffffffff\r\n",
    ):
        with connect(served) as connection:
            connection.sendall(raw)
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
    with connect(served) as connection:  # no second way into the server
        connection.sendall(head("/v1/models", "GET", Upgrade="websocket", Connection="Upgrade"))
        assert answer(connection)[0] == 200
    with connect(served) as connection:  # one after the other
        connection.sendall((head(Content_Length=len(body)) + body) * 3)
        for _ in range(3):
            assert answer(connection)[0] == 200
    assert capfd.readouterr().err == ""


def test_slow_clients_are_let_go(served):
    slow = [connect(served) for _ in range(3)]
    slow[1].sendall(b"POST / HTTP/1.1\r\n")
    slow[2].sendall(head(Content_Length=50) + b"{")
    assert answer(slow[2]) == (408, "the body did not come within 0.5 s; send it at once")
    for connection in slow:
        connection.settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        connection.close()


def test_trickling_does_not_help(served):
    for first in (b"GET / HTTP/1.1\r\nX: ", head(Content_Length=90_000)):
        begun = time.monotonic()
        with connect(served) as connection, contextlib.suppress(OSError):
            connection.sendall(first)
            connection.settimeout(0.02)
            while time.monotonic() < begun + 10:
                connection.sendall(b"y")
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1000):
                        break
        assert time.monotonic() < begun + 9


def test_idle_connections_shut_nobody_out(model):
    with serve([model], bounds=Bounds(connections=20)) as served, contextlib.ExitStack() as stack:
        for sent in (b"", b"GET / HTTP/1.1\r\n", head(Content_Length=50, key="x") + b"{"):
            for _ in range(100):
                connection = stack.enter_context(connect(served))
                with contextlib.suppress(OSError):
                    connection.sendall(sent)
            still_answers(served)
        assert len(established(served)) <= 21


@pytest.fixture
def slow(monkeypatch):
    """An evaluation that begins, and goes on when it is told to: the two events."""
    reading, go_on = threading.Event(), threading.Event()
    real = ServedLlama.eval

    def eval_when_told(self, tokens):
        reading.set()
        assert go_on.wait(20)
        real(self, tokens)

    monkeypatch.setattr(ServedLlama, "eval", eval_when_told)
    return reading, go_on


def test_an_answer_is_not_given_up_for_idle_connections(model, slow):
    reading, go_on = slow
    with serve([model], bounds=Bounds(connections=4)) as served, contextlib.ExitStack() as stack:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(post(served, CHAT)[0]))
        asking.start()
        assert reading.wait(10)
        for _ in range(20):
            stack.enter_context(connect(served))
        go_on.set()
        asking.join(20)
        assert answers == [200]


def test_the_queue_has_an_end(model, slow):
    reading, go_on = slow
    with serve([model], bounds=Bounds(queue=2)) as served:
        answers = []
        asking = [threading.Thread(target=lambda: answers.append(post(served, CHAT)[0])) for _ in range(3)]
        asking[0].start()
        assert reading.wait(10)
        gone = connect(served)  # it goes away while it waits, and leaves its place
        body = json.dumps(CHAT).encode()
        gone.sendall(head(Content_Length=len(body)) + body)
        wait_for(lambda: len(served.desk._waiting) == 1)
        gone.close()
        wait_for(lambda: not served.desk._waiting)
        for thread in asking[1:]:
            thread.start()
        wait_for(lambda: len(served.desk._waiting) == 2)
        with connect(served) as connection:
            connection.sendall(head(Content_Length=len(body)) + body)
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == 503 and response.getheader("Retry-After")
            assert json.load(response)["error"]["code"] == "server_busy"
        go_on.set()
        for thread in asking:
            thread.join(20)
        assert answers == [200] * 3


def wait_for(what):
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_streams_of_the_map_have_an_end(served):
    with contextlib.ExitStack() as stack:
        for i in range(3):
            connection = stack.enter_context(connect(served))
            connection.sendall(head("/v1/kv/stream", "GET"))
            response = http.client.HTTPResponse(connection)
            response.begin()
            assert response.status == (200 if i < 2 else 503)
            if i < 2:
                assert response.readline().startswith(b"data: ")


def test_bodies_together_have_an_end(model):
    with serve([model], bounds=Bounds(bodies_bytes=500_000)) as served:
        with contextlib.ExitStack() as stack:
            unfinished = [stack.enter_context(connect(served)) for _ in range(5)]
            for connection in unfinished:
                connection.sendall(head(Content_Length=151_000) + b" " * 150_000)
            turned_away, _, _ = select.select(unfinished, [], [], 10)
            assert answer(turned_away[0]) == (503, "the server holds as many requests as it may; ask again later")
        wait_for(lambda: post(served, b" " * 450_000)[0] == 400)
        still_answers(served)


def test_a_client_that_does_not_read_is_let_go(model):
    with serve([model], bounds=Bounds(send_seconds=0.3)) as served, connect(served) as connection:
        wait_for(lambda: established(served))
        with contextlib.suppress(OSError):
            connection.settimeout(1)
            connection.sendall(head("/style.css", "GET") * 20_000)  # answers of 160 MB
        wait_for(lambda: not established(served))


def established(served):
    port = urlsplit(served.url).port
    return [c for c in psutil.Process().net_connections("tcp") if c.status == "ESTABLISHED" and c.laddr.port == port]
