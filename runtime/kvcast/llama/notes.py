"""What of a loaded model may disappoint."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Llama


def notes_on(llm: Llama, n_ctx: int, given: Collection[str]) -> list[str]:
    """What of a loaded model may disappoint, in a sentence each; ``given`` are the names of the arguments that it was loaded with."""
    found = []
    trained = llm.header.n_ctx_train
    if 0 < trained < n_ctx and not {"rope_scaling_type", "rope_freq_base", "rope_freq_scale"} & set(given):
        found.append(f"the context of {n_ctx:,} tokens is longer than the {trained:,} of the model's training; past those answers go wrong")
    if "tokenizer.chat_template" not in llm.metadata and not {"chat_format", "chat_handler"} & set(given):
        found.append("the file has no chat template, as a base model has none; questions are put in Llama 2's, which it may not know")
    return found
