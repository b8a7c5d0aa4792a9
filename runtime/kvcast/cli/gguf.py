"""``kvcast plan``, ``inspect``, ``embed-predictor`` and ``extract-predictor``: commands on GGUF files; no model is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from rich.markup import escape
from rich.table import Table

from ..files import write
from ..terminal import Console, line

if TYPE_CHECKING:
    from ..planning.plan import Plan

GIB = 1 << 30
console = Console(emoji=False)

Model = Annotated[str, typer.Argument(help="A name from `kvcast models` or a path to a .gguf file.")]
Gguf = Annotated[Path, typer.Argument(help="A .gguf file.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]


def plan(
    model: Model,
    vram: Annotated[str | None, typer.Option(help="Memory of the device, as 8G. Default: the card's, or none: all on the CPU.")] = None,
    ram: Annotated[str | None, typer.Option(help="Memory of the host, as 32G. Default: what is free here.")] = None,
    context: Annotated[int, typer.Option(help="Tokens; 0: what the model was trained for, or what fits.")] = 0,
    card: Annotated[str | None, typer.Option(help="A graphics card by name, to forecast its speed; a wrong name lists them.")] = None,
    kv_type: Annotated[str, typer.Option(help="Type of the KV cache: f16, bf16, q8_0 or q4_0.")] = "f16",
    json_file: JsonFile = None,
) -> None:
    """Say what of a model fits where, how long a context may be, and which command line to use. Reads the file's header only."""
    from ..planning import gpu_cards as cards
    from ..planning.plan import parse_size
    from ..planning.plan import plan as make
    from .console import fetched

    known = cards.find(card) if card else None
    vram_bytes = parse_size(vram) if vram else known.vram_bytes if known else 0
    ram_bytes = parse_size(ram) if ram else psutil.virtual_memory().available
    made = make(fetched(model), vram_bytes, ram_bytes, context, known, kv_type, model)
    _write(json_file, asdict(made))
    _show_plan(made, card)


def _show_plan(p: Plan, card: str | None) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "device", "host"):
        table.add_column(column, justify="right" if column else "left")
    for part in p.parts:
        size = f"{'~' if part.estimate else ''}{part.n_bytes / GIB:.3f}"
        table.add_row(part.what, *((size, "") if part.where == "device" else ("", size)))
    table.add_row("all, GiB (~: estimated)", f"{p.device_bytes / GIB:.3f}" if p.vram_bytes else "", f"{p.host_bytes / GIB:.3f}")
    table.add_row("of", f"{p.vram_bytes / GIB:.3f}" if p.vram_bytes else "", f"{p.ram_bytes / GIB:.3f}")
    console.print(f"[bold]{escape(p.model)}[/bold], context {p.context:,}, KV cache {p.kv_type}", highlight=False)
    lines = {
        "device": f"weights and a pool of {p.budget:,} tokens on the device; the KV cache in host memory",
        "host": f"weights on the {p.weights}; attention to {p.budget:,} tokens on the CPU, beside the KV cache",
        "dense": f"dense: weights and KV cache on the {p.weights}",
    }
    console.print(lines[p.path], highlight=False)
    if p.why_dense:
        console.print(f"not served sparse: {p.why_dense}", highlight=False, markup=False)
    console.print(table)
    console.print(f"longest context that fits this way: {p.largest_context:,} tokens", highlight=False)
    if p.path == "device":
        console.print(f"KV on the device: 1/{p.compression:.1f} of a dense cache (compression)", highlight=False)
    elif p.path == "host":
        console.print(f"KV read per token: about 1/{p.compression:.1f} of a dense step", highlight=False)
    if p.forecast:
        console.print(
            f"expected on {card}: {p.forecast.tok_s:.0f} tokens/s, {p.forecast.bytes_per_step / 1e6:.2f} MB moved per token, "
            f"{p.forecast.wait_ms:.1f} ms of waiting (link simulator, see docs/plan.md)",
            highlight=False,
        )
    elif card and p.path == "host":
        console.print("no forecast: attention runs on the CPU; measure it with `kvcast bench`", highlight=False)
    if p.dense_fits and p.path != "dense":
        speed = f", expected {p.dense_tok_s:.0f} tokens/s" if p.dense_tok_s else ""
        faster = ": the faster way at this context" if p.forecast and p.dense_tok_s and p.dense_tok_s > p.forecast.tok_s else ""
        console.print(f"the whole KV cache would fit the device too (--dense){speed}{faster}", highlight=False)
    elif p.dense_tok_s:
        console.print(f"expected on {card}: {p.dense_tok_s:.0f} tokens/s", highlight=False)
    console.print(f"\n{p.command}", highlight=False, markup=False, soft_wrap=True)


def inspect(model: Model, json_file: JsonFile = None) -> None:
    """Say what a GGUF file holds, and whether kvcast serves it sparse."""
    from ..planning.inspect_gguf import inspect as look
    from .console import fetched

    found = look(fetched(model))
    _write(json_file, found)
    table = Table(box=None, pad_edge=False, show_header=False)
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_said(v)}" for k, v in value.items())
        table.add_row(key.replace("_", " "), escape(_said(value)))
    console.print(table)


def _said(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:,}" if isinstance(value, int) else line(str(value))


def embed_predictor(
    source: Gguf,
    predictor: Annotated[Path, typer.Argument(help="An .onnx file, with its card beside it (NAME.json).")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
) -> None:
    """Write a GGUF with a predictor inside; kvcast uses it by default, other programs do not see it."""
    from ..gguf.embedded_predictor import embed
    from .console import progress

    with progress("writing") as update:
        embed(source, predictor, out, update)
    console.print(f"{out} carries {predictor.name}", highlight=False, markup=False)


def extract_predictor(source: Gguf, out: Annotated[Path, typer.Argument(help="The .onnx file to write; its card goes beside it.")]) -> None:
    """Write a GGUF's predictor and its card to files."""
    from ..gguf.embedded_predictor import extract

    extract(source, out)
    console.print(f"wrote {out} and {out.with_suffix('.json').name}", highlight=False, markup=False)


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        write(path, json.dumps(report, indent=2) + "\n")
