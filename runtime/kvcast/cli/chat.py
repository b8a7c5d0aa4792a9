"""``kvcast chat``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import GenerationError, KvcastError, SessionError
from ..texts import read_text
from .console import console, fetched, notes, progress, say
from .options import (
    DEFAULT,
    Budget,
    Budgets,
    Calibrate,
    Exact,
    GpuLayers,
    Grain,
    Hold,
    KvType,
    ModelName,
    Predictor,
    Prefetch,
    Threads,
    Untested,
    Where,
    placement,
    sparse_config,
)

if TYPE_CHECKING:
    from ..chat.conversation import Conversation, Signals
    from ..chat.documents import DocumentCache


def chat(
    model: ModelName = "smollm2",
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="A text file to talk about; repeatable.")] = None,
    budget: Budget = DEFAULT.budget,
    dense: Annotated[bool, typer.Option("--dense", help="Plain llama.cpp, no sparse attention.")] = False,
    context: Annotated[int, typer.Option(help="Tokens the context holds; 0: what the model was trained for.")] = 0,
    predictor: Predictor = DEFAULT.predictor,
    calibrate: Calibrate = DEFAULT.calibrate,
    hold: Hold = DEFAULT.hold,
    budgets: Budgets = DEFAULT.budget_allocation,
    grain: Grain = DEFAULT.grain,
    exact: Exact = DEFAULT.exact,
    path: Where = DEFAULT.path,
    prefetch: Prefetch = DEFAULT.prefetch,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    kv_type: KvType = "f16",
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.2,
    cache: Annotated[bool, typer.Option(help="Keep processed documents on disk, to open them again at once; see `kvcast cache`.")] = True,
    untested: Untested = DEFAULT.untested,
    session: Annotated[
        Path | None, typer.Option(help="Go on with the conversation in this file, if it is there, and keep it there.")
    ] = None,
) -> None:
    """Chat, about documents if any are given. Ctrl-C stops an answer; an empty line or Ctrl-D ends the chat."""
    from ..chat.conversation import Conversation, Signals
    from ..chat.documents import DocumentCache
    from ..gguf.support import sparse_if_tested
    from ..llama.model import Llama
    from ..llama.notes import notes_on
    from ..llama.session_file import check_place, made_with

    if session is not None:
        check_place(session)
    sparse = sparse_config(budget, predictor, hold, calibrate, budgets, grain, path, prefetch, untested, exact)
    document = "\n\n".join(read_text(path) for path in file or [])
    more = placement(gpu_layers, kv_type)
    gguf = fetched(model)
    config = sparse_if_tested(gguf, None if dense else sparse, say)
    if threads:
        more["n_threads"] = threads
    if config is None:
        more["flash_attn"] = True
    with contextlib.closing(Llama(gguf, n_ctx=context, sparse=config, verbose=False, **more)) as llm:
        for note in notes_on(llm, context, more):
            say(note)
        conversation = Conversation(llm, document)
        with Signals(conversation.stop) as signals:
            if session is not None:
                with notes.status("looking at the model's file"):
                    made_with(llm)  # now, while it is the one that was loaded
                if session.exists():
                    conversation.resume(session)
                    notes.print(f"opened a conversation of {llm.n_tokens:,} tokens", highlight=False)
            if document and not conversation.llm.n_tokens:
                _read_document(conversation, signals, DocumentCache() if cache else None, ", ".join(path.name for path in file or []))
            try:
                _converse(conversation, signals, session, max_tokens, temperature)
            finally:  # whatever ended it
                if session is not None and conversation.unsaved:
                    with signals.keeping():
                        conversation.save(session)


def _read_document(conversation: Conversation, signals: Signals, cache: DocumentCache | None, title: str) -> None:
    llm = conversation.llm
    with progress("reading the document") as update:
        if llm.sparse is not None:
            llm.session.observers.on_progress = update
        kept = False
        try:
            kept = conversation.read(cache, title)
        except GenerationError:
            if not conversation.stopped:
                raise
            notes.print("stopped before the document was read", highlight=False)
            signals.check()
            sys.exit(130)
        except KvcastError as error:  # it was read all the same
            notes.print(f"kvcast: {error}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if llm.sparse is not None:
        llm.session.observers.on_progress = None
    notes.print(f"{'opened' if kept else 'read'} {llm.n_tokens:,} tokens; ask away", highlight=False)


def _converse(conversation: Conversation, signals: Signals, session: Path | None, max_tokens: int, temperature: float) -> None:
    """Questions and answers, until an empty line or the end of the input."""
    warned = False
    while True:
        try:
            with signals.waiting():
                question = console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()
        except (EOFError, KeyboardInterrupt, OSError):  # the last: a terminal that is gone
            return
        if not question.strip():
            return
        for piece in conversation.ask(question, max_tokens=max_tokens, temperature=temperature):
            if signals.ending:
                conversation.stop()
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
        assert conversation.figures is not None
        notes.print(conversation.figures.line(), style="dim", highlight=False)
        if session is not None and conversation.is_small:
            try:
                with signals.keeping():
                    conversation.save(session)
            except SessionError as error:  # there may be room in the end
                if not warned:
                    notes.print(f"kvcast: {error}", style="yellow", highlight=False, markup=False, soft_wrap=True)
                warned = True
