"""Runs cases in a child process, so that a crash or a hang of native code is one more finding, and the next case goes on."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import re
import resource
import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

HANG_S = 20.0
MEMORY_BYTES = 8 << 30  # of address space: what asks for more is told that there is none
N_KEPT = 3  # inputs kept of findings that look alike
LAST_WORDS = re.compile(r"GGML_ASSERT\(.*|GGML_ABORT.*|what\(\): .*|.*runtime error: .*|ERROR: AddressSanitizer: \S+")
FRAME = re.compile(r'File ".*?([^/"]+)", line \d+ in (\w+)')


class Surface(Protocol):
    """Something that takes input from outside. Made in the child, with a folder of its own."""

    def make(self, rng: random.Random) -> bytes:
        """One input."""
        ...

    def run(self, data: bytes) -> str:
        """Feed it; how it ended, in a word or two. What it raises is a finding."""
        ...


@dataclass
class Report:
    """Of a run: how often each outcome was seen, and each finding."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)


def fuzz(make_surface: Callable[[Path], Surface], name: str, cases: range, seed: int, out: Path) -> Report:
    """Run cases; inputs of findings go to ``out``, as NAME-CASE."""
    report, context = Report(), multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as scratch:
        folder, case = Path(scratch), cases.start
        while case < cases.stop:
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(make_surface, range(case, cases.stop), seed, folder, theirs))
            child.start()
            theirs.close()
            alive = True
            while alive and case < cases.stop:
                alive, finding, data = _next(ours, report)
                if not alive:
                    current = folder / "input"
                    finding, data = _end_of(child, folder), current.read_bytes() if current.exists() else b""
                if finding:
                    _keep(report, finding, data, out / f"{name}-{case}")
                case += 1
            child.join(5)
            child.kill()
    return report


def _next(pipe: Connection, report: Report) -> tuple[bool, str, bytes]:
    """Wait for the end of a case: whether the child got there in time, what was found, and its input."""
    try:
        if not pipe.poll(HANG_S):
            return False, "", b""
        outcome, finding, data = pipe.recv()
    except EOFError:
        return False, "", b""
    if not finding:
        report.outcomes[outcome] += 1
    return True, finding, data


def _end_of(child: multiprocessing.process.BaseProcess, folder: Path) -> str:
    child.join(1)
    if child.is_alive():
        child.kill()
        child.join()
        return "hang"
    words = (folder / "stderr").read_text(errors="replace")
    said = LAST_WORDS.findall(words)[-1:] or [f"{file}:{function}" for file, function in FRAME.findall(words)[:2]]
    code = child.exitcode or 0
    return f"{signal.Signals(-code).name if code < 0 else f'exit {code}'}: {' < '.join(said)[:160]}"


def _keep(report: Report, finding: str, data: bytes, to: Path) -> None:
    report.findings[finding] += 1
    if report.findings[finding] <= N_KEPT:
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(data)
        print(f"  {finding}\n    {to}", flush=True)


def _child(make_surface: Callable[[Path], Surface], cases: range, seed: int, folder: Path, pipe: Connection) -> None:
    errors = os.open(folder / "stderr", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    surface = make_surface(folder)
    for case in cases:
        data = surface.make(random.Random(f"{seed}-{case}"))
        (folder / "input").write_bytes(data)
        os.ftruncate(errors, 0)
        os.lseek(errors, 0, os.SEEK_SET)
        try:
            pipe.send((surface.run(data), "", b""))
        except Exception as error:  # noqa: BLE001 - it is a finding
            pipe.send(("", _about(error), data))
    os._exit(0)  # no destructors: what a case left behind is not of interest


def _about(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "kvcast" in f.filename or "predictor_onnx" in f.filename] or frames
    message = re.sub(r"(0x)?[0-9a-f]*[0-9]", "#", str(error))[:120]
    return f"{type(error).__name__} in {Path(own[-1].filename).name}:{own[-1].name}: {message}"
