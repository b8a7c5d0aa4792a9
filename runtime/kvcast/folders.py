"""Where kvcast keeps what it can make again: one folder of the user's, wherever the system wants it."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """The user's cache folder for kvcast: ``$XDG_CACHE_HOME/kvcast`` and its like; a private folder among the temporary files where there
    is no home, as in containers. It need not exist, nor be writable."""
    return _of_user("kvcast") or _private_temporary()


def _of_user(name: str) -> Path | None:
    """The user's cache folder of a program; None without a home: platformdirs raises then, and older ones expand nothing."""
    try:
        path = Path(platformdirs.user_cache_dir(name, appauthor=False))
    except RuntimeError:
        return None
    return path if path.is_absolute() else None


def can_write(folder: Path) -> bool:
    """Whether files could be made in the folder, or in what would have to be made for it."""
    while not folder.exists():
        if folder.parent == folder:
            return False
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _private_temporary() -> Path:
    """One folder for this user, made now; nobody else's, and no link."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    path = Path(tempfile.gettempdir()) / f"kvcast-{user}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or (found.st_uid == user and not found.st_mode & 0o077)):
            return path
    except OSError:
        pass
    return Path(tempfile.gettempdir()) / f"kvcast-{user}-{os.getpid()}"


def keep_compiled_kernels() -> None:
    """Numba keeps what it compiles beside the source, else in the user's folders. Where neither can be written, it refuses to compile:
    name it a folder that can."""
    if os.environ.get("NUMBA_CACHE_DIR") or can_write(Path(__file__).parent / "__pycache__"):
        return
    users = _of_user("numba")
    if users is not None and can_write(users):
        return
    folder = cache_folder()
    if not can_write(folder):
        folder = _private_temporary()
    os.environ["NUMBA_CACHE_DIR"] = str(folder / "numba")
    if "numba" in sys.modules:  # it has looked at the environment already
        sys.modules["numba"].config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
