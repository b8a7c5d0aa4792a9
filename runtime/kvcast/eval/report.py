"""Reports of evaluations: where the figures come from, intervals, Markdown, plots."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from ..extras import pyplot


def origin(model: Path, **settings: Any) -> dict[str, Any]:
    """Model and its hash, version or commit of kvcast, machine, settings."""
    with open(model, "rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read())
    return {
        "model": model.name,
        "model_sha256": digest.hexdigest(),
        "kvcast": commit(),
        "machine": f"{platform.machine()}, {psutil.cpu_count(logical=False)} cores, {platform.system()}",
        **settings,
    }


def commit() -> str:
    """Of the checkout that runs; else the installed version."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        try:
            return importlib.metadata.version("kvcast")
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def mean_interval(values: Sequence[float], n_draws: int = 1000) -> tuple[float, tuple[float, float]]:
    """Mean and its 95 % bootstrap interval."""
    x = np.asarray(values, float)
    draws = x[np.random.default_rng(0).integers(len(x), size=(n_draws, len(x)))].mean(1)
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(x.mean()), (float(low), float(high))


def scores(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means by task and selector, in percent, and of paired differences to dense; ``task`` "mean" is the plain mean over tasks.

    Each sample: task, index, selector, score (0 to 1). The interval of the mean over tasks draws within every task.
    """
    by: dict[tuple[str, str], dict[int, float]] = {}
    for s in samples:
        by.setdefault((s["task"], s["selector"]), {})[s["index"]] = 100 * s["score"]
    tasks = list(dict.fromkeys(task for task, _ in by))
    found = []
    for selector in dict.fromkeys(s["selector"] for s in samples):
        differences = []
        for task in tasks:
            mine, dense = by.get((task, selector), {}), by.get((task, "dense"), {})
            if not mine:
                continue
            row: dict[str, Any] = {"task": task, "selector": selector, "n": len(mine)}
            row["score"], row["interval"] = mean_interval(list(mine.values()))
            if both := [mine[i] - dense[i] for i in mine if i in dense]:
                row["difference"], row["difference_interval"] = mean_interval(both)
                differences.append(both)
            found.append(row)
        rows = [r for r in found if r["selector"] == selector]
        if len(rows) == len(tasks) > 1:
            mean = float(np.mean([r["score"] for r in rows]))
            row = {"task": "mean", "selector": selector, "n": sum(r["n"] for r in rows), "score": mean}
            if len(differences) == len(tasks):
                rng = np.random.default_rng(0)
                draws = np.mean([np.asarray(d)[rng.integers(len(d), size=(1000, len(d)))].mean(1) for d in differences], axis=0)
                low, high = np.percentile(draws, [2.5, 97.5])
                row["difference"], row["difference_interval"] = float(np.mean([np.mean(d) for d in differences])), (float(low), float(high))
            found.append(row)
    return found


def score_table(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Header and a row for each selector, a column for each task; differences to dense in brackets under the mean."""
    tasks = list(dict.fromkeys(r["task"] for r in results))
    table = [["selector", *tasks]]
    for selector in dict.fromkeys(r["selector"] for r in results):
        cells = []
        for task in tasks:
            row = next((r for r in results if (r["task"], r["selector"]) == (task, selector)), None)
            cell = f"{row['score']:.1f}" if row else ""
            if row and task == "mean" and selector != "dense" and "difference" in row:
                cell += " ({:+.1f}, {:+.1f} to {:+.1f})".format(row["difference"], *row["difference_interval"])
            cells.append(cell)
        table.append([selector, *cells])
    return table


BRIEF = ("selector", "budget", "recovery", "kl_mean", "top1_agreement", "ppl_dense", "ppl_sparse")  # columns for a terminal
FIDELITY = (
    ("selector", "{}"),
    ("budget", "{}"),
    ("recovery", "{:.3f}"),
    ("middle_recovery", "{:.3f}"),
    ("ratio_to_oracle", "{:.3f}"),
    ("output_error", "{:.3f}"),
    ("kl_mean", "{:.4f}"),
    ("kl_median", "{:.4f}"),
    ("kl_p99", "{:.3f}"),
    ("top1_agreement", "{:.1%}"),
    ("ppl_dense", "{:.3f}"),
    ("ppl_sparse", "{:.3f}"),
    ("dense_steps", "{:.1%}"),
)


def fidelity_table(results: Sequence[dict[str, Any]], brief: bool = False) -> list[list[str]]:
    """Header and a row for each selector and budget; ``brief`` fits a terminal of 80 columns."""
    columns = [(name, form) for name, form in FIDELITY if not brief or name in BRIEF]
    rows = [["" if r.get(name) is None else form.format(r[name]) for name, form in columns] for r in results]
    return [[name.replace("_", " ") for name, _ in columns], *rows]


def markdown(table: Sequence[Sequence[str]], title: str, notes: Sequence[str] = ()) -> str:
    """A table as Markdown."""
    lines = [f"### {title}", "", *(f"- {n}" for n in notes), *([""] if notes else [])]
    lines += ["| " + " | ".join(row) + " |" for row in table[:1]]
    lines.append("| " + " | ".join("---" for _ in table[0]) + " |")
    lines += ["| " + " | ".join(row) + " |" for row in table[1:]]
    return "\n".join(lines) + "\n"


def bars(results: Sequence[dict[str, Any]], out: Path, title: str) -> None:
    """Scores by task, a bar for each selector."""
    plt = pyplot()
    tasks = list(dict.fromkeys(r["task"] for r in results))
    selectors = list(dict.fromkeys(r["selector"] for r in results))
    fig, axes = plt.subplots(figsize=(max(7, 1.3 * len(tasks)), 4.5), layout="constrained")
    for i, selector in enumerate(selectors):
        rows = [r for r in results if r["selector"] == selector]
        at = [tasks.index(r["task"]) + 0.8 * (i + 0.5) / len(selectors) - 0.4 for r in rows]
        axes.bar(at, [r["score"] for r in rows], 0.8 / len(selectors), label=selector)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set(ylabel="score, %", ylim=(0, 105), title=title)
    fig.legend(loc="outside right upper", frameon=False)
    _save(plt, fig, out)


def curves(results: Sequence[dict[str, Any]], out: Path, title: str) -> None:
    """Recovery, divergence and perplexity against the budget, a line for each selector."""
    plt = pyplot()
    fig, panels = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for selector in dict.fromkeys(r["selector"] for r in results):
        rows = sorted((r for r in results if r["selector"] == selector), key=lambda r: r["budget"])
        for axes, name in zip(panels, ("middle_recovery", "kl_mean", "ppl_sparse")):
            axes.plot([r["budget"] for r in rows], [r[name] for r in rows], "o-", label=selector)
    panels[2].axhline(results[0]["ppl_dense"], color="black", linestyle="--", label="dense")
    for axes, label in zip(panels, ("middle recovery", "KL to dense, nats, mean", "perplexity")):
        axes.set(xlabel="budget, tokens", ylabel=label)
    panels[1].set_yscale("log")
    panels[2].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
    fig.suptitle(title)
    _save(plt, fig, out)


def _save(plt, fig, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)
