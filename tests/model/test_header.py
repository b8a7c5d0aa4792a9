"""A header that was read is kept, for the same file and the same overrides only."""

import time

import pytest

from kvcast.gguf import header
from kvcast.gguf.header import read_header
from shapes import write_shape

KEY = "llama.block_count"


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file that was written long enough ago to be kept."""
    monkeypatch.setattr(header, "SETTLED_NS", 10**7)
    file = write_shape(tmp_path / "x.gguf", n_layer=2)
    time.sleep(0.1)
    return file


def test_it_is_read_once(settled, monkeypatch):
    found = read_header(settled)
    monkeypatch.setattr(header, "header_of", lambda gguf: pytest.fail("it was read again"))
    assert read_header(settled) is found


@pytest.mark.parametrize("value", [True, 1.0])
def test_overrides_of_another_kind_are_others(settled, value):
    """They compare equal; llama.cpp takes no such ones in the place of a number."""
    assert read_header(settled, {KEY: 1}).n_layer == 1
    assert read_header(settled, {KEY: value}).n_layer == 2


def test_a_file_that_was_changed_is_read_again(settled, tmp_path):
    assert read_header(settled).n_layer == 2
    write_shape(settled, n_layer=1)
    assert read_header(settled).n_layer == 1
    time.sleep(0.1)
    assert read_header(settled).n_layer == 1
