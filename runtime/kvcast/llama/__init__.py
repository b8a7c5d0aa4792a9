"""``Llama``: llama-cpp-python's, with sparse attention."""

from typing import TYPE_CHECKING, Any

from ..bindings import loaded  # noqa: F401 - before anything imports llama_cpp

if TYPE_CHECKING:
    from .model import Llama

__all__ = ["Llama"]


def __getattr__(name: str) -> Any:
    """Loaded when it is asked for: the rest of the package is imported without it."""
    if name in __all__:
        from . import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
