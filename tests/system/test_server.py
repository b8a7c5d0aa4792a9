"""The server as clients see it: the official client, bad requests, clients that go away, the map, configuration, documents."""

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from openai import APIError, APITimeoutError, AuthenticationError, BadRequestError, NotFoundError

from commands import command, one_sentence
from kvcast import KvcastError, SparseConfig
from kvcast.chat.documents import DocumentCache
from kvcast.server.settings import ConfigFile, ModelSettings, ServerSettings, checked, short_name
from served import get, serve

SHORT = [{"role": "user", "content": "Name one animal."}]


def about(document, question):
    return [{"role": "system", "content": f"Answer from this document.\n\n{document}"}, {"role": "user", "content": question}]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return DocumentCache(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def served(smollm2, documents):
    shared = dict(model=str(smollm2), n_ctx=2048, n_threads=2, n_threads_batch=2)
    models = [
        ModelSettings(**shared, model_alias="sparse", sparse=SparseConfig(budget=256), n_batch=2048),  # a prompt is one batch
        ModelSettings(**shared, model_alias="dense", sparse=None, n_batch=128),
        ModelSettings(**shared, model_alias="device", sparse=SparseConfig(budget=256, path="device")),
    ]
    with serve(models, documents, api_key="secret") as it:
        yield it


@pytest.fixture(scope="module")
def client(served):
    return served.client()


def ask(client, messages, *, model="sparse", max_tokens=8, **options):
    done = client.chat.completions.create(model=model, messages=messages, max_tokens=max_tokens, temperature=0, **options)
    return done.choices[0].message.content


def stream(client, messages, *, max_tokens=8, **options):
    return client.chat.completions.create(model="sparse", messages=messages, max_tokens=max_tokens, temperature=0, stream=True, **options)


def idle(served, seconds=2.0):
    """The session when nothing runs any more, which must be soon."""
    end = time.monotonic() + seconds
    request = urllib.request.Request(f"{served.url}/v1/kv/stream", headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request, timeout=10) as events:
        while (kv := json.loads(events.readline()[6:]))["state"] != "idle":
            assert time.monotonic() < end, kv["state"]
            events.readline()
    return kv


def test_conversations_one_after_the_other(served, client, code):
    assert [m.id for m in client.models.list()] == ["sparse", "dense", "device"]
    whole = ask(client, SHORT)
    assert whole
    assert client.chat.completions.create(model="gpt-x", messages=SHORT, max_tokens=1).model == "sparse"
    pieces = [chunk.choices[0] for chunk in stream(client, SHORT)]
    assert "".join(c.delta.content or "" for c in pieces) == whole
    assert pieces[-1].finish_reason in ("length", "stop")
    other = ask(client, [{"role": "user", "content": f"{code[:1500]}\n\nWhat is this?"}])
    assert other and other != whole
    assert client.completions.create(model="sparse", prompt="1, 2, 3,", max_tokens=4, temperature=0).choices[0].text
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(ask(client, SHORT))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 3 and all(answers)


def test_wrong_key(served):
    client = served.client(api_key="wrong")
    for call in (client.models.list, lambda: ask(client, SHORT), lambda: stream(client, SHORT)):
        with pytest.raises(AuthenticationError, match="the API key is wrong") as caught:
            call()
        assert caught.value.code == "invalid_api_key"
    for path in ("/v1/kv", "/v1/kv/stream", "/v1/kv/text?block=0"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(served, path, Authorization="")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get_page(served, "/openapi.json")
    assert get_page(served, "/").status == 200  # the page itself asks for the key


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("wrong", "word"),
    [({"messages": []}, "empty"), ({"messages": "hello"}, "messages"), ({"messages": [{"role": "user"}]}, "content"),
     ({"messages": [{"role": "wizard", "content": "x"}]}, "role: it must be"),
         ({"temperature": "hot"}, "temperature"), ({"top_p": 7}, "top_p"),
     ({"response_format": {"type": "xml"}}, "response_format"), ({"grammar": "root ::= ("}, "grammar"),
     ({"tool_choice": {"type": "function", "function": {"name": "f"}}, "tools": []}, "f"),
     ({"logprobs": True, "top_logprobs": 3}, "logprobs")],
    ids=str,
)  # fmt: skip
def test_malformed_requests(client, capfd, wrong, word, streamed):
    arguments = {"messages": SHORT, "max_tokens": 4, **wrong, "stream": streamed}
    with pytest.raises(BadRequestError, match=word) as caught:
        client.chat.completions.create(model="sparse", messages=SHORT, extra_body=arguments)
    assert caught.value.body["type"] == "invalid_request_error"
    assert "Traceback" not in capfd.readouterr().err


def test_odd_requests_do_no_harm(served, client, capfd):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Name one animal."}]}]
    assert ask(client, parts) == ask(client, SHORT)
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    for call, word in (
        (lambda: ask(client, picture), "text models only"),
        (lambda: ask(client, SHORT, n=3), "n is 3"),
        (lambda: ask(client, SHORT, logit_bias={"99999999": 1}), "99999999"),
        (lambda: ask(client, SHORT, logit_bias={"x": 1}), "'x'"),
        (lambda: ask(client, SHORT, logit_bias={"5": -1e39}), "between -100 and 100"),
        (lambda: ask(client, SHORT, extra_body={"grammar": 'root ::= "a"', "min_tokens": 2}), "min_tokens does not go with"),
        (lambda: ask(client, SHORT, extra_body={"repeat_penalty": 0}), "repeat_penalty is 0"),
        (lambda: client.embeddings.create(model="sparse", input="x"), "no embeddings"),
        (lambda: client.completions.create(model="sparse", prompt=["a", "b"]), "one prompt"),
        (lambda: client.completions.create(model="sparse", prompt=""), "prompt is empty"),
        (
            lambda: client.with_options(base_url=served.url).post("/extras/detokenize", body={"tokens": [99999999]}, cast_to=object),
            "no token",
        ),
    ):
        with pytest.raises(BadRequestError, match=word):
            call()
    assert client.completions.create(model="sparse", prompt="1, 2,", max_tokens=2, presence_penalty=None).choices
    assert ask(client, SHORT) and capfd.readouterr().err == ""


def test_a_new_request_may_stop_the_old(served, client, monkeypatch):
    monkeypatch.setattr(served.desk, "_interrupt", True)
    with stream(client, SHORT, max_tokens=1900, extra_body={"logit_bias": {"2": -100, "0": -100}}) as chunks:
        next(iter(chunks))
        assert ask(client, SHORT)
        assert len(list(chunks)) < 500


@pytest.mark.parametrize("streamed", [False, True])
def test_too_long(client, code, streamed):
    with pytest.raises(BadRequestError, match="the context holds 2,048") as caught:
        client.chat.completions.create(model="sparse", messages=about(code, "What?"), stream=streamed)
    assert caught.value.code == "context_length_exceeded"


def test_unknown_routes_and_bodies(served, client, capfd):
    with pytest.raises(NotFoundError, match="there is no POST /v1/nothing"):
        client.post("/nothing", cast_to=object)
    for body in (b"{", b"[1]", b"\xff\xfe"):
        status, answer = post(served, body)
        assert status == 400 and answer["error"]["type"] == "invalid_request_error"
    status, answer = post(served, json.dumps({"messages": SHORT}).encode(), Host="evil.example")
    assert status == 403 and "--allow-host" in answer["error"]["message"]
    for origin in ("https://evil.example", "http://["):
        status, answer = post(served, json.dumps({"messages": SHORT}).encode(), Origin=origin)
        assert status == 403 and "--allow-origin" in answer["error"]["message"]
    status, answer = post(served, b'{"input": "\\ud800"}', path="/extras/tokenize")
    assert status == 400 and "surrogate" in answer["error"]["message"]
    assert "Traceback" not in capfd.readouterr().err


def post(served, body, path="/v1/chat/completions", **headers):
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=20)
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json", **headers}
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    return response.status, json.load(response)


