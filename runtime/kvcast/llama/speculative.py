"""Speculative decoding through llama-cpp-python's draft models: a token and its draft are verified in one batch."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from ..bindings import api as native  # noqa: F401  (says where the libraries are)

if TYPE_CHECKING:
    from .model import Llama

VERIFY_TOKENS = 32  # at most, in one batch: a token and its draft


class ShortDraft(LlamaDraftModel):
    """A draft model, of whose drafts only the beginning is used: what fits one batch. llama-cpp-python 0.3.36 reads logits by their
    distance from the last one, which must not reach into the batch before.

    Parameters
    ----------
    model : LlamaDraftModel
    n_max : int
        Tokens of a draft.
    """

    def __init__(self, model: LlamaDraftModel, n_max: int):
        self.model = model
        self.n_max = n_max

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        return self.model(input_ids, **kwargs)[: self.n_max]


class SparseDraft(LlamaDraftModel):
    """The model's own sparse steps draft what its dense attention then checks (``SparseConfig.exact``).

    How many depends on how many were accepted before: the number for which, at that rate, most tokens come of a draft and its check in the
    time that they take, counted in sparse steps. No clock is asked, so that an answer is always made in the same way.

    Parameters
    ----------
    llm : Llama
    n_max : int
        Tokens of a draft.
    """

    CHECK_STEPS = 4.0  # what a check takes
    MEMORY = 0.9  # of what was accepted, from one draft to the next

    def __init__(self, llm: Llama, n_max: int):
        self._llm = weakref.ref(llm)
        self.n_max = n_max
        self._pending = 0, 0  # tokens in the store before a draft that is being checked, and its length
        self._accepted, self._refused = 4.0, 1.0

    def __call__(self, input_ids: npt.NDArray[np.intc], /, **kwargs: Any) -> npt.NDArray[np.intc]:
        llm = self._llm()
        assert llm is not None, "it is the model that calls"
        self._learn(llm)
        n = min(self._length(), llm.n_ctx() - llm.n_tokens - 1) if len(input_ids) == llm.n_tokens + 1 else 0
        draft = llm.draft(int(input_ids[-1]), n)
        self._pending = llm.n_tokens, len(draft)
        return np.array(draft, np.intc)

    def _learn(self, llm: Llama) -> None:
        n_before, n = self._pending
        n_accepted = llm.n_tokens - n_before - 1
        self._pending = 0, 0
        if not 0 <= n_accepted <= n or n == 0:  # another answer
            return
        self._accepted = self.MEMORY * self._accepted + n_accepted
        self._refused = self.MEMORY * self._refused + (n_accepted < n)
        llm.session.times.n_checks += 1
        llm.session.times.n_drafted += n
        llm.session.times.n_accepted += n_accepted

    def _length(self) -> int:
        rate = self._accepted / (self._accepted + self._refused)
        n = np.arange(1, self.n_max + 1)
        tokens = (1 - rate ** (n + 1)) / (1 - rate) if rate < 1 else n + 1.0
        return int(n[np.argmax(tokens / (n + self.CHECK_STEPS))])
