"""Documents that were read once, kept on disk as sessions (``session_file``), so that opening one again takes seconds.

An entry is found by what decides its bytes: the model file, the tokens, and the settings of the KV cache. The folder is its owner's
(0700). What lies there is removed when it is certainly one of these files, and certainly damaged, or has to make room.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import llama_cpp
import numpy as np

from .. import files
from ..errors import KvcastError, SessionDamaged, SessionError
from ..folders import cache_folder
from ..llama import session_file

if TYPE_CHECKING:
    from ..llama.model import Llama

LIMIT_BYTES = 8 << 30
MIN_TOKENS = 512  # what is shorter is read as fast
NAME = re.compile(r"[0-9a-f]{32}\.kv")

log = logging.getLogger("kvcast")


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


@dataclass(frozen=True, slots=True)
class Found:
    """What is in the folder."""

    entries: list[Entry] = field(default_factory=list)  # the most recently opened first
    damaged: list[Path] = field(default_factory=list)  # certainly documents, and certainly not whole
    others: list[Path] = field(default_factory=list)  # not ours, or not to be read now


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
        """The documents that are there, the most recently opened first. Nothing is removed."""
        return self.look().entries

    def look(self) -> Found:
        """What is there. Nothing is removed.

        Raises
        ------
        KvcastError
            The folder cannot be listed.
        """
        found = Found()
        try:
            paths = sorted(p for p in self.folder.iterdir() if p.name.endswith(".kv"))
        except FileNotFoundError:
            return found
        except OSError as error:
            raise KvcastError(
                f"the folder of documents {str(self.folder)!r} cannot be listed ({files.reason(error)}); check its permissions"
            ) from error
        for path in paths:
            if not NAME.fullmatch(path.name) or path.is_symlink():
                found.others.append(path)
                continue
            try:
                meta, file = session_file.read_meta(path), path.stat()
                entry = Entry(path.stem, meta["about"]["title"], meta["model"], meta["n_tokens"], file.st_size, file.st_mtime)
                found.entries.append(entry)
            except SessionDamaged:
                found.damaged.append(path)
            except (SessionError, OSError, KeyError, TypeError):
                found.others.append(path)
        found.entries.sort(key=lambda e: -e.opened)
        return found

    def load(self, llm: Llama, tokens: list[int]) -> bool:
        """Put the model into the state after ``tokens``. False: not there, or not to be opened; the session in hand goes on.

        One that is damaged is removed, which the log says.
        """
        try:
            path = self._path(self._key(llm, tokens))
            if not path.is_file() or len(tokens) > llm.n_ctx():
                return False
            llm.load_session(path)
        except SessionDamaged as error:
            log.warning("a kept document was damaged (%s) and is removed", error.how)
            self._remove(path.stem)
            return False
        except SessionError:
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
            files.private_folder(self.folder)
            self._make_room(n_bytes)
            llm.save_session(self._path(self._key(llm, tokens)), {"title": title})
        except (OSError, SessionError) as error:
            cause = error.__cause__ if isinstance(error, SessionError) else error
            why = files.reason(cause) if isinstance(cause, OSError) else getattr(cause, "how", cause or error)
            raise KvcastError(f"the document cannot be kept in {str(self.folder)!r} ({why}); free some space or use --no-cache") from error
        return True

    def clear(self) -> int:
        """Remove every document, also damaged ones, and what was left half-written; returns the bytes that were freed. What is not ours,
        or cannot be read, stays."""
        found = self.look()
        n_bytes = files.remove_left(self.folder)
        for path in [*(self._path(e.key) for e in found.entries), *found.damaged]:
            with contextlib.suppress(OSError):
                size = path.stat().st_size
                path.unlink()
                n_bytes += size
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
        files.remove_left(self.folder)
        found = self.look()
        for path in found.damaged:
            log.warning("a kept document was damaged and is removed: %s", path.name)
            self._remove(path.stem)
        held = found.entries
        while held and sum(e.n_bytes for e in held) + n_bytes > self.limit_bytes:
            self._remove(held.pop().key)
