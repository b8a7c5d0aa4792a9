"""Documents that were read once, kept on disk as llama.cpp's own state files, so that opening one again takes seconds.

An entry is found by what decides its bytes: the model file, the tokens, and the settings of the KV cache. The history of
attention is not kept: a session makes it again from the last 64 tokens.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import KvcastError

import llama_cpp  # isort: skip  (after kvcast's own, which say where the libraries are)

if TYPE_CHECKING:
    from .llama import Llama

FORMAT = 1
LIMIT_BYTES = 8 << 30
MIN_TOKENS = 512  # what is shorter is read as fast
CHUNK = 1 << 24
OF_THE_CACHE = ("rope_", "yarn_", "type_k", "type_v", "flash_attn")  # context parameters that a state depends on


@dataclass(frozen=True, slots=True)
class Entry:
    """A document on disk; ``title`` is the caller's, ``opened`` seconds since the epoch."""

    key: str
    title: str
    model: str
    n_tokens: int
    n_bytes: int
    crc32: int
    opened: float

    def __post_init__(self) -> None:
        texts, numbers = (self.key, self.title, self.model), (self.n_tokens, self.n_bytes, self.crc32, self.opened)
        if not all(isinstance(x, str) for x in texts) or not all(isinstance(x, int | float) for x in numbers):
            raise TypeError("a field is of another type")


def default_folder() -> Path:
    """``$KVCAST_DOCUMENTS``, else ``kvcast/documents`` in the user's cache folder."""
    if folder := os.environ.get("KVCAST_DOCUMENTS"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvcast" / "documents"


class DocumentCache:
    """A folder of processed documents, the least recently opened of which go when it grows past a limit.

    Parameters
    ----------
    folder : Path or None
        None: ``default_folder()``. Made when something is kept.
    limit_bytes : int
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int = LIMIT_BYTES):
        self.folder = folder or default_folder()
        self.limit_bytes = limit_bytes

    def entries(self) -> list[Entry]:
        """What is there, the most recently opened first."""
        found = []
        for path in self.folder.glob("*.json"):
            try:
                found.append(Entry(**json.loads(path.read_text(encoding="utf-8"))))
            except FileNotFoundError:  # another process opens it
                continue
            except (OSError, ValueError, TypeError):
                self._remove(path.stem)
        return sorted(found, key=lambda e: -e.opened)

    def load(self, llm: Llama, tokens: list[int]) -> bool:
        """Put the model into the state after ``tokens``. False: not there, or damaged and now removed; then nothing is evaluated."""
        key = self._key(llm, tokens)
        entry = next((e for e in self.entries() if e.key == key), None)
        if entry is None or entry.n_tokens != len(tokens) or len(tokens) > llm.n_ctx():
            return False
        path = self._state(key)
        try:
            good = path.stat().st_size == entry.n_bytes and _crc32(path) == entry.crc32
        except OSError:
            good = False
        known = (llama_cpp.llama_token * len(tokens))()
        n_known = ctypes.c_size_t()
        llm.reset()
        if good:
            good = llama_cpp.llama_state_load_file(llm.ctx, os.fsencode(path), known, len(tokens), ctypes.byref(n_known))
            good = good and list(known[: n_known.value]) == list(tokens)
        if llm.sparse is not None:
            llm.session.forget()
        if not good:
            self._remove(key)
            return False
        llm.input_ids[: len(tokens)] = np.asarray(tokens)
        llm.n_tokens = len(tokens)
        with contextlib.suppress(OSError):  # the state is there, whether or not this can be noted
            self._write(Entry(**{**asdict(entry), "opened": time.time()}))
        return True

    def save(self, llm: Llama, tokens: list[int], title: str) -> bool:
        """Keep the state, which is that after ``tokens``. False: too short to be worth it, or larger than the limit.

        Raises
        ------
        KvcastError
            The disk is full, or the folder cannot be written; nothing is lost but what had to make room.
        """
        n_bytes = llama_cpp.llama_state_get_size(llm.ctx)
        if len(tokens) < MIN_TOKENS or n_bytes > self.limit_bytes:
            return False
        key = self._key(llm, tokens)
        partial = self._state(key).with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(n_bytes)
            given = (llama_cpp.llama_token * len(tokens))(*tokens)
            if not llama_cpp.llama_state_save_file(llm.ctx, os.fsencode(partial), given, len(tokens)):
                raise OSError("llama.cpp could not write it")
            entry = Entry(key, title, Path(llm.model_path).name, len(tokens), partial.stat().st_size, _crc32(partial), time.time())
            self._remove(key)
            partial.replace(self._state(key))
            self._write(entry)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise KvcastError(
                f"the document cannot be kept in {str(self.folder)!r} ({error}); free some space or use --no-cache"
            ) from error
        return True

    def clear(self) -> int:
        """Remove everything; returns the bytes that were freed."""
        n_bytes = 0
        for path in [*self.folder.glob("*.json"), *self.folder.glob("*.kv"), *self.folder.glob("*.part")]:
            with contextlib.suppress(OSError):
                n_bytes += path.stat().st_size
                path.unlink()
        return n_bytes

    # ---- inside

    def _state(self, key: str) -> Path:
        return self.folder / f"{key}.kv"

    def _key(self, llm: Llama, tokens: list[int]) -> str:
        params = llm.context_params
        settings = {name: str(getattr(params, name)) for name, *_ in params._fields_ if name.startswith(OF_THE_CACHE)}
        changes = [str(llm.lora_path), llm.lora_scale, str(llm.kv_overrides)]
        about = json.dumps([FORMAT, _model_digest(Path(llm.model_path)), settings, changes], sort_keys=True)
        return hashlib.blake2b(about.encode() + np.asarray(tokens, np.int32).tobytes(), digest_size=16).hexdigest()

    def _write(self, entry: Entry) -> None:
        path = self.folder / f"{entry.key}.json"
        partial = path.with_suffix(f".{os.getpid()}.part")
        partial.write_text(json.dumps(asdict(entry)), encoding="utf-8")
        partial.replace(path)

    def _remove(self, key: str) -> None:
        for path in (self.folder / f"{key}.json", self._state(key)):
            with contextlib.suppress(OSError):
                path.unlink()

    def _make_room(self, n_bytes: int) -> None:
        for path in [*self.folder.glob("*.part"), *self.folder.glob("*.kv")]:  # of runs that were killed an hour ago or more
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > 3600 and (path.suffix == ".part" or not path.with_suffix(".json").exists()):
                    path.unlink()
        held = self.entries()
        while held and sum(e.n_bytes for e in held) + n_bytes > self.limit_bytes:
            self._remove(held.pop().key)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _model_digest(path: Path) -> list[Any]:
    """Size, and a hash of both ends: the header with all metadata, and the last weights. A whole file takes too long."""
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.blake2b(file.read(CHUNK))
        file.seek(max(0, size - CHUNK))
        digest.update(file.read(CHUNK))
    return [size, digest.hexdigest()]
