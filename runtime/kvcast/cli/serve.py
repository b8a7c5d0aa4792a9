"""``kvcast serve``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import models
from ..errors import KvcastError
from ..extras import install_line
from .console import fetched, say
from .options import (
    DEFAULT,
    Budget,
    Budgets,
    Calibrate,
    Exact,
    GpuLayers,
    Grain,
    Hold,
    KvType,
    Predictor,
    Prefetch,
    Threads,
    Untested,
    Where,
    placement,
    sparse_config,
)


def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="A name from `kvcast models` or a path to a .gguf file. Default: smollm2.")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings in a JSON or YAML file, instead of MODEL and its options.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default: 8000.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="KVCAST_API_KEY", help="Clients must send it.")] = None,
    n_ctx: Annotated[
        int, typer.Option("--context", help="Tokens the context holds; 0: what the model was trained for, at most 32768.")
    ] = 0,
    budget: Budget = DEFAULT.budget,
    dense: Annotated[bool, typer.Option("--dense", help="Plain llama.cpp, no sparse attention.")] = False,
    predictor: Predictor = DEFAULT.predictor,
    calibrate: Calibrate = DEFAULT.calibrate,
    hold: Hold = DEFAULT.hold,
    budgets: Budgets = DEFAULT.budget_allocation,
    grain: Grain = DEFAULT.grain,
    exact: Exact = DEFAULT.exact,
    path: Where = DEFAULT.path,
    prefetch: Prefetch = DEFAULT.prefetch,
    threads: Threads = None,
    gpu_layers: GpuLayers = 0,
    kv_type: KvType = "f16",
    allow_origin: Annotated[list[str] | None, typer.Option(help="Let pages of this origin use the API; repeatable.")] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name of this machine; repeatable.")] = None,
    cache: Annotated[bool, typer.Option(help="Keep long first messages on disk, to open them again at once.")] = True,
    untested: Untested = DEFAULT.untested,
) -> None:
    """Serve the OpenAI API, and a page to chat on with a live map of the context. Ctrl-C ends it."""
    try:
        from ..server.run import run
        from ..server.settings import ModelSettings, ServerSettings, checked, read_config
    except ModuleNotFoundError as error:
        raise KvcastError(f"the server needs {error.name}, which is not installed; {install_line('serve')}") from error

    of_model = (
        "model", "n_ctx", "budget", "dense", "predictor", "calibrate", "hold", "budgets", "grain", "exact", "path", "prefetch", "threads",
        "gpu_layers", "kv_type", "untested",
    )  # fmt: skip
    given = [name for name in of_model if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"]
    if config is not None:
        if given:
            raise KvcastError(f"{given[0]} is given beside --config; write it into {str(config)!r}")
        server, found = read_config(config)
    else:
        sparse = sparse_config(budget, predictor, hold, calibrate, budgets, grain, path, prefetch, untested, exact)
        name = model or "smollm2"
        more = placement(gpu_layers, kv_type)
        if threads:
            more["n_threads"] = threads
        alias = name if models.find(name) else Path(name).stem
        values: dict[str, Any] = {"model": name, "model_alias": alias, "n_ctx": n_ctx, "sparse": None if dense else sparse, **more}
        server, found = ServerSettings(), [checked(ModelSettings, values, "kvcast serve")]
    options: dict[str, Any] = {"host": host, "port": port, "api_key": api_key, "allow_origins": allow_origin, "allow_hosts": allow_host}
    if api_key is None:  # click takes an empty variable for none
        options["api_key"] = os.environ.get("KVCAST_API_KEY")
    values = {name: value for name, value in options.items() if value is not None}
    if not cache:
        values["keep_documents"] = False
    server = checked(ServerSettings, {**server.model_dump(exclude_unset=True), **values}, "kvcast serve")
    for settings in found:
        fetched(settings.model)
    run(server, found, say)
