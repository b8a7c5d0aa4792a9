"""Exact answers (``SparseConfig.exact``) beside dense ones: the same tokens? how many of the drafts were accepted, how fast?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..llama.model import Llama
from .recovery import next_logits


def _answer(llm: Llama, tokens: Sequence[int], n: int, each: Callable[[], None] = lambda: None) -> tuple[list[int], float]:
    """Greedy tokens after a prompt, at most ``n``, and those of them a second after the first."""
    found: list[int] = []
    begin = 0.0
    generate: Any = llm.generate
    for token in generate(list(tokens), temp=0.0, repeat_penalty=1.0):
        each()
        found.append(token)
        begin = begin or time.perf_counter()
        if len(found) == n:
            break
    return found, (len(found) - 1) / (time.perf_counter() - begin)


def rounding(dense: Llama, tokens: Sequence[int], n: int) -> float:
    """How near a tie is: by how much, at most, the logits of the two likeliest tokens move apart or together when a token is evaluated in a
    batch instead of alone, over the last ``n`` of a text."""
    moved = 0.0
    for at in range(len(tokens) - n, len(tokens)):
        seen = []
        for n_batch in (1, 2):
            dense.n_tokens = min(dense.n_tokens, at - 1)
            dense.eval(tokens[dense.n_tokens : at - 1])
            for i in range(at - 1, at + 1, n_batch):
                dense.eval(tokens[i : i + n_batch])
            seen.append(next_logits(dense))
        first, second = np.argsort(-seen[0])[:2]
        moved = max(moved, abs(float((seen[0] - seen[1])[first] - (seen[0] - seen[1])[second])))
    return moved


def short_of_likeliest(dense: Llama, tokens: Sequence[int], answer: Sequence[int], n_batch: int = 8) -> list[float]:
    """By how much each token of an answer is below the likeliest, in dense logits, where it stands: 0 where it is that. The answer is
    evaluated in batches, as a check of drafts is."""
    dense.n_tokens = min(dense.n_tokens, len(tokens) - 1)
    dense.eval(list(tokens[dense.n_tokens :]))
    ctx: Any = dense._ctx
    short, logits = [], [next_logits(dense)]
    for i in range(0, len(answer), n_batch):
        part = answer[i : i + n_batch]
        dense._batch.set_batch(part, len(tokens) + i, logits_all=True)
        ctx.decode(dense._batch)
        of_part = np.ctypeslib.as_array(ctx.get_logits(), shape=(len(part), dense.n_vocab())).copy()
        short += [float(x.max() - x[token]) for x, token in zip([*logits[-1:], *of_part], part, strict=False)]
        logits = [of_part[-1]]
    dense.n_tokens = len(tokens)
    ctx.kv_cache_seq_rm(-1, dense.n_tokens, -1)
    return short


def compare(dense: Llama, exact: Llama, tokens: Sequence[int], n: int) -> dict[str, Any]:
    """One greedy answer of each.

    Returns
    -------
    dict
        answer : the exact one's tokens. short : the most that one of them is below the likeliest (``short_of_likeliest``), and n_short how
        many are. n_same : tokens before the first difference to the dense answer, whose tokens are evaluated one by one; n where there is
        none. gap : by how much dense's token is above the other there, in its logits; None where there is none. dense_tok_s, exact_tok_s,
        n_drafted, n_accepted, n_checks.
    """
    logits: list[np.ndarray] = []
    expected, dense_tok_s = _answer(dense, tokens, n, lambda: logits.append(next_logits(dense)))
    times = exact.session.reset_stats()
    answer, exact_tok_s = _answer(exact, tokens, n)
    n_same = next((i for i, (a, b) in enumerate(zip(expected, answer, strict=False)) if a != b), n)
    gap = None if n_same == n else float(logits[n_same][expected[n_same]] - logits[n_same][answer[n_same]])
    short = short_of_likeliest(dense, tokens, answer)
    return {
        "answer": answer,
        "n_short": sum(x > 0 for x in short),
        "short": max(short),
        "n_same": n_same,
        "gap": gap,
        "dense_tok_s": dense_tok_s,
        "exact_tok_s": exact_tok_s,
        "n_drafted": times.n_drafted,
        "n_accepted": times.n_accepted,
        "n_checks": times.n_checks,
    }


def exactness(
    dense: Llama,
    exact: Llama,
    texts: Mapping[str, Sequence[int]],
    n_context: int,
    n_answers: int,
    n: int,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """``n_answers`` of ``n`` tokens to each text, after ``n_context`` tokens of it from places that lie evenly apart."""
    rows = []
    for i, (name, tokens) in enumerate(texts.items()):
        for k in range(n_answers):
            say(i * n_answers + k, len(texts) * n_answers)
            first = (len(tokens) - n_context) * k // max(1, n_answers)
            rows.append({"document": name, "first": first, **compare(dense, exact, tokens[first : first + n_context], n)})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """By document: medians of speed, sums of the rest."""
    heads = "document,answers,not likeliest,equal,largest gap,dense tok/s,exact tok/s,ratio,accepted of drafted,tokens a check"
    found = [heads.split(",")]
    for name in dict.fromkeys(r["document"] for r in rows):
        of = [r for r in rows if r["document"] == name]
        gaps = [r["gap"] for r in of if r["gap"] is not None]
        drafted, accepted, checks = (sum(r[k] for r in of) for k in ("n_drafted", "n_accepted", "n_checks"))
        dense, exact = (float(np.median([r[k] for r in of])) for k in ("dense_tok_s", "exact_tok_s"))
        ratio = float(np.median([r["exact_tok_s"] / r["dense_tok_s"] for r in of]))
        short = f"{sum(r['n_short'] for r in of)} of {sum(len(r['answer']) for r in of)}"
        found.append(
            [
                name, str(len(of)), short, str(len(of) - len(gaps)), f"{max(gaps):.3f}" if gaps else "", f"{dense:.1f}", f"{exact:.1f}",
                f"{ratio:.2f}x", f"{accepted / max(1, drafted):.0%}", f"{1 + accepted / max(1, checks):.1f}",
            ]
        )  # fmt: skip
    return found
