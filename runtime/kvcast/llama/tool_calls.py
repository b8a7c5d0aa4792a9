"""Tools in a chat: what makes a model call one, and the calls in what it wrote.

A model that may call writes a call as its template told it. Two ways are understood: Qwen's and Hermes's
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, anywhere, and an answer that is such an object as a whole, bare or in a
Markdown fence, which small models write instead; there the name must be that of a tool. One that must call is held to JSON.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BEGIN, END = "<tool_call>", "</tool_call>"
OWN_WAYS = {"functionary", "functionary-v1", "functionary-v2", "chatml-function-calling"}  # llama-cpp-python's formats that do all this
_WHOLE = re.compile(r"\s*(?:```(?:json)?\s*([\[{].*)```|([\[{].*))\s*", re.DOTALL)
_FENCE = re.compile(r"```(json|jso|js|j)?\s*|`{0,2}")
_KEYS = ('"name"', '"arguments"', '"parameters"')


@dataclass(frozen=True, slots=True)
class Call:
    """A call, or, without a name, more of its arguments, which are JSON."""

    name: str
    arguments: str


Piece = str | Call


@dataclass(frozen=True, slots=True)
class Choice:
    """What a model may or must call in an answer.

    Parameters
    ----------
    names : tuple of str
        Of the tools.
    must : str or None
        The only one that it can call, and does.
    parallel : bool
        Several calls in an answer; else the first counts.
    legacy : bool
        Tools were given as ``functions``: the call is also said as ``function_call``.
    """

    names: tuple[str, ...]
    must: str | None
    parallel: bool
    legacy: bool

    def message(self, answer: dict[str, Any]) -> dict[str, Any]:
        """A chat completion in which the calls are no text any more."""
        choice = answer["choices"][0]
        reader = self._reader()
        pieces = [*reader.feed(choice["message"]["content"] or ""), *reader.end()]
        calls = [_as_dict(piece) for piece in pieces if isinstance(piece, Call)]
        if not calls:
            return answer
        text = "".join(piece for piece in pieces if isinstance(piece, str)).strip()
        message = {"role": "assistant", "content": text or None, "tool_calls": calls if self.parallel else calls[:1]}
        if self.legacy:
            message["function_call"] = calls[0]["function"]
        return {**answer, "choices": [{**choice, "message": message, "logprobs": None, "finish_reason": _reason(choice)}]}

    def chunks(self, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """A stream of them. Text that may be the beginning of a call waits until it is known."""
        reader, n_calls = self._reader(), 0
        waiting: list[Any] = []  # logprobs of text that waits
        for chunk in chunks:
            choice = chunk["choices"][0]
            text, last = choice["delta"].get("content"), choice["finish_reason"] is not None
            waiting += (choice.get("logprobs") or {}).get("content") or []
            for piece in [*(reader.feed(text) if text else []), *(reader.end() if last else [])]:
                if isinstance(piece, str):
                    if piece.strip() or not n_calls:
                        yield _with(chunk, {"content": piece}, {"content": waiting, "refusal": None} if waiting else None)
                    waiting = []
                    continue
                waiting = []
                n_calls += bool(piece.name)
                if n_calls > 1 and not self.parallel:
                    continue
                call = _as_dict(piece) if piece.name else {"function": {"arguments": piece.arguments}}
                more = {"function_call": call["function"]} if self.legacy else {}
                yield _with(chunk, {"tool_calls": [{"index": n_calls - 1, **call}], **more})
            if last and n_calls:
                yield {**chunk, "choices": [{**choice, "finish_reason": _reason(choice)}]}
            elif last or text is None:
                yield chunk

    def _reader(self) -> _Chosen | _Named:
        return _Chosen(self.names) if self.must is None else _Named(self.must)


def take_choice(arguments: dict[str, Any], parallel: bool = True) -> Choice | None:
    """Take what concerns tools out of the arguments of a chat completion, and put in what holds the model to it.

    Returns
    -------
    Choice or None
        None: no tool can be called.

    Raises
    ------
    ValueError
        A tool is to be called that is not there, or beside a grammar or a format.
    """
    functions, legacy_choice = arguments.pop("functions", None), arguments.pop("function_call", None)
    choice, tools = arguments.pop("tool_choice", None), arguments.pop("tools", None) or []
    if functions:
        tools = [{"type": "function", "function": function} for function in functions]
    if legacy_choice is not None:
        choice = {"type": "function", "function": legacy_choice} if isinstance(legacy_choice, dict) else legacy_choice
    of_name = {tool["function"]["name"]: tool["function"] for tool in tools}
    if isinstance(choice, dict):
        choice = choice["function"]["name"]
    choice = {None: "auto", "any": "required"}.get(choice, choice)
    if choice == "none" or (choice == "auto" and not tools):
        return None
    if choice not in of_name and (choice not in ("auto", "required") or not tools):
        raise ValueError(f"tool_choice is {choice!r}, and the tools are {', '.join(of_name) or 'none'}; give that tool, or choose another")
    arguments["tools"] = tools
    names = tuple(of_name)
    if choice == "auto":
        return Choice(names, None, parallel, bool(functions))
    if arguments.get("grammar") is not None or (arguments.get("response_format") or {}).get("type", "text") != "text":
        raise ValueError("a tool that must be called does not go with a grammar or a response_format; leave one out")
    must = names[0] if choice == "required" and len(names) == 1 else None if choice == "required" else choice
    schema = _any_of(of_name) if must is None else _parameters(of_name[must])
    arguments["response_format"] = {"type": "json_object", "schema": schema}
    return Choice(names, must, parallel, bool(functions))


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    return function.get("parameters") or {"type": "object", "properties": {}}


def _any_of(of_name: dict[str, Any]) -> dict[str, Any]:
    """The schema of a call of any of them. Their own definitions move with them, under names that are theirs alone."""
    definitions: dict[str, Any] = {}
    calls = []
    for i, (name, function) in enumerate(of_name.items()):
        moved = _moved(_parameters(function), f"tool{i}")
        for key in ("$defs", "definitions"):
            definitions.update({f"tool{i}-{inner}": value for inner, value in (moved.pop(key, None) or {}).items()})
        definitions[f"tool{i}"] = moved
        arguments = {"$ref": f"#/$defs/tool{i}"}
        properties = {"name": {"const": name}, "arguments": arguments}
        calls.append({"type": "object", "properties": properties, "required": ["name", "arguments"]})
    return {"anyOf": calls, "$defs": definitions}


def _moved(schema: Any, to: str) -> Any:
    """A schema whose references are right when it lies at ``#/$defs/to``, and its definitions at ``#/$defs/to-NAME``."""
    if isinstance(schema, list):
        return [_moved(value, to) for value in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _moved(value, to) for key, value in schema.items()}
    if isinstance(ref := schema.get("$ref"), str) and ref.startswith("#/"):
        inner = re.sub(r"^#/(\$defs|definitions)/", f"#/$defs/{to}-", ref)
        made["$ref"] = inner if inner != ref else f"#/$defs/{to}/{ref[2:]}"
    return made


