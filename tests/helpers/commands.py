"""The command line, as a user runs it."""

import os
import subprocess
import sys


def command(*arguments, given="", **environment):
    return subprocess.run(
        [sys.executable, "-m", "kvcast.cli", *map(str, arguments)],
        capture_output=True, text=True, input=given, env={**os.environ, "COLUMNS": "200", **environment}, timeout=300,
    )  # fmt: skip


def one_sentence(done, *words):
    assert done.returncode != 0
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    assert "Traceback" not in done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]
