"""Install kvcast the ways that people do, each into a new environment, and ask a model something: make test-installers.

The wheel in ``dist`` goes into each Python that is there; the checkout is installed by an older pip and by uv; the source distribution
is built without a network. What is installed is called from an empty folder, so that nothing of the checkout is found by accident.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
OLD_PIP = "pip==24.0"
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
QUESTION = "What colour is the dog?"
TRY = """
import ctypes, kvcast, sys
from kvcast import Llama, SparseConfig, models
import llama_cpp
llm = Llama(models.resolve("smollm2"), n_ctx=1024, sparse=SparseConfig(budget=256), verbose=False)
assert isinstance(llm, llama_cpp.Llama), "kvcast.Llama is no llama_cpp.Llama"
assert llama_cpp.llama_cpp._lib.kvcast_version, "libllama has no kvcast in it"
text = "Anna has a red dog called Rex. " * 30
said = llm.create_chat_completion([{"role": "user", "content": text + "What colour is the dog?"}], max_tokens=12, temperature=0)
print(sys.version.split()[0], kvcast.__version__, repr(said["choices"][0]["message"]["content"]))
assert "red" in said["choices"][0]["message"]["content"].lower()
"""


def run(command: list[str | Path], folder: Path, **changes: str) -> str:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **changes}, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout.strip()


def environment(python: str | Path, folder: Path) -> Path:
    """A new environment's Python."""
    run([python, "-m", "venv", folder], folder.parent)
    return folder / "bin" / "python"


def answer(python: Path, folder: Path) -> str:
    """What a small model says, as a user's program would ask it."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    return run([python, "-c", TRY], empty)


def the_wheel(version: str, folder: Path) -> str:
    python = environment(shutil.which(f"python{version}") or version, folder / "venv")
    run([python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *(ROOT / "dist").glob("*.whl")], folder)
    return answer(python, folder)


def an_old_pip(folder: Path) -> str:
    python = environment(sys.executable, folder / "venv")
    run([python, "-m", "pip", "install", "--quiet", OLD_PIP], folder)
    run([python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, ROOT], folder)
    return answer(python, folder)


def uv(folder: Path) -> str:
    tool = shutil.which("uv")
    if tool is None:
        python = environment(sys.executable, folder / "tool")
        run([python, "-m", "pip", "install", "--quiet", "uv"], folder)
        tool = str(folder / "tool" / "bin" / "uv")
    run([tool, "venv", "--quiet", "--python", sys.executable, folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    run([tool, "pip", "install", "--quiet", "--python", python, "--constraint", CONSTRAINTS, ROOT], folder)
    return answer(python, folder)


def the_sdist_without_network(folder: Path) -> str:
    python = environment(sys.executable, folder / "venv")
    tools = ["scikit-build-core", "cmake", "ninja"]
    run([python, "-m", "pip", "install", "--quiet", *tools], folder)
    cut = ["unshare", "--net", "--map-root-user"] if can_cut() else []
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    build = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, sdist]
    run([*cut, *build], folder, XDG_CACHE_HOME=str(folder / "cache"))
    (wheel,) = folder.glob("*.whl")
    run([python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, wheel], folder)
    return answer(python, folder) + ("" if cut else " (the network could not be cut off here)")


def can_cut() -> bool:
    return shutil.which("unshare") is not None and subprocess.run(["unshare", "--net", "--map-root-user", "true"]).returncode == 0


def ways() -> Iterator[tuple[str, Callable[[Path], str]]]:
    for version in PYTHONS:
        found = shutil.which(f"python{version}")
        if found and subprocess.run([found, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            yield f"the wheel, Python {version}", lambda folder, found=found: the_wheel(found, folder)
    yield f"a checkout, {OLD_PIP}", an_old_pip
    yield "a checkout, uv", uv
    yield "the source distribution, no network", the_sdist_without_network


def main() -> int:
    n_failed = 0
    for name, way in ways():
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = way(Path(folder))
            except (RuntimeError, ValueError) as error:
                n_failed += 1
                said = f"FAILED: {error}"
        print(f"{name}: {said} ({time.monotonic() - begin:.0f} s)", flush=True)
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
