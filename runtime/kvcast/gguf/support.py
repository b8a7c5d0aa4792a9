"""Whether a model is served sparse: can it be, asked of llama.cpp and of the check that every sparse context passes; and is it tested."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..bindings.context import NativeContext
from ..bindings.loaded import llama_cpp
from ..bindings.log import muted_llama_log
from ..errors import SparseUnsupported, SparseUntested
from .header import read_header

if TYPE_CHECKING:
    from ..config import SparseConfig

CANNOT_LOAD = "llama.cpp cannot load it as a text model"
TESTED = (  # by tests/model/test_families.py; docs/coverage.md
    "cohere2", "gemma", "gemma3", "glm4", "granite", "llama", "mistral3", "olmo2", "phi3", "qwen2", "qwen3", "qwen3moe", "smollm3",
    "starcoder2",
)  # fmt: skip


def why_impossible(path: str | os.PathLike[str]) -> str:
    """Why a model cannot run sparse, ``CANNOT_LOAD`` included; "" when it can. Tensors are made without data."""
    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers, params.no_alloc, params.load_mode = 0, True, llama_cpp.LLAMA_LOAD_MODE_NONE
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.offload_kqv = 256, 64, 64, False
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    model = ctx = None
    with muted_llama_log():
        llama_cpp.llama_backend_init()
        try:
            model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
            ctx = model and llama_cpp.llama_init_from_model(model, settings)
            if not ctx:
                return CANNOT_LOAD
            NativeContext(ctx, 1).close()
            return ""
        except SparseUnsupported as error:
            return error.reason
        finally:
            if ctx:
                llama_cpp.llama_free(ctx)
            if model:
                llama_cpp.llama_model_free(model)


def refusal(path: str | os.PathLike[str]) -> SparseUnsupported | None:
    """What keeps a model from running sparse unasked: it cannot, or its family is untested. None: nothing, or llama.cpp cannot load it."""
    reason, family = why_impossible(path), read_header(path).arch
    if reason:
        return None if reason == CANNOT_LOAD else SparseUnsupported(reason)
    return None if family in TESTED else SparseUntested(family)


def why_dense(path: str | os.PathLike[str]) -> str:
    """Why a model runs dense unless asked, ``CANNOT_LOAD`` included; "" when it is served sparse."""
    reason, family = why_impossible(path), read_header(path).arch
    return reason or ("" if family in TESTED else SparseUntested(family).reason)


def sparse_if_tested(path: str | os.PathLike[str], sparse: SparseConfig | None, say: Callable[[str], None]) -> SparseConfig | None:
    """``sparse``; or None, which is said in a line, where the family is untested and ``sparse`` does not ask for it.

    A predictor that the file brings and that is going to run is said, too.
    """
    if sparse is None:
        return None
    header = read_header(path)
    found = None if sparse.untested or header.arch in TESTED else refusal(path)
    if found is None:
        if sparse.predictor == "auto" and header.embedded is not None and (said := header.embedded.said(Path(path).name)):
            say(said)
        return sparse
    how = "; --untested (SparseConfig.untested) asks for it" if isinstance(found, SparseUntested) else ""
    say(f"running dense: {found.reason}{how}")
    return None
