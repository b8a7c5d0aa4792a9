"""kvcast: long context on your own hardware. Sparse attention over a KV cache in host memory, for GGUF models.

>>> from kvcast import Llama, SparseConfig
>>> llm = Llama("model.gguf", n_ctx=8192, sparse=SparseConfig(budget=512))  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

import predictor_onnx  # noqa: F401 - turns the telemetry of dependencies off, before they are imported

from .bindings.library import carry_llama_cpp
from .errors import (
    ArgumentError,
    CallbackError,
    GenerationError,
    InputError,
    KvcastError,
    ModelError,
    SessionError,
    SparseUnsupported,
    SparseUntested,
)
from .folders import keep_compiled_kernels
from .limits import Limits

if TYPE_CHECKING:
    from .config import SparseConfig
    from .llama.model import Llama

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CallbackError",
    "GenerationError",
    "InputError",
    "KvcastError",
    "Limits",
    "Llama",
    "ModelError",
    "SessionError",
    "SparseConfig",
    "SparseUnsupported",
    "SparseUntested",
]

carry_llama_cpp()
keep_compiled_kernels()


def __getattr__(name: str) -> Any:
    """Llama and SparseConfig load the libraries, so they are imported when they are first asked for: plugins stay cheap to list."""
    if name == "Llama":
        from .llama.model import Llama

        return Llama
    if name == "SparseConfig":
        from .config import SparseConfig

        return SparseConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
