"""``kvcast bench --sweep``: one model over contexts, budgets and holds, and three plots.

Speeds are medians of rounds of teacher-forced steps; recovery is measured as everywhere (evaluate.py).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import SparseConfig
from ..extras import pyplot
from ..llama.model import Llama
from .bench import Engine, pool_report, tokens_of
from .recovery import measure


def sweep(
    path: Path,
    text: str,
    config: SparseConfig,
    contexts: Sequence[int],
    budgets: Sequence[int],
    holds: Sequence[int],
    *,
    n_threads: int,
    n_steps: int = 64,
    n_rounds: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Every budget at every context, and every hold at the longest context and ``config.budget``.

    Returns
    -------
    list of dict
        context, budget (0: dense), hold, tok_s; and of sparse ones recovery, kl, churn, and what ``bench`` reports of the pool.
    """
    shared: dict[str, Any] = dict(n_threads=n_threads, n_threads_batch=n_threads, verbose=False)
    rows = []
    for n_context in contexts:
        with contextlib.closing(Llama(path, n_ctx=n_context + 512, flash_attn=True, **shared)) as llm:
            tokens = tokens_of(llm, text, n_context + n_steps, "the text")
            say(f"context {n_context}: dense")
            llm.eval(tokens[:n_context])
            rows.append({"context": n_context, "budget": 0, "hold": 0, "tok_s": _speed(llm, tokens, n_context, n_rounds)})
        for budget in budgets:
            now = replace(config, budget=budget, trace=config.chooses_tokens)
            wanted = holds if budget == config.budget and n_context == max(contexts) else [config.steps_held]
            with contextlib.closing(Llama(path, n_ctx=n_context + 512, sparse=now, **shared)) as llm:
                say(f"context {n_context}, budget {budget}")
                llm.eval(tokens[:n_context])
                held = [replace(now, hold=hold) for hold in wanted]
                for hold, settings, result in zip(wanted, held, measure(llm, tokens, n_context, held)):
                    say(f"context {n_context}, budget {budget}, hold {hold}")
                    found = asdict(result)
                    llm.session.configure(settings)
                    row = {"context": n_context, "budget": budget, "hold": hold, "tok_s": _speed(llm, tokens, n_context, n_rounds)}
                    row |= {key: found[key] for key in ("recovery", "middle_recovery", "kl", "churn")}
                    rows.append(row | pool_report(llm.session, n_context, llm.session.times))
    return rows


def _speed(llm: Llama, tokens: Sequence[int], n_context: int, n_rounds: int) -> float:
    engine = Engine(llm, n_context, 0.0)
    for _ in range(n_rounds + 1):  # the first warms up
        engine.round(tokens[n_context:])
    return statistics.median(engine.rounds[1:])


def plot(rows: list[dict[str, Any]], config: SparseConfig, out: Path, title: str) -> None:
    """Tokens per second against context, bytes moved per token against hold, recovery against budget: one picture."""
    plt = pyplot()
    longest = max(r["context"] for r in rows)
    fig, (speed, moved, recovery) = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for budget in sorted({r["budget"] for r in rows}):
        line = [r for r in rows if r["budget"] == budget and r["hold"] in (0, config.steps_held)]
        name = f"budget {budget}" if budget else "dense"
        speed.plot([r["context"] for r in line], [r["tok_s"] for r in line], "o-" if budget else "ks--", label=name)
    speed.set(xlabel="context, tokens", ylabel="tokens per second", ylim=(0, None), title="speed")
    speed.legend()
    line = sorted((r for r in rows if r["context"] == longest and r["budget"] == config.budget), key=lambda r: r["hold"])
    line = [r for r in line if "bytes_moved_per_step" in r]
    moved.plot([r["hold"] for r in line], [r["bytes_moved_per_step"] / 1e3 for r in line], "o-")
    moved.set(xlabel="hold, steps", ylabel="KB moved per token", ylim=(0, None), title=f"traffic at {longest}, budget {config.budget}")
    for context in sorted({r["context"] for r in rows}):
        line = [r for r in rows if r["context"] == context and r["hold"] == config.steps_held]
        recovery.plot([r["budget"] for r in line], [r["recovery"] for r in line], "o-", label=f"context {context}")
    recovery.set(xlabel="budget, tokens", ylabel="recovery of attention", title="quality")
    recovery.legend()
    fig.suptitle(title)
    out.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(out, dpi=110)
    plt.close(fig)
