"""Speculative decoding through llama-cpp-python's draft models: a token and its draft are verified in one batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llama_cpp.llama_speculative import LlamaDraftModel

from ..bindings import api as native  # noqa: F401  (says where the libraries are)

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
