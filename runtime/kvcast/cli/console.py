"""Where commands write: tables to stdout, notes and progress to stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .. import models
from ..terminal import Console

console = Console(emoji=False)
notes = Console(stderr=True, emoji=False)


@contextlib.contextmanager
def progress(title: str) -> Iterator:
    """A progress bar on stderr; yields ``update(done, total)``."""
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=notes,
        transient=True,
        disable=not notes.is_terminal,
    )
    with bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def fetched(name: str) -> Path:
    with progress(f"fetching {name}") as update:
        return models.resolve(name, lambda n_bytes, n_all: update(n_bytes >> 20, n_all >> 20))  # MiB


def say(text: str) -> None:
    notes.print(text, highlight=False, markup=False, soft_wrap=True)
