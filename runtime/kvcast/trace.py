"""Recordings of attention: what the runtime observed, step by step, and what dense attention did at the same tokens.

One ``.npz`` a document. Scores are kept as one byte, logarithmic: code 0 is "not there", code c stands for
``exp(LOWEST + STEP * (c - 1))``, so a value is off by 4 % at most.

``truth``     uint8, shape (n_primed + n_steps, n_rows, n_blocks): dense block scores of the prompt's last tokens, then of the steps
``seen``      uint8, shape (n_steps, n_rows, n_blocks): what the live loop saw, 0 for blocks that it did not attend to
``estimate``  uint8, shape (n_steps, n_rows, n_blocks): its estimates from the summary of keys, 0 where it made none
``about``     JSON: model, shape, document, config, number of prompt tokens
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import files
from .errors import KvcastError
from .eval.recovery import Recorder, true_scores
from .llama import Llama
from .native import BLOCK_TOKENS

VERSION = 1
LOWEST, STEP = -16.0, 0.08


def encode(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Codes of positive scores; 1 for those below e^-16."""
    with np.errstate(divide="ignore"):
        return np.clip(1 + np.rint((np.log(scores) - LOWEST) / STEP), 1, 255).astype(np.uint8)


_VALUES = np.r_[0.0, np.exp(LOWEST + STEP * np.arange(255))].astype(np.float32)
_VALUES[1] = 0.0


def decode(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scores of codes; 0 for code 0 and for what was too small to tell."""
    return _VALUES[codes]


@dataclass(frozen=True, slots=True)
class Trace:
    """One recorded document; arrays as in the module's docstring."""

    truth: npt.NDArray[np.uint8]
    seen: npt.NDArray[np.uint8]
    estimate: npt.NDArray[np.uint8]
    about: dict

    @property
    def n_primed(self) -> int:
        return len(self.truth) - len(self.seen)

    def save(self, path: Path) -> None:
        """Write whole or not at all.

        Raises
        ------
        KvcastError
            It cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path) as file:
                np.savez_compressed(file, truth=self.truth, seen=self.seen, estimate=self.estimate, about=json.dumps(self.about))
        except OSError as error:
            raise KvcastError(f"the recording {str(path)!r} cannot be written ({files.reason(error)}); free some space") from error


def load(path: Path) -> Trace:
    """Read a recording.

    Raises
    ------
    KvcastError
        The file is missing, damaged or of another version.
    """
    try:
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            if about.get("version") != VERSION:
                raise KvcastError(
                    f"{str(path)!r} is a recording of version {about.get('version')}, this is version {VERSION}; record it again"
                )
            return Trace(file["truth"], file["seen"], file["estimate"], about)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise KvcastError(f"{str(path)!r} is not a recording of attention ({error}); make one with `kvcast trace`") from error


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
    session.on_primed = lambda scores: primed.extend(
        scores[:, i].reshape(session.n_rows, -1)[:, :n_blocks].copy() for i in range(scores.shape[1])
    )
    try:
        llm.eval(tokens[:n_context])
    finally:
        session.on_primed = None
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
        session.on_attended = recorder = Recorder(llm)
        llm.eval([token])
        session.on_attended = None
        session.take_in()
        blocks, n_attended = recorder.lists[0]
        r, c = np.nonzero(np.arange(blocks.shape[1]) < n_attended[:, None])
        seen[i, r, blocks[r, c]] = encode(session.scores[r, c] * session.step_shares[r])
        begin, end = session.free_range
        if session.estimates is not None and end:
            estimate[i, rows, np.arange(begin, end)] = encode(session.estimates[:, begin:end])
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
