"""``kvcast models``, ``doctor`` and ``cache``: what is on this machine."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from .. import models
from ..terminal import line
from .console import console, notes, say

if TYPE_CHECKING:
    pass


TITLE_MAX = 200  # characters of a document's title that are shown


def list_models() -> None:
    """List the models that can be fetched by name, and what is there."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "model", "licence", "MB", "context", "fetched", "for"):
        table.add_column(column, no_wrap=column not in ("model", "licence"))
    for m in models.MODELS:
        there = (models.cache_dir() / m.file).exists()
        use = "everyone" if m.offered else "tests"
        table.add_row(m.name, m.title, m.licence, f"{m.size_bytes / 1e6:.0f}", str(m.context), "yes" if there else "no", use)
    console.print(table)
    notes.print(f"kept in {models.cache_dir()}", highlight=False)


def doctor() -> None:
    """Say what this machine has for kvcast, what is missing, and what to do. Exit code 1 when something is to be done."""
    from ..planning.doctor import examine

    findings = examine()
    table = Table(box=None, pad_edge=False, show_header=False)
    for f in findings:
        table.add_row("!" if f.todo else "", f.what, f.found + (f"\n[bold]{escape(f.todo)}[/bold]" if f.todo else ""))
    console.print(table)
    if any(f.todo for f in findings):
        sys.exit(1)


def list_cache(clear: Annotated[bool, typer.Option("--clear", help="Remove them all.")] = False) -> None:
    """List the processed documents that `kvcast chat` and `serve` keep on disk, or remove them; what else is in their folder stays."""
    from ..chat.documents import DocumentCache

    documents = DocumentCache()
    if clear:
        notes.print(f"{documents.clear() / 1e6:.0f} MB freed", highlight=False)
    found = documents.look()
    held = found.entries
    if not clear:
        table = Table(box=None, pad_edge=False)
        for column in ("document", "model", "tokens", "MB", "opened"):
            table.add_column(column, justify="right" if column in ("tokens", "MB") else "left")
        for e in held:
            opened = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.opened))
            title, model = (escape(line(text[:TITLE_MAX])) for text in (e.title, e.model))
            table.add_row(title, model, f"{e.n_tokens:,}", f"{e.n_bytes / 1e6:.0f}", opened)
        console.print(table)
        total = sum(e.n_bytes for e in held)
        say(f"{total / 1e6:.0f} MB of {documents.limit_bytes / 1e6:.0f} in {documents.folder}")
    if found.damaged:
        say(f"{len(found.damaged)} damaged, which go when the next document is kept, or with --clear")
    if found.others:
        say(f"left alone, since no document or not to be read: {line(', '.join(p.name for p in found.others)[:1000])}")
