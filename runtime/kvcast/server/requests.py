"""What clients may ask, as OpenAI's API has it: llama-cpp-python's request types, and what they lack.

A parameter that is null is one that was not given. One that is unknown is an error, so that nothing is asked in vain; those in
``IGNORED`` change no answer here.
"""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from llama_cpp.server import types as upstream
from pydantic import BaseModel, Field, Strict, field_validator, model_validator

from .errors import ApiError

IGNORED = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction",
    "reasoning_effort", "verbosity", "cache_prompt",
}  # fmt: skip
NO_ARGUMENTS = {"model", "n", "best_of", "user", "min_tokens", "logit_bias", "logit_bias_type", "stream_options", "grammar"}  # of Llama
STOPS_MOST = 64  # texts; each is looked for after every token
BIASES_MOST = 10_000
LOGPROBS_MOST = 100

FIRST = Field(fail_fast=True)  # a list of 100,000 wrong values has one error, not 100,000
Token = Annotated[int, Strict()]
Tokens = Annotated[list[Token], FIRST]


class Parameters(BaseModel):
    """A body whose null fields are those that were not given.

    Raises
    ------
    ApiError
        There is no such parameter.
    """

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if wrong := [name for name in value if name not in cls.model_fields and name not in IGNORED]:
            close = difflib.get_close_matches(wrong[0], cls.model_fields, n=1)
            what = f"did you mean {close[0]!r}?" if close else "leave it out"
            raise ApiError(400, f"there is no parameter {wrong[0]!r}; {what}", param=wrong[0], code="unknown_parameter")
        return {name: given for name, given in value.items() if given is not None}


class StreamOptions(BaseModel):
    """Of a stream; ``include_usage`` adds a last chunk with the numbers of tokens."""

    include_usage: bool | None = False


class _Sampled(Parameters):
    """What chats and completions have in common."""

    stop: str | Annotated[list[str], FIRST] = []
    logit_bias: dict[str, float] | None = None
    stream_options: StreamOptions = StreamOptions()
    n: int = 1

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: Any) -> list[str]:
        texts = [text for text in ([value] if isinstance(value, str) else value) if text]  # "" would end every answer before it begins
        if len(texts) > STOPS_MOST:
            raise ValueError(f"there are {len(texts)} texts; at most {STOPS_MOST} can be looked for")
        return texts

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > BIASES_MOST:
            raise ValueError(f"there are {len(value):,} tokens; at most {BIASES_MOST:,} can have a bias")
        return value

    @field_validator("n", "best_of", check_fields=False)
    @classmethod
    def _one(cls, value: int, info: Any) -> int:
        if value != 1:
            raise ApiError(400, f"{info.field_name} is {value}; a request has one answer", param=info.field_name)
        return value

    @field_validator("max_tokens", "max_completion_tokens", check_fields=False)
    @classmethod
    def _length(cls, value: int | None) -> int | None:
        if value is not None and value < 1 and value != -1:
            raise ValueError(f"it is {value}; an answer has at least 1 token, and -1 is as many as the context holds")
        return None if value == -1 else value


class Part(BaseModel):
    """A part of a message."""

    type: str
    text: str | None = None
    refusal: str | None = None


class Function(BaseModel):
    """A call: its arguments are JSON."""

    name: str
    arguments: str = ""


class ToolCall(BaseModel):
    """A call that an assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    """A message of a chat; ``developer`` is ``system`` by a newer name."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], FIRST] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FIRST] | None = None
    tool_call_id: str | None = None
    function_call: Function | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_content(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("role") not in ("assistant", None) and "content" not in value:
            raise ValueError("it has no content; send some text")
        return value

    @field_validator("role", mode="before")
    @classmethod
    def _role(cls, value: Any) -> Any:
        if value not in ("system", "developer", "user", "assistant", "tool", "function"):
            raise ValueError("it must be system, developer, user, assistant, tool or function")
        return value

    @field_validator("content")
    @classmethod
    def _only_text(cls, value: Any) -> str | None:
        if not isinstance(value, list):
            return value
        texts = [part.refusal if part.type == "refusal" else part.text if part.type == "text" else None for part in value]
        if None in texts:
            raise ApiError(400, "kvcast runs text models only; send messages of text", param="messages")
        return "\n".join(texts)


class Described(BaseModel):
    """A function that the model may call; without ``parameters`` it takes none."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


class Tool(BaseModel):
    """A tool, which is a function."""

    type: Literal["function"] = "function"
    function: Described


class Named(BaseModel):
    """A function by its name."""

    name: str


class NamedTool(BaseModel):
    """The tool that the model is to call."""

    type: Literal["function"] = "function"
    function: Named


class JsonSchema(BaseModel):
    """A schema that the answer follows."""

    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class ResponseFormat(BaseModel):
    """Whether the answer is JSON. ``schema`` is an older place for that of a ``json_object``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _complete(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing; send it, or use json_object")
        return self


class ChatRequest(_Sampled, upstream.CreateChatCompletionRequest):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], FIRST]
    functions: Annotated[list[Described], FIRST] | None = None
    function_call: Literal["none", "auto"] | Named | None = None
    tools: Annotated[list[Tool], FIRST] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    top_logprobs: int | None = Field(None, ge=0, le=LOGPROBS_MOST)

    @field_validator("messages")
    @classmethod
    def _some(cls, value: list[Message]) -> list[Message]:
        if not value:
            raise ApiError(400, "messages is empty; send at least one", param="messages")
        return value

    def arguments(self) -> dict[str, Any]:
        """Those of ``Llama.create_chat_completion``."""
        given = self.model_dump(
            exclude_none=True,
            by_alias=True,
            exclude={*NO_ARGUMENTS, "modalities", "max_completion_tokens"},
        )
        if self.max_completion_tokens is not None:  # the newer name of the same
            given["max_tokens"] = self.max_completion_tokens
        return given


class CompletionRequest(_Sampled, upstream.CreateCompletionRequest):
    """``POST /v1/completions``."""

    prompt: str | Tokens
    max_tokens: int | None = 16
    logprobs: int | None = Field(None, ge=0, le=LOGPROBS_MOST)
    best_of: int = 1

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, value: Any) -> Any:
        if isinstance(value, list) and value and isinstance(value[0], str | list):
            if len(value) > 1:
                raise ApiError(400, f"prompt is a list of {len(value)}; send one prompt a request", param="prompt")
            value = value[0]
        if value == "" or value == []:
            raise ApiError(400, "prompt is empty; send some text", param="prompt")
        if not isinstance(value, str | list):
            raise ValueError("it must be a text, or a list of the model's tokens")
        return value

    def arguments(self) -> dict[str, Any]:
        """Those of ``Llama.create_completion``."""
        return self.model_dump(exclude_none=True, exclude=NO_ARGUMENTS)


class EmbeddingRequest(Parameters):
    """``POST /v1/embeddings``."""

    model: str | None = None
    input: str | Annotated[list[str], FIRST]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        texts = value if isinstance(value, list) else [value]
        if not texts:
            raise ApiError(400, "input is empty; send some text", param="input")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ApiError(400, "input must be a text or a list of texts; tokens are not taken", param="input")
            if not text:
                raise ApiError(400, f"input{f'.{i}' if isinstance(value, list) else ''} is empty; send some text", param="input")
        return texts


class TokenizeRequest(Parameters, upstream.TokenizeInputRequest):
    """``POST /extras/tokenize``."""


class DetokenizeRequest(Parameters, upstream.DetokenizeInputRequest):
    """``POST /extras/detokenize``."""

    tokens: Tokens
