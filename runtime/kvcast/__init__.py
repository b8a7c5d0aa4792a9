"""kvcast: long context on your own hardware. Sparse attention over a KV cache in host memory, for GGUF models.

>>> from kvcast import Llama, SparseConfig
>>> llm = Llama("model.gguf", n_ctx=8192, sparse=SparseConfig(budget=512))  # doctest: +SKIP
"""

from .config import SparseConfig
from .errors import CallbackError, GenerationError, KvcastError, ModelError, SparseUnsupported
from .llama import Llama

__version__ = "0.1.0"

__all__ = ["CallbackError", "GenerationError", "KvcastError", "Llama", "ModelError", "SparseConfig", "SparseUnsupported"]
