"""Fetch, check, prune and patch the pinned llama.cpp into vendor/llama.cpp; export edited patches again.

    python scripts/vendor.py            make vendor/llama.cpp unless it is there and current
    python scripts/vendor.py --export   write patches/*.patch anew from an edited vendor/llama.cpp (make patches)
    python scripts/vendor.py --pristine DIR   the pruned tree without patches (the reference build of the tests)

The source is the sdist of llama-cpp-python, which carries llama.cpp, and whose Python part kvcast carries; it comes from the package
index that pip is set up for. This runs inside the build, before kvcast is installed; to download it needs what runtime/kvcast/download.py
imports.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from difflib import unified_diff
from pathlib import Path
from typing import Any

SDIST = "llama_cpp_python-0.3.36.tar.gz"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
NAME, VERSION = "llama-cpp-python", "0.3.36"
TOP = "llama_cpp_python-0.3.36/"
PREFIX = f"{TOP}vendor/llama.cpp/"
KEEP = ("CMakeLists.txt", "LICENSE", "cmake", "include", "src", "ggml", "common", "vendor")
CONVERTER = ("LICENSE", "convert_hf_to_gguf.py", "conversion", "gguf-py")
PYTHON_PART = ("LICENSE.md", "llama_cpp")
NEIGHBOURS = ("tests", "vendor/llama.cpp/models/ggml-vocab-llama-spm.gguf")

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "vendor" / "llama.cpp"
PYTHON_TREE = ROOT / "vendor" / "llama_cpp_python"
ORIGINALS = ROOT / "vendor" / "originals"  # the files that patches touch, as they were
PATCHES = ROOT / "patches"


class VendorError(Exception):
    pass


def series() -> list[Path]:
    lines = (PATCHES / "series").read_text().splitlines()
    return [PATCHES / line.strip() for line in lines if line.strip() and not line.startswith("#")]


def stamp() -> str:
    """Identity of what the tree is made from."""
    digest = hashlib.sha256(SHA256.encode())
    for patch in series():
        digest.update(patch.read_bytes())
    return digest.hexdigest()


def _module(name: str) -> Any:
    """One file of kvcast, which is not installed yet."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "runtime" / "kvcast" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fetch() -> Path:
    """The sdist in the user's cache, downloaded when it is not there."""
    try:
        download, folders = _module("download"), _module("folders")
    except ImportError as error:
        raise VendorError(f"fetching {SDIST} needs {error.name}: pip install pypi-simple filelock platformdirs") from error
    path = folders.cache_folder() / SDIST
    if path.exists() and download.sha256(path) != SHA256:
        path.unlink()
    if not path.exists():
        try:
            download.download(NAME, VERSION, ".tar.gz", path)
        except download.DownloadError as error:
            raise VendorError(str(error)) from error
        if (found := download.sha256(path)) != SHA256:
            path.unlink()
            raise VendorError(f"{SDIST} has sha256 {found}, expected {SHA256}; the index serves another file")
    return path


def extract(target: Path, keep: tuple[str, ...] = KEEP, prefix: str = PREFIX) -> None:
    """Unpack files and folders of the sdist: those of llama.cpp that libllama needs."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    with tarfile.open(fetch()) as archive:
        for member in archive:
            if not member.isfile() or not member.name.startswith(prefix):
                continue
            name = member.name[len(prefix) :]
            if not any(name == k or name.startswith(f"{k}/") for k in keep) or ".." in name:
                continue
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            source = archive.extractfile(member)
            assert source is not None
            with source, path.open("wb") as out:
                shutil.copyfileobj(source, out)
            path.chmod(member.mode & 0o777)


def converter() -> Path:
    """llama.cpp's converter of Hugging Face checkpoints, unpacked when it is not there."""
    target = ROOT / "vendor" / "converter"
    mark = target / ".stamp"
    if not mark.exists() or mark.read_text() != SHA256:
        extract(target, CONVERTER)
        mark.write_text(SHA256)
    return target / "convert_hf_to_gguf.py"


def neighbours(target: Path) -> None:
    """llama-cpp-python's own tests, with the vocabulary that they open."""
    extract(target, NEIGHBOURS, TOP)


def touched(patch: Path) -> list[str]:
    return [line[6:].split("\t")[0].strip() for line in patch.read_text().splitlines() if line.startswith("+++ b/")]


def apply(target: Path) -> None:
    """Apply patches/series with git; a skipped file, an offset or fuzz is an error."""
    # inside another checkout git apply skips every file silently unless it is kept from finding that checkout
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(target.parent.resolve()), "LC_ALL": "C"}
    for patch in series():
        for name in touched(patch):
            saved = ORIGINALS / name
            if saved.exists():
                raise VendorError(f"{patch.name} touches {name}, which an earlier patch touches: merge the two")
            saved.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(target / name, saved)
        done = subprocess.run(["git", "apply", "--verbose", str(patch)], cwd=target, env=environment, capture_output=True, text=True)
        log = done.stdout + done.stderr
        if done.returncode != 0 or "Skipped" in log or "offset" in log:
            raise VendorError(f"{patch.name} does not apply cleanly to the pinned llama.cpp:\n{log}")


def export() -> None:
    """Rewrite each patch from the edited tree, keeping its header; files no patch names are an error."""
    for patch in series():
        header = patch.read_text().split("--- a/")[0]
        text = header
        for name in touched(patch):
            old = (ORIGINALS / name).read_text().splitlines(keepends=True)
            new = (TREE / name).read_text().splitlines(keepends=True)
            text += "".join(unified_diff(old, new, f"a/{name}", f"b/{name}", n=3))
        patch.write_text(text)
        print(f"{patch.relative_to(ROOT)}: {len(touched(patch))} files")
    (TREE / ".stamp").write_text(stamp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--export", action="store_true", help="write patches/*.patch anew from the edited tree")
    parser.add_argument("--pristine", type=Path, metavar="DIR", help="make the pruned, unpatched tree in DIR")
    options = parser.parse_args()
    if options.export:
        export()
    elif options.pristine:
        if not (options.pristine / "CMakeLists.txt").exists():
            extract(options.pristine)
    else:
        mark = TREE / ".stamp"
        if mark.exists() and mark.read_text() == stamp():
            return
        if not (PATCHES / "series").exists() and TREE.exists():
            return
        shutil.rmtree(ORIGINALS, ignore_errors=True)
        extract(PYTHON_TREE, PYTHON_PART, TOP)
        extract(TREE)
        apply(TREE)
        mark.write_text(stamp())
        print(f"vendored llama.cpp into {TREE}")


if __name__ == "__main__":
    try:
        main()
    except VendorError as error:
        sys.exit(f"vendor.py: {error}")
