"""Long runs: what the tests do for seconds, for minutes. `make soak`; the exit code says whether all held. The first three are
of the device path.

verify   a session of 2,000 steps, the pool compared with the store after each
rounds   generate and truncate, 20,000 steps, interleaved with dense: speed of the last rounds to the first, memory
sessions 200 sessions of 500 steps on both paths with random edits, the contract checked twice in each (sessions.py), memory
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import psutil

from kvcast import Llama, SparseConfig, models
from kvcast.cores import usable_cores
from sessions import sessions

TEXT = Path(__file__).resolve().parent / "demo.txt"


def load(n_ctx: int, **config) -> tuple[Llama, list[int]]:
    config = SparseConfig(path="device", **config)
    llm = Llama(models.resolve("smollm2"), n_ctx=n_ctx, sparse=config, n_threads_batch=usable_cores(), verbose=False)
    return llm, llm.tokenize(TEXT.read_bytes())


def verify(n_steps: int) -> None:
    llm, tokens = load(8192, budget=512)
    llm.eval(tokens[:4096])
    for i, token in enumerate(tokens[4096 : 4096 + n_steps]):
        llm.eval([token])
        wrong = llm.session.attached.verify_pool()
        assert wrong == 0, f"{wrong} slots differ after step {i}"
    print(f"verify: {n_steps} steps, every slot equal to the store after each; {llm.session.path.pool.n_moved} blocks moved")
    llm.close()


def rounds(n_steps: int) -> None:
    n_context, n = 4096, 200
    llm, tokens = load(n_context + 512, budget=512)
    dense = Llama(models.resolve("smollm2"), n_ctx=n_context + 512, flash_attn=True, n_threads=usable_cores(), verbose=False)
    for x in (llm, dense):
        x.eval(tokens[:n_context])
    ratios, memory = [], []
    for i in range(n_steps // n):
        speeds = []
        for x, m in ((llm, n), (dense, n // 4)):
            x.n_tokens = n_context
            begin = time.perf_counter()
            for token in tokens[n_context : n_context + m]:
                x.eval([token])
            speeds.append(m / (time.perf_counter() - begin))
        ratios.append(speeds[0] / speeds[1])
        memory.append(psutil.Process().memory_info().rss / 1e6)
        if i % 10 == 0:
            print(f"rounds: step {i * n}: {ratios[-1]:.2f}x dense, {memory[-1]:.0f} MB", flush=True)
    k = max(1, len(ratios) // 5)
    first, last = np.median(ratios[:k]), np.median(ratios[-k:])
    print(f"rounds: {n_steps} steps: {first:.3f}x dense at first, {last:.3f}x at last ({last / first:.3f}); "
          f"{memory[k]:.0f} MB then {memory[-1]:.0f} MB")  # fmt: skip
    assert memory[-1] < memory[k] + 20 and 0.9 < last / first, "memory grew or speed fell"
    llm.close()
    dense.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("verify", "rounds", "sessions"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps and sessions")
    parser.add_argument("--sessions", metavar="A:B", help="these of the sessions, to run them in pieces; the last is B - 1")
    options = parser.parse_args()
    for part, n in ((verify, 2000), (rounds, 20000)):
        if options.only in (None, part.__name__):
            part(int(n * options.scale))
    if options.only in (None, "sessions"):
        sessions(*map(int, options.sessions.split(":"))) if options.sessions else sessions(0, max(2, round(200 * options.scale)))


if __name__ == "__main__":
    main()
