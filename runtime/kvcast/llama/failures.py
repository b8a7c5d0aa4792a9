"""Why something failed, as an error of ours."""

from __future__ import annotations

from ..errors import CallbackError, GenerationError


def of_step(
    error: BaseException, signal: BaseException | None, of_callback: BaseException | None, said: str, n_tokens: int
) -> tuple[BaseException, BaseException | None]:
    """What to raise for a step or a prompt that did not come to its end, and its cause.

    Parameters
    ----------
    error : BaseException
        What it ended with.
    signal, of_callback : BaseException or None
        What a signal handler or an attention callback raised in the middle of native code, which ended it.
    said : str
        Native code's last error.
    n_tokens : int
        That the store holds now.
    """
    if signal is not None:
        error = signal
    elif of_callback is not None:
        if not isinstance(of_callback, Exception):  # Ctrl-C, say
            return of_callback, None
        words = f"an attention callback raised {type(of_callback).__name__}: {of_callback}; the step was not taken"
        return CallbackError(words), of_callback
    if isinstance(error, GenerationError) or not isinstance(error, Exception):
        return error, None
    cause: BaseException = error
    while isinstance(cause, SystemError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if cause is not error:
        return cause, None  # a signal handler raised it in the middle of a compiled kernel, which Numba passes on so
    if not isinstance(error, RuntimeError):
        words = f"evaluating failed: {type(error).__name__}: {error}"
    elif "returned 2" in str(error):  # of llama_decode: it was aborted
        words = said or "the step was stopped"
    else:
        words = str(error)
    return GenerationError(f"{words}; the store holds the {n_tokens} tokens before it"), error
