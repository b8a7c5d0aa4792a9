"""A Hugging Face checkpoint to GGUF: llama.cpp's own converter from the pinned source, then quantised, and with a predictor inside.

    python scripts/convert_hf.py CHECKPOINT_DIR OUT.gguf [--quantize Q4_K_M] [--predictor stream]

Needs kvcast and, for the converter, torch, transformers, safetensors and sentencepiece.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

import vendor
from kvcast.bindings.api import llama_cpp
from kvcast.bindings.log import muted_llama_log
from kvcast.cli.console import progress
from kvcast.errors import KvcastError
from kvcast.extras import install_line
from kvcast.gguf.embedded_predictor import embed
from predictor_onnx.infer import open_predictor, resolve

NEEDED = ("torch", "transformers", "safetensors", "sentencepiece")
PREFIX = "LLAMA_FTYPE_MOSTLY_"
notes = Console(stderr=True, emoji=False)


def file_types() -> dict[str, int]:
    """Names of quantisations, as Q4_K_M, and llama.cpp's numbers of them."""
    return {name.removeprefix(PREFIX): value for name, value in vars(llama_cpp).items() if name.startswith(PREFIX)}


def convert(checkpoint: Path, out: Path) -> None:
    """Write the checkpoint as 16-bit GGUF."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise KvcastError(f"converting needs {', '.join(missing)}: {install_line('convert')}")
    if not (checkpoint / "config.json").is_file():
        raise KvcastError(f"{str(checkpoint)!r} is not a checkpoint: it has no config.json; give the folder that has it")
    command = [sys.executable, str(vendor.converter()), str(checkpoint), "--outfile", str(out), "--outtype", "auto"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0 or not out.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise KvcastError(f"llama.cpp's converter could not convert {str(checkpoint)!r}: {last}; its families are in vendor/converter")


def quantize(source: Path, out: Path, name: str) -> None:
    """Write ``source`` quantised."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_types()[name]
    with muted_llama_log():
        failed = llama_cpp.llama_model_quantize(bytes(source), bytes(out), params)
    if failed:
        raise KvcastError(f"llama.cpp could not quantise the model to {name}; try another, as Q8_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quantize", metavar="TYPE", help="as Q4_K_M; 16 bits when not given")
    parser.add_argument("--predictor", help="one that comes with kvcast, or a path to an .onnx, to put inside")
    options = parser.parse_args()
    if options.quantize and options.quantize not in file_types():
        raise KvcastError(f"there is no quantisation {options.quantize!r}; choose one of {', '.join(file_types())}")
    if options.predictor:
        open_predictor(resolve(options.predictor))
    if not options.out.parent.is_dir():
        raise KvcastError(f"there is no folder {str(options.out.parent)!r}; make it first")
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:
        made = Path(folder) / "16-bit.gguf"
        with notes.status("converting") as status:
            convert(options.checkpoint, made)
            if options.quantize:
                status.update("quantising")
                made, source = Path(folder) / "quantised.gguf", made
                quantize(source, made, options.quantize)
                source.unlink()
        if options.predictor:
            with progress("adding the predictor") as update:
                embed(made, resolve(options.predictor), Path(folder) / "with-predictor.gguf", update)
            made = Path(folder) / "with-predictor.gguf"
        made.replace(options.out)
    print(options.out)


if __name__ == "__main__":
    try:
        main()
    except (KvcastError, ValueError, vendor.VendorError) as error:
        sys.exit(f"convert_hf.py: {error}")
