"""Points llama-cpp-python at kvcast's own libraries; must run before the first ``import llama_cpp``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .errors import KvcastError

LIBRARY_DIR = Path(__file__).resolve().parent / "lib"


def name_own_libraries() -> None:
    """Say where kvcast's libllama is, to an ``import llama_cpp`` that is still to come."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(LIBRARY_DIR)


def use_own_libraries() -> None:
    """Make ``import llama_cpp`` load kvcast's libllama.

    Raises
    ------
    KvcastError
        The libraries are missing, or llama_cpp was imported first with others.
    """
    if not any(LIBRARY_DIR.glob("*llama.*")):
        raise KvcastError(f"kvcast's libraries are missing in {LIBRARY_DIR}; reinstall with `pip install --force-reinstall kvcast`")
    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is not None and Path(loaded._base_path).resolve() != LIBRARY_DIR.resolve():
        raise KvcastError("llama_cpp was imported before kvcast and loaded another libllama; import kvcast first")
    name_own_libraries()
    if os.environ.get("MTMD_CPP_LIB"):
        raise KvcastError("MTMD_CPP_LIB names a multimodal library with a libllama of its own; unset it, kvcast runs text models only")
