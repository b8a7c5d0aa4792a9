"""Errors that a user can cause. Each message is one sentence that names what is wrong and what to do."""


class KvcastError(Exception):
    """Base class of kvcast's own errors."""


class SparseUnsupported(KvcastError):
    """The model or the context cannot run sparse attention, for ``reason``; it runs with ``sparse=None``."""

    def __init__(self, reason: str):
        super().__init__(f"sparse attention is not possible here: {reason}; run it dense with sparse=None (--dense)")
        self.reason = reason


class SparseUntested(SparseUnsupported):
    """No test runs the model's family sparse, and nobody asked for it."""

    def __init__(self, family: str):
        self.reason = f"the model family {family!r} is untested with sparse attention"
        super(SparseUnsupported, self).__init__(
            f"{self.reason}; run it dense with sparse=None (--dense), or ask for it with SparseConfig(untested=True) (--untested)"
        )


class ModelError(KvcastError):
    """A model is unknown, missing, damaged or does not fit."""


class SessionError(KvcastError):
    """A session cannot be saved, or a file of one cannot be used; the session in hand goes on."""


class SessionDamaged(SessionError):
    """A file is one of a session, and certainly not what was saved; ``how`` says what is wrong with it."""

    def __init__(self, message: str, how: str):
        super().__init__(message)
        self.how = how


class InputError(KvcastError, ValueError):
    """A text, a grammar, a schema or what a chat template makes of messages is wrong, or more than is taken (``Limits``)."""


class GenerationError(KvcastError):
    """A step failed; the store holds everything up to the step before."""


class ContextFull(GenerationError):
    """The tokens do not fit into the context."""


class CallbackError(GenerationError):
    """A user's callback raised; the exception is the ``__cause__``."""


class ArgumentError(KvcastError, ValueError, TypeError):
    """An argument is of another type than it must be, or out of its range."""
