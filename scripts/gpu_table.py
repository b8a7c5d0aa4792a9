"""Both sparse paths beside dense llama.cpp on a GPU build: weights on the GPU, the KV cache in host memory.

    python scripts/gpu_table.py MODEL.gguf --contexts 8192,32768,131072 --out table.json

Per context: dense with all KV on the GPU; dense with the KV cache on the host (offload_kqv=False; only up to --host-dense-max, it
is slow); the host path at --budgets; the device path at context/16, at least 2,048. Decoded one token at a time through the same
Python loop; medians over rounds, the first of which warms up and fills the pool. At --variants-at, the device path also without
prefetch, with the plain average as predictor, with the network on the GPU (onnxruntime-gpu), and with calibration on the host.

A model of the right shape with random weights is enough for speed, but its attention knows no jumps. So what moves between two
sets of the device path is replayed from real models: the share of the critical blocks that was new at each selection
(kvcast/data/churn.json), applied to every KV head, with blocks drawn at random, ``RUN`` side by side as real attention has them. The
predictor, the selection and calibration run as they are; only which blocks they name is replaced. To record it anew from a model that
is real:

    python scripts/gpu_table.py MODEL.gguf --record text.txt --contexts 7680 --budget 512
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import threading
import time
from pathlib import Path

import numba
import numpy as np

from kvcast import Llama, SparseConfig
from kvcast.cores import usable_cores
from kvcast.planning.link_simulator import measure_link

RUN = 3  # critical blocks that lie side by side, in the mean: 3.0 to 4.4 in recordings of `kvcast trace`
CHURN = Path(__file__).resolve().parent.parent / "runtime/kvcast/data/churn.json"


def gpu_memory_mib() -> int:
    """What the driver reports as used; 0 without a driver."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"], capture_output=True, text=True)
    except FileNotFoundError:
        return 0
    return sum(int(x) for x in done.stdout.split()) if done.returncode == 0 else 0


def rounds(llm: Llama, n_context: int, n_steps: int, n_rounds: int) -> float:
    """Tokens per second; random tokens from the end of the context on, taken back after each round."""
    tokens = np.random.default_rng(0).integers(100, 20000, n_steps).tolist()
    speeds = []
    for _ in range(n_rounds + 1):
        llm.n_tokens = n_context
        begin = time.perf_counter()
        for token in tokens:
            llm.eval([token])
        speeds.append(n_steps / (time.perf_counter() - begin))
    return statistics.median(speeds[1:] or speeds)


@numba.njit(nogil=True, cache=True)
def _replace(before, n_before, wanted, n_wanted, begin, end, share):
    """Make ``wanted`` what of ``before`` lies in [begin, end), but for a share of each row's blocks; those and what is missing are drawn
    anew, in runs."""
    inside = np.zeros(end, np.uint8)
    for row in range(wanted.shape[0]):
        n, n_there = n_wanted[row], 0
        inside[begin:end] = 0
        for b in before[row, : n_before[row]]:
            if begin <= b < end:
                inside[b] = 1
                n_there += 1
        n_gone = min(n_there, max(int(share * n + np.random.random()), n_there - n), end - begin - n)
        for change, left in ((1, n_gone), (0, n - n_there + n_gone)):  # what goes, then what comes
            while left > 0:
                run, b = RUN, before[row, np.random.randint(n_before[row])] if change else np.random.randint(begin, end)
                if b >= end:
                    continue
                while change and b > begin and inside[b - 1] == 1:  # whole runs go
                    b -= 1
                while left > 0 and run > 0 and b < end and inside[b] == change:
                    inside[b] = 2 if change else 1  # what goes does not come back
                    b, run, left = b + 1, run - 1, left - 1
        i = 0
        for b in range(begin, end):
            if inside[b] == 1:
                wanted[row, i] = b
                i += 1


