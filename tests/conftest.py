"""Models and documents for the tests. Models are fetched once into the user's cache."""

import os
import signal
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import pytest

import kvcast
from kvcast import models
from places import DATA
from small import first_layers

# what was started in the background, or with nohup, ignores them, and so would every process that a test starts
for number, usual in ((signal.SIGINT, signal.default_int_handler), (getattr(signal, "SIGHUP", None), signal.SIG_DFL)):
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return models.resolve("smollm2")


@pytest.fixture(scope="session")
def small(smollm2, tmp_path_factory) -> Path:
    """SmolLM2's first four layers of 30: what a test needs of a real model that does not look at what is answered."""
    return first_layers(smollm2, tmp_path_factory.mktemp("small") / "small.gguf", 4)


@pytest.fixture(scope="session")
def qwen() -> Path:
    return models.resolve("qwen-coder-0.5b")


@pytest.fixture(scope="session")
def small_qwen(qwen, tmp_path_factory) -> Path:
    """Qwen's first three layers of 24."""
    return first_layers(qwen, tmp_path_factory.mktemp("small") / "small.gguf", 3)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return models.resolve("gemma3-270m")


@pytest.fixture(scope="session")
def code() -> str:
    return (DATA / "code.txt").read_text()


@pytest.fixture(scope="session")
def prose() -> str:
    return (Path(kvcast.__file__).parent / "data" / "prose.txt").read_text()


@pytest.fixture(params=["avx512", "avx2", "generic"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("KVCAST_KERNELS", request.param)
