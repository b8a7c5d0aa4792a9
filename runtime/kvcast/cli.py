"""The ``kvcast`` command."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from predictor_onnx.cli import app as predictor_app

from . import files, models, tools
from .config import SparseConfig
from .cores import usable_cores
from .errors import GenerationError, KvcastError, SessionError
from .eval.cli import app as eval_app
from .extras import install_line
from .terminal import PLAIN, Console, line

from llama_cpp import _logger  # isort: skip  (after .config, which says where the libraries are)

if TYPE_CHECKING:
    from .cache import DocumentCache
    from .chat import Conversation, Signals

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Long context on your own hardware.", pretty_exceptions_enable=False)
app.add_typer(predictor_app, name="predictor")
app.add_typer(eval_app, name="eval")
app.command()(tools.plan)
app.command()(tools.inspect)
app.command()(tools.embed_predictor)
app.command()(tools.extract_predictor)
console = Console(emoji=False)
notes = Console(stderr=True, emoji=False)

ModelName = Annotated[str, typer.Option("--model", "-m", help="A name from `kvcast models` or a path to a .gguf file.")]
Budget = Annotated[int, typer.Option(help="Tokens each KV head attends to, sink and window included.")]
Predictor = Annotated[str, typer.Option(help="auto, ema, last, window, onnx:NAME; oracle, quest for evaluation.")]
Calibrate = Annotated[str, typer.Option(help="auto, summary, dense:M, host:M or off.")]
Budgets = Annotated[str, typer.Option(help="spread over layers and heads, or uniform.")]
Hold = Annotated[int | None, typer.Option(help="Steps for which a prediction is kept; 32 with a summary, else 8.")]
Where = Annotated[str, typer.Option(help="host: attend beside the store; device: from a pool on the device, prefetched.")]
Prefetch = Annotated[bool, typer.Option(help="Device path: bring blocks to the pool beside the steps.")]
GpuLayers = Annotated[int, typer.Option(help="Layers of weights on a GPU, -1 for all.")]
KvType = Annotated[str, typer.Option(help="Type of the KV cache: f16, bf16, q8_0 or q4_0.")]
Untested = Annotated[bool, typer.Option("--untested", help="Run a family sparse that no test covers, see docs/coverage.md.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads; all physical cores when not given.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]

DEFAULT = SparseConfig()
TITLE_MAX = 200  # characters of a document's title that are shown


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


def read_text(path: Path) -> str:
    if not path.is_file():
        raise KvcastError(f"there is no file {str(path)!r}; check the path")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise KvcastError(f"{str(path)!r} is not UTF-8 text; convert it to plain text first") from None


@app.command("models")
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


@app.command()
def doctor() -> None:
    """Say what this machine has for kvcast, what is missing, and what to do. Exit code 1 when something is to be done."""
    from .doctor import examine

    findings = examine()
    table = Table(box=None, pad_edge=False, show_header=False)
    for f in findings:
        table.add_row("!" if f.todo else "", f.what, f.found + (f"\n[bold]{escape(f.todo)}[/bold]" if f.todo else ""))
    console.print(table)
    if any(f.todo for f in findings):
        sys.exit(1)


@app.command("cache")
def list_cache(clear: Annotated[bool, typer.Option("--clear", help="Remove them all.")] = False) -> None:
    """List the processed documents that `kvcast chat` and `serve` keep on disk, or remove them; what else is in their folder stays."""
    from .cache import DocumentCache

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
        _say(f"{total / 1e6:.0f} MB of {documents.limit_bytes / 1e6:.0f} in {documents.folder}")
    if found.damaged:
        _say(f"{len(found.damaged)} damaged, which go when the next document is kept, or with --clear")
    if found.others:
        _say(f"left alone, since no document or not to be read: {line(', '.join(p.name for p in found.others)[:1000])}")


@app.command()
def chat(
    model: ModelName = "smollm2",
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="A text file to talk about; repeatable.")] = None,
    budget: Budget = DEFAULT.budget,
    dense: Annotated[bool, typer.Option("--dense", help="Plain llama.cpp, no sparse attention.")] = False,
    context: Annotated[int, typer.Option(help="Tokens the context holds; 0: what the model was trained for.")] = 0,
    predictor: Predictor = DEFAULT.predictor,
    calibrate: Calibrate = DEFAULT.calibrate,
    hold: Hold = DEFAULT.hold,
    budgets: Budgets = DEFAULT.budgets,
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
    from .cache import DocumentCache
    from .chat import Conversation, Signals
    from .llama import Llama
    from .session_file import check_place, made_with
    from .support import notes_on, sparse_if_tested

    if session is not None:
        check_place(session)
    sparse = _config(budget, predictor, hold, calibrate, budgets, path, prefetch, untested)
    document = "\n\n".join(read_text(path) for path in file or [])
    more = _placement(gpu_layers, kv_type)
    gguf = fetched(model)
    config = sparse_if_tested(gguf, None if dense else sparse, _say)
    if threads:
        more["n_threads"] = threads
    if config is None:
        more["flash_attn"] = True
    with contextlib.closing(Llama(gguf, n_ctx=context, sparse=config, verbose=False, **more)) as llm:
        for note in notes_on(llm, context, more):
            _say(note)
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
            llm.session.on_progress = update
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
        llm.session.on_progress = None
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


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A name from `kvcast models` or a path to a .gguf file. Default: smollm2.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in a JSON or YAML file, instead of MODEL and its options.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KVCAST_API_KEY", help="Clients must send it.")] = None,
    n_ctx: Annotated[
        int, typer.Option("--context", help="Tokens the context holds; 0: what the model was trained for, at most 32768.")
    ] = 0,
    budget: Budget = DEFAULT.budget,
    dense: Annotated[bool, typer.Option("--dense", help="Plain llama.cpp, no sparse attention.")] = False,
    predictor: Predictor = DEFAULT.predictor,
    calibrate: Calibrate = DEFAULT.calibrate,
    hold: Hold = DEFAULT.hold,
    budgets: Budgets = DEFAULT.budgets,
    path: Where = DEFAULT.path,
    prefetch: Prefetch = DEFAULT.prefetch,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    kv_type: KvType = "f16",
    allow_origin: Annotated[list[str] | None, typer.Option(help="Let pages of this origin use the API; repeatable.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name of this machine; repeatable.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep long first messages on disk, to open them again at once.")] = True,
    untested: Untested = DEFAULT.untested,
) -> None:
    """Serve the OpenAI API, and a page to chat on with a live map of the context. Ctrl-C ends it."""
    try:
        from .server.run import run
        from .server.settings import ModelSettings, ServerSettings, checked, read_config
    except ModuleNotFoundError as error:
        raise KvcastError(f"the server needs {error.name}, which is not installed; {install_line('serve')}") from error

    of_model = (
        "model", "n_ctx", "budget", "dense", "predictor", "calibrate", "hold", "budgets", "path", "prefetch", "threads", "gpu_layers",
        "kv_type", "untested",
    )  # fmt: skip
    given = [name for name in of_model if context.get_parameter_source(name).name == "COMMANDLINE"]
    if config is not None:
        if given:
            raise KvcastError(f"{given[0]} is given beside --config; write it into {str(config)!r}")
        server, found = read_config(config)
    else:
        sparse = _config(budget, predictor, hold, calibrate, budgets, path, prefetch, untested)
        name = model or "smollm2"
        more = _placement(gpu_layers, kv_type)
        if threads:
            more["n_threads"] = threads
        alias = name if models.find(name) else Path(name).stem
        values = {"model": name, "model_alias": alias, "n_ctx": n_ctx, "sparse": None if dense else sparse, **more}
        server, found = ServerSettings(), [checked(ModelSettings, values, "kvcast serve")]
    options = {"host": host, "port": port, "api_key": api_key, "allow_origins": allow_origin, "allow_hosts": allow_host}
    if api_key is None:  # click takes an empty variable for none
        options["api_key"] = os.environ.get("KVCAST_API_KEY")
    values = {name: value for name, value in options.items() if value is not None}
    if not cache:
        values["keep_documents"] = False
    server = checked(ServerSettings, {**server.model_dump(exclude_unset=True), **values}, "kvcast serve")
    for settings in found:
        fetched(settings.model)
    run(server, found, _say)


def _say(text: str) -> None:
    notes.print(text, highlight=False, markup=False, soft_wrap=True)


def _config(budget, predictor, hold, calibrate, budgets, path, prefetch, untested) -> SparseConfig:
    return SparseConfig(
        budget, None, predictor, hold=hold, calibrate=calibrate, budgets=budgets, path=path, prefetch=prefetch, untested=untested
    )


def _placement(gpu_layers: int, kv_type: str) -> dict[str, int]:
    """Arguments of Llama."""
    from .sizes import KV_TYPES

    if kv_type not in KV_TYPES:
        raise ValueError(f"the KV type is {kv_type!r}; choose one of {', '.join(KV_TYPES)}")
    return {"n_gpu_layers": gpu_layers, "type_k": KV_TYPES[kv_type], "type_v": KV_TYPES[kv_type]}


@app.command()
def bench(
    model: ModelName = "smollm2",
    context: Annotated[int, typer.Option(help="Tokens of prompt.")] = 7680,
    text: Annotated[
        list[Path] | None, typer.Option(help="Documents; speed is measured on the first. Default: a novel that comes with kvcast.")
    ] = None,
    budget: Budget = DEFAULT.budget,
    predictor: Predictor = DEFAULT.predictor,
    calibrate: Calibrate = DEFAULT.calibrate,
    hold: Hold = DEFAULT.hold,
    budgets: Budgets = DEFAULT.budgets,
    path: Annotated[str, typer.Option(help="host or device; host,device: both, side by side.")] = DEFAULT.path,
    prefetch: Prefetch = DEFAULT.prefetch,
    compare: Annotated[str, typer.Option(help="Other predictors to measure the recovery of, comma-separated.")] = "",
    steps: Annotated[int, typer.Option(help="Decode steps of a round.")] = 64,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are reported.")] = 5,
    sweep: Annotated[bool, typer.Option("--sweep", help="Contexts up to --context, budgets, holds; plots into out/.")] = False,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Measure sparse against dense: speed, KV read, recovery."""
    from .bench import bench as run

    config, *also = (_config(budget, predictor, hold, calibrate, budgets, name, prefetch, untested=True) for name in path.split(","))
    others = [name for name in compare.split(",") if name]
    for name in others:
        SparseConfig(predictor=name)
    texts = {path.stem: read_text(path) for path in text or [DEFAULT_TEXT]}
    file = fetched(model)
    if sweep:
        _sweep(file, next(iter(texts.values())), config, context, steps, rounds, threads or usable_cores(), json_file)
        return
    with notes.status("bench") as status:
        report = run(
            file, texts, context, config,
            n_threads=threads, n_steps=steps, n_rounds=rounds, predictors=others, also=also, say=status.update,
        )  # fmt: skip
    if json_file:
        files.write(json_file, json.dumps(report, indent=2) + "\n")
    show(report)


