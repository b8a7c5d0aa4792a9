"""A server in a thread, for the tests."""

import contextlib
import json
import threading
import urllib.request
from dataclasses import dataclass

from openai import OpenAI

from kvcast.chat.documents import DocumentCache
from kvcast.server.model_manager import ModelManager
from kvcast.server.request_queue import RequestQueue
from kvcast.server.run import listen, make_server
from kvcast.server.settings import ModelSettings, ServerSettings


@dataclass
class Served:
    url: str
    desk: RequestQueue
    key: str | None

    def client(self, **options):
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": self.key or "none", "max_retries": 0, **options})


@contextlib.contextmanager
def serve(models: list[ModelSettings], documents: DocumentCache | None = None, **options):
    settings = ServerSettings(port=0, **options)
    with listen(settings) as listening:
        desk = RequestQueue(ModelManager(models, documents), bounds=settings.bounds)
        server = make_server(settings, desk)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listening.getsockname()[1]}", desk, settings.api_key)
        finally:
            server.handle_exit(2, None)
            thread.join(30)
            desk.proxy.free()
        assert not thread.is_alive()


def get(served, path, **headers):
    request = urllib.request.Request(f"{served.url}{path}", headers={"Authorization": "Bearer secret", **headers})
    return json.load(urllib.request.urlopen(request, timeout=10))


SHORT = [{"role": "user", "content": "Name one animal."}]
NO_END = {"2": -100, "0": -100}  # SmolLM2's tokens that end an answer


def ask(client, messages=SHORT, **options):
    return client.chat.completions.create(**{"model": "sparse", "messages": messages, "max_tokens": 8, "temperature": 0, **options})
