"""Texts from files, and the one that commands measure with."""

from __future__ import annotations

from pathlib import Path

from .errors import KvcastError


def read_text(path: Path) -> str:
    if not path.is_file():
        raise KvcastError(f"there is no file {str(path)!r}; check the path")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise KvcastError(f"{str(path)!r} is not UTF-8 text; convert it to plain text first") from None


DEFAULT_TEXT = Path(__file__).parent / "data" / "prose.txt"
