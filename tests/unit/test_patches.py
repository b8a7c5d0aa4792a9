"""The patch queue: small, applies without fuzz, re-exports byte for byte, and its README tells the truth."""

import re
import subprocess
import sys

from places import ROOT

PATCHES = ROOT / "patches"
SERIES = [line for line in (PATCHES / "series").read_text().splitlines() if line]


def changed_lines(text):
    return [line for line in text.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]


def test_call_sites_only():
    assert sum(len(changed_lines((PATCHES / name).read_text())) for name in SERIES) < 150


def test_headers_say_why():
    for name in SERIES:
        header = (PATCHES / name).read_text().split("--- a/")[0]
        assert "Why here:" in header and "What would let us drop it:" in header, name


def test_readme_is_true_to_series():
    rows = re.findall(r"^\| `([^`]+\.patch)` \| ((?:`[^`]+` ?)+)\|", (PATCHES / "README.md").read_text(), re.M)
    assert [name for name, _ in rows] == SERIES
    assert sorted(p.name for p in PATCHES.glob("*.patch")) == sorted(SERIES)
    for name, files in rows:
        touched = re.findall(r"^\+\+\+ b/(\S+)", (PATCHES / name).read_text(), re.M)
        assert re.findall(r"`([^`]+)`", files) == touched


def test_apply_and_export_are_byte_stable():
    before = {name: (PATCHES / name).read_bytes() for name in SERIES}
    subprocess.run([sys.executable, str(ROOT / "scripts/vendor.py"), "--export"], check=True, capture_output=True)
    assert {name: (PATCHES / name).read_bytes() for name in SERIES} == before


def test_our_symbol_is_in_the_library():
    from kvcast.bindings.library import LIBRARY_DIR

    assert any(b"kvcast_attach" in path.read_bytes() for path in LIBRARY_DIR.glob("*llama.*"))
    assert not list(LIBRARY_DIR.glob("libllama.so.*")), "each library once"
