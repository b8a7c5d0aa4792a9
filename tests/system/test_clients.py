"""What programs written for OpenAI's API send, by its official client, and how answers end."""

import base64
import json
import struct
import subprocess
import sys
import types
import urllib.request

import pytest
from openai import BadRequestError, InternalServerError, NotFoundError
from pydantic import BaseModel

from kvcast import Llama, SparseConfig
from kvcast.llama.notes import notes_on
from kvcast.server.model_manager import ModelManager
from kvcast.server.served import ServedLlama
from kvcast.server.settings import ModelSettings
from served import NO_END, SHORT, ask, get, serve
from shapes import write_shape

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"]},
    },
}
HOUR = {"type": "function", "function": {**WEATHER["function"], "name": "get_hour", "description": "The time in a city"}}


@pytest.fixture(scope="module")
def served(smollm2, tmp_path_factory):
    shared = dict(model=str(smollm2), n_threads=2, n_threads_batch=2)
    models = [
        ModelSettings(**shared, n_ctx=1024, model_alias="sparse", sparse=SparseConfig(budget=256)),
        ModelSettings(**shared, n_ctx=128, model_alias="logits", sparse=None, logits_all=True),
        ModelSettings(**shared, n_ctx=128, n_batch=64, model_alias="vectors", sparse=None, embedding=True),
        ModelSettings(model=str(tmp_path_factory.mktemp("lost") / "lost.gguf")),
    ]
    with serve(models, api_key="secret") as it:
        yield it


@pytest.fixture(scope="module")
def client(served):
    return served.client(timeout=60)


def flat(value):
    """The numbers in lists of lists."""
    return [n for one in value for n in flat(one)] if isinstance(value, list | tuple) else [value] if isinstance(value, float) else []


# ---- tools


@pytest.mark.parametrize(
    "dump", [lambda m: m, lambda m: m.model_dump(), lambda m: m.model_dump(exclude_none=True)], ids=["object", "all", "set"]
)
def test_a_loop_with_tools(client, dump):
    messages = [{"role": "user", "content": "Weather in Oslo?"}]
    forced = {"type": "function", "function": {"name": "get_weather"}}
    first = ask(client, messages, tools=[WEATHER, HOUR], tool_choice=forced, max_tokens=60).choices[0]
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls" and first.message.content is None
    assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)
    messages += [dump(first.message), {"role": "tool", "tool_call_id": call.id, "content": "4 degrees"}]
    assert ask(client, messages, tools=[WEATHER]).choices[0].message.content
    for content in (None, [{"type": "text", "text": "4"}]):
        messages[-1]["content"] = content
        assert ask(client, messages).choices


def test_a_tool_must_be_called(client):
    for tools in ([WEATHER], [WEATHER, HOUR]):
        choice = ask(client, tools=tools, tool_choice="required", max_tokens=60).choices[0]
        assert choice.finish_reason == "tool_calls" and "city" in json.loads(choice.message.tool_calls[0].function.arguments)
        with client.chat.completions.stream(
            model="sparse", messages=SHORT, tools=tools, tool_choice="required", max_tokens=60, temperature=0
        ) as events:
            streamed = [event for event in events][-1] and events.get_final_completion().choices[0]
        assert streamed.finish_reason == "tool_calls"
        calls = [[(c.function.name, c.function.arguments) for c in found.message.tool_calls] for found in (choice, streamed)]
        assert calls[0] == calls[1]
    no_parameters = {"type": "function", "function": {"name": "now"}}
    assert ask(client, tools=[no_parameters], tool_choice="required").choices[0].message.tool_calls[0].function.name == "now"
    assert ask(client, tools=[WEATHER], tool_choice="none").choices[0].message.content
    for wrong, words in (({"tools": [], "tool_choice": "required"}, "the tools are none"), ({"tool_choice": "sometimes"}, "tool_choice")):
        with pytest.raises(BadRequestError, match=words):
            ask(client, extra_body=wrong)


