"""The host path beside dense llama.cpp on a GPU build: weights on the GPU, the KV cache in host memory, attention on the CPU.

    python scripts/gpu_table.py MODEL.gguf --contexts 8192,32768,131072 --budgets 512,2048 --out table.json

Dense with all KV on the GPU, dense with the KV cache on the host (offload_kqv=False; only at contexts up to
--host-dense-max, it is slow), and sparse at each budget with shipped defaults, decoded one token at a time through the
same Python loop. Any model serves; a random-weight model of the right shape is enough for speed. Medians over rounds of
means over steps; a sparse round is long enough to hold its share of calibrations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil

from kvcast import Llama, SparseConfig


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
    return statistics.median(speeds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--contexts", default="8192,32768,131072")
    parser.add_argument("--budgets", default="512,2048")
    parser.add_argument("--host-dense-max", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ubatch", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path("gpu_table.json"))
    options = parser.parse_args()
    rows: list[dict] = []

    def note(**row) -> None:
        rows.append(row)
        options.out.write_text(json.dumps({"model": options.model.name, "threads": options.threads, "rows": rows}, indent=2))
        print(" ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)

    common = {"n_gpu_layers": -1, "n_batch": options.ubatch, "n_ubatch": options.ubatch, "n_threads": options.threads, "verbose": False}
    for n_context in map(int, options.contexts.split(",")):
        tokens = np.random.default_rng(1).integers(100, 20000, n_context).tolist()
        make = {**common, "n_ctx": n_context + 1024}

        def read(llm: Llama, tokens: list[int] = tokens) -> float:
            begin = time.perf_counter()
            llm.eval(tokens)
            return len(tokens) / (time.perf_counter() - begin)

        llm = Llama(options.model, flash_attn=True, **make)
        prefill = read(llm)
        tok_s = rounds(llm, n_context, 48, options.rounds)
        note(context=n_context, how="dense, KV on GPU", tok_s=tok_s, prefill_tok_s=prefill, gpu_mib=gpu_memory_mib())
        llm.close()

        config = SparseConfig(budget=int(options.budgets.split(",")[0]))
        llm = Llama(options.model, sparse=config, **make)
        prefill = read(llm)
        if n_context <= options.host_dense_max:
            llm.session.attached.set_mode(0)
            begin = time.perf_counter()
            n = 16
            llm.n_tokens = n_context
            for token in tokens[:n]:
                super(Llama, llm).eval([token])
            note(context=n_context, how="dense, KV on host", tok_s=n / (time.perf_counter() - begin), prefill_tok_s=prefill)
            llm.n_tokens = n_context
            llm.session.truncate(n_context)
        for budget in map(int, options.budgets.split(",")):
            config = SparseConfig(budget=budget)
            llm.session.configure(config)
            tok_s = rounds(llm, n_context, 48, options.rounds)
            times = llm.session.times
            row = {
                "attention_ms": times.attention_us / 1e3 / times.n_steps,
                "choose_ms": times.choose_us / 1e3 / times.n_steps,
                "select_ms": times.ms(times.predict + times.select + times.observe),
            }
            note(
                context=n_context,
                how=f"sparse {budget}",
                tok_s=tok_s,
                prefill_tok_s=prefill,
                gpu_mib=gpu_memory_mib(),
                **row,
            )
            llm.session.configure(config, frozen=True)
            note(context=n_context, how=f"sparse {budget}, frozen set", tok_s=rounds(llm, n_context, 48, options.rounds))
        llm.close()


if __name__ == "__main__":
    main()
