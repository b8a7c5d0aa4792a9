"""What kvcast can do with packages that it does not need otherwise."""

from __future__ import annotations

import importlib.metadata
import shlex
from types import ModuleType

from .errors import KvcastError


def install_line(extra: str) -> str:
    """The command that brings the packages of one of kvcast's extras, wherever kvcast itself was installed from."""
    try:
        requirements = importlib.metadata.requires("kvcast") or []
    except importlib.metadata.PackageNotFoundError:
        requirements = []
    mark = f"extra == '{extra}'"
    found = [shlex.quote(r.partition(";")[0].strip()) for r in requirements if mark in r.replace('"', "'")]
    return f"pip install {' '.join(found) or f'.[{extra}]'}"


def pyplot() -> ModuleType:
    """matplotlib's ``pyplot``, which draws into files.

    Raises
    ------
    KvcastError
        It is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise KvcastError(f"pictures need matplotlib, which is not installed; {install_line('plots')}") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
