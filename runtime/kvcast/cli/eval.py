"""``kvcast eval``: what a budget costs in quality."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..files import write
from ..terminal import Console

app = typer.Typer(no_args_is_help=True, help="Quality against dense, on any model and text.", pretty_exceptions_enable=False)
console = Console(emoji=False)

ModelName = Annotated[str, typer.Option("--model", "-m", help="A name from `kvcast models` or a path to a .gguf file.")]
Budget = Annotated[list[str] | None, typer.Option(help="Tokens, or a share of the context as 1/13; repeatable. Default: 1/13.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads; all physical cores when not given.")]
Gpu = Annotated[int, typer.Option("--gpu-layers", help="Layers of weights on a GPU, -1 for all; the KV cache stays in host memory.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report to this file, a table beside it as .md, a plot as .png.")]
Seed = Annotated[int, typer.Option(help="Of the samples.")]


@app.command()
def fidelity(
    model: ModelName = "smollm2",
    context: Annotated[int, typer.Option(help="Tokens of prompt.")] = 4096,
    budget: Budget = None,
    text: Annotated[list[Path] | None, typer.Option(help="Documents; repeatable. Default: five of different kinds.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many documents; 0: all.")] = 0,
    steps: Annotated[int, typer.Option(help="Tokens that are scored after the context of each.")] = 256,
    selectors: Annotated[str, typer.Option(help="Comma-separated, see `kvcast eval selectors`.")] = (
        "default,stream,paper,ema,last,quest,snapkv,h2o,streaming,window,oracle"
    ),
    threads: Threads = None,
    gpu_layers: Gpu = 0,
    json_file: JsonFile = None,
) -> None:
    """Teacher-forced over documents: KL divergence, same token, perplexity, recovery, error of attention's output."""
    from ..eval.fidelity import documents, fidelity
    from ..eval.report import curves, fidelity_table, markdown, origin
    from .console import progress

    budgets = _budgets(budget, context)
    chosen = _selectors(selectors, budgets, dense=False)
    path, llm = _load(model, context + steps + 64, max(budgets), threads, gpu_layers)
    with contextlib.closing(llm):
        texts = documents(llm, text or [], context + steps, limit)
        with progress(f"{path.stem}, {context} tokens") as update:
            results = fidelity(llm, texts, context, steps, chosen, say=update)
    report = {**origin(path, context=context, steps=steps, documents=list(texts)), "results": results}
    means = [r for r in results if r["document"] == "mean"]
    title = f"{path.stem}, {context} tokens of context, {steps} scored, {', '.join(texts)}"
    _show(fidelity_table(means, brief=True))
    _write(json_file, report, lambda: markdown(fidelity_table(means), title))
    if json_file and len({r["budget"] for r in means}) > 1:
        curves(means, json_file.with_suffix(".png"), title)


