"""docs/cli.md and docs/api.md are what the code says."""

import subprocess
import sys

import pytest

from places import ROOT

pytest.importorskip("langchain_community", reason="part of the API is an integration")


def test_the_reference_is_that_of_the_code(tmp_path):
    subprocess.run([sys.executable, ROOT / "scripts" / "reference.py", tmp_path], check=True)
    for name in ("cli.md", "api.md"):
        written, made = (ROOT / "docs" / name).read_text(), (tmp_path / name).read_text()
        assert written == made, f"docs/{name} is not what the code says; run `make docs`"
        assert len(written) > 5000
