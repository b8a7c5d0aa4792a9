"""Answers that a grammar allows, drawn token by token through llama.cpp's own grammar sampler, without a model's opinion."""

import ctypes
import random

import llama_cpp
import numpy as np


class Writer:
    """Writes at random, with a liking for what ends texts, lists and objects.

    Parameters
    ----------
    llm : kvcast.Llama
        Its vocabulary is used.
    """

    def __init__(self, llm):
        self._llm, self._vocab = llm, llm._model.vocab
        n = llm.n_vocab()
        pieces = [llm.detokenize([i], special=True) for i in range(n)]
        self._weights = np.array([20.0 if piece.strip() in (b'"', b"}", b"]") else 1.0 for piece in pieces])
        whole = np.array([piece.decode(errors="ignore").encode() == piece for piece in pieces])
        self._whole = self._weights * whole  # parts of characters only where nothing else fits
        self._pieces = pieces
        self._data = (llama_cpp.llama_token_data * n)()
        self._view = np.frombuffer(self._data, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])

    def write(self, grammar, seed, n_most=2000):
        """The text, None if it is not done after ``n_most`` tokens. Raises RuntimeError when nothing fits."""
        rng = random.Random(seed)
        sampler = llama_cpp.llama_sampler_init_grammar(self._vocab, grammar._grammar.encode(), grammar._root.encode())
        assert sampler, "llama.cpp does not take it"
        text = b""
        try:
            for _ in range(n_most):
                self._view["id"], self._view["logit"] = np.arange(len(self._view)), 0
                array = llama_cpp.llama_token_data_array(self._data, len(self._view), -1, False)
                llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
                fits = np.isfinite(self._view["logit"])
                weights = self._whole * fits if (self._whole * fits).any() else self._weights * fits
                if not weights.any():
                    raise RuntimeError(f"nothing fits after {text!r}")
                token = rng.choices(range(len(weights)), weights)[0]
                if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                    return text.decode()
                llama_cpp.llama_sampler_accept(sampler, token)
                text += self._pieces[token]
            return None
        finally:
            llama_cpp.llama_sampler_free(sampler)
