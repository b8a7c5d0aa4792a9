"""Whether a trained predictor is worth its name on this prompt."""

from __future__ import annotations

import warnings

import numpy as np

from ..blocks import BLOCK_TOKENS
from ..config import SparseConfig
from ..sparse.history import History
from ..sparse.predictors import EmaPredictor, OnnxPredictor, Predictor

GUARD_TOKENS = 8  # last ones of a prompt, held back to try the predictor on
GUARD_MARGIN = 0.98  # of what the average holds of their attention, that a network must hold


class Guard:
    """Tries a prompt's predictor on its last tokens. Its verdict is the prompt's; it warns once."""

    def __init__(self) -> None:
        self._warned = False

    def fails(self, predictor: Predictor, history: History, truth: np.ndarray, n_tokens: int, config: SparseConfig) -> bool:
        """Whether a network would have chosen worse than the average for tokens that the history has not seen.

        Parameters
        ----------
        truth : float32, shape (n_layer, n_head_kv, n_blocks)
            Their attention.
        n_tokens : int
            In the store, with them.
        """
        n_used = -(-n_tokens // BLOCK_TOKENS)
        n_sink, n_window = config.sink // BLOCK_TOKENS, config.window // BLOCK_TOKENS
        n_keep = config.budget_blocks(n_tokens) - n_sink - n_window
        middle = slice(n_sink, n_used - n_window)
        if not isinstance(predictor, OnnxPredictor) or n_keep >= n_used - n_window - n_sink:
            return False
        held = []
        for tried in (predictor, EmaPredictor(0.9)):
            scores = tried.predict(history, n_used)[:, middle]
            best = np.argpartition(-scores, n_keep - 1, axis=1)[:, :n_keep]
            held.append(float(np.take_along_axis(truth.reshape(len(scores), -1)[:, middle], best, 1).sum()))
        if held[0] >= GUARD_MARGIN * held[1]:
            return False
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"predictor {config.predictor!r} does worse than the plain average on this model and text "
                f"({held[0] / held[1]:.0%} of the attention that the average holds); 'ema' is used instead",
                stacklevel=2,
            )
        return True
