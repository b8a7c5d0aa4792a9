"""llama-cpp-python's model, whose token ids are checked: llama.cpp ends the process at one that there is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_cpp._internals import LlamaModel

from ..bindings import api as native  # noqa: F401  (says where the libraries are)
from .arguments import token_id, token_ids


class CheckedModel(LlamaModel):
    """See ``llama_cpp._internals.LlamaModel``.

    Raises
    ------
    ArgumentError
        From what takes a token: the model has none of that number.
    """

    def token_get_text(self, token: Any) -> str:
        return super().token_get_text(token_id("token", token, self.n_vocab()))

    def token_get_score(self, token: Any) -> float:
        return super().token_get_score(token_id("token", token, self.n_vocab()))

    def token_get_attr(self, token: Any) -> int:
        return super().token_get_attr(token_id("token", token, self.n_vocab()))

    def token_to_piece(self, token: Any, special: bool = False) -> bytes:
        return super().token_to_piece(token_id("token", token, self.n_vocab()), special)

    def detokenize(self, tokens: Sequence[Any], special: bool = False) -> bytes:
        return super().detokenize(token_ids("tokens", tokens, self.n_vocab()), special)
