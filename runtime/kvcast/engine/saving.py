"""A session as numbers and arrays, for a file, and back."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from ..sparse import predictors
from .known import fits
from .session import Session


def save(session: Session, n_tokens: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Numbers and arrays with which ``restore`` goes on exactly as the session will; empty when nothing is known.

    The next step then depends on them and on the store alone, here too: the lists are selected anew, and the device path plans
    and fills its pool anew.

    Parameters
    ----------
    n_tokens : int
        In the store.
    """
    cut = not session.goes_on(n_tokens)
    session.truncate(n_tokens if n_tokens <= session.n_tokens else 0)
    session.history.truncate(session.n_tokens)
    session.path.clear()
    session.lost |= cut
    if not session.history.primed:
        return {}, {}
    places, states = session.checkpoints.kept()
    numbers, arrays = session.known.kept(n_tokens)
    numbers |= {"fell_back": session.suspended_network is not None, "lost": session.lost, "checkpoints": places}
    return numbers, {**arrays, **states}


def restore(session: Session, numbers: dict[str, Any], arrays: dict[str, np.ndarray], n_tokens: int) -> None:
    """Go on from what was saved and passes ``known.check``, with the same store. Where it lacks what this session needs, nothing is known
    then."""
    session.forget()
    session.path.clear()
    if not numbers or not session.known.take_kept(numbers, arrays):
        return
    session.n_tokens = session.n_done = n_tokens
    session.lost = numbers["lost"]
    needs_steps = bool(session.predictor.n_steps_kept)
    with contextlib.suppress(ValueError):  # of a session with other settings: nothing can be gone back to
        session.checkpoints.take(
            numbers["checkpoints"], arrays, n_tokens, lambda state, n: fits(state, n, session.n_rows, needs_steps, session.attached)
        )
    if numbers["fell_back"] and isinstance(session.predictor, predictors.OnnxPredictor):
        session.fall_back()
    elif not numbers["fell_back"] and session.suspended_network is not None:
        session.use(session.suspended_network)
