"""A GGUF's header, read with ggml's own reader, before anything large is loaded or allocated."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelError
from .native import llama_cpp

_lib = llama_cpp._lib  # ggml-base's symbols are reachable through the library that depends on it
_UINT32, _INT32, _ARRAY = 4, 5, 9


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _function(name: str, result, *arguments):
    fn = getattr(_lib, name)
    fn.restype, fn.argtypes = result, arguments
    return fn


_p = ctypes.c_void_p
_init = _function("gguf_init_from_file", _p, ctypes.c_char_p, _InitParams)
_free = _function("gguf_free", None, _p)
_find_key = _function("gguf_find_key", ctypes.c_int64, _p, ctypes.c_char_p)
_kv_type = _function("gguf_get_kv_type", ctypes.c_int, _p, ctypes.c_int64)
_u32 = _function("gguf_get_val_u32", ctypes.c_uint32, _p, ctypes.c_int64)
_str = _function("gguf_get_val_str", ctypes.c_char_p, _p, ctypes.c_int64)
_arr_type = _function("gguf_get_arr_type", ctypes.c_int, _p, ctypes.c_int64)
_arr_n = _function("gguf_get_arr_n", ctypes.c_size_t, _p, ctypes.c_int64)
_arr_data = _function("gguf_get_arr_data", _p, _p, ctypes.c_int64)
_n_tensors = _function("gguf_get_n_tensors", ctypes.c_int64, _p)
_data_offset = _function("gguf_get_data_offset", ctypes.c_size_t, _p)
_tensor_offset = _function("gguf_get_tensor_offset", ctypes.c_size_t, _p, ctypes.c_int64)
_tensor_size = _function("gguf_get_tensor_size", ctypes.c_size_t, _p, ctypes.c_int64)
_row_size = _function("ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64)


@dataclass(frozen=True, slots=True)
class Header:
    """What kvcast needs to know of a model before loading it."""

    arch: str
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_ctx_train: int
    weights_bytes: int

    def store_bytes(self, n_ctx: int, type_k: int = 1, type_v: int = 1) -> int:
        """Bytes of the whole KV cache of ``n_ctx`` cells; the types are ggml's, f16 when not named."""
        n_cells = -(-n_ctx // 256) * 256
        k = _row_size(type_k, self.n_head_kv * self.head_dim_k)
        v = _row_size(type_v, self.n_head_kv * self.head_dim_v)
        return n_cells * self.n_layer * (k + v)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read and check the header of a GGUF file.

    Raises
    ------
    ModelError
        The file is missing, not a GGUF, or shorter than its header says.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"there is no model file {str(path)!r}; give a path to a .gguf file or a name from `kvcast models`")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{str(path)!r} is not a GGUF file; convert the model to GGUF first")
    gguf = _init(os.fsencode(path), _InitParams(True, None))
    if not gguf:
        raise ModelError(f"the header of {str(path)!r} cannot be read; the file is damaged or incomplete, fetch it again")
    try:
        n_tensors = _n_tensors(gguf)
        end = _data_offset(gguf)
        for i in range(n_tensors):
            end = max(end, _data_offset(gguf) + _tensor_offset(gguf, i) + _tensor_size(gguf, i))
        size = path.stat().st_size
        if size < end:
            raise ModelError(f"{str(path)!r} is cut short: {size} bytes of {end}; fetch it again")
        return _parse(gguf, size)
    finally:
        _free(gguf)


def _parse(gguf: int, size: int) -> Header:
    arch_id = _find_key(gguf, b"general.architecture")
    arch = _str(gguf, arch_id).decode() if arch_id >= 0 else ""

    def number(key: str, default: int) -> int:
        i = _find_key(gguf, f"{arch}.{key}".encode())
        if i < 0:
            return default
        kind = _kv_type(gguf, i)
        if kind == _UINT32:
            return _u32(gguf, i)
        if kind == _ARRAY and _arr_type(gguf, i) in (_UINT32, _INT32) and _arr_n(gguf, i) > 0:
            data = ctypes.cast(_arr_data(gguf, i), ctypes.POINTER(ctypes.c_uint32))
            return max(data[j] for j in range(_arr_n(gguf, i)))
        return default

    n_head = number("attention.head_count", 0)
    head_dim = number("embedding_length", 0) // n_head if n_head else 0
    return Header(
        arch=arch,
        n_layer=number("block_count", 0),
        n_head=n_head,
        n_head_kv=number("attention.head_count_kv", n_head),
        head_dim_k=number("attention.key_length", head_dim),
        head_dim_v=number("attention.value_length", head_dim),
        n_ctx_train=number("context_length", 0),
        weights_bytes=size,
    )
