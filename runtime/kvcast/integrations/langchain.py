"""A loaded ``kvcast.Llama`` as a chat model of LangChain."""

from __future__ import annotations

import inspect
from typing import Any

import llama_cpp
from langchain_community.chat_models import ChatLlamaCpp
from llama_cpp.llama_grammar import LlamaGrammar
from pydantic import ConfigDict, model_validator
from typing_extensions import Self

from ..llama.model import Llama

OF_THE_MODEL = inspect.signature(llama_cpp.Llama.__init__).parameters.keys() | {"model_kwargs"}
OF_THE_CLASS = {"model_path", "verbose"}


class ChatKvcast(ChatLlamaCpp):
    """langchain-community's ``ChatLlamaCpp`` on a model that is loaded already, instead of one that it loads itself.

    Parameters
    ----------
    client : Llama
        Stays the caller's, to be closed when the last chain is done.
    **kwargs
        Those of ``ChatLlamaCpp`` that concern an answer: ``temperature``, ``max_tokens``, ``top_p``, ``stop``, ``grammar``, ...

    Raises
    ------
    ValueError
        An argument is unknown, or one of loading (``n_ctx``): that belongs to ``Llama``.
    """

    model_config = ConfigDict(extra="forbid")

    client: Any
    model_path: str = ""

    @model_validator(mode="after")
    def validate_environment(self) -> Self:
        """In place of the base class's, which loads a model."""
        if not isinstance(self.client, Llama):
            raise ValueError(f"client is a {type(self.client).__name__}; give it a loaded kvcast.Llama")
        wrong = sorted(self.model_fields_set & OF_THE_MODEL - OF_THE_CLASS)
        if wrong:
            raise ValueError(f"{wrong[0]} is an argument of loading; give it to the kvcast.Llama that is the client")
        self.model_path = self.client.model_path
        if self.grammar and self.grammar_path:
            raise ValueError("grammar and grammar_path are both given; use one of them")
        if isinstance(self.grammar, str):
            self.grammar = LlamaGrammar.from_string(self.grammar)
        elif self.grammar_path:
            self.grammar = LlamaGrammar.from_file(str(self.grammar_path))
        return self
