"""The system has no more open files, or no more memory, at a random moment: one sentence, and everything goes on once there is some."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from injection.subject import PATHS

LIMIT_S = 60  # for a process
SCRIPTS = Path(__file__).resolve().parent.parent

SCRIPT = """
import os, random, resource, sys, tempfile
from pathlib import Path
from injection.subject import Subject, load
from kvcast import KvcastError
from kvcast.chat.documents import DocumentCache

seed, path, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
rng = random.Random(seed)
subject = Subject(load(path, n_threads=1))
llm, document = subject.llm, 40 * subject.prompt
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    cache = DocumentCache(folder / "documents")
    llm.save_session(folder / "kept")
    for _ in range(12):
        if what == "files":
            kind, used = resource.RLIMIT_NOFILE, len(os.listdir("/proc/self/fd")) - 1
            most = used + rng.randrange(4)
        else:
            kind, used = resource.RLIMIT_AS, int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            most = used + rng.choice((0, 1 << 16, 1 << 20, 1 << 23, 1 << 25))
        soft, hard = resource.getrlimit(kind)
        act = rng.choice((
            lambda: llm.save_session(folder / "kept"), lambda: llm.load_session(folder / "kept"), lambda: cache.entries(),
            lambda: llm.save_state(), lambda: subject.answer(),
        ))
        resource.setrlimit(kind, (most, hard))
        try:
            act()
        except KvcastError as error:
            resource.setrlimit(kind, (soft, hard))
            assert chr(10) not in str(error), error
        finally:
            resource.setrlimit(kind, (soft, hard))
        llm.load_session(folder / "kept")
        subject.answer()
        subject.check()
print("held")
"""


def _limits(i: int, rng: random.Random, what: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(rng.randrange(1 << 30)), PATHS[i % 2], what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=SCRIPTS)
    assert done.returncode == 0 and done.stdout.strip() == "held", (done.returncode, done.stderr[-2000:])


def few_files(i: int, rng: random.Random) -> None:
    _limits(i, rng, "files")


def little_memory(i: int, rng: random.Random) -> None:
    _limits(i, rng, "memory")
