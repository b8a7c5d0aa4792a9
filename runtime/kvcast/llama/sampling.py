"""Python functions between llama.cpp's samplers: what they raise cannot pass through native code, and what they return may be no logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from ..errors import CallbackError

LogitsProcessor = Callable[[npt.NDArray[np.intc], npt.NDArray[np.single]], npt.NDArray[np.single]]
FAR = np.float32(1e20)  # from any logit: what is so far below is never drawn, what is so far above always


class Processors:
    """Logits processors as one, whose errors are kept for ``check``.

    Parameters
    ----------
    processors : iterable of callables
        Each gets the tokens, int32, shape (n_tokens,), and logits, float32, shape (n_vocab,), and returns logits of the same shape.
    grammar : bool
        A grammar comes after them, which may leave none but tokens that they forbid; llama.cpp would end the process.
    """

    def __init__(self, processors: Iterable[LogitsProcessor], grammar: bool):
        self._processors = processors
        self._grammar = grammar
        self._error: BaseException | None = None

    def __call__(self, input_ids: npt.NDArray[np.intc], scores: npt.NDArray[np.single]) -> npt.NDArray[np.single]:
        try:
            for processor in self._processors:
                found = np.asarray(processor(input_ids, scores))
                if found.shape != scores.shape:
                    raise ValueError(f"it returned an array of shape {found.shape}, and not {scores.shape}")
                scores[:] = found
            highest = scores.max(initial=-np.inf)
            if highest == np.inf or (self._grammar and not np.isnan(highest)):
                np.clip(scores, -FAR if self._grammar else None, FAR, out=scores)
            elif not np.isfinite(highest):
                raise ValueError("it leaves no token: every logit is minus infinity" if highest == -np.inf else "it returned NaN")
        except BaseException as error:  # noqa: BLE001 - raised again by ``check``
            self._error = self._error or error
            scores[:] = 0
        return scores

    def check(self) -> None:
        """Raise what a processor raised.

        Raises
        ------
        CallbackError
            Its exception is the ``__cause__``. What is none of a program's own errors, Ctrl-C say, is raised as it is.
        """
        error, self._error = self._error, None
        if error is None:
            return
        if not isinstance(error, Exception):
            raise error
        raise CallbackError(f"a logits processor failed: {type(error).__name__}: {error}; no token was chosen") from error
