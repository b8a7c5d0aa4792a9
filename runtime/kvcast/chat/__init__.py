"""A conversation about documents, which are kept."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversation import Conversation, Figures

__all__ = ["Conversation", "Figures"]


def __getattr__(name: str) -> Any:
    """Loaded when they are asked for, as the libraries are then."""
    if name in __all__:
        from . import conversation

        return getattr(conversation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
