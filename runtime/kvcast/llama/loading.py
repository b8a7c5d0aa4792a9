"""What a model is loaded with, and why loading it failed."""

from __future__ import annotations

import os
from typing import Any

import llama_cpp
import psutil
from jinja2 import TemplateError

from ..config import SparseConfig
from ..cores import usable_cores
from ..errors import ModelError
from ..gguf import memory as sizes
from ..gguf.header import Header, read_header
from ..gguf.reader import GgufFile
from ..gguf.support import TESTED, refusal
from . import arguments

GIB = 1 << 30
STEP_THREADS = 2  # of a step over a pool on a GPU, of which the CPU computes next to nothing; threads that wait spin, and others select
SMALLER = "close something, or use a smaller n_ctx (--context)"
GPU_BATCH = 2048  # tokens; a prompt's batch carries the whole store to the GPU once


def prepared(path: str, sparse: SparseConfig | None, kwargs: dict[str, Any]) -> tuple[Header, dict[str, Any], int]:
    """What a file says, what llama-cpp-python is to load it with, and the cells of its KV cache; see ``Llama`` for what is raised."""
    kwargs = arguments.of_loading(kwargs)
    if sparse is not None:
        kwargs = _of_sparse(kwargs, sparse)
    kwargs["n_threads"] = kwargs.get("n_threads") or usable_cores()
    kwargs["n_threads_batch"] = kwargs.get("n_threads_batch") or kwargs["n_threads"]
    header = read_header(path, kwargs.get("kv_overrides"))
    if adapter := kwargs.get("lora_path"):
        _check_adapter(adapter, header)
    if sparse is not None and not sparse.untested and header.arch not in TESTED:
        if error := refusal(path):
            raise error
    n_ctx = sizes.n_cells(kwargs.get("n_ctx", 512) or header.n_ctx_train)
    _check_memory(header, n_ctx, kwargs, sparse is not None and sparse.keeps_summary)
    return header, kwargs, n_ctx


def _of_sparse(kwargs: dict[str, Any], sparse: SparseConfig) -> dict[str, Any]:
    """What a sparse model is loaded with; ValueError when the arguments contradict that."""
    arguments.refuse_contradictions(kwargs)
    given = {name: value for name, value in kwargs.items() if value is not None}
    on_gpu = llama_cpp.llama_supports_gpu_offload() and given.get("n_gpu_layers", 0)
    if sparse.device and on_gpu and not given.get("n_threads"):
        given["n_threads_batch"] = given.get("n_threads_batch") or usable_cores()
        given["n_threads"] = STEP_THREADS
    if llama_cpp.llama_supports_gpu_offload() and not {"n_batch", "n_ubatch"} & given.keys():
        given.update(n_batch=GPU_BATCH, n_ubatch=GPU_BATCH)
    return {"swa_full": False, **given, "offload_kqv": False, "flash_attn": True}


def explained(error: Exception, path: str) -> Exception:
    """What made loading a model fail, as an error of ours where it is one."""
    if isinstance(error, TemplateError | UnicodeDecodeError):
        return ModelError(f"the chat template or another text in {path!r} cannot be read ({error}); fetch the file again")
    if isinstance(error, RuntimeError) and "LoRA" in str(error):
        return ModelError("llama.cpp could not load the LoRA adapter: it is damaged or for another model; use another one")
    if isinstance(error, MemoryError):
        return ModelError(f"memory ran out while {path!r} was loaded; {SMALLER}")
    if isinstance(error, ValueError) and ("load model" in str(error) or "create llama_context" in str(error)):
        return ModelError(
            f"llama.cpp could not load {path!r}: the file is damaged, of an unknown family, or memory ran out; "
            "verbose=True shows its own words"
        )
    return error


def _check_adapter(path: str, header: Header) -> None:
    """Refuse what is no LoRA adapter for this family."""
    if not os.path.isfile(path):
        raise ModelError(f"there is no LoRA adapter {path!r}; give the path of a .gguf file, or leave lora_path out")
    with GgufFile(path) as gguf:
        kind = gguf.get("general.type"), gguf.get("adapter.type")
        if kind != ("adapter", "lora"):
            raise ModelError(
                f"{path!r} is not a LoRA adapter; leave lora_path out, or convert one with llama.cpp's convert_lora_to_gguf.py"
            )
        if (arch := gguf.get("general.architecture")) != header.arch:
            raise ModelError(f"{path!r} is a LoRA adapter for another family ({arch}), and the model is {header.arch}; use another one")


def _check_memory(header: Header, n_ctx: int, kwargs: dict[str, Any], summary: bool) -> None:
    """Refuse a KV cache that memory cannot hold: allocating it would get the process killed."""
    if kwargs.get("vocab_only"):
        return
    n_ubatch = kwargs.get("n_ubatch", 512) if kwargs.get("swa_full") is False else None
    need = header.store_bytes(n_ctx, kwargs.get("type_k") or 1, kwargs.get("type_v") or 1, n_ubatch)
    if summary:
        need += sizes.allocated(header, n_ctx).summary
    free = psutil.virtual_memory().available
    if need > free and not (kwargs.get("n_gpu_layers") and kwargs.get("offload_kqv", True)):
        per_token = header.store_bytes(256) / 256
        raise ModelError(
            f"a context of {n_ctx} tokens needs {need / GIB:.1f} GiB for its KV cache, and {free / GIB:.1f} GiB are free; "
            f"n_ctx={int(free * 0.8 / per_token) // 256 * 256} would fit"
        )
