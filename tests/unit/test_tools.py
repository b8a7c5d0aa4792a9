"""Chats with tools: what clients send and what they get back, whatever way a model has of calling."""

import json

import pytest

from kvcast.llama.messages import for_template
from kvcast.llama.tool_calls import Choice, take_choice

CITY = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"], "$defs": {"City": {"type": "string"}}}
HOUR = {"type": "object", "properties": {"city": {"$ref": "#/$defs/City"}}, "required": ["city"], "$defs": {"City": {"type": "integer"}}}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in (("weather", CITY), ("hour", HOUR))]
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
MAY = Choice(("weather", "hour"), None, parallel=True, legacy=False)


def answer_of(text, reason="stop"):
    message = {"role": "assistant", "content": text}
    return {"id": "1", "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reason}]}


def stream_of(text, n, reason="stop"):
    pieces = [text[i : i + n] for i in range(0, len(text), n)]
    deltas = [({"role": "assistant"}, None), *(({"content": piece}, None) for piece in pieces), ({}, reason)]
    for delta, end in deltas:
        yield {"id": "1", "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": end}]}


def read(choice, text, reason="stop"):
    """Text, calls and reason of an answer; a stream in pieces of any size says the same."""
    (whole,) = choice.message(answer_of(text, reason))["choices"]
    message = whole["message"]
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", [])]
    for n in (1, 3, 7, 1000):
        said, streamed, ids = "", {}, set()
        for chunk in choice.chunks(stream_of(text, n, reason)):
            (part,) = chunk["choices"]
            said += part["delta"].get("content") or ""
            for call in part["delta"].get("tool_calls", []):
                known = streamed.setdefault(call["index"], ["", ""])
                known[0] += call["function"].get("name", "")
                known[1] += call["function"]["arguments"]
                ids |= {call["id"]} if "id" in call else set()
        assert [tuple(call) for call in streamed.values()] == calls and len(ids) == len(calls)
        assert said.strip() == (message["content"] or "").strip() and part["finish_reason"] == whole["finish_reason"]
    return message["content"], calls, whole["finish_reason"]


OSLO = ("weather", '{"city": "Oslo"}')


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", None, [OSLO]),
        (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "Let me see.", [OSLO, OSLO]),
        (f"<tool_call>\n{CALL}", None, [OSLO]),  # cut, or without its end
        (CALL, None, [OSLO]),
        (f"```json\n{CALL}\n```", None, [OSLO]),
        (f"```\n[{CALL}, {CALL}]\n```\n", None, [OSLO, OSLO]),
        (CALL.replace("arguments", "parameters"), None, [OSLO]),
        ('{"name": "hour"}', None, [("hour", "{}")]),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, [("other", "{}")]),
        # no calls
        ("Four degrees.", "Four degrees.", []),
        ("", "", []),
        ("a < b, <tool, <tool_call", "a < b, <tool, <tool_call", []),
        ("<tool_call>{</tool_call> x", "<tool_call>{</tool_call> x", []),
        ('<tool_call>["x"]</tool_call>', '<tool_call>["x"]</tool_call>', []),
        ('{"name": "other", "arguments": {}}', '{"name": "other", "arguments": {}}', []),
        ('{"name": "weather", "arguments": "x"}', '{"name": "weather", "arguments": "x"}', []),
        (f"It is {CALL}", f"It is {CALL}", []),
        ('{"answer": 4}', '{"answer": 4}', []),
        ("```python\nprint()\n```", "```python\nprint()\n```", []),
        ('{"name": ' + "[" * 5000, '{"name": ' + "[" * 5000, []),
    ],
)  # fmt: skip
def test_calls_in_text(text, said, calls):
    assert read(MAY, text) == (said, calls, "tool_calls" if calls else "stop")


