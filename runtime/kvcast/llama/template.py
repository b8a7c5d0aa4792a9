"""Chat templates: what they write of a conversation."""

from __future__ import annotations

import functools
import itertools
import re
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import ChatFormatterResponse, Jinja2ChatFormatter

from ..errors import InputError, ModelError
from ..limits import Limits
from .sandbox import Environment, OverLimit


class ChatTemplate(Jinja2ChatFormatter):
    """llama-cpp-python's formatter, with bounds.

    Parameters
    ----------
    template : str
        Jinja, as a model's file has it.
    eos_token, bos_token : str
    stop_token_ids : list of int or None
        Tokens that end an answer.
    limits : Limits

    Raises
    ------
    ModelError
        It cannot be read.
    """

    def __init__(
        self, template: str, eos_token: str, bos_token: str, stop_token_ids: list[int] | None = None, limits: Limits | None = None
    ):
        self.template, self.eos_token, self.bos_token, self.add_generation_prompt = template, eos_token, bos_token, True
        self.stop_token_ids = None if stop_token_ids is None else set(stop_token_ids)
        self._limits = limits or Limits()
        self._bounds = Environment(self._limits)
        try:
            with self._bounds.bounded(template):
                self._environment = self._bounds.from_string(template)
        except OverLimit:
            raise ModelError(f"the model's chat template {self._too_much()}; use another file, or choose a chat_format") from None
        except Exception as error:  # whatever Jinja, and Python's own compiler, say of odd ones
            raise ModelError(
                f"the model's chat template cannot be read ({_why(error)}); use another file, or choose a chat_format"
            ) from error

    def __call__(self, **kwargs: Any) -> ChatFormatterResponse:
        """The prompt for messages. What a template would refuse or leave out of a first system message goes before the first question.

        Raises
        ------
        InputError
            The template cannot write them, or refuses them.
        """
        messages: Any = kwargs.get("messages")
        first = messages[0] if isinstance(messages, list) and messages else None
        if isinstance(first, dict) and first.get("role") == "system" and not self.takes_system:
            kwargs["messages"] = _without_system(messages)
        return self._written(kwargs)

    @functools.cached_property
    def takes_system(self) -> bool:
        """Whether system messages are written; the templates of Gemma 2 and of older Mistrals refuse them, others pass over them."""
        messages = [{"role": "system", "content": "a-system-message"}, {"role": "user", "content": "a-question"}]
        try:
            return "a-system-message" in self._written({"messages": messages}).prompt
        except InputError:
            pass
        try:
            return "a-system-message" not in self._written({"messages": _without_system(messages)}).prompt
        except InputError:  # for another reason
            return True

    def _written(self, kwargs: dict[str, Any]) -> ChatFormatterResponse:
        try:
            with self._bounds.bounded(kwargs):
                return super().__call__(**kwargs)
        except OverLimit:
            raise InputError(f"the model's chat template {self._too_much()} for these messages; send fewer, or use another model") from None
        except Exception as error:  # the template's own words, and any of Python's
            raise InputError(f"the model's chat template cannot write these messages: {_why(error)}") from error

    @staticmethod
    def strftime_now(f: str) -> str:
        """The date; no widths."""
        if not isinstance(f, str) or len(f) > 200 or re.search("[0-9]{3}", f):
            raise jinja2.TemplateRuntimeError("strftime_now takes a format of at most 200 characters, without widths")
        return Jinja2ChatFormatter.strftime_now(f)

    def _too_much(self) -> str:
        return f"takes more than {self._limits.template_seconds:g} s, or makes more than {self._limits.template_characters:,} characters"


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first system messages as the beginning of the first message of a user."""
    system = list(itertools.takewhile(lambda message: isinstance(message, dict) and message.get("role") == "system", messages))
    first, rest = {"role": "user", "content": ""}, messages[len(system) :]
    if rest and isinstance(rest[0], dict) and rest[0].get("role") == "user":
        first, *rest = rest
    contents = [content for message in (*system, first) if (content := message.get("content"))]
    if all(isinstance(content, str) for content in contents):
        return [{**first, "content": "\n\n".join(contents)}, *rest]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [{"type": "text", "text": content}])]
    return [{**first, "content": parts}, *rest]


def _why(error: Exception) -> str:
    """Its words, for people: some end in a full stop, some are very long."""
    words = " ".join(str(error).split())[:300].rstrip(".")
    return words if isinstance(error, ValueError | jinja2.TemplateError) and words else f"{type(error).__name__}: {words}".rstrip(": ")
