"""``kvcast trace``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..blocks import BLOCK_TOKENS
from ..config import SparseConfig
from ..texts import read_text
from .console import fetched, notes, progress
from .options import DEFAULT, Budget, Calibrate, Hold, ModelName, Predictor, Threads


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

    from ..eval.record import record
    from ..llama.model import Llama

    config = SparseConfig(budget=budget, predictor=predictor, calibrate=calibrate, hold=hold, untested=True, grain=BLOCK_TOKENS)
    documents = [(path.stem, read_text(path)) for path in text] if text else [(name, data.document(name)) for name in data.NAMES]
    contexts = [context] if context else [1536, 3072, 6144]
    path = fetched(model)
    folder = out / path.stem
    more: dict[str, Any] = {"n_threads": threads} if threads else {}
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