def replay(session, shares: list[float]) -> None:
    """Have the session's sets change as much as a real model's did; the first one is drawn whole."""
    path = session.path
    select, at = path._select_wanted, itertools.cycle(shares)
    n_drawn = np.zeros(session.n_rows, np.int32)

    def select_and_replace(n_used: int, rows: slice, last: object) -> None:
        if rows.start == rows.stop and rows != slice(None):
            return
        before = path._wanted[rows, : n_drawn[rows].max()].copy()
        select(n_used, rows, last)
        wanted, n_wanted = path._wanted[rows], path._n_wanted[rows]
        _replace(before, n_drawn[rows], wanted, n_wanted, path._n_sink, n_used - path._n_window, next(at))
        n_drawn[rows] = n_wanted

    path._select_wanted = select_and_replace


def record(model: Path, text: Path, n_context: int, budget: int, n_steps: int = 512) -> None:
    """Add the shares of one model and text to churn.json."""
    config = SparseConfig(budget=budget, path="device", budget_allocation="uniform")
    llm = Llama(model, sparse=config, n_ctx=n_context + n_steps, verbose=False)
    tokens = llm.tokenize(text.read_bytes())[: n_context + n_steps]
    llm.eval(tokens[:n_context])
    for token in tokens[n_context:]:
        llm.eval([token])
    session = llm.session
    critical = session.n_rows * (budget // 16 - session.path._n_fixed)
    moves = session.times.moves[config.steps_held + 1 :]  # without the first, which fills the pool
    shares = [sum(moves[i : i + config.steps_held]) / critical for i in range(0, len(moves), config.steps_held)]
    known = json.loads(CHURN.read_text()) if CHURN.exists() else {}
    known[f"{model.stem}, {text.stem}, {n_context} tokens, budget {budget}, hold {config.steps_held}"] = [round(s, 4) for s in shares]
    CHURN.write_text(json.dumps(known, indent=1).replace(",\n  ", ", ") + "\n")
    print(f"{len(shares)} selections, {statistics.mean(shares):.3f} of the critical blocks new in the mean")


class Peak:
    """Context manager: the most GPU memory that was in use, in MiB over ``empty``, looked at four times a second."""

    def __init__(self, empty: int):
        self.mib = 0
        self._empty = empty
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            self.mib = max(self.mib, gpu_memory_mib() - self._empty)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


class Table:
    """Rows, printed and written as they come."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.rows: list[dict] = []
        self.empty_mib = gpu_memory_mib()

    def add(self, **row) -> None:
        self.rows.append(row)
        about = {"model": self.options.model.name, "threads": self.options.threads, "ubatch": self.options.ubatch}
        self.options.out.write_text(json.dumps({**about, "rows": self.rows}, indent=2))
        print(" ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    def load(self, n_context: int, **more) -> tuple[Llama, dict]:
        """A model that has read a context, how fast, and the GPU memory in use meanwhile."""
        make = dict(n_gpu_layers=-1, n_batch=self.options.ubatch, n_ubatch=self.options.ubatch, n_ctx=n_context + 1024, verbose=False)
        if self.options.threads:
            more["n_threads"] = self.options.threads
        llm = Llama(self.options.model, **make, **more)
        tokens = np.random.default_rng(1).integers(100, 20000, n_context).tolist()
        llm.eval(tokens[: self.options.ubatch])  # what is loaded and compiled once
        llm.reset()
        with Peak(self.empty_mib) as peak:
            begin = time.perf_counter()
            llm.eval(tokens)
            seconds = time.perf_counter() - begin
        return llm, {"prefill_tok_s": n_context / seconds, "prefill_peak_mib": peak.mib}

    def sparse(self, llm: Llama, n_context: int, how: str, config: SparseConfig, **more) -> None:
        llm.session.configure(config)
        rounds(llm, n_context, self.options.steps, 0)
        llm.session.reset_stats()
        tok_s = rounds(llm, n_context, self.options.steps, self.options.rounds)
        times, session = llm.session.times, llm.session
        parts = {name: times.ms(getattr(times, name)) for name in ("total", "wait", "predict", "select", "gather", "observe")}
        parts |= {"attention": times.attention_us / 1e3 / times.n_steps, "choose": times.choose_us / 1e3 / times.n_steps}
        if config.device:
            pool = session.attached.pool_info
            more["device_kv_mib"] = (pool.pool_bytes + pool.staging_bytes + pool.tap_bytes) / 2**20
            more["moved_mb_per_step"] = sum(times.moves) * session.path.pool.bytes_per_move / 1e6 / times.n_steps
            more["wrong_blocks"] = session.attached.verify_pool()
        self.add(
            context=n_context, how=how, tok_s=tok_s, gpu_mib=gpu_memory_mib() - self.empty_mib, **more,
            **{f"{name}_ms": ms for name, ms in parts.items() if ms},
        )  # fmt: skip
        llm.session.configure(config, frozen=True)
        frozen = rounds(llm, n_context, self.options.steps, 1)
        self.add(context=n_context, how=how + ", frozen set", tok_s=frozen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--budgets", default="512,2048", help="of the host path")
    parser.add_argument("--budget", type=int, help="of the device path, instead of context/16")
    parser.add_argument("--paths", default="dense,host,device")
    parser.add_argument("--host-dense-max", type=int, default=8192)
    parser.add_argument("--variants-at", type=int, default=32768)
    parser.add_argument("--threads", type=int, help="of all rows; else the defaults, and all cores for dense with KV on the host")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=128, help="of a round; at its begin every set is selected anew")
    parser.add_argument("--ubatch", type=int, default=2048)
    parser.add_argument("--record", type=Path, help="a text: record how sets change, instead of measuring")
    parser.add_argument("--out", type=Path, default=Path("gpu_table.json"))
    options = parser.parse_args()
    contexts = [int(c) for c in options.contexts.split(",")]
    if options.record:
        record(options.model, options.record, contexts[0], options.budget or 512)
        return
    shares = [s for recorded in json.loads(CHURN.read_text()).values() for s in recorded]
    np.random.default_rng(2).shuffle(shares)
    table = Table(options)
    for n_context in contexts:
        if "dense" in options.paths:
            llm, prefill = table.load(n_context, flash_attn=True)
            tok_s = rounds(llm, n_context, options.steps, options.rounds)
            table.add(context=n_context, how="dense, KV on GPU", tok_s=tok_s, **prefill, gpu_mib=gpu_memory_mib() - table.empty_mib)
            llm.close()
            if n_context <= options.host_dense_max:
                llm, prefill = table.load(n_context, flash_attn=True, offload_kqv=False, n_threads=usable_cores())
                tok_s = rounds(llm, n_context, 16, 1)
                table.add(context=n_context, how="dense, KV on host", tok_s=tok_s, **prefill)
                llm.close()
        if "host" in options.paths:
            configs = [SparseConfig(budget=int(b), path="host") for b in options.budgets.split(",")]
            llm, prefill = table.load(n_context, sparse=configs[0])
            for config in configs:
                table.sparse(llm, n_context, f"host {config.budget}", config, **prefill)
            llm.close()
        if "device" in options.paths:
            config = SparseConfig(budget=options.budget or max(2048, n_context // 16), path="device")
            llm, prefill = table.load(n_context, sparse=config)
            link = measure_link(llm.session.path)
            info = llm.session.attached.info
            whole = info.n_layer * n_context * (info.k_row_bytes + info.v_row_bytes)
            table.add(context=n_context, how="the whole KV to the GPU at every step, copies alone", tok_s=1 / link.seconds(whole))
            replay(llm.session, shares)
            table.sparse(llm, n_context, f"device {config.budget}", config, **prefill)
            if n_context == options.variants_at:
                for name, change in (
                    ("no prefetch", {"prefetch": False}),
                    ("ema", {"predictor": "ema"}),
                    ("network on the GPU", {"predictor_device": "cuda"}),
                    ("layers:32", {"calibrate": "layers:32"}),
                ):
                    changed = SparseConfig(budget=config.budget, path="device", **change)
                    table.sparse(llm, n_context, f"device {config.budget}, {name}", changed)
            llm.close()


if __name__ == "__main__":
    main()
