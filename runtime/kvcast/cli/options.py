"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import SparseConfig

ModelName = Annotated[str, typer.Option("--model", "-m", help="A name from `kvcast models` or a path to a .gguf file.")]
Budget = Annotated[int, typer.Option(help="Tokens each KV head attends to, sink and window included.")]
Predictor = Annotated[str, typer.Option(help="auto, ema, last, window, onnx:NAME; oracle, quest for evaluation.")]
Calibrate = Annotated[str, typer.Option(help="auto, summary, dense:M, layers:M or off.")]
Budgets = Annotated[str, typer.Option(help="spread over layers and heads, or uniform; auto: uniform where steps choose tokens.")]
Grain = Annotated[int, typer.Option(help="Tokens that a step chooses together: 1, 4 or 16 (a block).")]
Exact = Annotated[bool, typer.Option("--exact", help="Answers of dense attention: sparse steps draft, a dense batch checks them.")]
Hold = Annotated[int | None, typer.Option(help="Steps for which a prediction is kept; 32 with a summary, else 8.")]
Where = Annotated[str, typer.Option(help="host: attend beside the store; device: from a pool on the device, prefetched.")]
Prefetch = Annotated[bool, typer.Option(help="Device path: bring blocks to the pool beside the steps.")]
GpuLayers = Annotated[int, typer.Option(help="Layers of weights on a GPU, -1 for all.")]
KvType = Annotated[str, typer.Option(help="Type of the KV cache: f16, bf16, q8_0 or q4_0.")]
Untested = Annotated[bool, typer.Option("--untested", help="Run a family sparse that no test covers, see docs/coverage.md.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads; all physical cores when not given.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")]
DEFAULT = SparseConfig()


def sparse_config(budget, predictor, hold, calibrate, budgets, grain, path, prefetch, untested, exact=False) -> SparseConfig:
    return SparseConfig(
        budget,
        None,
        predictor,
        hold=hold,
        calibrate=calibrate,
        budget_allocation=budgets,
        grain=grain,
        path=path,
        prefetch=prefetch,
        untested=untested,
        exact=exact,
    )


def placement(gpu_layers: int, kv_type: str) -> dict[str, Any]:
    """Arguments of Llama."""
    from ..gguf.memory import KV_TYPES

    if kv_type not in KV_TYPES:
        raise ValueError(f"the KV type is {kv_type!r}; choose one of {', '.join(KV_TYPES)}")
    return {"n_gpu_layers": gpu_layers, "type_k": KV_TYPES[kv_type], "type_v": KV_TYPES[kv_type]}
