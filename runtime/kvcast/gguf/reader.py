"""The header of a GGUF file: keys, tensors, and the metadata written anew. By ggml's own reader; tensor data is never read."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bindings.loaded import llama_cpp
from ..bindings.log import muted_llama_log
from ..errors import ModelError

_lib = llama_cpp._lib  # ggml-base's symbols are reachable through the library that depends on it
_UINT8, _STRING, _ARRAY = 0, 8, 9


class _InitParams(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


def _function(name: str, result, *arguments):
    fn = getattr(_lib, name)
    fn.restype, fn.argtypes = result, arguments
    return fn


_p, _id, _size, _name = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
_init = _function("gguf_init_from_file", _p, _name, _InitParams)
_free = _function("gguf_free", None, _p)
_find_key = _function("gguf_find_key", _id, _p, _name)
_kv_type = _function("gguf_get_kv_type", ctypes.c_int, _p, _id)
_str = _function("gguf_get_val_str", _name, _p, _id)
_arr_type = _function("gguf_get_arr_type", ctypes.c_int, _p, _id)
_arr_n = _function("gguf_get_arr_n", _size, _p, _id)
_arr_str = _function("gguf_get_arr_str", _name, _p, _id, _size)
_arr_data = _function("gguf_get_arr_data", _p, _p, _id)
_n_tensors = _function("gguf_get_n_tensors", _id, _p)
_data_offset = _function("gguf_get_data_offset", _size, _p)
_tensor_name = _function("gguf_get_tensor_name", _name, _p, _id)
_tensor_type = _function("gguf_get_tensor_type", ctypes.c_int, _p, _id)
_tensor_offset = _function("gguf_get_tensor_offset", _size, _p, _id)
_tensor_size = _function("gguf_get_tensor_size", _size, _p, _id)
_remove_key = _function("gguf_remove_key", _id, _p, _name)
_set_str = _function("gguf_set_val_str", None, _p, _name, _name)
_set_arr = _function("gguf_set_arr_data", None, _p, _name, ctypes.c_int, _p, _size)
_meta_size = _function("gguf_get_meta_size", _size, _p)
_meta_data = _function("gguf_get_meta_data", None, _p, _p)
_type_name = _function("ggml_type_name", _name, ctypes.c_int)
row_size = _function("ggml_row_size", _size, ctypes.c_int, ctypes.c_int64)  # bytes of a row of so many values of a ggml type

# enum gguf_type to the function that reads one value, and to the type of an array's elements
_SCALARS = {
    kind: _function(f"gguf_get_val_{name}", c_type, _p, _id)
    for kind, name, c_type in (
        (0, "u8", ctypes.c_uint8), (1, "i8", ctypes.c_int8), (2, "u16", ctypes.c_uint16), (3, "i16", ctypes.c_int16),
        (4, "u32", ctypes.c_uint32), (5, "i32", ctypes.c_int32), (6, "f32", ctypes.c_float), (7, "bool", ctypes.c_bool),
        (10, "u64", ctypes.c_uint64), (11, "i64", ctypes.c_int64), (12, "f64", ctypes.c_double),
    )
}  # fmt: skip
_DTYPES = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), map(np.dtype, ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "u8", "i8", "f8"))))


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor; ``type`` is ggml's name of it."""

    name: str
    type: str
    n_bytes: int


