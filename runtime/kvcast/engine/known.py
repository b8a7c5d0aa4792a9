"""What a session knows of attention that the store alone does not give again; and whether what a file has can be that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from predictor_onnx.features import DECAYS

from ..bindings.context import NativeContext
from ..blocks import BLOCK_TOKENS
from ..sparse.history import History
from . import checkpoints
from .checkpoints import State

COUNT_MAX = 1 << 40  # of steps, in a file


class Known:
    """What a session knows beside the store.

    Attributes
    ----------
    history : History
    n_since : int
        Steps since every score was new.
    n_summarised : int
        Tokens in the store when the channels of the summary of keys were chosen; 0: they were not.
    poor : bool
        The last step's estimated recovery was below the minimum.
    """

    def __init__(self, history: History, attached: NativeContext):
        self.history, self._attached = history, attached
        self.n_since = self.n_summarised = 0
        self.poor = False

    def summarise(self, n_tokens: int) -> None:
        """Choose the channels of the summary, for the ``n_tokens`` in the store, where that is twice as many as before."""
        if n_tokens >= 2 * self.n_summarised:
            self._attached.prepare_summary()
            self.n_summarised = n_tokens

    def truncate(self, n_tokens: int) -> None:
        """The store ends at ``n_tokens``."""
        self.n_summarised = min(self.n_summarised, n_tokens)

    def state(self, n_tokens: int) -> State | None:
        """All of it, for ``take``; None when nothing is known."""
        if not self.history.primed:
            return None
        kept = self.history.kept(-(-n_tokens // BLOCK_TOKENS))
        return State(
            history={name: np.array(x) for name, x in kept.items()},
            n_observed=self.history.n_observed,
            summary=self._attached.summary_state if self.n_summarised else None,
            n_summarised=self.n_summarised,
            poor=self.poor,
        )

    def take(self, state: State | None) -> None:
        """Know that and nothing else."""
        self.history.truncate(0)
        self.n_summarised, self.poor = 0, False
        if state is not None and self.history.take(state.history, state.n_observed):
            if state.summary is not None:
                self._attached.summary_state = state.summary
                self.n_summarised = state.n_summarised
            self.poor = state.poor

    def kept(self, n_tokens: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Numbers and arrays for a file, of the ``n_tokens`` in the store."""
        numbers = {
            "n_observed": self.history.n_observed,
            "since_calibration": self.n_since,
            "poor": self.poor,
            "n_summarised": self.n_summarised,
        }
        arrays = self.history.kept(n_tokens // BLOCK_TOKENS)
        self.history.change_from(0)  # predictions made anew differ in their last digits
        return numbers, {**arrays, "summary": self._attached.summary_state}

    def take_kept(self, numbers: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bool:
        """Know what a file has; False, and nothing is known, where that lacks something that is needed here."""
        if self._attached.n_summary_state not in (0, len(arrays["summary"])):
            return False
        if not self.history.take(dict(arrays), numbers["n_observed"]):
            return False
        if self._attached.n_summary_state:
            self._attached.summary_state = arrays["summary"]
        self.n_summarised, self.n_since, self.poor = numbers["n_summarised"], numbers["since_calibration"], numbers["poor"]
        return True


def is_sane(state: State, n_tokens: int, history: History, attached: NativeContext) -> bool:
    """Whether a state can be one of this model, with any settings, at ``n_tokens``."""
    if state.history.keys() - {"last_steps"} != {"averages"} or (state.summary is not None and state.summary.ndim != 1):
        return False
    try:
        history.check(state.history, -(-n_tokens // BLOCK_TOKENS))
    except ValueError:
        return False
    fitting = state.summary is None or not attached.n_summary_state or attached.takes_summary_state(state.summary)
    known = (state.summary is None) == (state.n_summarised == 0)
    return 0 < state.n_observed < 1 << 62 and 0 <= state.n_summarised <= n_tokens and known and fitting


def fits(state: State, n_tokens: int, n_rows: int, needs_steps: bool, attached: NativeContext) -> bool:
    """Whether a state can be one of a session with so many rows, whose predictor ``needs_steps``, at ``n_tokens``."""
    averages, steps = state.history.get("averages"), state.history.get("last_steps")
    n_blocks = -(-n_tokens // BLOCK_TOKENS)
    if averages is None or averages.shape != (n_rows, len(DECAYS), n_blocks) or averages.dtype != np.float32:
        return False
    if steps is not None and (steps.ndim != 3 or steps.shape[1:] != (n_rows, n_blocks) or steps.dtype != np.float32):
        return False
    if not 0 < state.n_observed < 1 << 62 or not 0 <= state.n_summarised <= n_tokens:
        return False
    if not all(np.isfinite(x).all() for x in state.history.values()) or (steps is None and needs_steps):
        return False
    return (state.summary is None) == (state.n_summarised == 0) and (state.summary is None or attached.takes_summary_state(state.summary))


def check(numbers: dict[str, Any], arrays: Mapping[str, np.ndarray], n_tokens: int, history: History, attached: NativeContext) -> None:
    """Whether ``Session.restore`` can take this, of anybody's: what ``Session.save`` yields with this model and any settings.

    Raises
    ------
    ValueError
        A number or an array is missing, of another type or shape, or out of range.
    """
    if not numbers and not arrays:
        return
    bounds: dict[str, tuple[type, int, int]] = {
        "n_observed": (int, 1, COUNT_MAX),
        "since_calibration": (int, 0, COUNT_MAX),
        "poor": (bool, 0, 1),
        "n_summarised": (int, 0, n_tokens),
        "fell_back": (bool, 0, 1),
    }
    if numbers.keys() != bounds.keys() | {"checkpoints", "lost"} or type(numbers["lost"]) is not bool:
        raise ValueError("its numbers are others")
    for name, (kind, least, most) in bounds.items():
        if type(numbers[name]) is not kind or not least <= numbers[name] <= most:
            raise ValueError(f"{name} is no number that it can be")
    if not {"averages", "summary"} <= arrays.keys():
        raise ValueError("an array is missing")
    history.check(dict(arrays), n_tokens // BLOCK_TOKENS)
    summary, info = arrays["summary"], attached.info
    most = 4 * info.n_layer * info.n_head_kv * 5 * info.head_dim_k  # channels, and four numbers of each
    if summary.ndim != 1 or not len(summary) <= most:
        raise ValueError("summary is of another shape")
    if attached.n_summary_state and len(summary) and not attached.takes_summary_state(summary):
        raise ValueError("summary names a channel that no head has, or holds a number of no sane size")
    checkpoints.check(numbers["checkpoints"], arrays, n_tokens, lambda state, n: is_sane(state, n, history, attached))
