"""``kvcast bench``: dense llama.cpp, sparse, and sparse with a frozen set, side by side in one process.

Same tokens, same threads, same KV types, same Python loop (teacher-forced ``eval`` of one token after the other), rounds
alternating, medians over rounds. Dense is the faster of flash attention on and off. A round of the sparse loop includes
its selections and calibrations in their regular share. Recovery is measured in passes of its own (evaluate.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import SparseConfig
from ..cores import usable_cores
from ..engine.device_path import DevicePath
from ..engine.session import Session
from ..engine.stats import StepTimes
from ..errors import ModelError
from ..llama.model import Llama
from ..planning.link_simulator import measure_link, simulate
from .recovery import Recovery, measure

Say = Callable[[str], None]


@dataclass
class Engine:
    """A loaded model at the end of the prompt, and the speeds of its rounds, tokens per second."""

    llm: Llama
    n_context: int
    prefill_tok_s: float
    rounds: list[float] = field(default_factory=list)

    def round(self, tokens: Sequence[int]) -> None:
        """Decode ``tokens`` from the end of the prompt and note the speed."""
        self.llm.n_tokens = self.n_context
        begin = time.perf_counter()
        for token in tokens:
            self.llm.eval([token])
        self.rounds.append(len(tokens) / (time.perf_counter() - begin))

    @property
    def tok_s(self) -> float:
        return statistics.median(self.rounds)


def tokens_of(llm: Llama, text: str, n_tokens: int, origin: str) -> list[int]:
    """The first tokens of a text.

    Raises
    ------
    ModelError
        The text is shorter than that.
    """
    tokens = llm.tokenize(text.encode())
    if len(tokens) < n_tokens:
        raise ModelError(f"{origin} has {len(tokens)} tokens, and {n_tokens} are needed; take a longer text or a smaller --context")
    return tokens[:n_tokens]


def _read(llm: Llama, tokens: Sequence[int]) -> Engine:
    begin = time.perf_counter()
    llm.eval(tokens)
    return Engine(llm, len(tokens), len(tokens) / (time.perf_counter() - begin))


def pool_report(session: Session, n_context: int, times: StepTimes) -> dict[str, Any]:
    """What the device path holds and moves; empty for the host path.

    Compression: to the KV of a dense cache of ``n_context``. ``fill_bytes`` are those of the step that fills the pool, once a prompt.
    """
    info, pool, path = session.attached.info, session.attached.pool_info, session.path
    if not isinstance(path, DevicePath):
        return {}
    held = pool.pool_bytes + pool.staging_bytes + pool.tap_bytes
    return {
        "device": pool.device.decode(),
        "pool_bytes": pool.pool_bytes,
        "staging_bytes": pool.staging_bytes,
        "tap_bytes": pool.tap_bytes,
        "compression": info.n_layer * n_context * (info.k_row_bytes + info.v_row_bytes) / held,
        "fill_bytes": path.n_filled * path.pool.bytes_per_move,
        "bytes_moved_per_step": sum(times.moves[1:]) * path.pool.bytes_per_move / max(1, times.n_steps - 1),
    }


def simulated_report(session: Session, times: StepTimes, step_s: float) -> dict[str, Any]:
    """What the link simulator makes of the moves of the last round, beside what was measured; empty for the host path."""
    path = session.path
    if not isinstance(path, DevicePath):
        return {}
    link = measure_link(path)
    n_selections = max(1, sum(n > 0 for n in times.moves))
    uploads = sum(link.seconds(n * path.pool.bytes_per_move) for n in times.moves)
    select_s = max(0.0, times.predict + times.select + times.gather - uploads) / n_selections
    # on the CPU backend a selection takes a core from the compute
    forecast = simulate(
        times.moves, path.pool.bytes_per_move, link, step_s, times.observe / times.n_steps, select_s,
        prefetch=session.config.prefetch, shared=1.0 if session.attached.pool_info.device == b"CPU" else 0.0,
    )  # fmt: skip
    return {"simulated": {**asdict(forecast), "link": asdict(link), "select_ms": 1e3 * select_s, "step_ms": 1e3 * step_s}}


def bench(
    path: Path,
    texts: dict[str, str],
    n_context: int,
    config: SparseConfig,
    *,
    n_threads: int | None = None,
    n_batch: int = 512,
    n_steps: int = 64,
    n_rounds: int = 5,
    predictors: Sequence[str] = (),
    also: Sequence[SparseConfig] = (),
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure; see the module's docstring for how.

    Parameters
    ----------
    texts : dict of str
        Name to text. Speed is measured on the first; recovery on all.
    n_steps : int
        Decode steps of a round, and of a recovery pass; a multiple of the calibration interval keeps rounds alike.
    predictors : sequence of str
        Others to measure the recovery of, beside the configured one.
    also : sequence of SparseConfig
        The other path, to be measured beside ``config`` in the same rounds.

    Returns
    -------
    dict
        The report, ready for JSON: docs/bench.md.
    """
    if n_context <= config.budget:
        raise ValueError(f"the context is {n_context} tokens and the budget {config.budget}: nothing is left out; take a longer --context")
    if n_steps < 4:
        raise ValueError(f"steps is {n_steps}; it must be at least 4")
    n_threads = n_threads or usable_cores()
    shared: dict[str, Any] = dict(n_ctx=n_context + 512, n_threads=n_threads, n_threads_batch=n_threads, n_batch=n_batch, verbose=False)

    first = next(iter(texts))
    names = [config.predictor, *(p for p in predictors if p != config.predictor)]
    engines: list[Engine] = []
    found: dict[str, list[Recovery]] = {name: [] for name in texts}
    for now in (config, *also):
        say(f"loading and reading {n_context} tokens: sparse, path={now.path}")
        llm = Llama(path, sparse=replace(now, trace=now.chooses_tokens), **shared)
        documents = {name: tokens_of(llm, text, n_context + n_steps, name) for name, text in texts.items()}
        tokens = documents[first]
        engines.append(_read(llm, tokens[:n_context]))
        for name in [*(n for n in texts if n != first), first]:  # the first comes last: its context stays for the rounds
            say(f"recovery on {name}, path={now.path}")
            if llm.input_ids[:n_context].tolist() != documents[name][:n_context] or llm.n_tokens != n_context:
                llm.reset()
                llm.eval(documents[name][:n_context])
            found[name] += measure(llm, documents[name], n_context, [replace(now, predictor=p) for p in names])
    sparse, others = engines[0], engines[1:]
    session = sparse.llm.session
    say(f"loading and reading {n_context} tokens: dense, flash attention on")
    dense_on = _read(Llama(path, flash_attn=True, **shared), tokens[:n_context])
    say(f"loading and reading {n_context} tokens: dense, flash attention off")
    dense_off = _read(Llama(path, flash_attn=False, **shared), tokens[:n_context])
    n_short = max(16, config.budget - n_steps // 2)  # its rounds have a mean depth of the budget
    short = _read(Llama(path, flash_attn=True, **{**shared, "n_ctx": n_short + 512}), tokens[:n_short])
    frozen = Engine(sparse.llm, n_context, sparse.prefill_tok_s)

    steps = tokens[n_context:]
    short_steps = tokens[n_short : n_short + n_steps]
    for i in range(n_rounds + 1):  # the first warms up
        say(f"round {i}/{n_rounds}" if i else "warm-up")
        dense_on.round(steps)
        dense_off.round(steps[:16])
        session.configure(config)
        sparse.round(steps)
        times = session.times
        for engine, now in zip(others, also):
            engine.llm.session.configure(now)
            engine.round(steps)
        session.configure(config, frozen=True)
        frozen.round(steps)
        short.round(short_steps)
        if i == 0:
            for engine in (dense_on, dense_off, *engines, frozen, short):
                engine.rounds.clear()
    dense, flash = (dense_on, True) if dense_on.tok_s >= dense_off.tok_s else (dense_off, False)

    simulated = simulated_report(session, times, 1 / frozen.tok_s)
    info = session.attached.info
    block_bytes = 16 * (info.k_row_bytes + info.v_row_bytes) // info.n_head_kv
    read_sparse = (times.blocks_read * block_bytes + times.summary_bytes_read) / times.n_steps
    n_plain = times.n_steps - times.n_calibrations
    plain = (times.total - times.calibrate) / max(1, n_plain)
    main = found[first][0]
    report: dict[str, Any] = {
        "model": path.name,
        "document": first,
        "context": n_context,
        "budget": config.budget_blocks(n_context) * 16,
        "config": asdict(config),
        "threads": n_threads,
        "dense": {"tok_s": dense.tok_s, "prefill_tok_s": dense.prefill_tok_s, "flash_attn": flash},
        "dense_flash_on": {"tok_s": dense_on.tok_s, "prefill_tok_s": dense_on.prefill_tok_s},
        "dense_flash_off": {"tok_s": dense_off.tok_s, "prefill_tok_s": dense_off.prefill_tok_s},
        "dense_at_budget": {"context": n_short + n_steps // 2, "tok_s": short.tok_s},
        "sparse": {"tok_s": sparse.tok_s, "prefill_tok_s": sparse.prefill_tok_s},
        "frozen": {"tok_s": frozen.tok_s, "of_dense_at_budget": frozen.tok_s / short.tok_s},
        "paths": {
            now.path: {
                "tok_s": engine.tok_s,
                "prefill_tok_s": engine.prefill_tok_s,
                "rounds": engine.rounds,
                **asdict(found[first][i * len(names)]),
                **pool_report(engine.llm.session, n_context, times if i == 0 else engine.llm.session.times),
            }
            for i, (engine, now) in enumerate(zip(engines, (config, *also)))
        },
        **simulated,
        "speedup": sparse.tok_s / dense.tok_s,
        "rounds": {"dense": dense.rounds, "sparse": sparse.rounds, "frozen": frozen.rounds, "dense_at_budget": short.rounds},
        "kv": {
            "summary_bytes": info.summary_bytes,
            "store_bytes": info.n_layer * info.n_cells * (info.k_row_bytes + info.v_row_bytes),
            "read_bytes_dense": times.blocks_dense * block_bytes / times.n_steps,
            "read_bytes_sparse": read_sparse,
            "read_reduction": times.blocks_dense * block_bytes / times.n_steps / read_sparse,
        },
        "recovery": main.recovery,
        "middle_recovery": main.middle_recovery,
        "churn": main.churn,
        "step_ms": {
            "total": times.ms(times.total),
            "attention": times.attention_us / 1e3 / times.n_steps,
            "choose": times.choose_us / 1e3 / times.n_steps,
            "predict": times.ms(times.predict),
            "select": times.ms(times.select),
            "observe": times.ms(times.observe),
            "gather": times.ms(times.gather),
            "calibrate": times.ms(times.calibrate - times.n_calibrations * plain),
            "wait": times.ms(times.wait),
        },
        "documents": {name: [asdict(r) for r in results] for name, results in found.items()},
    }
    for engine in (*engines, dense_on, dense_off, short):
        engine.llm.close()
    return report
