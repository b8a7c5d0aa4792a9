"""Documents that were read once, kept on disk as sessions (``session_file``), so that opening one again takes seconds.

An entry is found by what decides its bytes: the model file, the tokens, and the settings of the KV cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import session_file
from .errors import KvcastError, SessionError
from .folders import cache_folder

import llama_cpp  # isort: skip  (after kvcast's own, which say where the libraries are)

if TYPE_CHECKING:
    from .llama import Llama

LIMIT_BYTES = 8 << 30
MIN_TOKENS = 512  # what is shorter is read as fast


@dataclass(frozen=True, slots=True)
class Entry:
    """A document on disk; ``title`` is the caller's, ``opened`` seconds since the epoch."""

    key: str
    title: str
    model: str
    n_tokens: int
    n_bytes: int
    opened: float

    def __post_init__(self) -> None:
        if not (isinstance(self.title, str) and isinstance(self.model, str) and isinstance(self.n_tokens, int)):
            raise TypeError("a field is of another type")


def default_folder() -> Path:
    """``$KVCAST_DOCUMENTS``, else ``documents`` in the user's cache folder for kvcast."""
    return Path(os.environ.get("KVCAST_DOCUMENTS") or cache_folder() / "documents")


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
        """What is there, the most recently opened first; what cannot be read is removed."""
        found = []
        for path in self.folder.glob("*.kv"):
            try:
                meta, file = session_file.read_meta(path), path.stat()
                found.append(Entry(path.stem, meta["about"]["title"], meta["model"], meta["n_tokens"], file.st_size, file.st_mtime))
            except (SessionError, OSError, KeyError, TypeError):
                self._remove(path.stem)
        return sorted(found, key=lambda e: -e.opened)

    def load(self, llm: Llama, tokens: list[int]) -> bool:
        """Put the model into the state after ``tokens``. False: not there, or damaged and now removed; the session in hand goes on."""
        key = self._key(llm, tokens)
        path = self._path(key)
        if not path.exists() or len(tokens) > llm.n_ctx():
            return False
        try:
            llm.load_session(path)
        except SessionError as error:
            if not isinstance(error.__cause__, MemoryError):
                self._remove(key)
            return False
        with contextlib.suppress(OSError):  # the state is there, whether or not this can be noted
            os.utime(path)
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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(n_bytes)
            llm.save_session(self._path(self._key(llm, tokens)), {"title": title})
        except (OSError, SessionError) as error:
            reason = error.__cause__ if isinstance(error, SessionError) else error
            raise KvcastError(
                f"the document cannot be kept in {str(self.folder)!r} ({reason}); free some space or use --no-cache"
            ) from error
        return True

    def clear(self) -> int:
        """Remove everything; returns the bytes that were freed."""
        n_bytes = 0
        for path in [*self.folder.glob("*.kv"), *self.folder.glob("*.part")]:
            with contextlib.suppress(OSError):
                n_bytes += path.stat().st_size
                path.unlink()
        return n_bytes

    # ---- inside

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.kv"

    def _key(self, llm: Llama, tokens: list[int]) -> str:
        about = json.dumps([session_file.VERSION, session_file.made_with(llm)], sort_keys=True)
        return hashlib.blake2b(about.encode() + np.asarray(tokens, np.int32).tobytes(), digest_size=16).hexdigest()

    def _remove(self, key: str) -> None:
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _make_room(self, n_bytes: int) -> None:
        session_file.remove_partial(self.folder)
        held = self.entries()
        while held and sum(e.n_bytes for e in held) + n_bytes > self.limit_bytes:
            self._remove(held.pop().key)
