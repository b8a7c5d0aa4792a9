"""llama_cpp, with kvcast's libraries and whatever backends lie beside them."""

from __future__ import annotations

import ctypes
import os

from .library import LIBRARY_DIR
from .log import llama_cpp, muted_llama_log

__all__ = ["llama_cpp"]


def _load_plugins() -> None:
    """Builds with GGML_BACKEND_DL look for backends beside the executable only; ours lie beside libllama."""
    reg_count = llama_cpp._lib.ggml_backend_reg_count
    reg_count.restype, reg_count.argtypes = ctypes.c_size_t, ()
    if reg_count() == 0:
        load = llama_cpp._lib.ggml_backend_load_all_from_path
        load.restype, load.argtypes = None, (ctypes.c_char_p,)
        load(os.fsencode(LIBRARY_DIR))


with muted_llama_log():
    _load_plugins()
# a null pointer is not None, which llama-cpp-python looks for
llama_cpp.llama_adapter_lora_init.errcheck = lambda adapter, _function, _arguments: adapter if adapter else None