def test_a_model_calls_in_its_own_way(qwen):
    with serve([ModelSettings(model=str(qwen), n_ctx=1024, n_threads=2, n_threads_batch=2, sparse=None)]) as served:
        client = served.client(timeout=60)
        messages = [{"role": "user", "content": "What is the weather in Paris? Use the function."}]
        given = dict(messages=messages, tools=[WEATHER], max_tokens=60)
        choice = ask(client, **given).choices[0]
        assert choice.finish_reason == "tool_calls" and not choice.message.content
        assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Paris"}
        chunks = [chunk.choices[0] for chunk in ask(client, **given, stream=True)]
        assert chunks[-1].finish_reason == "tool_calls" and not any(chunk.delta.content for chunk in chunks)
        (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
        assert call.function.arguments == choice.message.tool_calls[0].function.arguments
        messages += [choice.message, {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "It rains."}]
        assert "rain" in ask(client, **given).choices[0].message.content
        assert ask(client, [{"role": "user", "content": "Say hello."}], tools=[WEATHER]).choices[0].message.content


# ---- parameters


def test_parameters_of_newer_clients(client):
    answer = ask(client, max_tokens=50, max_completion_tokens=3, logit_bias=NO_END)
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"
    assert (
        client.chat.completions.create(model="sparse", messages=SHORT, max_completion_tokens=2, logit_bias=NO_END).usage.completion_tokens
        == 2
    )
    assert ask(client, [{"role": "developer", "content": "Be brief."}, *SHORT]).choices[0].message.content
    assert ask(client, max_tokens=2, store=False, metadata={"a": "b"}, user="me", service_tier="auto", reasoning_effort="low").choices
    nulls = ["temperature", "top_p", "stream", "stop", "n", "seed", "presence_penalty", "frequency_penalty", "tools", "tool_choice", "user",
             "response_format", "logit_bias", "logprobs", "top_logprobs", "max_completion_tokens", "stream_options", "functions", "top_k",
             "function_call", "parallel_tool_calls", "min_p", "grammar", "min_tokens"]  # fmt: skip
    assert ask(client, extra_body=dict.fromkeys(nulls)).choices[0].message.content
    text = client.completions.create(
        model="sparse", prompt="1, 2, 3,", extra_body=dict.fromkeys(["max_tokens", "temperature", "suffix", "echo"])
    )
    assert text.usage.completion_tokens <= 16
    for wrong, words in (
        ({"max_token": 5}, "no parameter 'max_token'; did you mean 'max_tokens'"),
        ({"quantum": 5}, "no parameter 'quantum'; leave it out"),
        ({"max_tokens": 0}, "at least 1 token"),
        ({"audio": {}}, "no parameter 'audio'"),
        ({"n": 2}, "n is 2"),
    ):
        with pytest.raises(BadRequestError, match=words):
            ask(client, extra_body=wrong)


def test_texts_that_stop(client):
    def stopped_by(stop):
        return ask(client, model="logits", max_tokens=12, stop=stop).choices[0]

    whole = stopped_by(None).message.content
    for nothing in ("", [""], [], ["", ""]):
        assert stopped_by(nothing).message.content == whole
    stopped = stopped_by(["", whole[4]])
    assert stopped.message.content == whole[: whole.index(whole[4])] and stopped.finish_reason == "stop"


def test_usage(client):
    answer = ask(client, model="logits")
    assert answer.usage.prompt_tokens > 20 and answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    again = ask(client, model="logits")
    assert again.usage.prompt_tokens_details.cached_tokens >= again.usage.prompt_tokens - 16
    assert all(chunk.usage is None for chunk in ask(client, model="logits", stream=True))
    chunks = list(ask(client, model="logits", stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1) and chunks[-2].choices[0].finish_reason
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage.completion_tokens == answer.usage.completion_tokens
    assert usage.prompt_tokens == answer.usage.prompt_tokens
    *_, last = client.completions.create(model="sparse", prompt="1,", max_tokens=3, stream=True, stream_options={"include_usage": True})
    assert last.usage.total_tokens > 3


def test_structured_answers(client):
    class Person(BaseModel):
        name: str
        age: int

    parsed = client.chat.completions.parse(
        model="sparse", messages=[{"role": "user", "content": "Bob is 5"}], response_format=Person, max_tokens=60, temperature=0
    )
    assert isinstance(parsed.choices[0].message.parsed, Person)
    for form in ({"type": "json_schema", "json_schema": {"name": "x"}}, {"type": "text"}):
        assert ask(client, response_format=form).choices
    with pytest.raises(BadRequestError, match="response_format"):
        ask(client, response_format={"type": "json_schema"})


def test_prompts_of_tokens(client):
    def complete(prompt, **options):
        return client.completions.create(**{"model": "sparse", "prompt": prompt, "max_tokens": 4, "temperature": 0, **options})

    text = "1, 2, 3, 4,"
    tokens = client.with_options(base_url=client.base_url.join("/")).post("/extras/tokenize", body={"input": text}, cast_to=object)[
        "tokens"
    ]
    expected = complete(text)
    for prompt in (tokens, [tokens], [text]):
        assert complete(prompt).choices[0].text == expected.choices[0].text and complete(prompt).usage.prompt_tokens == len(tokens)
    for prompt in (text, tokens):
        assert complete(prompt, echo=True).choices[0].text == text + expected.choices[0].text
        assert "".join(c.choices[0].text for c in complete(prompt, echo=True, stream=True)) == text + expected.choices[0].text
    for wrong, words in (
        ([], "empty"), ([[]], "empty"), ([10**9], "no token 1000000000"), ([-1], "no token -1"), ([1, "x"], "prompt"),
        ([[1], [2]], "one prompt"), ([True], "prompt"),
    ):  # fmt: skip
        with pytest.raises(BadRequestError, match=words):
            complete(wrong)


def test_log_probabilities(client):
    def chances(choice):
        return [(c.token, c.logprob, [(t.token, t.logprob) for t in c.top_logprobs]) for c in choice.logprobs.content]

    given = dict(model="logits", max_tokens=6, logprobs=True)
    whole = ask(client, **given, top_logprobs=3)
    found = chances(whole.choices[0])
    assert len(found) == whole.usage.completion_tokens and "".join(token for token, _, _ in found) == whole.choices[0].message.content
    assert all(len(top) == 3 and top[0][1] == chance <= 0 for _, chance, top in found)  # the likeliest was taken
    streamed = [chunk.choices[0] for chunk in ask(client, **given, top_logprobs=3, stream=True)]
    assert flat([one for choice in streamed if choice.logprobs for one in chances(choice)]) == pytest.approx(flat(found))
    assert len(chances(ask(client, **given).choices[0])) == len(found)

    def complete(**options):
        return client.completions.create(
            **{"model": "logits", "prompt": "1, 2, 3,", "max_tokens": 3, "temperature": 0, "logprobs": 2, **options}
        )

    plain, echoed = (complete(echo=echo).choices[0] for echo in (False, True))
    assert len(plain.logprobs.token_logprobs) == 3 and plain.logprobs.text_offset[0] == len("1, 2, 3,")
    assert "".join(echoed.logprobs.tokens) == echoed.text == "1, 2, 3," + plain.text
    assert echoed.logprobs.token_logprobs[0] is None and echoed.logprobs.token_logprobs[-3:] == pytest.approx(plain.logprobs.token_logprobs)
    assert [
        echoed.text[at:][: len(token)] for at, token in zip(echoed.logprobs.text_offset, echoed.logprobs.tokens)
    ] == echoed.logprobs.tokens
    with pytest.raises(BadRequestError, match="logits_all"):
        ask(client, logprobs=True)


# ---- models


def test_models_by_name(served, client):
    assert [m.id for m in client.models.list()] == ["sparse", "logits", "vectors", "lost"]
    assert client.models.retrieve("logits").id == "logits"
    for name in ("nothing", "a/b", "sparse/"):
        with pytest.raises(NotFoundError, match="no model"):
            client.models.retrieve(name)
    assert urllib.request.urlopen(f"{served.url}/health", timeout=10).read() == b'{"status":"ok"}'


def test_no_path_of_the_server_is_shown(served, client, caplog, monkeypatch):
    assert ask(client).model == "sparse"
    with pytest.raises(InternalServerError, match="'lost' cannot be loaded; the server's log says why") as caught:
        ask(client, model="lost")
    assert "/" not in caught.value.body["message"] and "lost.gguf" in caplog.text
    assert get(served, "/v1/kv")["model"] == "sparse"  # it is still there
    monkeypatch.setattr(ServedLlama, "embed", lambda *_, **__: open("/nowhere/else"))
    with pytest.raises(InternalServerError) as caught:
        client.embeddings.create(model="vectors", input="x")
    assert "/nowhere" not in caught.value.body["message"] and "/nowhere" in caplog.text


def test_a_load_that_failed_is_said(served, client, monkeypatch):
    ask(client)
    with monkeypatch.context() as patch:
        patch.setattr(ModelManager, "load_llama_from_model_settings", lambda *_: (_ for _ in ()).throw(MemoryError("at /root/x")))
        with pytest.raises(InternalServerError, match="'logits' cannot be loaded"):
            ask(client, model="logits")
        assert get(served, "/v1/kv") == {"state": "failed"}
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{served.url}/health", timeout=10)
    assert ask(client).model == "sparse" and get(served, "/v1/kv")["state"] in ("idle", "answering")


def test_what_a_model_lacks_is_said_at_its_start(tmp_path):
    path = write_shape(tmp_path / "tiny.gguf", vocabulary="llama", n_ctx=512)
    said = []
    shared = dict(model=str(path), model_alias="tiny", sparse=None)
    for settings, n in (({"n_ctx": 512}, 0), ({"n_ctx": 1024}, 1), ({"n_ctx": 1024, "rope_freq_scale": 0.5}, 1)):
        ModelManager([ModelSettings(**shared, **settings)], None, said.append).free()
        assert len(said) == n
    assert said[0].startswith("tiny: the context of 1,024 tokens is longer than the 512")
    bare = types.SimpleNamespace(header=types.SimpleNamespace(n_ctx_train=512), metadata={})
    (note,) = notes_on(bare, 512, {})
    assert "no chat template" in note and notes_on(bare, 512, {"chat_format": "chatml"}) == []
    done = subprocess.run(
        [sys.executable, "-m", "kvcast.cli", "chat", "--model", path, "--context", "1024", "--dense"],
        input="", capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "longer than the 512" in done.stderr


# ---- embeddings


def test_embeddings(client):
    def embed(given, **options):
        return client.embeddings.create(model="vectors", input=given, encoding_format="float", **options)

    both, dog, cat = embed(["a dog", "the cat sat"]), embed("a dog"), embed(["the cat sat"])
    assert both.model == "vectors" and both.usage.prompt_tokens == dog.usage.prompt_tokens + cat.usage.prompt_tokens
    assert flat([entry.embedding for entry in both.data]) == pytest.approx(flat([dog.data[0].embedding, cat.data[0].embedding]))
    assert embed(" ").data and client.embeddings.create(model="vectors", input="x").data
    for wrong, words in (
        ("", "input is empty"), ([], "input is empty"), (["", ""], "input.0 is empty"), (["x", ""], "input.1 is empty"),
        ([[]], "tokens are not"), ([1, 2], "tokens are not"), ([[1], [2]], "tokens are not"), (5, "must be a text"),
        ("dog " * 70, "64 can be embedded"),
        ("dog " * 40_000, "tokens or more"),
    ):  # fmt: skip
        with pytest.raises(BadRequestError, match=words):
            embed(wrong)
    with pytest.raises(BadRequestError, match="dimensions is 5"):
        embed("x", dimensions=5)


def test_embeddings_of_a_model(tmp_path):
    script = """
import pytest, sys
from kvcast import Llama
from kvcast.models import resolve
small = dict(n_ctx=128, n_batch=64, n_ubatch=64, n_threads=1, verbose=False)
llm = Llama(resolve("smollm2"), **small, embedding=True, pooling_type=int(sys.argv[1]))
for wrong in ("", [], ["", ""], ["x", ""]):
    for call in (llm.embed, llm.create_embedding):
        with pytest.raises(ValueError, match="empty|no text"):
            call(wrong)
both, alone = llm.embed(["a dog", "the cat sat"]), [llm.embed("a dog"), llm.embed("the cat sat")]
for b, a in zip(both, alone):
    assert b == (a if sys.argv[1] == "0" else pytest.approx(a, rel=1e-3, abs=1e-3))
assert len(llm.embed("dog " * 100)) and llm.embed("a dog", return_count=True)[1] == len(llm.tokenize(b"a dog"))
with pytest.raises(ValueError, match="64 can be embedded"):
    llm.embed("dog " * 100, truncate=False)
"""
    for pooling in ("0", "1"):  # none: a vector for each token; mean
        done = subprocess.run([sys.executable, "-c", script, pooling], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr  # also at its exit: nothing was written where it does not belong


def test_vectors_as_base64(client, monkeypatch):
    monkeypatch.setattr(ServedLlama, "embed", lambda *_, **__: ([0.5, -1.0], 1))
    for given in ({}, {"encoding_format": "base64"}):  # the client's own choice is base64, which it reads
        assert client.embeddings.create(model="vectors", input="x", **given).data[0].embedding is not None
    plain = client.with_options(base_url=client.base_url).post(
        "/embeddings", body={"model": "vectors", "input": "x", "encoding_format": "base64"}, cast_to=object
    )
    assert struct.unpack("<2f", base64.b64decode(plain["data"][0]["embedding"])) == (0.5, -1.0)


# ---- the rest


def test_llama_takes_what_clients_send(smollm2):
    llm = Llama(smollm2, n_ctx=512, n_threads=2, verbose=False, sparse=SparseConfig(budget=256))
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    messages = [*SHORT, {"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "4"}]
    assert llm.create_chat_completion(messages, max_tokens=2)["choices"]
    made = llm.create_chat_completion(SHORT, tools=[WEATHER, HOUR], tool_choice="required", max_tokens=60, temperature=0)
    assert made["choices"][0]["finish_reason"] == "tool_calls"
    llm.close()


def test_langchain_loops_with_tools(smollm2):
    pytest.importorskip("langchain_community")
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool

    from kvcast.integrations.langchain import ChatKvcast

    @tool
    def get_weather(city: str) -> str:
        """The weather of a city"""
        return "4 degrees"

    llm = Llama(smollm2, n_ctx=1024, n_threads=2, verbose=False, sparse=SparseConfig(budget=256))
    chat = ChatKvcast(client=llm, max_tokens=60, temperature=0)
    messages = [HumanMessage("Weather in Oslo?")]
    answer = chat.bind_tools([get_weather], tool_choice="get_weather").invoke(messages)
    messages += [answer, get_weather.invoke(answer.tool_calls[0])]
    assert chat.invoke(messages).content
    assert chat.bind_tools([get_weather]).invoke("Say hello.").content
    merged = None
    for chunk in chat.bind_tools([get_weather], tool_choice="get_weather").stream([HumanMessage("Weather in Oslo?")]):
        merged = chunk if merged is None else merged + chunk
    assert merged.tool_calls[0]["name"] == "get_weather" and merged.tool_calls[0]["args"] == answer.tool_calls[0]["args"]
    assert chat.invoke([HumanMessage([{"type": "text", "text": "Say hi."}])]).content
    llm.close()
