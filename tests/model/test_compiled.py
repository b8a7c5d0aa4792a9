"""Kernels are compiled before the first step, and keep within their arrays."""

import itertools
import os
import subprocess
import sys

import pytest

from places import ROOT

LATE = """
import sys
import numpy as np
from numba.core.dispatcher import Dispatcher
from kvcast import Llama, SparseConfig
from kvcast.engine import device_path
from kvcast.sparse import history, pool, selection
from shapes import write_shape

kernels = [x for module in (device_path, history, pool, selection) for x in vars(module).values() if isinstance(x, Dispatcher)]
path, *settings = sys.argv[1:]
config = SparseConfig(budget=256, **dict(s.split("=") for s in settings))
late = []
for n_head_kv in (1, 2):
    llm = Llama(write_shape(path, n_ctx=2048, n_head_kv=n_head_kv), n_ctx=1024, verbose=False, sparse=config)
    before = [len(k.signatures) for k in kernels]
    llm.eval(np.arange(960).tolist())
    for token in range(64):
        llm.eval([token])
    late += [k.__name__ for k, n in zip(kernels, before) if len(k.signatures) > n]
print(late)
"""


@pytest.mark.parametrize(
    "settings",
    [*itertools.product(("path=host", "path=device"), ("predictor=auto", "predictor=ema", "predictor=window")),
     ("calibrate=off",), ("calibrate=layers:4",), ("path=device", "calibrate=dense:4"), ("path=device", "calibrate=layers:4")],
    ids=" ".join,
)  # fmt: skip
def test_no_kernel_is_compiled_in_a_step(settings, tmp_path):
    """All are compiled, or loaded from numba's cache, before the first token: a step must not wait a second for one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT / "tests" / "helpers")])}
    command = [sys.executable, "-c", LATE, tmp_path / "x.gguf", *settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stdout + done.stderr[-2000:]


@pytest.mark.skipif("NUMBA_BOUNDSCHECK" in os.environ, reason="this is the run with bounds checked")
def test_with_bounds_checked(tmp_path):
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "compiled", ROOT / "tests/unit/test_kernels.py"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout[-2000:]
