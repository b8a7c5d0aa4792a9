"""A session as one file: llama.cpp's own state file, behind it what kvcast remembers of attention, what both were made with, and
a checksum. Sessions that users save and the documents that are kept on disk (``cache.py``) are such files.

Layout: llama.cpp's state file (tokens and KV cache) | arrays, .npz | JSON | its length | ``TAIL``: BLAKE2b of everything before it,
version, magic. A file is written beside its name and takes the name when all of it is on the disk.

Anybody can make a file whose checksum fits. So every value is looked at for type, range, shape and size before it is used, and all of
them before anything of the session in hand is touched.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import struct
import tokenize
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from .. import files
from ..bindings import api as native
from ..blocks import BLOCK_TOKENS
from ..engine import known, saving
from ..engine.checkpoints import N_HELD, N_KEPT
from ..errors import SessionDamaged, SessionError
from ..gguf import identity
from ..terminal import line

if TYPE_CHECKING:
    from .model import Llama

VERSION = 2
LISTED = (1, VERSION)  # versions whose description says what they are
MAGIC = b"\x00kvcast\n"
LENGTH = struct.Struct("<Q")
TAIL = struct.Struct("<32sI8s")
STATE_HEADER = struct.Struct("<III")  # llama.cpp's magic and version, number of tokens
CHUNK = 1 << 24
DESCRIPTION_MAX = 1 << 26  # bytes; of a document in the cache a few hundred
N_BYTES_MAX = 1 << 53
WORTH_A_LOOK = 1 << 30  # bytes that are read to say more precisely why a file is refused
REMEDY = "use a copy of it, or start over"
OF_THE_CACHE = ("rope_", "yarn_", "type_k", "type_v", "flash_attn", "attention_type")  # context parameters that a state depends on
OF_WINDOWS = ("swa_full", "n_ubatch")  # the same of a model with sliding-window layers
# what NumPy raises on a header that is none
UNREADABLE = (ValueError, TypeError, KeyError, SyntaxError, OverflowError, EOFError, RecursionError)
OF_CHECKPOINT = re.compile(r"^checkpoint[0-9]_")  # a place to go back to has arrays of the same kinds
ARRAYS: dict[str, np.dtype] = {"averages": np.dtype("<f4"), "last_steps": np.dtype("<f4"), "summary": np.dtype("u1")}


@dataclass(frozen=True, slots=True)
class Meta:
    """A file's description, checked.

    Attributes
    ----------
    made_with : dict
        See ``made_with``.
    model : str
        A file name.
    n_tokens : int
    seed : int
    numbers : dict
        Of the session; see ``Session.restore``.
    about : dict
        The caller's.
    n_state, n_arrays : int
        Bytes.
    """

    made_with: dict[str, Any]
    model: str
    n_tokens: int
    seed: int
    numbers: dict[str, Any]
    about: dict[str, Any]
    n_state: int
    n_arrays: int

    def __post_init__(self) -> None:
        good = isinstance(self.model, str) and all(isinstance(x, dict) for x in (self.made_with, self.numbers, self.about))
        good &= all(type(x) is int and 0 <= x < N_BYTES_MAX for x in (self.n_tokens, self.n_state, self.n_arrays))
        if not good or type(self.seed) is not int or not -(1 << 63) <= self.seed < 1 << 63:
            raise TypeError("a field is of another type or size")


def save(llm: Llama, path: Path, about: dict[str, Any]) -> None:
    """See ``Llama.save_session``."""
    if llm.n_tokens > len(llm.input_ids):
        raise SessionError(
            f"the context holds {llm.n_tokens} tokens, and only {len(llm.input_ids)} of them are known; cut it with n_tokens"
        )
    origin = made_with(llm)
    numbers, arrays = ({}, {}) if llm.sparse is None else saving.save(llm.session, llm.n_tokens)
    llm._ctx.kv_cache_seq_rm(-1, llm.n_tokens, -1)
    llm._requires_eval = True  # logits are not saved: here as after a load, the last token is run once more where they are needed
    meta = {
        "made_with": origin,
        "model": Path(llm.model_path).name,
        "n_tokens": llm.n_tokens,
        "seed": llm._seed,
        "numbers": numbers,
        "about": about,
    }
    try:
        with files.replacing(path, private=True) as file:
            _write(file, llm, meta, arrays)
    except (native.StateRefused, ValueError) as error:
        raise SessionError(f"the session cannot be saved as {str(path)!r}: {error}, so that it could not be opened again") from error
    except (OSError, MemoryError) as error:
        reason = "memory ran out" if isinstance(error, MemoryError) else files.reason(error)
        raise SessionError(f"the session cannot be saved as {str(path)!r} ({reason}); free some space or choose another place") from error


def load(llm: Llama, path: Path, check: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
    """See ``Llama.load_session``."""
    with _open(path) as file:
        try:
            meta, tokens, arrays = _look_through(llm, file, path)
        except MemoryError as error:
            raise SessionError(f"memory ran out while {str(path)!r} was read; close something, the session in hand goes on") from error
        if check is not None:
            check(meta.about)
        try:
            file.seek(STATE_HEADER.size + 4 * meta.n_tokens)
            native.read_state(llm.ctx, lambda part: _fill(file, part), meta.n_state)
        except BaseException as error:
            _empty(llm)
            if not isinstance(error, (native.StateRefused, OSError, MemoryError)):  # Ctrl-C, say
                raise
            raise SessionError(f"{str(path)!r} changed while it was taken in ({error}); the context is empty now, start over") from error
    llm.n_tokens = meta.n_tokens
    llm.input_ids[: llm.n_tokens] = tokens
    llm._requires_eval = True
    llm._forget()
    if llm.sparse is not None:
        try:
            saving.restore(llm.session, meta.numbers, arrays, llm.n_tokens)
        except MemoryError:  # the history is made again, from the last tokens
            llm.session.forget()
    llm._seed = meta.seed
    return meta.about


def made_with(llm: Llama) -> dict[str, Any]:
    """What decides the bytes of a state, the tokens aside: the model's files, and settings of the KV cache.

    Raises
    ------
    SessionError
        The model's file was changed since it was loaded.
    """
    params = llm.context_params
    deciding = (*OF_THE_CACHE, *(OF_WINDOWS if llm.header.n_swa else ()))
    settings = {name: str(getattr(params, name)) for name, *_ in params._fields_ if name.startswith(deciding)}
    changes = {"lora": identity.digest(llm._lora_stamps), "lora_scale": llm.lora_scale, "kv_overrides": str(llm.kv_overrides)}
    return {"model": identity.digest(llm._stamps), "state_version": llama_cpp.LLAMA_SESSION_VERSION, **settings, **changes}


def read_meta(path: Path) -> dict[str, Any]:
    """The description of a file, without a look at the rest, so that what it says is not certain; also of an older version.

    Raises
    ------
    SessionError
        The file is missing or of another kind or version; ``SessionDamaged``: it was one, and was cut short or changed.
    """
    with _open(path) as file:
        return _description(file, path, LISTED)[0]


def check_place(path: Path) -> None:
    """Say now what would keep a session from being saved there or, where one is, from being opened.

    Raises
    ------
    SessionError
        There is no such folder, it cannot be written, or ``path`` is another kind of file.
    """
    try:
        files.check_place(path)
    except OSError as error:
        raise SessionError(f"no session can be saved as {str(path)!r} ({files.reason(error)}); choose another place") from error
    if path.exists():
        with _open(path) as file:
            _description(file, path, (VERSION,))


# ---- inside


def _damaged(path: Path, how: str) -> SessionDamaged:
    return SessionDamaged(f"{str(path)!r} is damaged: {how}; {REMEDY}", how)


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """The file, for one look at it: a save puts another in its place and leaves this one as it is."""
    try:
        with files.open_regular(path) as file:
            yield file
    except OSError as error:
        raise SessionError(f"the session {str(path)!r} cannot be read ({files.reason(error)}); check the path") from error


def _fill(file: IO[bytes], part: memoryview) -> None:
    while part:
        n = file.readinto(part)  # type: ignore[attr-defined]
        if not n:
            raise OSError("it became shorter while it was read")
        part = part[n:]


def _description(file: IO[bytes], path: Path, versions: tuple[int, ...]) -> tuple[dict[str, Any], int]:
    """What the end of a file says, and where that begins."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL.size - LENGTH.size))
    end = file.read(TAIL.size + LENGTH.size)
    if len(end) < TAIL.size + LENGTH.size or not end.endswith(MAGIC):
        message = f"{str(path)!r} is not a session of kvcast, or was cut short; {REMEDY}"
        file.seek(0)
        begin = file.read(STATE_HEADER.size)
        ours = len(begin) == STATE_HEADER.size and STATE_HEADER.unpack(begin)[0] == llama_cpp.LLAMA_SESSION_MAGIC
        raise SessionDamaged(message, "it was cut short") if ours else SessionError(message)
    _, version, _ = TAIL.unpack(end[LENGTH.size :])
    if version not in versions:
        why = ", which knows a model by a part of its file only" if version == 1 else ""
        raise SessionError(
            f"{str(path)!r} is a session of version {version}{why}, and this kvcast reads {VERSION}; "
            "use the kvcast that wrote it, or start over"
        )
    n_bytes = LENGTH.unpack(end[: LENGTH.size])[0]
    begin_of_it = size - len(end) - n_bytes
    if n_bytes > DESCRIPTION_MAX or begin_of_it < 0:
        raise _damaged(path, "its description has no such length")
    file.seek(begin_of_it)
    try:
        meta = json.loads(file.read(n_bytes))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its description cannot be read") from error
    if not isinstance(meta, dict):
        raise _damaged(path, "its description cannot be read")
    return meta, begin_of_it


