"""What llama-cpp-python's completions lack: log-probabilities of answers in one piece, and the prompt before the answer (``echo``).

Its own way of an answer in one piece turns all scores of the context into log-probabilities, several times, and cannot be sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .served import ServedLlama

Chunk = dict[str, Any]
LISTS = ("tokens", "text_offset", "token_logprobs", "top_logprobs")


def echoed(llm: ServedLlama, chunks: Iterator[Chunk], tokens: list[int], text: str, n_logprobs: int | None) -> Iterator[Chunk]:
    """The chunks after one with the prompt, and with its log-probabilities if any are asked for."""
    first = next(chunks, None)  # the prompt has been evaluated
    if first is None:
        return
    logprobs = None if n_logprobs is None else _of_prompt(llm, tokens, n_logprobs)
    yield {**first, "choices": [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": None}]}
    yield first
    yield from chunks


def with_offsets(chunks: Iterator[Chunk], offset: int) -> Iterator[Chunk]:
    """The chunks, whose texts begin so many characters after the prompt's beginning; llama-cpp-python counts a prompt's tokens."""
    for chunk in chunks:
        (choice,) = chunk["choices"]
        if choice["logprobs"]:
            *choice["logprobs"]["text_offset"], _ = accumulate(map(len, choice["logprobs"]["tokens"]), initial=offset)
        offset += len(choice["text"])
        yield chunk


def in_one_piece(chunks: Iterator[Chunk]) -> Chunk:
    """The chunks, of which there is one at least, as one answer; without ``usage``."""
    text, logprobs, last = "", {name: [] for name in LISTS}, {}
    for last in chunks:
        (choice,) = last["choices"]
        text += choice["text"]
        for name in LISTS:
            logprobs[name] += (choice["logprobs"] or {}).get(name, [])
    return {**last, "choices": [{**last["choices"][0], "text": text, "logprobs": logprobs if logprobs["tokens"] else None}]}


def _of_prompt(llm: ServedLlama, tokens: list[int], n: int) -> dict[str, Any]:
    """Of each token but the first, after those before it."""
    found: dict[str, Any] = {name: [] for name in LISTS}
    for i, token in enumerate(tokens):
        found["tokens"].append(_text(llm, token))
        if i == 0:
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        row = llm.logits_to_logprobs(llm.scores[i - 1])
        top = np.argsort(row)[::-1][:n]
        found["token_logprobs"].append(float(row[token]))
        found["top_logprobs"].append({_text(llm, int(j)): float(row[j]) for j in [*top, token]})
    return found


def _text(llm: ServedLlama, token: int) -> str:
    return llm.detokenize([token]).decode("utf-8", errors="ignore")
