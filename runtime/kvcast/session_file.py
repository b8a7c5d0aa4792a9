"""A session as one file: llama.cpp's own state file, behind it what kvcast remembers of attention, what both were made with, and
a checksum. Sessions that users save and the documents that are kept on disk (``cache.py``) are such files.

Layout: llama.cpp's state file (tokens and KV cache) | arrays, .npz | JSON | its length | ``TAIL``: BLAKE2b of everything before it,
version, magic. A file is written beside its name and takes the name when all of it is on the disk.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

from . import native
from .errors import SessionError

import llama_cpp  # isort: skip  (after .native, which says where the libraries are)

if TYPE_CHECKING:
    from .llama import Llama

VERSION = 1
MAGIC = b"\x00kvcast\n"
LENGTH = struct.Struct("<Q")
TAIL = struct.Struct("<32sI8s")
STATE_HEADER = struct.Struct("<III")  # llama.cpp's magic and version, number of tokens
CHUNK = 1 << 24
REMEDY = "use a copy of it, or start over"
# what NumPy and zipfile raise on arrays that are none
UNREADABLE = (
    *(ValueError, TypeError, KeyError, OverflowError, EOFError, OSError, NotImplementedError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
OF_THE_CACHE = ("rope_", "yarn_", "type_k", "type_v", "flash_attn")  # context parameters that a state depends on
OF_WINDOWS = ("swa_full", "n_ubatch")  # the same of a model with sliding-window layers


@dataclass(frozen=True, slots=True)
class Saved:
    """A file that was read and found whole.

    Attributes
    ----------
    meta : dict
        ``made_with`` (see there), ``model`` (a file name), ``n_tokens``, ``seed``, ``numbers`` (of the session), ``about`` (the
        caller's), ``n_state`` and ``n_arrays`` (bytes).
    tokens : int32, shape (n_tokens,)
    state : uint8, shape (n_bytes,)
        llama.cpp's, in the mapped file.
    arrays : dict of arrays
        Of the session; none when it knew nothing, or ran dense.
    """

    meta: dict[str, Any]
    tokens: npt.NDArray[np.int32]
    state: npt.NDArray[np.uint8]
    arrays: dict[str, np.ndarray]


def save(llm: Llama, path: Path, about: dict[str, Any]) -> None:
    """See ``Llama.save_session``."""
    numbers, arrays = ({}, {}) if llm.sparse is None else llm.session.save(llm.n_tokens)
    llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1)
    llm._requires_eval = True  # logits are not saved: here as after a load, the last token is run once more where they are needed
    meta = {
        "made_with": made_with(llm),
        "model": Path(llm.model_path).name,
        "n_tokens": llm.n_tokens,
        "seed": llm._seed,
        "numbers": numbers,
        "about": about,
    }
    try:
        remove_partial(path.parent, path.name)
        _write(path, llm, meta, arrays)
    except (OSError, MemoryError) as error:
        reason = "memory ran out" if isinstance(error, MemoryError) else error.strerror or error
        raise SessionError(f"the session cannot be saved as {str(path)!r} ({reason}); free some space or choose another place") from error


def load(llm: Llama, path: Path) -> dict[str, Any]:
    """See ``Llama.load_session``."""
    try:
        saved = read(path)
    except MemoryError as error:
        raise SessionError(f"memory ran out while {str(path)!r} was read; close something, the session in hand goes on") from error
    try:
        _check(llm, saved, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, "its description lacks something") from error
    with native.quiet():
        pointer = saved.state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        good = llama_cpp.llama_state_set_data(llm.ctx, pointer, len(saved.state)) == len(saved.state)
    llm.n_tokens = len(saved.tokens) if good else 0
    llm.input_ids[: llm.n_tokens] = saved.tokens[: llm.n_tokens]
    llm._requires_eval = True
    llm._forget()
    if not good:
        raise SessionError(f"llama.cpp could not take in the state in {str(path)!r}; the context is empty now, start over")
    if llm.sparse is not None:
        try:
            llm.session.restore(saved.meta["numbers"], saved.arrays, llm.n_tokens)
        except (KeyError, TypeError, ValueError):  # the history is made again, from the last tokens
            llm.session.forget()
    llm._seed = saved.meta["seed"]
    return saved.meta["about"]


def made_with(llm: Llama) -> dict[str, Any]:
    """What decides the bytes of a state, the tokens aside: the model's file, and settings of the KV cache."""
    params = llm.context_params
    deciding = (*OF_THE_CACHE, *(OF_WINDOWS if llm.header.n_swa else ()))
    settings = {name: str(getattr(params, name)) for name, *_ in params._fields_ if name.startswith(deciding)}
    changes = {"lora_path": str(llm.lora_path), "lora_scale": llm.lora_scale, "kv_overrides": str(llm.kv_overrides)}
    file = Path(llm.model_path).stat()
    digest = _model_digest(llm.model_path, file.st_size, file.st_mtime_ns)
    return {"model": [file.st_size, digest], "state_version": llama_cpp.LLAMA_SESSION_VERSION, **settings, **changes}


def read_meta(path: Path) -> dict[str, Any]:
    """``Saved.meta``, without a look at the rest.

    Raises
    ------
    SessionError
        The file is missing, of another kind or version, or cut short.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL.size - LENGTH.size))
            end = file.read()
            if len(end) < TAIL.size + LENGTH.size or not end.endswith(MAGIC):
                raise SessionError(f"{str(path)!r} is not a session of kvcast, or was cut short; {REMEDY}")
            _, version, _ = TAIL.unpack(end[LENGTH.size :])
            if version != VERSION:
                raise SessionError(
                    f"{str(path)!r} is a session of version {version}, and this kvcast reads {VERSION}; use the kvcast that wrote it"
                )
            n_bytes = min(size - len(end), *LENGTH.unpack(end[: LENGTH.size]))
            file.seek(size - len(end) - n_bytes)
            meta = json.loads(file.read(n_bytes))
            if not isinstance(meta, dict):
                raise ValueError("no description")
            return meta
    except OSError as error:
        raise SessionError(f"the session {str(path)!r} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its description cannot be read") from error


def read(path: Path) -> Saved:
    """Read and check a file.

    Raises
    ------
    SessionError
        It is missing, of another kind or version, cut short or damaged.
    """
    meta = read_meta(path)
    with path.open("rb") as file:
        n_checked = file.seek(0, os.SEEK_END) - TAIL.size
        if _checksum(file, n_checked) != TAIL.unpack(file.read())[0]:
            raise _damaged(path, "its checksum does not match")
        file.seek(0)
        try:
            _, _, n_tokens = STATE_HEADER.unpack(file.read(STATE_HEADER.size))
            tokens = np.frombuffer(file.read(4 * n_tokens), np.int32)
            begin = file.tell()
            file.seek(meta["n_state"], os.SEEK_CUR)
            with np.load(io.BytesIO(file.read(meta["n_arrays"]))) as arrays:
                return Saved(meta, tokens, np.memmap(path, np.uint8, "r", begin, (meta["n_state"],)), dict(arrays))
        except UNREADABLE as error:
            raise _damaged(path, "its parts are not where its description says") from error


def remove_partial(folder: Path, name: str = "") -> None:
    """Remove what processes that are gone left half-written in a folder: of all files, or of one."""
    for partial in folder.glob("*.part"):
        stem, _, process = partial.name.removesuffix(".part").rpartition(".")
        if process.isdigit() and stem == (name or stem) and not psutil.pid_exists(int(process)):
            partial.unlink(missing_ok=True)


# ---- inside


def _damaged(path: Path, how: str) -> SessionError:
    return SessionError(f"{str(path)!r} is damaged: {how}; {REMEDY}")


def _check(llm: Llama, saved: Saved, path: Path) -> None:
    """Whether this model can go on with it."""
    theirs, ours = saved.meta["made_with"], made_with(llm)
    if not (isinstance(saved.meta["numbers"], dict) and isinstance(saved.meta["about"], dict) and isinstance(saved.meta["seed"], int)):
        raise TypeError("a field is of another type")
    if not (saved.tokens < llm.n_vocab()).all() or not (saved.tokens >= 0).all():
        raise TypeError("a token that the model does not have")
    if theirs["model"] != ours["model"]:
        raise SessionError(f"{str(path)!r} was saved with another model, {saved.meta['model']!r}; load that one to go on with it")
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise SessionError(
                f"{str(path)!r} was saved with {name}={theirs.get(name)}, and this model is loaded with {value}; load it with the same"
            )
    if len(saved.tokens) > llm.n_ctx():
        raise SessionError(
            f"{str(path)!r} holds {len(saved.tokens)} tokens, and the context {llm.n_ctx()}; load the model with a larger n_ctx (--context)"
        )


def _write(path: Path, llm: Llama, meta: dict[str, Any], arrays: dict[str, Any]) -> None:
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    n_state = llama_cpp.llama_state_get_size(llm.ctx)
    description = json.dumps({**meta, "n_state": n_state, "n_arrays": packed.getbuffer().nbytes}).encode()
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        partial.open("wb").close()  # says why it cannot be, which llama.cpp does not
        tokens = (llama_cpp.llama_token * llm.n_tokens)(*llm.input_ids[: llm.n_tokens].tolist())
        with native.quiet():
            good = llama_cpp.llama_state_save_file(llm.ctx, os.fsencode(partial), tokens, llm.n_tokens)
        if not good or partial.stat().st_size != STATE_HEADER.size + 4 * llm.n_tokens + n_state:
            raise OSError("llama.cpp could not write all of it")
        with partial.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(packed.getbuffer())
            file.write(description)
            file.write(LENGTH.pack(len(description)))
            checksum = _checksum(file, file.tell())
            file.write(TAIL.pack(checksum, VERSION, MAGIC))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _checksum(file: IO[bytes], n_bytes: int) -> bytes:
    """Of the first bytes of a file, which is left where they end."""
    file.seek(0)
    digest = hashlib.blake2b(digest_size=32)
    while n_bytes > 0:
        chunk = file.read(min(CHUNK, n_bytes))
        if not chunk:
            break
        digest.update(chunk)
        n_bytes -= len(chunk)
    return digest.digest()


@functools.lru_cache(maxsize=8)
def _model_digest(path: str, size: int, mtime_ns: int) -> str:
    """A hash of both ends of a file: a GGUF's header with all metadata, and the last weights. A whole file takes too long."""
    with open(path, "rb") as file:
        digest = hashlib.blake2b(file.read(CHUNK))
        file.seek(max(0, size - CHUNK))
        digest.update(file.read(CHUNK))
    return digest.hexdigest()
