"""Whether a model is served sparse, asked of llama.cpp and of the check that every sparse context passes, without its weights."""

from __future__ import annotations

import os

from .errors import SparseUnsupported
from .native import Attached, llama_cpp, quiet

CANNOT_LOAD = "llama.cpp cannot load it as a text model"


def why_dense(path: str | os.PathLike[str]) -> str:
    """Why a model runs dense only, ``CANNOT_LOAD`` included; "" when it is served sparse. Tensors are made without data."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.no_alloc, params.load_mode = 0, True, llama_cpp.LLAMA_LOAD_MODE_NONE
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.offload_kqv = 256, 64, 64, False
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    model = ctx = None
    with quiet():
        llama_cpp.llama_backend_init()
        try:
            model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
            ctx = model and llama_cpp.llama_init_from_model(model, settings)
            if not ctx:
                return CANNOT_LOAD
            Attached(ctx, 1).close()
            return ""
        except SparseUnsupported as error:
            return error.reason
        finally:
            if ctx:
                llama_cpp.llama_free(ctx)
            if model:
                llama_cpp.llama_model_free(model)