def get_page(served, path):
    return urllib.request.urlopen(f"{served.url}{path}", timeout=10)


def test_the_page_is_served_strictly(served):
    for path in ("/", "/app.js", "/style.css"):
        page = get_page(served, path)
        assert "default-src 'none'" in page.headers["Content-Security-Policy"] and "http" not in page.headers["Content-Security-Policy"]


def test_a_client_that_goes_away_stops_its_answer(served, client):
    with stream(client, SHORT, max_tokens=1900, extra_body={"logit_bias": {"2": -100, "0": -100}}) as chunks:
        for _, _ in zip(range(5), chunks):
            pass
    kv = idle(served)
    assert kv["n_tokens"] < 500
    assert ask(client, SHORT)


@pytest.mark.parametrize("model", ["sparse", "dense"])
def test_a_client_that_goes_away_stops_the_reading(served, client, code, capfd, model):
    ask(client, SHORT, model=model)
    messages = [{"role": "user", "content": code[200:6200] + model}]
    with pytest.raises(APITimeoutError):
        ask(served.client(timeout=0.8), messages, model=model)
    assert idle(served, 1.0)["n_tokens"] < 1000
    assert ask(client, SHORT, model=model)
    assert "Traceback" not in capfd.readouterr().err


def test_stopping_one_leaves_the_next_alone(served, client):
    expected = ask(client, SHORT, max_tokens=24)
    answers = []
    first = stream(client, SHORT, max_tokens=1500, extra_body={"logit_bias": {"2": -100, "0": -100}})
    next(first)
    waiting = threading.Thread(target=lambda: answers.append(ask(client, SHORT, max_tokens=24)))
    waiting.start()
    with pytest.raises(APITimeoutError):  # it goes away while it waits
        ask(served.client(timeout=0.3), SHORT)
    assert all(next(first).choices for _ in range(120))  # more than had come before
    first.close()
    waiting.join(20)
    assert answers == [expected]


