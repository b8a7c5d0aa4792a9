"""The ``kvcast`` command."""

from __future__ import annotations

import logging
import sys

import typer

from ..bindings.library import LOG_LEVELS
from ..errors import KvcastError
from ..terminal import PLAIN
from .bench import bench
from .chat import chat
from .console import notes
from .eval import app as eval_app
from .gguf import embed_predictor, extract_predictor, inspect, plan
from .machine import doctor, list_cache, list_models
from .predictor import app as predictor_app
from .record import trace
from .serve import serve

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Long context on your own hardware.", pretty_exceptions_enable=False)
app.add_typer(predictor_app, name="predictor")
app.add_typer(eval_app, name="eval")
for command in (plan, inspect, embed_predictor, extract_predictor):
    app.command()(command)
app.command("models")(list_models)
app.command()(doctor)
app.command("cache")(list_cache)
app.command()(chat)
app.command()(serve)
app.command()(bench)
app.command()(trace)


def main() -> None:
    """Entry point: errors of ours are one sentence and exit code 1."""
    # llama-cpp-python 0.3.36 numbers ggml's log levels one too low and so prints warnings as errors
    LOG_LEVELS.update({1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR})
    if logging.lastResort is not None:
        logging.lastResort.addFilter(PLAIN)
    try:
        app(standalone_mode=True)
    except (KvcastError, ValueError, TypeError) as error:
        notes.print(f"kvcast: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except MemoryError:
        notes.print("kvcast: memory ran out; close something, or use a smaller --context", style="red", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