class _Named:
    """Reads the arguments of the one tool."""

    def __init__(self, name: str):
        self._name = name

    def feed(self, text: str) -> list[Piece]:
        name, self._name = self._name, ""
        return [Call(name, text)]

    def end(self) -> list[Piece]:
        return [Call(self._name, "{}")] if self._name else []


class _Chosen:
    """Finds calls in text that comes in pieces."""

    def __init__(self, names: tuple[str, ...]):
        self._names = names
        self._text = ""  # that waits
        self._begun = False  # something was said

    def feed(self, text: str) -> list[Piece]:
        self._text += text
        pieces: list[Piece] = []
        while True:
            at = self._text.find(BEGIN)
            if at < 0:
                return [*pieces, *self._said(self._sure())]
            to = self._text.find(END, at)
            pieces += self._said(at)
            if to < 0:
                return pieces
            to += len(END) - at
            pieces += self._called(self._text[:to], self._text[len(BEGIN) : to - len(END)])
            self._text = self._text[to:]

    def end(self) -> list[Piece]:
        """What is left: a call that lacks its end, a whole answer that is a call, or text."""
        text, self._text = self._text, ""
        if text.startswith(BEGIN):
            return self._called(text, text.removeprefix(BEGIN))
        whole = None if self._begun else _WHOLE.fullmatch(text)
        if whole:
            calls = _calls(whole[1] or whole[2])
            if calls and all(call.name in self._names for call in calls):
                return list(calls)
        return [text] if text else []

    def _sure(self) -> int:
        """So many characters are no part of a call, whatever follows."""
        if not self._begun and _may_be_whole(self._text.lstrip()):
            return 0
        for n in range(min(len(BEGIN) - 1, len(self._text)), 0, -1):
            if self._text.endswith(BEGIN[:n]):
                return len(self._text) - n
        return len(self._text)

    def _said(self, n: int) -> list[Piece]:
        said, self._text = self._text[:n], self._text[n:]
        self._begun |= bool(said.strip())
        return [said] if said else []

    def _called(self, text: str, inner: str) -> list[Piece]:
        self._begun = True
        return list(_calls(inner)) or [text]


def _may_be_whole(text: str) -> bool:
    fence = _FENCE.match(text)
    assert fence is not None
    if fence.end() == len(text):
        return True
    inner = text[fence.end() :].lstrip("[").lstrip()
    if not inner:
        return True
    key = inner[1:].lstrip()
    return inner[0] == "{" and any(key.startswith(known[: len(key)]) for known in _KEYS)


def _calls(text: str) -> list[Call]:
    """The calls in JSON, none where it is something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        given = item.get("arguments", item.get("parameters", {})) if isinstance(item, dict) else None
        if not isinstance(given, dict) or not isinstance(item.get("name"), str) or not item["name"]:
            return []
        calls.append(Call(item["name"], json.dumps(given, ensure_ascii=False)))
    return calls


def _as_dict(call: Call) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reason(choice: dict[str, Any]) -> str:
    return "tool_calls" if choice["finish_reason"] == "stop" else choice["finish_reason"]


def _with(chunk: dict[str, Any], delta: dict[str, Any], logprobs: Any = None) -> dict[str, Any]:
    return {**chunk, "choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}]}
