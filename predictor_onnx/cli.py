"""``kvcast predictor``: record, train, export and describe the learned predictors."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console

from .infer import HERE, OnnxPredictor, resolve, shipped

app = typer.Typer(no_args_is_help=True, help="The learned predictors: record, train, export, describe.")
notes = Console(stderr=True)
HELD_OUT = ("source:pathlib", "novel:2", "pairs:2", "needles:2", "chains:2", "table:entities")
CONTEXTS = (1536, 3072, 6144)
Out = Annotated[Path, typer.Option(help="Folder of the recordings.")]


@app.command()
def record(
    model: Annotated[list[str], typer.Option("--model", "-m", help="Names or paths; repeatable.")],
    prose: Annotated[Path, typer.Option(help="A long public-domain text.")] = HERE.parent / "scripts" / "demo.txt",
    out: Out = Path("out/traces"),
    steps: Annotated[int, typer.Option(help="Decode steps per document.")] = 72,
) -> None:
    """Record what the runtime observes and what attention then does; models that are recorded already are left alone."""
    from kvcast import Llama, SparseConfig
    from kvcast.cli import fetched

    from . import data

    out.mkdir(parents=True, exist_ok=True)
    for name in model:
        path = fetched(name)
        target = out / f"{path.stem}.npz"
        if target.exists():
            notes.print(f"{target} is there", highlight=False)
            continue

        def make(n_ctx: int, path: Path = path) -> Llama:
            return Llama(path, n_ctx=n_ctx, sparse=SparseConfig(calibrate="dense:16", predictor="ema"), verbose=False)

        with notes.status(name) as status:
            found = data.collect(make, prose.read_text(encoding="utf-8"), CONTEXTS, steps, status.update)
        data.save(target, found)
        notes.print(f"{target}: {len(found)} documents, {sum(map(len, found.values()))} selections", highlight=False)


@app.command()
def train(
    traces: Annotated[list[Path], typer.Argument(help="Recordings to train on.")],
    name: Annotated[str, typer.Option(help="Name of the predictor.")] = "stream",
    out: Annotated[Path, typer.Option(help="Folder to write NAME.onnx and NAME.json to.")] = HERE,
    test: Annotated[list[Path] | None, typer.Option(help="Recordings of models that are left out of training.")] = None,
    iterations: Annotated[int, typer.Option()] = 1500,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train, export, check against torch, and write the card."""
    from . import data
    from .export import OPSET, export
    from .train import train as run

    recorded = {path.stem: data.load(path) for path in traces}
    merged = {f"{model}/{doc}": samples for model, found in recorded.items() for doc, samples in found.items()}
    held_out = {f"{model}/{doc}" for model in recorded for doc in HELD_OUT}
    for path in test or []:
        left_out = {f"{path.stem}/{doc}": samples for doc, samples in data.load(path).items()}
        merged |= left_out
        held_out |= left_out.keys()
    begin = time.perf_counter()
    with notes.status("training") as status:
        model, metrics = run(merged, held_out, iterations, seed, status.update)
    seconds = time.perf_counter() - begin
    path = out / f"{name}.onnx"
    difference = export(model, path)
    card = {
        "name": name,
        "architecture": (type(model).__doc__ or "").strip(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "opset": OPSET,
        "state_bytes_per_block": 20,
        "trained_on": {m: sorted(d for d in found if d not in HELD_OUT) for m, found in recorded.items()},
        "recipe": {
            "loss": "generalised KL over middle blocks",
            "iterations": iterations,
            "seed": seed,
            "optimizer": "Adam, one cycle, 6e-3",
        },
        "seconds_to_train": round(seconds, 1),
        "difference_to_torch": difference,
        "middle_recovery_24_blocks_held_out": metrics,
        "ms_per_prediction": cost(path),
    }
    (out / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n")
    show(card)


def cost(path: Path) -> dict[str, float]:
    """Milliseconds of one run with one thread, median of 9, at two sizes."""
    predictor = OnnxPredictor(path, 5)
    found = {}
    for rows, blocks in ((90, 512), (256, 2048)):
        x = np.random.default_rng(0).random((rows, 5, blocks)).astype(np.float32)
        times = []
        for _ in range(9):
            begin = time.perf_counter()
            predictor.predict(x)
            times.append(time.perf_counter() - begin)
        found[f"{rows}x{blocks}"] = round(1e3 * sorted(times)[4], 2)
    return found


def show(card: dict) -> None:
    """A card's figures."""
    console = Console()
    console.print(f"[bold]{card['name']}[/bold]: {card['architecture']}", highlight=False)
    for document, row in card["middle_recovery_24_blocks_held_out"].items():
        console.print(f"  {document:60s} " + "  ".join(f"{k} {v:.3f}" for k, v in row.items()), highlight=False)
    console.print(f"  ms per prediction: {card['ms_per_prediction']}, trained in {card['seconds_to_train']} s", highlight=False)


@app.command()
def card(name: Annotated[str, typer.Argument(help="A predictor that comes with kvcast, or a path to its .onnx.")] = "") -> None:
    """Describe a predictor; without a name, list them."""
    if not name:
        Console().print("\n".join(shipped()))
        return
    path = resolve(name)
    OnnxPredictor(path, 5)
    show(json.loads(path.with_suffix(".json").read_text()))
