"""Text into tokens, by llama.cpp: what its tokenizers cannot take is refused before they end the process."""

from __future__ import annotations

import llama_cpp
from llama_cpp.llama_tokenizer import LlamaTokenizer

from ..bindings import api as native  # noqa: F401 - says where the libraries are
from ..errors import InputError, ModelError

FAILED = -(1 << 31)  # of llama_tokenize


class Tokenizer(LlamaTokenizer):
    """llama-cpp-python's tokenizer, within bounds, and in one pass where that takes two.

    Parameters
    ----------
    llama : llama_cpp.Llama
    most_bytes : int
        Of a text.
    """

    def __init__(self, llama: llama_cpp.Llama, most_bytes: int):
        super().__init__(llama)
        self._most_bytes = most_bytes
        self._lacks = _missing(self._model.vocab)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = True) -> list[int]:
        """The tokens of a text.

        Raises
        ------
        InputError
            It is too long, or cannot be written in the model's tokens.
        ModelError
            The model's vocabulary is incomplete.
        """
        if len(text) > self._most_bytes:
            raise InputError(
                f"the text has {len(text):,} bytes, and at most {self._most_bytes:,} are made into tokens at once; "
                "shorten it, or load the model with larger limits"
            )
        if self._lacks and (add_bos or not self._lacks.startswith("a token")):
            raise ModelError(f"the model's file has no {self._lacks.removeprefix('a ')}, and cannot take text; use another file")
        vocab, n_most = self._model.vocab, len(text) + 16
        while True:
            tokens = (llama_cpp.llama_token * n_most)()
            n = llama_cpp.llama_tokenize(vocab, text, len(text), tokens, n_most, add_bos, special)
            if n >= 0:
                return tokens[:n]
            if n == FAILED:
                raise InputError("the text cannot be written in this model's tokens; see that it is UTF-8, or use another model file")
            n_most = -n


def _missing(vocab: llama_cpp.llama_vocab_p) -> str:
    """What llama.cpp would end the process without."""
    kind = llama_cpp.llama_vocab_type(vocab)
    if kind == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
        return "vocabulary"
    both = kind == llama_cpp.LLAMA_VOCAB_TYPE_WPM  # written whatever the file says
    if (both or llama_cpp.llama_vocab_get_add_bos(vocab)) and llama_cpp.llama_vocab_bos(vocab) < 0:
        return "a token for the beginning"
    if both and llama_cpp.llama_vocab_sep(vocab) < 0:
        return "a token for separation"
    if llama_cpp.llama_vocab_get_add_eos(vocab) and llama_cpp.llama_vocab_eos(vocab) < 0:
        return "a token for the end"
    return ""