def _look_through(llm: Llama, file: IO[bytes], path: Path) -> tuple[Meta, npt.NDArray[np.int32], dict[str, np.ndarray]]:
    """Read and check a whole file, for this model. Nothing of the model is touched."""
    found, end = _description(file, path, (VERSION,))
    try:
        meta = Meta(**found)
    except TypeError as error:
        raise _damaged(path, "its description lacks something") from error
    try:
        _check_origin(llm, meta, path)
    except SessionError as error:  # of a description that may be damaged
        if end < WORTH_A_LOOK and _checksum(file) != _kept_checksum(file):
            raise _damaged(path, "its checksum does not match") from error
        raise
    if STATE_HEADER.size + 4 * meta.n_tokens + meta.n_state + meta.n_arrays != end:
        raise _damaged(path, "its parts are not where its description says")

    checksum = hashlib.blake2b(digest_size=32)

    def take(part: memoryview) -> None:
        _fill(file, part)
        checksum.update(part)

    def take_bytes(n_bytes: int) -> bytes:
        taken = bytearray(n_bytes)
        take(memoryview(taken))
        return bytes(taken)

    file.seek(0)
    header = STATE_HEADER.unpack(take_bytes(STATE_HEADER.size))
    if header != (llama_cpp.LLAMA_SESSION_MAGIC, llama_cpp.LLAMA_SESSION_VERSION, meta.n_tokens):
        raise _damaged(path, "its beginning is not that of a state of llama.cpp")
    tokens = np.frombuffer(take_bytes(4 * meta.n_tokens), np.int32)
    if not ((tokens >= 0) & (tokens < llm.n_vocab())).all():
        raise _damaged(path, "it has a token that the model does not have")
    try:
        native.check_state(llm.ctx, take, meta.n_state, meta.n_tokens)
    except native.StateRefused as error:
        raise _damaged(path, f"of its state, {error}") from error
    packed = take_bytes(meta.n_arrays) if meta.n_arrays <= _most_packed(llm, meta.n_tokens) else b""
    if len(packed) < meta.n_arrays:
        raise _damaged(path, "its arrays are larger than this model's can be")
    while n := min(CHUNK, os.fstat(file.fileno()).st_size - TAIL.size - file.tell()):
        take_bytes(n)
    if checksum.digest() != _kept_checksum(file):
        raise _damaged(path, "its checksum does not match")
    if llm.sparse is None:
        return meta, tokens, {}
    try:
        arrays = _unpack(packed)
        known.check(meta.numbers, arrays, meta.n_tokens, llm.session.history, llm.session.attached)
    except UNREADABLE as error:
        raise _damaged(path, f"of what it remembers of attention, {_said(error)}") from error
    return meta, tokens, arrays