class GgufFile:
    """An open header; a context manager.

    Parameters
    ----------
    path : path-like
    overrides : dict
        Values that stand for the file's, as llama.cpp takes ``kv_overrides``: where the file has none, or one of the same kind.

    Attributes
    ----------
    path : Path
    size_bytes : int
        Of the file.
    data_offset : int
        Where the tensor data begins; offsets of tensors count from there, so changed metadata leaves them as they are.

    Raises
    ------
    ModelError
        The file is missing, not a GGUF, or shorter than its header says.
    """

    def __init__(self, path: str | os.PathLike[str], overrides: Mapping[str, bool | int | float | str] | None = None):
        self._gguf: int | None = None
        self._overrides = overrides or {}
        self.path = path = Path(path)
        if not path.is_file():
            raise ModelError(
                f"there is no model file {str(path)!r}; give the path of a .gguf file; "
                "kvcast.models.resolve(NAME) is that of a name from `kvcast models`"
            )
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{str(path)!r} is not a GGUF file; convert the model to GGUF first")
        with muted_llama_log():
            self._gguf = _init(os.fsencode(path), _InitParams(True, None))
        if not self._gguf:
            raise ModelError(f"the header of {str(path)!r} cannot be read; the file is damaged or incomplete, fetch it again")
        self.data_offset = _data_offset(self._gguf)
        self.size_bytes = path.stat().st_size
        ends = (_tensor_offset(self._gguf, i) + _tensor_size(self._gguf, i) for i in range(_n_tensors(self._gguf)))
        end = self.data_offset + max(ends, default=0)
        if self.size_bytes < end:
            self.close()
            raise ModelError(f"{str(path)!r} is cut short: {self.size_bytes} bytes of {end}; fetch it again")

    def close(self) -> None:
        gguf, self._gguf = self._gguf, None
        if gguf:
            _free(gguf)

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_overridden(self) -> bool:
        return bool(self._overrides)

    def get(self, key: str, default: Any = None) -> Any:
        """A key's number, bool, string or list of numbers; ``default`` where there is none. Arrays of strings: see ``strings``."""
        i = _find_key(self._gguf, key.encode())
        found = default if i < 0 else self._value(i, default)
        override = self._overrides.get(key)
        return override if override is not None and (i < 0 or type(override) is type(found)) else found

    def _value(self, i: int, default: Any) -> Any:
        kind = _kv_type(self._gguf, i)
        if kind == _STRING:
            return _str(self._gguf, i).decode("utf-8", "replace")
        if kind == _ARRAY:
            dtype = _DTYPES.get(_arr_type(self._gguf, i))
            return default if dtype is None else np.frombuffer(self._array(i, dtype.itemsize), dtype).tolist()
        return _SCALARS[kind](self._gguf, i)

    def count(self, key: str) -> int:
        """Elements of an array; 0 where there is none."""
        i = _find_key(self._gguf, key.encode())
        return _arr_n(self._gguf, i) if i >= 0 and _kv_type(self._gguf, i) == _ARRAY else 0

    def strings(self, key: str) -> list[bytes]:
        """An array of strings, as they are; empty where there is none."""
        i = _find_key(self._gguf, key.encode())
        if i < 0 or _kv_type(self._gguf, i) != _ARRAY or _arr_type(self._gguf, i) != _STRING:
            return []
        return [_arr_str(self._gguf, i, j) for j in range(_arr_n(self._gguf, i))]

    def get_bytes(self, key: str) -> bytes | None:
        """An array of uint8; None where there is none."""
        i = _find_key(self._gguf, key.encode())
        if i < 0 or _kv_type(self._gguf, i) != _ARRAY or _arr_type(self._gguf, i) != _UINT8:
            return None
        return self._array(i, 1)

    def tensors(self) -> list[Tensor]:
        gguf = self._gguf
        return [
            Tensor(_tensor_name(gguf, i).decode(errors="replace"), _type_name(_tensor_type(gguf, i)).decode(), _tensor_size(gguf, i))
            for i in range(_n_tensors(gguf))
        ]

    # ---- in memory only, for ``metadata``

    def set_str(self, key: str, value: str) -> None:
        _set_str(self._gguf, key.encode(), value.encode())

    def set_bytes(self, key: str, value: bytes) -> None:
        _set_arr(self._gguf, key.encode(), _UINT8, value, len(value))

    def metadata(self) -> bytes:
        """Everything before the tensor data, padded to the file's alignment, with what was set."""
        data = ctypes.create_string_buffer(_meta_size(self._gguf))
        _meta_data(self._gguf, data)
        return data.raw

    def _array(self, i: int, item_bytes: int) -> bytes:
        n = _arr_n(self._gguf, i)
        return ctypes.string_at(_arr_data(self._gguf, i), n * item_bytes) if n else b""
