"""Messages as OpenAI's clients send them, made ready for chat templates, which take less."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

ARGUMENTS_MOST = 1 << 20  # characters of a call that are parsed, which takes some milliseconds; longer ones stay text


def for_template(messages: Sequence[Any]) -> list[Any]:
    """A copy in which every content is a text, a call's arguments are an object, and roles are those that templates know.

    ``developer`` becomes ``system``. What is null is left out, but for a content, which becomes "". Parts of text become one text;
    messages with other parts stay as they are, for handlers that take them.
    """
    return [_message(message) if isinstance(message, dict) else message for message in messages]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    made = {name: value for name, value in message.items() if value is not None}
    if made.get("role") == "developer":
        made["role"] = "system"
    content = made.setdefault("content", "")
    if isinstance(content, list) and all(isinstance(part, str) or _is_text(part) for part in content):
        made["content"] = "\n".join(part if isinstance(part, str) else part["text"] for part in content)
    calls = made.pop("tool_calls", None)
    if isinstance(calls, list) and calls:
        made["tool_calls"] = [_call(call) for call in calls]
    return made


def _is_text(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _call(call: Any) -> Any:
    """Templates write the arguments as JSON: a text would become a text in quotes."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str) or len(arguments) > ARGUMENTS_MOST:
        return call
    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**(function or {}), "arguments": given}} if isinstance(given, dict) else call
