"""Long runs: what the tests do for seconds, for minutes. `make soak`; the exit code says whether all held. The first three are
of the device path.

verify   a session of 2,000 steps, the pool compared with the store after each
faults   1,000 prefetches that are late, fail or end their thread's work: the documented error or the same tokens, never a hang
rounds   generate and truncate, 20,000 steps, interleaved with dense: speed of the last rounds to the first, memory
sessions 200 sessions of 500 steps on both paths with random edits, the contract checked twice in each (sessions.py), memory
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from kvcast import GenerationError, Llama, SparseConfig, models, pool
from sessions import sessions

TEXT = Path(__file__).resolve().parent / "demo.txt"


def load(n_ctx: int, **config) -> tuple[Llama, list[int]]:
    config = SparseConfig(path="device", **config)
    llm = Llama(models.resolve("smollm2"), n_ctx=n_ctx, sparse=config, n_threads_batch=psutil.cpu_count(logical=False), verbose=False)
    return llm, llm.tokenize(TEXT.read_bytes())


def verify(n_steps: int) -> None:
    llm, tokens = load(8192, budget=512)
    llm.eval(tokens[:4096])
    for i, token in enumerate(tokens[4096 : 4096 + n_steps]):
        llm.eval([token])
        wrong = llm.session.attached.verify_pool()
        assert wrong == 0, f"{wrong} slots differ after step {i}"
    print(f"verify: {n_steps} steps, every slot equal to the store after each; {llm.session.pool.n_moved} blocks moved")
    llm.close()


def faults(n_tries: int) -> None:
    faulthandler.dump_traceback_later(60 + n_tries, exit=True)  # a hang ends here
    llm, tokens = load(1024, budget=1024, hold=1)
    tokens = tokens[:900]
    llm.eval(tokens[:600])
    state = llm.save_state()
    llm.load_state(state)
    expected: list[int] = []
    for token in tokens[600:640]:
        llm.eval([token])
        expected.append(int(np.argmax(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()])))
    rng, stage, kinds = random.Random(0), pool.Pool.stage, {"late": 0, "fails": 0, "killed": 0}
    kind = ""

    def spoiled(self, *arguments):
        if threading.current_thread() is not threading.main_thread():
            if kind == "late":
                time.sleep(rng.random() * 0.02)
            elif kind == "fails":
                raise OSError("no more uploads")
            elif kind == "killed":
                raise SystemExit
        return stage(self, *arguments)

    pool.Pool.stage = spoiled
    n_done = 0
    while n_done < n_tries:
        llm.load_state(state)
        for i, token in enumerate(tokens[600:640]):
            kind = rng.choice(["late", "late", "fails", "killed"])
            kinds[kind] += 1
            n_done += 1
            try:
                llm.eval([token])
                assert kind == "late" or i == 0, kind  # the first step after an edit has nothing beside it
            except GenerationError as error:
                assert kind != "late" and "beside the step failed" in str(error), error
                kind = ""
                llm.eval([token])
            assert llm.session.attached.verify_pool() == 0
            assert int(np.argmax(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()])) == expected[i], i
    pool.Pool.stage = stage
    faulthandler.cancel_dump_traceback_later()
    llm.close()
    print(f"faults: {n_done} prefetches ({kinds}): the same tokens, or the documented error and then the same tokens; no hang")


def rounds(n_steps: int) -> None:
    n_context, n = 4096, 200
    llm, tokens = load(n_context + 512, budget=512)
    dense = Llama(
        models.resolve("smollm2"), n_ctx=n_context + 512, flash_attn=True, n_threads=psutil.cpu_count(logical=False), verbose=False
    )
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
    parser.add_argument("--only", choices=("verify", "faults", "rounds", "sessions"))
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps, tries and sessions")
    parser.add_argument("--sessions", metavar="A:B", help="these of the sessions, to run them in pieces; the last is B - 1")
    options = parser.parse_args()
    for part, n in ((verify, 2000), (faults, 1000), (rounds, 20000)):
        if options.only in (None, part.__name__):
            part(int(n * options.scale))
    if options.only in (None, "sessions"):
        sessions(*map(int, options.sessions.split(":"))) if options.sessions else sessions(0, max(2, round(200 * options.scale)))


if __name__ == "__main__":
    main()
