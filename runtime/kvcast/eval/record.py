"""Recordings of attention: what the runtime observed, step by step, and what dense attention did at the same tokens.

One ``.npz`` a document. Scores are kept as one byte, logarithmic: code 0 is "not there", code c stands for
``exp(LOWEST + STEP * (c - 1))``, so a value is off by 4 % at most.

``truth``     uint8, shape (n_primed + n_steps, n_rows, n_blocks): dense block scores of the prompt's last tokens, then of the steps
``seen``      uint8, shape (n_steps, n_rows, n_blocks): what the live loop saw, 0 for blocks that it did not attend to
``estimate``  uint8, shape (n_steps, n_rows, n_blocks): its estimates from the summary of keys, 0 where it made none
``about``     JSON: model, shape, document, config, number of prompt tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from predictor_onnx.recording import _VALUES, VERSION, Trace, encode

from ..blocks import BLOCK_TOKENS
from ..llama.model import Llama
from .recovery import Recorder, true_scores

_VALUES[1] = 0.0


def record(llm: Llama, tokens: Sequence[int], n_context: int, name: str) -> Trace:
    """Run ``tokens[n_context:]`` dense for the truth, then through the live loop.

    Parameters
    ----------
    llm : Llama
        Loaded with the configuration whose observations are wanted.
    tokens : sequence of int
    n_context : int
        How many of them are the prompt, at least 64.
    """
    session = llm.session
    info = session.attached.info
    steps = tokens[n_context:]
    n_blocks = -(-len(tokens) // BLOCK_TOKENS)
    llm.reset()
    primed: list[np.ndarray] = []
    session.observers.on_primed = lambda scores: primed.extend(
        scores[:, i].reshape(session.n_rows, -1)[:, :n_blocks].copy() for i in range(scores.shape[1])
    )
    try:
        llm.eval(tokens[:n_context])
    finally:
        session.observers.on_primed = None
    saved = session.history.save()
    truth, _ = true_scores(llm, steps)
    llm.n_tokens = n_context
    session.truncate(n_context)
    session.configure(session.config)
    session.history.restore(saved)

    seen = np.zeros((len(steps), session.n_rows, n_blocks), np.uint8)
    estimate = np.zeros_like(seen)
    rows = np.arange(session.n_rows)[:, None]
    for i, token in enumerate(steps):
        session.observers.on_attended = recorder = Recorder(llm)
        llm.eval([token])
        session.observers.on_attended = None
        session.take_in()
        blocks, n_attended = recorder.lists[0]
        r, c = np.nonzero(np.arange(blocks.shape[1]) < n_attended[:, None])
        seen[i, r, blocks[r, c]] = encode(session.path.scores[r, c] * session.result.shares[r])
        begin, end = session.path.topk_range
        if session.path.estimates is not None and end:
            estimate[i, rows, np.arange(begin, end)] = encode(session.path.estimates[:, begin:end])
    padded = np.zeros((len(primed) + len(truth), session.n_rows, n_blocks), np.uint8)
    for i, scores in enumerate([*primed, *truth]):
        padded[i, :, : scores.shape[1]] = encode(scores)
    about = {
        "version": VERSION,
        "model": Path(llm.model_path).stem,
        "document": name,
        "n_context": n_context,
        "n_layer": info.n_layer,
        "n_head_kv": info.n_head_kv,
        "config": asdict(session.config),
    }
    return Trace(padded, seen, estimate, about)
