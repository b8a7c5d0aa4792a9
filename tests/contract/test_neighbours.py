"""llama-cpp-python's own tests of 0.3.36, on our libraries and with ``kvcast.Llama`` in the place of its ``Llama``."""

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from neighbours import SKIPPED
from places import ROOT

N_PASSED = 12  # of 26; four of them with SmolLM2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("vendor", ROOT / "scripts" / "vendor.py")
    vendor = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vendor)
    path = tmp_path_factory.mktemp("neighbours")
    vendor.neighbours(path)
    return path


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_all_pass_but_those_that_need_a_download(folder, small, kind):
    out = folder / f"{kind}.xml"
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "neighbours", "-c", os.devnull, "--rootdir", folder, f"--junitxml={out}", "tests"],
        cwd=folder, env={**os.environ, "PYTHONPATH": path, "KVCAST_NEIGHBOURS": kind}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    cases = {case.get("name"): [child.tag for child in case] for case in ElementTree.parse(out).iter("testcase")}
    assert {name for name, tags in cases.items() if "skipped" in tags} == set(SKIPPED)
    assert len(cases) - len(SKIPPED) == N_PASSED
