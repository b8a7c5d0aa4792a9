"""A server under attack, while one client wants answers. `make attack`; the exit code says whether something went wrong.

Prints, for each attack, how long the client's answers took against the quiet time, and what the server's memory did.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import psutil

ASK = {"messages": [{"role": "user", "content": "Name one animal."}], "max_tokens": 8, "temperature": 0}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
N_ANSWERS = 8
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 20000}}, "required": ["a"]}
GRAMMARS = (
    "root ::= (", "root ::= ", 'root ::= "a', "x ::= root", 'root ::= "a"{5,2}', "root ::= [z-a]", "root ::= root", "root ::= root | root",
    'root ::= "a"{99999999}', "root ::= " + "(" * 20000 + '"a"' + ")" * 20000,
)  # fmt: skip


class Server:
    """`kvcast serve` on a free port, with one thread, so that the attacker has a core of its own."""

    def __init__(self) -> None:
        command = [
            sys.executable,
            "-m",
            "kvcast.cli",
            "serve",
            "smollm2",
            "--context",
            "2048",
            "--threads",
            "1",
            "--no-cache",
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        self.port = int(next(word for word in line.split() if word.startswith("http")).rstrip("/").rsplit(":", 1)[1])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def post(self, body: bytes) -> int:
        with self.connect() as connection:
            with contextlib.suppress(OSError):
                connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            return status(connection)

    def rss(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)


def status(connection: socket.socket) -> int:
    response = http.client.HTTPResponse(connection)
    response.begin()
    response.read()
    return response.status


# ---- attacks: each does its worst once, and says how it was answered


def gibibyte(server: Server, chunked: bool) -> str:
    block = b"[" * (1 << 20)
    with server.connect() as connection:
        connection.sendall(HEAD + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Content-Length: 1073741824\r\n\r\n"))
        with contextlib.suppress(OSError):
            for _ in range(1024):
                connection.sendall(b"%x\r\n%s\r\n" % (len(block), block) if chunked else block)
        return str(status(connection))


def deep(server: Server) -> str:
    return str(server.post(b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"))


def many_messages(server: Server) -> str:
    return str(server.post(json.dumps({"messages": ASK["messages"] * 100_000}).encode()))  # type: ignore[operator]


def idle(server: Server) -> str:
    with contextlib.ExitStack() as stack:
        for i in range(1100):
            connection = stack.enter_context(server.connect())
            with contextlib.suppress(OSError):
                connection.sendall((b"", b"POST / HT", HEAD + b"Content-Length: 9\r\n\r\n{")[i % 3])
        time.sleep(2)
    return "1,100 open"


def grammars(server: Server) -> str:
    bodies = [{**ASK, "grammar": grammar} for grammar in GRAMMARS]
    bodies.append({**ASK, "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}})
    return ", ".join(str(server.post(json.dumps(body).encode())) for body in bodies)


ATTACKS: dict[str, Callable[[Server], str]] = {
    "1 GiB": lambda server: gibibyte(server, False),
    "1 GiB in chunks": lambda server: gibibyte(server, True),
    "50,000 deep": deep,
    "100,000 messages": many_messages,
    "1,100 idle connections": idle,
    "grammars": grammars,
}


def answers(server: Server) -> Iterator[float]:
    """Seconds of each answer that the client gets."""
    body = json.dumps(ASK).encode()
    for _ in range(N_ANSWERS):
        begin = time.monotonic()
        assert server.post(body) == 200
        yield time.monotonic() - begin


def main() -> int:
    wanted = sys.argv[1:] or list(ATTACKS)
    server = Server()
    try:
        list(answers(server))  # the first ones compile
        quiet = statistics.median(answers(server))
        print(f"{'quiet':24}{quiet:8.2f} s")
        for name in wanted:
            before, over, said = server.rss(), threading.Event(), []

            def go_on(name: str = name, over: threading.Event = over, said: list[str] = said) -> None:
                while not over.is_set():
                    said.append(ATTACKS[name](server))

            attacker = threading.Thread(target=go_on)
            attacker.start()
            under = statistics.median(answers(server))
            over.set()
            attacker.join()
            grown = (server.rss() - before) / 1e6
            print(f"{name:24}{under:8.2f} s  {under / quiet:5.2f} times  memory {grown:+6.0f} MB  {len(said)} x {said[-1]}", flush=True)
            if grown > 200 or server.process.poll() is not None:
                return 1
        return 0
    finally:
        server.process.terminate()
        server.process.wait(20)


if __name__ == "__main__":
    sys.exit(main())
