"""``kvcast predictor``: train, export, evaluate and describe the learned predictors."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from predictor_onnx.card import BYTES_MAX as CARD_BYTES_MAX
from predictor_onnx.card import read_card
from predictor_onnx.infer import PaperPredictor, open_predictor, resolve, shipped
from predictor_onnx.protobuf import Damaged

from .. import files
from ..blocks import BLOCK_TOKENS
from ..terminal import Console

app = typer.Typer(no_args_is_help=True, help="The learned predictors: train, export, evaluate, describe.")
notes = Console(stderr=True, emoji=False)
ITERATIONS = {"stream": 4000, "paper": 600}
Architecture = Annotated[str, typer.Option(help="stream or paper.")]


def needs_torch() -> None:
    try:
        import onnx  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise ValueError(f"training and export need {error.name}, which is not installed: pip install torch onnx") from None


@app.command()
def train(
    traces: Annotated[list[Path], typer.Argument(help="Folders of recordings, one a model, made by `kvcast trace`.")],
    name: Annotated[str, typer.Option(help="Name of the predictor.")] = "stream",
    architecture: Architecture = "stream",
    out: Annotated[Path, typer.Option(help="Folder to write NAME.pt, NAME.onnx and NAME.json to.")] = Path(),
    test: Annotated[list[Path] | None, typer.Option(help="Recordings of models that are left out of training; repeatable.")] = None,
    iterations: Annotated[int, typer.Option(help="0: the recipe's.")] = 0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train, export, check against torch, and write the card."""
    needs_torch()
    import torch

    from predictor_onnx import data
    from predictor_onnx.model import ARCHITECTURES, Paper
    from predictor_onnx.train import metrics
    from predictor_onnx.train import train as fit

    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture is {architecture!r}; choose one of {', '.join(ARCHITECTURES)}")
    kind = ARCHITECTURES[architecture]
    n_rows_kept = kind.n_steps if kind is Paper else 0
    n_iterations = iterations or ITERATIONS[architecture]
    fitted: dict[str, list] = {}
    held_out: dict[str, list] = {}
    with notes.status("reading") as status:
        for folder, left_out in [*((t, False) for t in traces), *((t, True) for t in test or [])]:
            for document, recorded in recordings(folder):
                status.update(f"{folder.name}: {document}")
                aside = left_out or document in data.HELD_OUT
                (held_out if aside else fitted)[f"{folder.name}/{document}"] = data.samples(recorded, 16 if aside else 8, n_rows_kept)
        if not fitted:
            raise ValueError("every recording given is held out for testing; record more documents")
        begin = time.perf_counter()
        model = fit(kind, [s for samples in fitted.values() for s in samples], n_iterations, seed, status.update)
        seconds = time.perf_counter() - begin
        status.update("testing")
        found = metrics(model, held_out)
    out.mkdir(parents=True, exist_ok=True)
    with files.replacing(out / f"{name}.pt") as file:
        torch.save({"architecture": architecture, "state": model.state_dict()}, file)
    card: dict[str, Any] = {
        "name": name,
        "architecture": architecture,
        "description": " ".join((kind.__doc__ or "").split()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds_per_block": kind.multiply_adds_per_block,
        "trained_on": sorted(fitted),
        "recipe": {
            "loss": "mean squared error" if kind is Paper else "generalised KL, correction shrunk (0.2)",
            "over": "middle blocks, mean of the next 8 steps",
            "iterations": n_iterations,
            "seed": seed,
            "optimizer": "Adam, one cycle, 6e-3",
        },
        "seconds_to_train": round(seconds, 1),
        "middle_recovery_24_blocks_held_out": found,
    }
    finish(model, out / f"{name}.onnx", card)


def recordings(folder: Path):
    from predictor_onnx.recording import load

    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise ValueError(f"there are no recordings in {str(folder)!r}; make them with `kvcast trace`")
    for path in paths:
        recorded = load(path)
        yield recorded.about["document"], recorded


@app.command()
def export(
    weights: Annotated[Path, typer.Argument(help="NAME.pt, as `train` leaves it; its card NAME.json lies beside it.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write NAME.onnx and its card to; the same when not given.")] = None,
) -> None:
    """Write trained weights as ONNX and check them against torch."""
    needs_torch()
    import pickle

    import torch

    from predictor_onnx.model import ARCHITECTURES

    try:
        saved = torch.load(weights, weights_only=True)
        model = ARCHITECTURES[saved["architecture"]]()
        model.load_state_dict(saved["state"])
    except (OSError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{str(weights)!r} holds no trained predictor ({str(error).splitlines()[0][:120]}); make it with `train`"
        ) from error
    card_file = weights.with_suffix(".json")
    card = card_of(card_file) if card_file.is_file() else {"name": weights.stem}
    finish(model.eval(), (out or weights.parent) / f"{weights.stem}.onnx", card)


def finish(model, path: Path, card: dict[str, Any]) -> None:
    from predictor_onnx.export import OPSET
    from predictor_onnx.export import export as write

    difference = write(model, path)
    predictor = open_predictor(path)
    card |= {
        "opset": OPSET,
        "state_bytes_per_block": predictor.state_bytes_per_block,
        "difference_to_torch": float(f"{difference:.1e}"),
        "ms_per_prediction": cost(path),
    }
    files.write(path.with_suffix(".json"), json.dumps(card, indent=2) + "\n")
    show(card)


def cost(path: Path) -> dict[str, float]:
    """Milliseconds of one prediction with one thread, median of 5, at two sizes; for ``paper`` one new step since the last."""
    predictor = open_predictor(path)
    found = {}
    for rows, blocks in ((90, 512), (256, 2048)):
        times = []
        if isinstance(predictor, PaperPredictor):
            given = np.random.default_rng(0).random((72, rows, blocks)).astype(np.float32)
            predictor.run(given[:64], 64)
        else:
            given = np.random.default_rng(0).random((rows, 5, blocks)).astype(np.float32)
        for i in range(5):
            begin = time.perf_counter()
            if isinstance(predictor, PaperPredictor):
                predictor.run(given[: 65 + i], 65 + i)
            else:
                predictor.run(given)
            times.append(time.perf_counter() - begin)
        found[f"{rows}x{blocks}"] = round(1e3 * sorted(times)[2], 2)
    return found


def card_of(path: Path) -> dict[str, Any]:
    """The card in a file.

    Raises
    ------
    ValueError
        It is damaged.
    """
    try:
        with path.open("rb") as file:
            return read_card(file.read(CARD_BYTES_MAX + 1))
    except Damaged as error:
        raise ValueError(f"the card {str(path)!r} is damaged ({error}); `kvcast predictor export` writes it again") from None
    except OSError as error:
        raise ValueError(f"the card {str(path)!r} cannot be read ({error.strerror or error}); check the file") from error


def show(card: dict) -> None:
    """A card's figures."""
    console = Console(width=150, emoji=False)
    console.print(f"[bold]{escape(card['name'])}[/bold]: {escape(card.get('description', ''))}", highlight=False)
    table = Table(box=None, pad_edge=False, title="middle recovery at 24 blocks, held out", title_justify="left")
    for i, (document, row) in enumerate(card.get("middle_recovery_24_blocks_held_out", {}).items()):
        if i == 0:
            table.add_column("document")
            for column in row:
                table.add_column(escape(column.replace("_", " ")), justify="right")
        table.add_row(escape(document), *(f"{x:.3f}" for x in row.values()))
    if table.row_count:
        console.print(table)
    for key in (
        "parameters",
        "multiply_adds_per_block",
        "state_bytes_per_block",
        "ms_per_prediction",
        "seconds_to_train",
        "difference_to_torch",
    ):
        console.print(f"{key.replace('_', ' ')}: {card.get(key)}", highlight=False, markup=False)


@app.command()
def card(name: Annotated[str, typer.Argument(help="A predictor that comes with kvcast, or a path to its .onnx.")] = "") -> None:
    """Describe a predictor; without a name, list them."""
    if not name:
        Console().print("\n".join(shipped()))
        return
    path = resolve(name)
    open_predictor(path)
    described = path.with_suffix(".json")
    if not described.is_file():
        raise ValueError(f"predictor {str(path)!r} has no card; `kvcast predictor train` writes one beside it")
    show(card_of(described))


@app.command()
def evaluate(
    model: Annotated[str, typer.Option("--model", "-m", help="A name from `kvcast models` or a path to a .gguf file.")] = "smollm2",
    text: Annotated[list[str] | None, typer.Option(help="Text files, or corpus:NAME for one of the training corpus; repeatable.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of prompt.")] = 7680,
    steps: Annotated[int, typer.Option(help="Decode steps after it.")] = 96,
    budget: Annotated[list[int] | None, typer.Option(help="Repeatable.")] = None,
    predictors: Annotated[str, typer.Option(help="Comma-separated.")] = "window,last,ema,quest,onnx:paper,onnx:stream,oracle",
    budgets: Annotated[str, typer.Option(help="Comma-separated: spread, uniform.")] = "spread",
    calibrate: Annotated[str, typer.Option(help="Comma-separated: auto, summary, dense:M, layers:M, off.")] = "auto",
    hold: Annotated[int | None, typer.Option(help="Steps for which a prediction is kept; 32 with a summary, else 8.")] = None,
    where: Annotated[str, typer.Option("--path", help="host or device.")] = "host",
    threads: Annotated[int | None, typer.Option(help="Compute threads; all physical cores when not given.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Recovery of predictors in the live loop, which chooses blocks, teacher-forced; every combination of what is given."""
    from .. import Llama, SparseConfig
    from ..eval.recovery import measure
    from ..texts import DEFAULT_TEXT
    from .console import fetched

    configs = [
        SparseConfig(budget=b, predictor=p, budget_allocation=spread, calibrate=c, hold=hold, path=where, grain=BLOCK_TOKENS)
        for b in budget or [512]
        for spread in budgets.split(",")
        for c in calibrate.split(",")
        for p in predictors.split(",")
    ]
    path = fetched(model)
    names = text or [str(DEFAULT_TEXT)]
    traced = any(c.predictor == "quest" for c in configs)
    largest = max(c.budget for c in configs)
    start = SparseConfig(largest, predictor="quest" if traced else "ema", path=where, untested=True)
    report: dict[str, Any] = {"model": path.name, "context": context, "steps": steps, "documents": {}}
    more: dict[str, Any] = {"n_threads": threads, "n_threads_batch": threads} if threads else {}
    with contextlib.closing(Llama(path, n_ctx=context + steps + 64, sparse=start, verbose=False, **more)) as llm:
        if any(c.predictor.startswith("onnx:") for c in configs):
            llm.session.history.keep_steps(PaperPredictor.n_steps_kept)
        with notes.status("") as status:
            for name in names:
                tokens, n_context = tokens_of(llm, name, context, steps)
                status.update(f"{name}: reading {n_context} tokens")
                llm.reset()
                llm.eval(tokens[:n_context])
                status.update(f"{name}: {len(configs)} configurations")
                found = measure(llm, tokens, n_context, configs)
                label = name if name.startswith("corpus:") else Path(name).stem
                report["documents"][label] = [asdict(r) for r in found]
                show_results(label, n_context, found)
    report["results"] = [{"document": d, **r} for d, results in report.pop("documents").items() for r in results]
    if json_file:
        files.write(json_file, json.dumps(report, indent=2) + "\n")


def tokens_of(llm, name: str, n_context: int, n_steps: int) -> tuple[list[int], int]:
    from predictor_onnx import data

    from ..texts import read_text

    n_needed = n_context + n_steps
    if name.startswith("corpus:"):
        wanted = name.removeprefix("corpus:")
        tokens = llm.tokenize(data.document(wanted).encode())
        n_context = min(n_context, len(tokens) - n_steps)
        return (tokens[-n_context - n_steps :] if data.is_retrieval(wanted) else tokens[: n_context + n_steps]), n_context
    tokens = llm.tokenize(read_text(Path(name)).encode())
    if len(tokens) < n_needed:
        raise ValueError(f"{name} has {len(tokens)} tokens, and {n_needed} are needed; take a longer text or a smaller --context")
    return tokens[:n_needed], n_context


def show_results(document: str, n_context: int, found) -> None:
    console = Console(width=150, file=sys.stdout, emoji=False)
    table = Table(box=None, pad_edge=False, title=f"{document}, {n_context} tokens", title_justify="left")
    for column in ("predictor", "budget", "budgets", "calibrate", "recovery", "95 %", "middle", "of oracle", "churn", "KL", "same", "ms"):
        table.add_column(column)
    copies = any(r.n_copied for r in found)
    if copies:
        table.add_column(f"copied in set ({found[0].n_copied})")
        table.add_column("copied right")
    for r in found:
        row = [r.predictor, str(r.budget), r.budgets, r.calibrate, f"{r.recovery:.3f}", "{:.3f}-{:.3f}".format(*r.recovery_interval)]
        row += [f"{r.middle_recovery:.3f}", f"{r.ratio_to_oracle:.3f}" if r.ratio_to_oracle else "", f"{r.churn:.1%}"]
        row += [f"{r.kl:.3f}", f"{r.top1:.0%}", f"{r.ms_per_step:.1f}"]
        if copies:
            row += [f"{r.copied_in_set:.3f}", f"{r.copied_right:.0%} of {r.copied_right_dense:.0%}"] if r.n_copied else ["", ""]
        table.add_row(*row)
    console.print(table)