def _checksum(file: IO[bytes]) -> bytes:
    """Of all but the tail."""
    n_bytes = file.seek(0, os.SEEK_END) - TAIL.size
    file.seek(0)
    digest = hashlib.blake2b(digest_size=32)
    while chunk := file.read(min(CHUNK, n_bytes)):
        digest.update(chunk)
        n_bytes -= len(chunk)
    return digest.digest()


def _kept_checksum(file: IO[bytes]) -> bytes:
    file.seek(-TAIL.size, os.SEEK_END)
    return TAIL.unpack(file.read(TAIL.size))[0]


def _said(error: BaseException) -> str:
    return line(str(error))[:200] if isinstance(error, ValueError) else "a part cannot be read"


def _check_origin(llm: Llama, meta: Meta, path: Path) -> None:
    """Whether this model can go on with it."""
    theirs, ours = meta.made_with, made_with(llm)
    if theirs.get("model") != ours["model"]:
        raise SessionError(f"{str(path)!r} was saved with another model, {meta.model[:200]!r}; load that one to go on with it")
    for name, value in ours.items():
        if theirs.get(name) != value:
            if name == "lora":
                raise SessionError(f"{str(path)!r} was saved with another LoRA, or with none; load the model with the same")
            their = line(str(x)[:200]) if isinstance(x := theirs.get(name), (str, int, float)) else "nothing that can be read"
            raise SessionError(f"{str(path)!r} was saved with {name}={their}, and this model is loaded with {value}; load it with the same")
    n_ctx = min(llm.n_ctx(), len(llm.input_ids))
    if meta.n_tokens > n_ctx:
        raise SessionError(
            f"{str(path)!r} holds {meta.n_tokens} tokens, and the context {n_ctx}; load the model with a larger n_ctx (--context)"
        )


