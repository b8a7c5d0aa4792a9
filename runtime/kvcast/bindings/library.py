"""llama-cpp-python's Python part, which kvcast carries, on kvcast's own libraries.

``import llama_cpp`` finds the carried package from the moment kvcast is imported, in this process only: an installed llama-cpp-python
stays as it is, for other programs and for whoever does not import kvcast.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from ..errors import KvcastError

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY_DIR = PACKAGE / "lib"
CARRIED = PACKAGE / "_vendor" / "llama_cpp"
REINSTALL = "install kvcast again (pip install --force-reinstall, of the same file or folder)"

# How long a thread that waits for the others keeps its core busy. Unbounded, as OpenMP runtimes have it, any other program on these cores
# slows an answer a hundredfold. Read once, when the runtime is loaded: GNU's (in turns of a loop), LLVM's and Intel's (in milliseconds).
WAITING = {"GOMP_SPINCOUNT": "300", "KMP_BLOCKTIME": "1"}
LOG_LEVELS: dict[int, int] = {}  # of ggml, to Python's, in the place of llama-cpp-python's
SET_BY_USER = ("OMP_WAIT_POLICY", *WAITING)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the carried ``llama_cpp``."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if name == "llama_cpp":
            if not any(LIBRARY_DIR.glob("*llama.*")) or not CARRIED.is_dir():
                raise KvcastError(f"kvcast's libraries are missing in {LIBRARY_DIR}; {REINSTALL}")
            return importlib.util.spec_from_file_location(name, CARRIED / "__init__.py", submodule_search_locations=[str(CARRIED)])
        if name == "llama_cpp.llama_cpp" and path is not None and str(CARRIED) in path:  # the module that loads the library
            file = str(CARRIED / "llama_cpp.py")
            return importlib.util.spec_from_file_location(name, file, loader=_Loader(name, file))
        return None


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        try:
            with environment_of_libraries():
                super().exec_module(module)
        except (OSError, RuntimeError) as error:
            raise KvcastError(f"kvcast's libraries in {LIBRARY_DIR} cannot be loaded ({error}); {REINSTALL}") from error


@contextlib.contextmanager
def environment_of_libraries() -> Iterator[None]:
    """While kvcast's libraries are loaded: where they are, and how their threads wait. Children of this process inherit nothing of it."""
    changes = {"LLAMA_CPP_LIB_PATH": str(LIBRARY_DIR)}
    if not any(name in os.environ for name in SET_BY_USER):
        changes |= WAITING
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def carry_llama_cpp() -> None:
    """From now on ``import llama_cpp`` finds the carried package, unless another one was imported before."""
    if "llama_cpp" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def use_own_libraries() -> None:
    """Load kvcast's libllama, as ``llama_cpp``.

    Raises
    ------
    KvcastError
        The libraries are missing or cannot be loaded, or another llama_cpp was imported first.
    """
    for name in ("llama_cpp", "llama_cpp.llama_cpp"):
        loaded = sys.modules.get(name)
        if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve().parent != CARRIED:
            raise KvcastError("llama_cpp was imported before kvcast and loaded another libllama; import kvcast first")
    if os.environ.get("MTMD_CPP_LIB"):
        raise KvcastError("MTMD_CPP_LIB names a multimodal library with a libllama of its own; unset it, kvcast runs text models only")
    import llama_cpp  # noqa: F401
