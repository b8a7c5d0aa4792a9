"""Files as kvcast writes them: whole or not at all, on the disk when it is said, in the place of a regular file and of nothing else.

A file is written under a random name in the folder of its target, which it takes over when it is complete. Until then it is locked, so
that what a process left that is gone can be told from what another one, also in another container, is writing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import KvcastError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BEGIN, END = ".kvcast-", ".part"
DEAD_S = 86400  # after which what cannot be locked counts as left
MOST_LINKS, MOST_TRIES = 40, 100
FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@contextlib.contextmanager
def replacing(path: Path, *, private: bool = False) -> Iterator[IO[bytes]]:
    """A new file, to be written (and read) in the block; it takes the place of ``path`` when the block ends without an exception.

    A link is followed, and what it names is replaced. A file that was there leaves its permissions to the new one.

    Parameters
    ----------
    private : bool
        A file that was not there is for its owner only (0600).

    Raises
    ------
    OSError
        It cannot be written, or ``path`` is a folder, a pipe, a device or read-only; what was there is as it was.
    """
    target = _target(path)
    remove_left(target.parent)
    descriptor, partial = _create(target.parent, private)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            _take_over(descriptor, target)
            yield file
            file.flush()
            _sync(descriptor)
            if fcntl is not None:  # while it is locked
                os.replace(partial, target)
        if fcntl is None:  # Windows renames no open file
            os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    _sync_folder(target.parent)


def write(path: Path, content: bytes | str, *, private: bool = False) -> None:
    """Write a whole file; text as UTF-8.

    Raises
    ------
    KvcastError
        See ``replacing``.
    """
    try:
        with replacing(path, private=private) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise KvcastError(f"{str(path)!r} cannot be written ({reason(error)}); name another place, or make room there") from error


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. OSError also when it is a folder, a pipe or a device, which might never end or wait for ever."""
    _refuse_other_kinds(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | FLAGS | getattr(os, "O_NONBLOCK", 0))
    try:
        _refuse_other_kinds(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_place(path: Path) -> None:
    """Whether ``replacing`` can write there now: OSError if not."""
    target = _target(path)
    descriptor, partial = _create(target.parent, private=True)
    os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):  # somebody who looks for what was left was faster
        os.unlink(partial)


def private_folder(path: Path) -> None:
    """Make a folder that only its owner may look into (0700), and its parents; one that is there and ours is closed to others."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
        path = folder
    found = path.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    everybodys = found.st_mode & stat.S_ISVTX or path.parent == path
    if os.name == "posix" and found.st_uid == os.geteuid() and found.st_mode & 0o077 and not everybodys:
        path.chmod(stat.S_IMODE(found.st_mode) & 0o700)


def remove_left(folder: Path) -> int:
    """Remove what processes that are gone left half-written in a folder; returns the bytes. What is not ours, or being written, stays."""
    n_bytes = 0
    try:
        with os.scandir(folder) as entries:
            left = [e for e in entries if e.name.startswith(BEGIN) and e.name.endswith(END) and e.is_file(follow_symlinks=False)]
    except OSError:
        return 0
    for entry in left:
        with contextlib.suppress(OSError):
            n_bytes += _remove_if_left(entry.path)
    return n_bytes


def reason(error: OSError) -> str:
    """What the system says of an error, without numbers and paths."""
    return error.strerror or str(error)


# ---- inside


def _refuse_other_kinds(found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {KINDS.get(kind, 'something else')}, and not a regular file")


def _target(path: Path) -> Path:
    """The file that a name stands for."""
    for _ in range(MOST_LINKS):
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return path
        if not stat.S_ISLNK(found.st_mode):
            _refuse_other_kinds(found)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, "it is read-only")
            return path
        folder = os.stat(path.parent)
        if folder.st_mode & stat.S_ISVTX and folder.st_mode & 0o002 and found.st_uid not in (os.geteuid(), folder.st_uid):
            raise PermissionError(errno.EACCES, "it is a link of another user in a folder that is everybody's")
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _create(folder: Path, private: bool) -> tuple[int, Path]:
    """A new file of ours, locked."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | FLAGS
    for _ in range(MOST_TRIES):
        path = folder / f"{BEGIN}{secrets.token_hex(8)}{END}"
        descriptor = os.open(path, flags, 0o600 if private else 0o666)
        if _lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return descriptor, path
        os.close(descriptor)  # somebody who looks for what was left was faster, and removes it
    raise OSError(errno.EAGAIN, "other processes remove what is written there")


def _lock(descriptor: int) -> bool | None:
    """False: another process has it; None: files cannot be locked here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        return False if error.errno == errno.EAGAIN else None


def _remove_if_left(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR | FLAGS | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        found = os.fstat(descriptor)
        locked = _lock(descriptor)
        left = time.time() - found.st_mtime > DEAD_S if locked is None else locked
        if not left or (os.name == "posix" and found.st_uid != os.geteuid()):
            return 0
        if fcntl is not None:
            os.unlink(path)
    finally:
        os.close(descriptor)
    if fcntl is None:
        os.unlink(path)
    return found.st_size


def _take_over(descriptor: int, target: Path) -> None:
    """Give the new file the permissions of the one that it replaces."""
    if os.name != "posix":
        return
    try:
        found = os.stat(target)
    except FileNotFoundError:
        return
    mode = stat.S_IMODE(found.st_mode) & 0o777
    try:
        os.fchown(descriptor, found.st_uid, found.st_gid)
    except OSError:  # it is ours now, and our group is another
        mode &= ~0o070
    os.fchmod(descriptor, mode)


def _sync(descriptor: int) -> None:
    full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS, whose fsync leaves it in the disk's own memory
    if full is not None:
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, full)
            return
    os.fsync(descriptor)


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk, where the system does that of folders."""
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | FLAGS)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
