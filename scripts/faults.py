"""Faults on purpose, 50 of each kind and 200 random interrupts. `make faults`; the exit code says whether all held.

After a fault the answer goes on, and must be that of an undisturbed run, token by token. What hangs ends with a traceback of every
thread. Budgets are as large as the context, so that what a step attends to does not depend on what was lost of the history.

python_callbacks, compiled_callbacks    a callback of attention or of KV raises, or returns an error, at a random step
network      the ONNX session fails at its n-th call, in the step or beside it
late_prefetch, failing_prefetch, dying_prefetch    device path: beside a step the upload is late, raises, or its thread ends
interrupts   Llama.interrupt from another thread at a random moment
signals      KeyboardInterrupt at a random moment, out of a signal handler
forks        another thread forks at a random moment; the child is refused, closes and ends
exits        the interpreter ends at a random moment while a daemon thread generates
two          two models generate in two threads at once, one of them interrupted
prompts      while a prompt is read a callback raises, or an interrupt or a signal comes
few_files, little_memory    the system has no more of them, at a random moment
closes       another thread closes the model at a random moment of an answer
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import time
from collections.abc import Callable

from injection.callbacks import compiled_callbacks, network, python_callbacks
from injection.limits import few_files, little_memory
from injection.moments import closes, interrupts, signals, two
from injection.prefetch import dying_prefetch, failing_prefetch, late_prefetch
from injection.processes import exits, forks
from injection.prompts import prompts

LIMIT_S = 60  # for one fault

KINDS = (
    python_callbacks, compiled_callbacks, network, late_prefetch, failing_prefetch, dying_prefetch, interrupts, signals, forks, exits,
    two, closes, prompts, few_files, little_memory,
)  # fmt: skip


def inject(kind: Callable[[int, random.Random], None], count: int, seed: int = 0) -> None:
    """``count`` faults of a kind."""
    rng = random.Random(seed)
    begin = time.monotonic()
    for i in range(count):
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        try:
            kind(i, rng)
        except BaseException as error:
            error.add_note(f"{kind.__name__}, fault {i} of {count}") if hasattr(error, "add_note") else None
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
    print(f"{kind.__name__}: {count} faults, {time.monotonic() - begin:.0f} s: no hang, no wrong token", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=[kind.__name__ for kind in KINDS])
    parser.add_argument("--count", type=int, help="of each kind; without it 50, of interrupts and signals 200")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in KINDS:
        if options.only in (None, kind.__name__):
            inject(kind, options.count or (200 if kind in (interrupts, signals) else 50), options.seed)
