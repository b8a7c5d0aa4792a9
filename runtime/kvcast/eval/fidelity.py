"""Dense against sparse over the same text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..llama.model import Llama
from ..sparse.baselines import PROMPT_STEPS
from .recovery import measure
from .selectors import Selector

MEANS = ("recovery", "middle_recovery", "output_error", "kl_mean", "kl_median", "kl_p99", "top1_agreement", "dense_steps")
DOCUMENTS = ("prose", "source:_pydecimal", "reference:ssl", "log:7", "talk:5")  # none of them was trained on


def documents(llm: Llama, paths: Sequence[Path], n_tokens: int, limit: int, *, whole: bool = False) -> dict[str, list[int]]:
    """Name to tokens, one more than ``n_tokens`` or all: of these files, or of five documents of different kinds; those that are too short
    are left out.

    Raises
    ------
    ValueError
        None is long enough.
    """
    from predictor_onnx import data

    from ..texts import DEFAULT_TEXT, read_text

    found: dict[str, list[int]] = {}
    longest = 0
    for name in paths or DOCUMENTS:
        if limit and len(found) == limit:
            break
        text = read_text(name) if isinstance(name, Path) else read_text(DEFAULT_TEXT) if name == "prose" else data.document(name)
        tokens = llm.tokenize(text.encode())
        longest = max(longest, len(tokens))
        if len(tokens) > n_tokens:
            found[name.stem if isinstance(name, Path) else name] = tokens if whole else tokens[: n_tokens + 1]
    if not found:
        raise ValueError(
            f"the longest document has {longest} tokens, and {n_tokens + 1} are needed; give a longer one (--text) or a smaller --context"
        )
    return found


def fidelity(
    llm: Llama,
    texts: Mapping[str, Sequence[int]],
    n_context: int,
    n_steps: int,
    selectors: Sequence[Selector],
    say: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Each selector on each document, and means over documents (perplexities: of all tokens together).

    Returns
    -------
    list of dict
        document, selector, budget, ppl_dense, ppl_sparse, kl_mean, kl_median, kl_p99 (nats; what the worst percent of tokens
        exceeds), top1_agreement, recovery, middle_recovery, ratio_to_oracle (of middle recovery), output_error, dense_steps (share).
    """
    llm.session.history.keep_steps(PROMPT_STEPS)
    rows: list[dict[str, Any]] = []
    total = len(texts) * (len(selectors) + 2)
    for i, (name, tokens) in enumerate(texts.items()):
        done = i * (len(selectors) + 2)
        say(done, total)
        llm.reset()
        llm.eval(tokens[:n_context])
        configs = [s.config for s in selectors if s.config is not None]

        def measured(k: int, done: int = done) -> None:
            say(done + k + 2, total)

        found = measure(llm, tokens[: n_context + n_steps + 1], n_context, configs, outputs=True, say=measured)
        for selector, result in zip(selectors, found, strict=True):
            r = asdict(result)
            rows.append(
                {
                    "document": name,
                    "selector": selector.name,
                    "n_tokens": r["n_steps"] - 1,
                    "kl_mean": r["kl"],
                    "top1_agreement": r["top1"],
                    "dense_steps": r["n_dense_steps"] / r["n_steps"],
                    **{k: r[k] for k in ("budget", "ppl_dense", "ppl_sparse", "kl_median", "kl_p99", "recovery", "recovery_interval")},
                    **{k: r[k] for k in ("middle_recovery", "middle_interval", "ratio_to_oracle", "output_error")},
                }
            )
    say(total, total)
    return rows + _means(rows)


def _means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    means = []
    for selector, budget in dict.fromkeys((r["selector"], r["budget"]) for r in rows):
        mine = [r for r in rows if (r["selector"], r["budget"]) == (selector, budget)]
        mean: dict[str, Any] = {"document": "mean", "selector": selector, "budget": budget, "n_documents": len(mine)}
        mean |= {k: float(np.mean([r[k] for r in mine])) for k in MEANS}
        mean |= {k: float(np.exp(np.mean([np.log(r[k]) for r in mine]))) for k in ("ppl_dense", "ppl_sparse")}
        means.append(mean)
    oracles = {m["budget"]: m["middle_recovery"] for m in means if m["selector"].startswith("oracle")}
    for m in means:
        m["ratio_to_oracle"] = m["middle_recovery"] / oracles[m["budget"]] if m["budget"] in oracles else None
    return means
