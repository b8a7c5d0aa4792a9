"""Models and documents for the tests. Models are fetched once into the user's cache."""

import os
from pathlib import Path

os.environ.setdefault("NUMBA_NUM_THREADS", "1")

import pytest

import kvcast
from kvcast import models

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return models.resolve("smollm2")


@pytest.fixture(scope="session")
def qwen() -> Path:
    return models.resolve("qwen-coder-0.5b")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return models.resolve("gemma3-270m")


@pytest.fixture(scope="session")
def code() -> str:
    return (DATA / "code.txt").read_text()


@pytest.fixture(scope="session")
def prose() -> str:
    return (Path(kvcast.__file__).parent / "data" / "prose.txt").read_text()