def _sweep(file, text, config, context, steps, rounds, threads, json_file) -> None:
    from .sweep import plot, sweep

    contexts = [context // 4 // 256 * 256, context // 2 // 256 * 256, context]
    budgets = sorted({256, config.budget, 2 * config.budget})
    with notes.status("sweep") as status:
        rows = sweep(
            file, text, config, contexts, budgets, [2, 4, 8, 16], n_threads=threads, n_steps=steps, n_rounds=rounds, say=status.update
        )
    if json_file:
        files.write(json_file, json.dumps({"model": file.name, "threads": threads, "rows": rows}, indent=2) + "\n")
    table = Table(box=None, pad_edge=False)
    for column in ("context", "budget", "hold", "tok/s", "recovery", "KL", "KB moved", "compression"):
        table.add_column(column, justify="right")
    for r in rows:
        figures = [f"{r['recovery']:.3f}", f"{r['kl']:.3f}"] if r["budget"] else ["", ""]
        if "compression" in r:
            figures += [f"{r['bytes_moved_per_step'] / 1e3:.0f}", f"{r['compression']:.1f}"]
        budget = [str(r["budget"]), str(r["hold"])] if r["budget"] else ["dense", ""]
        table.add_row(str(r["context"]), *budget, f"{r['tok_s']:.1f}", *figures)
    console.print(table)
    picture = Path("out") / f"sweep-{config.path}.png"
    plot(rows, config, picture, f"{file.stem}, {threads} threads, path={config.path}")
    notes.print(f"plots in {picture}", highlight=False)


@app.command()
def trace(
    model: ModelName = "smollm2",
    text: Annotated[list[Path] | None, typer.Option(help="Documents; repeatable. Default: the corpus of predictor_onnx.data.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of prompt; 0: 1536, 3072 and 6144 in turn. Shorter documents: what they have.")] = 0,
    steps: Annotated[int, typer.Option(help="Decode steps to record of each document.")] = 72,
    budget: Budget = DEFAULT.budget,
    predictor: Predictor = "ema",
    calibrate: Calibrate = DEFAULT.calibrate,
    hold: Hold = DEFAULT.hold,
    out: Annotated[Path, typer.Option(help="Folder; recordings go to OUT/MODEL. Those that are there are left alone.")] = Path(
        "out/traces"
    ),
    threads: Threads = None,
) -> None:
    """Record what the runtime observes of attention, and what attention then really does: data to train predictors on."""
    from predictor_onnx import data

    from .llama import Llama
    from .trace import record

    config = SparseConfig(budget=budget, predictor=predictor, calibrate=calibrate, hold=hold, untested=True)
    documents = [(path.stem, read_text(path)) for path in text] if text else [(name, data.document(name)) for name in data.NAMES]
    contexts = [context] if context else [1536, 3072, 6144]
    path = fetched(model)
    folder = out / path.stem
    more = {"n_threads": threads} if threads else {}
    with contextlib.closing(Llama(path, n_ctx=max(contexts) + steps + 64, sparse=config, verbose=False, **more)) as llm:
        with progress(f"recording {path.stem}") as update:
            for i, (name, content) in enumerate(documents):
                update(i, len(documents))
                target = folder / f"{name.replace(':', '_')}.npz"
                tokens = llm.tokenize(content.encode())
                n_context = min(contexts[i % len(contexts)], len(tokens) - steps)
                if target.exists():
                    continue
                if n_context < 2 * budget:
                    notes.print(f"{name} has {len(tokens)} tokens, too few at a budget of {budget}; left out", highlight=False)
                    continue
                if data.is_retrieval(name):
                    tokens = tokens[-n_context - steps :]
                record(llm, tokens[: n_context + steps], n_context, name).save(target)
    notes.print(f"{len(list(folder.glob('*.npz')))} recordings in {folder}", highlight=False)


DEFAULT_TEXT = Path(__file__).parent / "data" / "prose.txt"


def show(report: dict) -> None:
    """The report of ``bench`` as tables."""
    settings = ", ".join(f"{k}={v}" for k, v in report["config"].items() if v is not None)
    console.print(f"{report['model']}, context {report['context']}, {report['threads']} threads", highlight=False)
    console.print(f"SparseConfig({settings})", style="dim", highlight=False)
    speed = Table(box=None, pad_edge=False)
    for column in ("", "tok/s", "to dense", "first token", "KV read per token"):
        speed.add_column(column, justify="left" if not column else "right")
    dense, kv = report["dense"], report["kv"]
    flash = "on" if dense["flash_attn"] else "off"
    main, *others = report["paths"].items()
    rows = [
        (f"dense (flash attention {flash})", dense, kv["read_bytes_dense"]),
        (f"sparse, path={main[0]}", main[1], kv["read_bytes_sparse"]),
        *((f"sparse, path={name}", engine, None) for name, engine in others),
        ("sparse, frozen set", report["frozen"], None),
        (f"dense at context {report['dense_at_budget']['context']}", report["dense_at_budget"], None),
    ]
    for name, engine, read in rows:
        tok_s, prefill = engine["tok_s"], engine.get("prefill_tok_s")
        first = f"{report['context'] / prefill:.1f} s" if prefill else ""
        speed.add_row(name, f"{tok_s:.1f}", f"{tok_s / dense['tok_s']:.2f}x", first, f"{read / 1e6:.1f} MB" if read else "")
    console.print(speed)
    if pool := report["paths"].get("device"):
        console.print(
            f"on {pool['device']}: {pool['pool_bytes'] / 1e6:.1f} MB pool, {pool['staging_bytes'] / 1e6:.1f} staging, "
            f"{pool['tap_bytes'] / 1e6:.1f} taps; compression {pool['compression']:.1f}; "
            f"{pool['fill_bytes'] / 1e6:.1f} MB to fill it, then {pool['bytes_moved_per_step'] / 1e3:.0f} KB moved per token",
            highlight=False,
        )
    if forecast := report.get("simulated"):
        console.print(
            f"link simulator, from this trace of moves: {forecast['tok_s']:.1f} tok/s, measured {report['sparse']['tok_s']:.1f} "
            f"(link {forecast['link']['bytes_per_s'] / 1e9:.1f} GB/s, {1e6 * forecast['link']['latency_s']:.0f} us)",
            highlight=False,
        )
    table = Table(box=None, pad_edge=False)
    for column in ("document", "path", "predictor", "recovery", "middle", "KL", "same token", "churn/step"):
        table.add_column(column)
    for name, results in report["documents"].items():
        for r in results:
            table.add_row(
                name,
                r["path"],
                r["predictor"],
                f"{r['recovery']:.3f}",
                f"{r['middle_recovery']:.3f}",
                f"{r['kl']:.3f}",
                f"{r['top1']:.0%}",
                f"{r['churn']:.1%}",
            )
    console.print(table)
    parts = ", ".join(f"{name} {value:.2f}" for name, value in report["step_ms"].items())
    console.print(f"step, ms: {parts}", highlight=False)


def main() -> None:
    """Entry point: errors of ours are one sentence and exit code 1."""
    # llama-cpp-python 0.3.36 numbers ggml's log levels one too low and so prints warnings as errors
    _logger.GGML_LOG_LEVEL_TO_LOGGING_LEVEL.update({1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR})
    if logging.lastResort is not None:
        logging.lastResort.addFilter(PLAIN)
    try:
        app(standalone_mode=True)
    except (KvcastError, ValueError, TypeError) as error:
        notes.print(f"kvcast: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except MemoryError:
        notes.print("kvcast: memory ran out; close something, or use a smaller --context", style="red", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