def test_text_that_is_no_call_is_not_held_back():
    for text in ("Four degrees. And so on.", '{"answer": 4, "unit": "C"}', "```python\nprint()\n```"):
        seen = [chunk["choices"][0]["delta"].get("content") for chunk in MAY.chunks(stream_of(text, 1))]
        assert len([piece for piece in seen if piece]) > len(text) // 2


def test_one_call_at_a_time():
    text = f"<tool_call>{CALL}</tool_call>" * 2
    assert read(Choice(("weather",), None, parallel=False, legacy=False), text) == (None, [OSLO], "tool_calls")


def test_the_tool_that_must_be_called():
    must = Choice(("weather",), "weather", parallel=True, legacy=False)
    assert read(must, '{"city": "Oslo"}') == (None, [OSLO], "tool_calls")
    assert read(must, '{"city": "Os', "length") == (None, [("weather", '{"city": "Os')], "length")
    legacy = Choice(("weather",), "weather", parallel=True, legacy=True).message(answer_of('{"city": "Oslo"}'))["choices"][0]["message"]
    assert legacy["function_call"] == legacy["tool_calls"][0]["function"]


def test_what_a_choice_does_to_a_request():
    for choice, must in (("auto", None), (None, None), ({"type": "function", "function": {"name": "hour"}}, "hour"), ("hour", "hour")):
        arguments = {"tools": TOOLS, "tool_choice": choice}
        assert take_choice(arguments).must == must
        assert arguments["tools"] == TOOLS and "tool_choice" not in arguments
        assert (arguments.get("response_format") or {}).get("schema") == (HOUR if must else None)
    for nothing in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}, {"functions": [], "tools": None}):
        assert take_choice(nothing) is None and "tools" not in nothing
    arguments = {"functions": [TOOLS[0]["function"]], "function_call": {"name": "weather"}}
    assert take_choice(arguments).legacy and arguments["tools"] == TOOLS[:1]
    arguments = {"tools": TOOLS[:1], "tool_choice": "required"}
    assert take_choice(arguments).must == "weather" and arguments["response_format"]["schema"] == CITY
    for wrong, word in (
        ({"tools": TOOLS, "tool_choice": "moon"}, "'moon'"),
        ({"tools": [], "tool_choice": "required"}, "the tools are none"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "'f'"),
        ({"tools": TOOLS, "tool_choice": "required", "grammar": "x"}, "does not go with"),
        ({"tools": TOOLS, "tool_choice": "hour", "response_format": {"type": "json_object"}}, "does not go with"),
    ):
        with pytest.raises(ValueError, match=word):
            take_choice(wrong)


def test_any_of_several_tools():
    from llama_cpp import LlamaGrammar

    arguments = {"tools": TOOLS, "tool_choice": "required"}
    assert take_choice(arguments).must is None
    schema = arguments["response_format"]["schema"]
    assert {schema["$defs"][f"tool{i}-City"]["type"] for i in (0, 1)} == {"string", "integer"}
    rules = LlamaGrammar.from_json_schema(json.dumps(schema))._grammar
    assert "tool0-city ::= string" in rules and "tool1-city ::= integer" in rules


def test_messages_for_templates():
    calls = [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
    given = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
        {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None, "function_call": None, "audio": None},
        {"role": "tool", "tool_call_id": "1", "content": None},
        {"role": "assistant", "tool_calls": []},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
    ]
    before = json.dumps(given)
    made = for_template(given)
    assert json.dumps(given) == before
    assert made[0] == {"role": "system", "content": "Be brief."} and made[1] == {"role": "user", "content": "a\nb"}
    assert made[2]["content"] == "" and made[2]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert made[3] == {"role": "tool", "tool_call_id": "1", "content": ""} and made[4] == {"role": "assistant", "content": ""}
    assert made[5] == given[5]
    for odd in ("[" * 100_000, "{", '"x"', "[]", "x" * (2 << 20)):
        (message,) = for_template([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": odd}}]}])
        assert message["tool_calls"][0]["function"]["arguments"] == odd
