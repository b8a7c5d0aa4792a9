"""At a random moment of an answer the process forks, or ends."""

from __future__ import annotations

import atexit
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from injection.subject import PATHS, after, subject
from kvcast import GenerationError

LIMIT_S = 60  # for a process
SCRIPTS = Path(__file__).resolve().parent.parent


def forks(i: int, rng: random.Random) -> None:
    subject_, pids = subject(PATHS[i % 2]), []
    llm = subject_.llm

    def fork() -> None:
        pid = os.fork()
        if pid:
            pids.append(pid)
            return
        code = 1
        try:
            try:
                llm.eval([1])
            except GenerationError as error:
                code = 0 if "forked" in str(error) else 2
            atexit._run_exitfuncs()
            llm.close()
        finally:
            os._exit(code)

    thread = after(rng.random() * subject_.seconds, fork)
    assert subject_.answer() == subject_.expected
    thread.join()
    end = time.monotonic() + 20
    while (done := os.waitpid(pids[0], os.WNOHANG))[0] == 0:
        assert time.monotonic() < end, "the child hangs"
        time.sleep(0.01)
    assert done[1] == 0, f"the child ended with {done[1]}"
    subject_.check()


EXITING = """
import sys, threading, time
from injection.subject import TEXT, load
from kvcast import GenerationError
llm = load(sys.argv[2])
def generate():
    begun.set()
    for _ in zip(range(200), llm.generate(llm.tokenize(TEXT.encode()), temp=0.0)):
        pass
begun = threading.Event()
threading.excepthook = lambda args: None if args.exc_type is GenerationError else print(args, file=sys.stderr)
threading.Thread(target=generate, daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[1]))
"""


def exits(i: int, rng: random.Random) -> None:
    command = [sys.executable, "-c", EXITING, str(rng.random()), PATHS[i % 2]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, cwd=SCRIPTS)
    assert done.returncode == 0 and not done.stderr, (done.returncode, done.stderr)
