"""Which model a session was made with: a hash of the whole content of its files.

A large file takes seconds, so what was found is remembered in the user's cache folder, with what changes when a file does. It is asked for
when a session is first saved or loaded, of the files that were loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..errors import KvcastError, SessionError
from ..folders import cache_folder

CHUNK = 1 << 24  # bytes that are hashed as one; the hash of a file is that of its chunks' hashes
N_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
N_REMEMBERED = 256  # files, the last ones asked for
SETTLED_S = 2.0  # a file that changed more recently may do so again without another time
MOST_BYTES = 1 << 20
NAME = "models.json"  # in a folder of its own


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file as it is at a moment; ``changed_ns`` is the time of the last change that nobody can set back."""

    path: str
    device: int
    inode: int
    n_bytes: int
    modified_ns: int
    changed_ns: int

    def is_content_of(self, other: Stamp) -> bool:
        """Whether nothing speaks for other content: a link more or other permissions do not."""
        return (self.device, self.inode, self.n_bytes, self.modified_ns) == (other.device, other.inode, other.n_bytes, other.modified_ns)


def files_of(path: str | os.PathLike[str], n_split: int = 1) -> list[str]:
    """All files of a model: of one in parts those that llama.cpp finds by the name of the first."""
    path = os.fspath(path)
    ending = f"-00001-of-{n_split:05d}.gguf"
    if n_split < 2 or not path.endswith(ending):
        return [path]
    return [f"{path.removesuffix(ending)}-{i:05d}-of-{n_split:05d}.gguf" for i in range(1, n_split + 1)]


def stamps(paths: Sequence[str]) -> list[Stamp]:
    """Of files about to be loaded. One that is missing has a stamp that no file has."""
    found = []
    for path in paths:
        try:
            found.append(_stamp(os.path.abspath(path), os.stat(path)))
        except OSError:
            found.append(Stamp(os.path.abspath(path), -1, -1, -1, -1, -1))
    return found


def digest(loaded: Sequence[Stamp]) -> str:
    """The hash of the content of files, as they were when they were loaded.

    Raises
    ------
    SessionError
        One of them is gone or was changed since.
    """
    return hashlib.blake2b("".join(_digest_of(stamp) for stamp in loaded).encode(), digest_size=32).hexdigest()


# ---- inside

_found: dict[Stamp, str] = {}  # in this process
_HEX = re.compile("[0-9a-f]{64}")


def _stamp(path: str, found: os.stat_result) -> Stamp:
    changed = found.st_mtime_ns if os.name == "nt" else found.st_ctime_ns  # there it is the time of creation
    return Stamp(path, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, changed)


def _digest_of(loaded: Stamp) -> str:
    path = Path(loaded.path)
    try:
        with files.open_regular(path) as file:
            now = _stamp(loaded.path, os.fstat(file.fileno()))
            if now.is_content_of(loaded):
                if found := _found.get(now) or _remembered().get(now):
                    return found
                asked = time.time_ns()
                found = _hash(file.fileno(), now.n_bytes)
                if _stamp(loaded.path, os.fstat(file.fileno())) == now:
                    _found[now] = found
                    if asked - max(now.modified_ns, now.changed_ns) > SETTLED_S * 1e9:
                        _remember(now, found)
                    return found
    except OSError as error:
        raise SessionError(
            f"the model's file {loaded.path!r} cannot be read ({files.reason(error)}), and sessions name a model by its content; "
            "put it back where it was"
        ) from error
    raise SessionError(
        f"the model's file {loaded.path!r} was changed after it was loaded, so that no session can name it; load the model again"
    )


def _hash(descriptor: int, n_bytes: int) -> str:
    lock = threading.Lock()

    def of_chunk(begin: int) -> bytes:
        wanted, parts = min(CHUNK, n_bytes - begin), []
        while wanted > 0:
            if hasattr(os, "pread"):
                part = os.pread(descriptor, wanted, begin)
            else:
                with lock:
                    os.lseek(descriptor, begin, os.SEEK_SET)
                    part = os.read(descriptor, wanted)
            if not part:
                break  # it became shorter; its stamp says so
            parts.append(part)
            begin += len(part)
            wanted -= len(part)
        hashed = hashlib.blake2b(digest_size=32)
        for part in parts:
            hashed.update(part)
        return hashed.digest()

    whole = hashlib.blake2b(n_bytes.to_bytes(8, "little"), digest_size=32)
    with ThreadPoolExecutor(N_THREADS, thread_name_prefix="kvcast-hash") as pool:
        for one in pool.map(of_chunk, range(0, n_bytes, CHUNK)):
            whole.update(one)
    return whole.hexdigest()


def _folder() -> Path:
    return cache_folder() / "identity"


def _remembered() -> dict[Stamp, str]:
    """What is known of files. Nothing where it could be somebody else's word."""
    try:
        with files.open_regular(_folder() / NAME) as file:
            found = os.fstat(file.fileno())
            if os.name == "posix" and (found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
                return {}
            known = json.loads(file.read(MOST_BYTES))
        return {Stamp(path, *numbers): found for path, (*numbers, found) in known.items() if _HEX.fullmatch(found)}
    except (KvcastError, OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _remember(stamp: Stamp, found: str) -> None:
    """For the next time; where it cannot be kept, that takes as long again."""
    known = {s: d for s, d in _remembered().items() if s.path != stamp.path}
    known[stamp] = found
    latest = {s.path: [s.device, s.inode, s.n_bytes, s.modified_ns, s.changed_ns, d] for s, d in list(known.items())[-N_REMEMBERED:]}
    with contextlib.suppress(KvcastError, OSError):
        files.private_folder(_folder())
        files.write(_folder() / NAME, json.dumps(latest) + "\n", private=True)