def _most_packed(llm: Llama, n_tokens: int) -> int:
    """Bytes that arrays can have: those of a file that was made with this model, with any settings."""
    header = llm.header
    rows, dims, n_blocks = header.n_layer * header.n_head_kv, header.head_dim_k, n_tokens // BLOCK_TOKENS
    return (2 + N_KEPT + N_HELD) * 4 * rows * ((MOST_STEPS + 8) * n_blocks + 8 * dims) + (1 << 16)


MOST_STEPS = 256  # of last_steps; the published predictors keep some 70


def _unpack(packed: bytes) -> dict[str, np.ndarray]:
    """The arrays of an .npz as ``np.savez`` writes it: not compressed, each once, of one of our names and its type.

    Raises
    ------
    ValueError, and what NumPy raises
        It is another one.
    """
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                plain = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size and not member.flag_bits & 1
                if not plain:
                    raise ValueError("its parts are not where they should be, or packed")
                kind: np.dtype | None = ARRAYS.get(OF_CHECKPOINT.sub("", name))
                if kind is None or name in arrays or not member.filename.endswith(".npy"):
                    raise ValueError(f"{name[:40]!r} is not one of its arrays, or there twice")
                arrays[name] = _array(archive.read(member), kind, name)
    except (zipfile.BadZipFile, struct.error, NotImplementedError, OSError, RuntimeError, LookupError) as error:
        raise ValueError("its parts are not where they should be") from error
    return arrays


def _array(data: bytes, kind: np.dtype, name: str) -> np.ndarray:
    """An array in NumPy's own format, little-endian, in C's order, without objects."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError(f"{name} is of another version of NumPy's format")
    try:
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    except (MemoryError, tokenize.TokenError) as error:  # the first is what Python's parser says of what is nested too deep
        raise ValueError(f"{name} has no header that can be read") from error
    good = dtype == kind and not (fortran and len(shape) > 1) and all(type(n) is int and n >= 0 for n in shape)
    if not good or math.prod(shape) * kind.itemsize != len(data) - file.tell():
        raise ValueError(f"{name} is of another type or size")
    return np.frombuffer(data, kind, offset=file.tell()).reshape(shape)


def _empty(llm: Llama) -> None:
    """The store was emptied by a load that failed."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(llm.ctx), True)
    llm.n_tokens = 0
    llm._requires_eval = True
    llm._forget()


def _write(file: IO[bytes], llm: Llama, meta: dict[str, Any], arrays: dict[str, Any]) -> None:
    checksum = hashlib.blake2b(digest_size=32)

    class Out:
        def write(self, part: Any) -> None:
            file.write(part)
            checksum.update(part)

    out: Any = Out()
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    out.write(STATE_HEADER.pack(llama_cpp.LLAMA_SESSION_MAGIC, llama_cpp.LLAMA_SESSION_VERSION, llm.n_tokens))
    out.write(np.ascontiguousarray(llm.input_ids[: llm.n_tokens], np.int32).tobytes())
    n_state = native.write_state(llm.ctx, out)
    out.write(packed.getbuffer())
    meta = {**meta, "n_state": n_state, "n_arrays": packed.getbuffer().nbytes}
    description = json.dumps(meta).encode()
    if len(description) > DESCRIPTION_MAX:
        raise OSError(f"what is kept with it has {len(description)} bytes, and {DESCRIPTION_MAX} is the most")
    out.write(description)
    out.write(LENGTH.pack(len(description)))
    file.write(TAIL.pack(checksum.digest(), VERSION, MAGIC))
    # what would be refused is not kept
    Meta(**meta)
    if llm.sparse is not None:
        known.check(meta["numbers"], arrays, llm.n_tokens, llm.session.history, llm.session.attached)
    file.seek(STATE_HEADER.size + 4 * llm.n_tokens)
    native.check_state(llm.ctx, lambda part: _fill(file, part), n_state, llm.n_tokens)
