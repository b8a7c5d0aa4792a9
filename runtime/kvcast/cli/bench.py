"""``kvcast bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .. import files
from ..config import SparseConfig
from ..cores import usable_cores
from ..texts import DEFAULT_TEXT, read_text
from .console import console, fetched, notes
from .options import DEFAULT, Budget, Budgets, Calibrate, Grain, Hold, JsonFile, ModelName, Predictor, Prefetch, Threads, sparse_config


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
    budgets: Budgets = DEFAULT.budget_allocation,
    grain: Grain = DEFAULT.grain,
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
    from ..eval.bench import bench as run

    config, *also = (
        sparse_config(budget, predictor, hold, calibrate, budgets, grain, name, prefetch, untested=True) for name in path.split(",")
    )
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
    from ..eval.sweep import plot, sweep

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