@app.command("exact")
def exactness(
    model: ModelName = "smollm2",
    context: Annotated[int, typer.Option(help="Tokens of prompt.")] = 4096,
    budget: Budget = None,
    text: Annotated[list[Path] | None, typer.Option(help="Documents; repeatable. Default: five of different kinds.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many documents; 0: all.")] = 0,
    answers: Annotated[int, typer.Option(min=1, help="To each document, after parts of it.")] = 1,
    tokens: Annotated[int, typer.Option(min=2, help="Of an answer.")] = 100,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Exact answers (--exact) beside dense ones: equal tokens, drafts accepted, speed."""
    from ..config import SparseConfig
    from ..eval.exactness import exactness, rounding, table
    from ..eval.fidelity import documents
    from ..eval.report import markdown, origin
    from ..llama.model import Llama
    from .console import fetched, progress

    budget_tokens = _one_budget(budget, context)
    path = fetched(model)
    more: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads} if threads else {}
    more.update(n_ctx=-(-(context + tokens + 64) // 256) * 256, verbose=False)
    config = SparseConfig(budget=budget_tokens, exact=True, untested=True)
    with contextlib.closing(Llama(path, sparse=config, **more)) as exact, contextlib.closing(Llama(path, flash_attn=True, **more)) as dense:
        texts = documents(dense, text or [], context, limit, whole=answers > 1)
        with progress(f"{path.stem}, {context} tokens") as update:
            rows = exactness(dense, exact, texts, context, answers, tokens, update)
            moved = max(rounding(dense, text[:context], 16) for text in texts.values())
    _show(table(rows))
    console.print(f"gap: of dense's logits where answers part; evaluating a token in a batch alone moves them by up to {moved:.3f}")
    report = {**origin(path, context=context, budget=budget_tokens, tokens=tokens), "rounding": moved, "answers": rows}
    _write(
        json_file,
        report,
        lambda: markdown(table(rows), f"{path.stem}, {context} tokens, budget {budget_tokens}, {tokens} tokens an answer"),
    )


Tasks = Annotated[str, typer.Option(help="Comma-separated; `ruler` for the eleven, `all` with passkey and kv.")]
Samples = Annotated[int, typer.Option("--samples", "--limit", help="Samples a task.")]
Few = Annotated[int, typer.Option(help="Samples a task of selectors other than the first two; 0: as many.")]
Names = Annotated[str, typer.Option("--selectors", help="Comma-separated, see `kvcast eval selectors`.")]
Text = Annotated[Path | None, typer.Option("--haystack", help="Prose to hide needles in. Default: a novel that comes with kvcast.")]


def _command(turns: int) -> Callable[..., None]:
    def command(
        model: ModelName = "smollm2",
        context: Annotated[int, typer.Option(help="Tokens of prompt and answer.")] = 4096,
        budget: Budget = None,
        tasks: Tasks = "ruler",
        samples: Samples = 10,
        few: Few = 0,
        selectors: Names = "dense,default",
        haystack: Text = None,
        seed: Seed = 0,
        threads: Threads = None,
        gpu_layers: Gpu = 0,
        json_file: JsonFile = None,
    ) -> None:
        from ..eval.ask import run
        from ..eval.report import bars, markdown, origin, score_table, scores
        from ..eval.tasks import RULER, TASKS, sentences
        from ..texts import DEFAULT_TEXT, read_text
        from .console import progress

        wanted = {"ruler": RULER, "all": tuple(TASKS)}.get(tasks) or tuple(tasks.split(","))
        for task in wanted:
            if task not in TASKS:
                raise ValueError(f"there is no task {task!r}; choose of ruler, all, {', '.join(TASKS)}")
        one = _one_budget(budget, context)
        chosen = _selectors(selectors, [one], dense=True)
        path, llm = _load(model, context + 64, one, threads, gpu_layers)
        settings = dict(context=context, budget=one, turns=turns, seed=seed)
        about = {**origin(path, **settings), "haystack": haystack.stem if haystack else "prose"}
        prose = sentences(read_text(haystack or DEFAULT_TEXT))
        journal = json_file.with_suffix(".jsonl") if json_file else None
        with contextlib.closing(llm), progress(f"{path.stem}, {context} tokens") as update:
            done = run(llm, turns, wanted, range(samples), chosen, few, seed, context, prose, about, journal, update)
        results = scores(done)
        kind = "RULER-style" if turns == 1 else "The question in a later turn"
        title = f"{kind}, {path.stem}, {context} tokens, budget {one}"
        _show(score_table(results))
        _write(json_file, {**about, "results": results, "samples": done}, lambda: markdown(score_table(results), title))
        if json_file:
            bars(results, json_file.with_suffix(".png"), title)

    return command


app.command("ruler", help="RULER-style tasks, generated answers: needles, variables, words. Goes on where it was stopped.")(_command(1))
app.command("multiturn", help="The same tasks, the document first and the question only in a later turn.")(_command(2))


@app.command("selectors")
def list_selectors() -> None:
    """What can be compared. Settings may follow: default+min_recovery=0.9."""
    from ..eval.selectors import SELECTORS

    _show([["selector", ""], *([name, line] for name, (_, line) in SELECTORS.items())])


def _budgets(texts: list[str] | None, context: int) -> list[int]:
    from ..eval.selectors import budget_tokens

    return [budget_tokens(text, context) for text in texts or ["1/13"]]


def _one_budget(texts: list[str] | None, context: int) -> int:
    budgets = _budgets(texts, context)
    if len(budgets) > 1:
        raise ValueError("give one --budget at a time; this command compares at one")
    return budgets[0]


def _selectors(names: str, budgets: list[int], dense: bool):
    from ..eval.selectors import selector

    chosen = [selector(name, b) for b in budgets for name in names.split(",") if dense or name != "dense"]
    if not chosen:
        raise ValueError(f"--selectors {names!r} leaves nothing to measure beside dense; name one, for example default")
    return chosen


def _load(model: str, n_ctx: int, budget: int, threads: int | None, gpu_layers: int):
    from ..config import SparseConfig
    from ..llama.model import Llama
    from .console import fetched

    path = fetched(model)
    more: dict[str, Any] = {"n_threads": threads} if threads else {}
    n_ctx = -(-n_ctx // 256) * 256
    config = SparseConfig(budget=budget, trace=True, untested=True)
    return path, Llama(path, n_ctx=n_ctx, n_gpu_layers=gpu_layers, sparse=config, verbose=False, **more)


def _show(table: list[list[str]]) -> None:
    shown = Table(box=None, pad_edge=False)
    for i, column in enumerate(table[0]):
        shown.add_column(column, justify="left" if i == 0 else "right" if len(table[0]) > 2 else "left")
    for row in table[1:]:
        shown.add_row(*row)
    console.print(shown)


def _write(json_file: Path | None, report: dict[str, Any], table) -> None:
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write(json_file, json.dumps(report, indent=1) + "\n")
        write(json_file.with_suffix(".md"), table())
        console.print(f"written: {json_file}, {json_file.with_suffix('.md')}", highlight=False, markup=False, soft_wrap=True)