def test_a_failure_of_the_model_is_an_error_of_the_server(served, client, monkeypatch):
    from kvcast import GenerationError
    from kvcast.server.served import ServedLlama

    def fail(self, tokens):
        raise GenerationError("the device failed")

    monkeypatch.setattr(ServedLlama, "eval", fail)
    for call in (lambda: ask(client, SHORT), lambda: list(stream(client, SHORT))):
        with pytest.raises(APIError, match="the device failed") as caught:
            call()
        assert caught.value.status_code == 500 and caught.value.body["type"] == "server_error"


def test_the_map(served, client, code):
    ask(client, about(code[:3000], "What is this?"), max_tokens=40)
    kv = idle(served)
    assert kv["path"] == "host" and kv["budget"] == 256 and kv["n_ctx"] == 2048 and kv["block_tokens"] == 16
    assert kv["n_tokens"] > 600 and kv["n_blocks"] == -(-kv["n_tokens"] // 16)
    assert kv["compression"] > 1.5 and 0.3 < kv["recovery"] <= 1 and kv["tok_s"] > 1 and kv["step_ms"]["total"] > 0
    maps = {name: base64.b64decode(data) for name, data in kv["maps"].items()}
    assert {len(data) for data in maps.values()} == {30 * kv["n_blocks"]}
    rows = [maps["resident"][i * kv["n_blocks"] : (i + 1) * kv["n_blocks"]] for i in range(30)]
    assert all(row[0] == 255 and row[-1] == 255 for row in rows)  # sink and window
    shares = sum(maps["resident"]) / 255 / 30
    assert 0.8 * 256 / 16 < shares < 0.95 * kv["n_blocks"]  # blocks of a layer, in the mean, of which it attended to some tokens or all
    assert any(maps["fetched"]) and all(f <= r for f, r in zip(maps["fetched"], maps["resident"]))
    assert max(maps["attention"]) > 200
    blocks = "".join(get(served, f"/v1/kv/text?block={i}")["text"] for i in range(6))
    assert code[:100] in blocks
    for block in (-1, 10_000):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(served, f"/v1/kv/text?block={block}")


def test_the_map_streams(served, client):
    request = urllib.request.Request(f"{served.url}/v1/kv/stream", headers={"Authorization": "Bearer secret"})
    with urllib.request.urlopen(request, timeout=10) as events:
        states = [json.loads(events.readline()[6:])["state"]]
        events.readline()
        asking = threading.Thread(target=lambda: ask(client, SHORT, max_tokens=100, extra_body={"logit_bias": {"2": -100}}))
        asking.start()
        while states[-1] != "idle" or len(states) < 3:
            states.append(json.loads(events.readline()[6:])["state"])
            events.readline()
        asking.join()
    assert states[0] == "idle" and "answering" in states


def test_dense_has_figures_and_no_maps(served, client):
    assert ask(client, SHORT, model="dense")
    kv = idle(served)
    assert kv["model"] == "dense" and kv["path"] == "dense" and kv["maps"] is None and kv["budget"] is None and kv["tok_s"] > 1


def test_the_pool_of_the_device_path(served, client, code):
    ask(client, about(code[:3000], "What is this?"), model="device", max_tokens=24)
    kv = idle(served)
    assert kv["path"] == "device" and kv["pool_bytes"] > 0 and kv["compression"] > 1.5 and kv["recovery"] > 0.3
    resident, fetched = (base64.b64decode(kv["maps"][name]) for name in ("resident", "fetched"))
    assert 0 < sum(resident) / 255 / 30 <= 1.1 * 256 / 16 + 1 and any(fetched)


def test_documents_are_kept(served, client, documents, code):
    documents.clear()
    first = ask(client, about(code[500:4500], "What is this?"))
    n_read = idle(served)["progress"]["n_tokens"]
    (entry,) = documents.entries()
    assert entry.n_tokens >= 512 and entry.title and n_read < 64  # the question; the document was read before it
    ask(client, SHORT, model="dense")
    assert ask(client, about(code[500:4500], "What is this?")) == first
    assert documents.entries()[0].opened > entry.opened and documents.entries()[0].key == entry.key
    ask(client, [{"role": "user", "content": code[5000:8000]}])  # without a second message
    assert len(documents.entries()) == 2


def test_defaults_are_accepted():
    assert ModelSettings(model="small.gguf").sparse == SparseConfig()


def test_configuration(tmp_path, smollm2):
    content = "api_key: secret\nmodels:\n- {model: smollm2, sparse: {budget: 80}}\n"
    for name, text, words in (
        ("a.yaml", content, ["models.0.sparse", "at least 96"]),
        ("b.json", '{"models": [{"model": "smollm2", "n_ctxx": 5}]}', ["n_ctxx", "did you mean 'n_ctx'"]),
        ("c.json", '{"models": [{"model": "smollm2", "clip_model_path": "x"}]}', ["clip_model_path", "text models only"]),
        ("e.json", '{"models": [{"model": "smollm2"}, {"model": "smollm2"}]}', ["smollm2", "model_alias"]),
        ("d.json", "{", ["neither JSON nor YAML"]),
        ("f.yaml", "api_key:\nmodels: [{model: smollm2}]", ["api_key is empty"]),
        ("g.yaml", "models: [{model: smollm2, cache_type: disk}]", ["cache_type", "use ram"]),
        ("h.yaml", "bounds: {body_byte: 5}\nmodels: [{model: smollm2}]", ["bounds.body_byte", "did you mean 'body_bytes'"]),
        ("j.yaml", "models: [{model: smollm2, limits: {grammar_byte: 5}}]", ["limits", "did you mean 'grammar_bytes'"]),
        ("k.yaml", "models: [{model: smollm2, limits: {grammar_bytes: 0}}]", ["limits", "grammar_bytes is 0"]),
        ("i.yaml", "bounds: {queue: -1}\nmodels: [{model: smollm2}]", ["bounds.queue is -1"]),
    ):
        (tmp_path / name).write_text(text)
        one_sentence(command("serve", "--config", tmp_path / name), *words)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        one_sentence(command("serve", smollm2, "--port", taken.getsockname()[1]), "--port", "in use")
    one_sentence(command("serve", "nowhere.gguf"), "nowhere.gguf")
    one_sentence(command("serve", smollm2, "--kv-type", "f8"), "f8", "q8_0")
    one_sentence(command("serve", "--config", tmp_path / "b.json", "--budget", "512"), "--config", "budget")


@pytest.mark.parametrize("key", ["", " ", "\t", "a\nb", " a", "a ", "a\x00"])
def test_a_key_that_is_none_is_refused(key, tmp_path):
    for settings in ({"api_key": key}, {"api_key": key, "models": [{"model": "smollm2"}]}):
        with pytest.raises(KvcastError, match=r"api_key (is empty|has white space)") as caught:
            checked(ConfigFile if "models" in settings else ServerSettings, settings, "here")
        assert key.strip() == "" or repr(key) not in str(caught.value)  # it may be right but for a slip


def test_an_empty_key_on_the_command_line():
    one_sentence(command("serve", "--api-key", ""), "api_key is empty")
    one_sentence(command("serve", KVCAST_API_KEY=""), "api_key is empty")
    one_sentence(command("serve", "--api-key", "", KVCAST_API_KEY="right"), "api_key is empty")


def test_names_of_models():
    assert [short_name(name) for name in ("smollm2", "/models/my.gguf", "my.q4.gguf")] == ["smollm2", "my", "my.q4"]
    with pytest.raises(KvcastError, match="two models are called 'my'"):
        checked(ConfigFile, {"models": [{"model": "/a/my.gguf"}, {"model": "/b/my.gguf"}]}, "here")


def test_without_the_packages_of_the_server():
    script = "import sys; sys.modules['fastapi'] = None; sys.argv = ['kvcast', 'serve']; from kvcast.cli import main; main()"
    one_sentence(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True), "fastapi", "pip install")


def test_ctrl_c_ends_it_in_the_middle_of_an_answer(smollm2):
    process = subprocess.Popen(
        [sys.executable, "-m", "kvcast.cli", "serve", str(smollm2), "--port", "0", "--context", "1024", "--threads", "2", "--no-cache"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    try:
        line = process.stderr.readline()
        url = next(word for word in line.split() if word.startswith("http")).rstrip("/")
        body = json.dumps({"messages": SHORT, "max_tokens": 900, "stream": True, "logit_bias": {"2": -100, "0": -100}}).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        watching = urllib.request.urlopen(f"{url}/v1/kv/stream", timeout=10)
        with urllib.request.urlopen(request, timeout=20) as answer:
            answer.readline()
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(http.client.HTTPException):
                answer.read()
        watching.close()
        assert process.wait(10) == 0
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.stderr.close()
