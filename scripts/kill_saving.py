"""Kill a process that saves a session, at random moments, and look what is left. `make kills`; the exit code says whether all held.

A forked child saves the same session shorter and shorter, one token less each time, and says so after each; the file must then
be the last one that it told of, or the one after it, whole: the tokens, and every row of the store.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

from kvcast import Llama, SparseConfig, models
from kvcast.files import remove_left

TEXT = Path(__file__).resolve().parent / "demo.txt"
N_TOKENS, N_LEAST = 250, 20


def save_again_and_again(llm: Llama, path: Path, say: int) -> None:
    for n in range(N_TOKENS, N_LEAST, -1):
        llm.n_tokens = n
        llm.save_session(path)
        os.write(say, bytes([n]))


def kill_one(llm: Llama, path: Path, after_s: float) -> int:
    """Tokens of the last version that the child told of; 0: it was killed before."""
    hear, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_again_and_again(llm, path, say)
        finally:
            os._exit(0)
    os.close(say)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(hear, "rb") as file:
        told = file.read()
    return told[-1] if told else 0


def main(n_kills: int, seed: int) -> None:
    llm = Llama(models.resolve("smollm2"), n_ctx=256, sparse=SparseConfig(budget=128), n_threads=1, verbose=False)
    tokens = llm.tokenize(TEXT.read_bytes())[:N_TOKENS]
    llm.eval(tokens)
    layers = range(llm.session.attached.info.n_layer)
    rows = [llm.session.attached.rows_of(layer, 0, N_TOKENS) for layer in layers]
    rng, n_torn = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        path, start = Path(folder) / "session", Path(folder) / "start"
        llm.save_session(start)
        llm.save_session(path)
        last = N_TOKENS
        for i in range(n_kills):
            llm.load_session(start)
            told = kill_one(llm, path, rng.uniform(0, 0.15))
            n_torn += len(list(Path(folder).glob("*.part")))
            remove_left(Path(folder))
            possible = (told, told - 1) if told else (last, N_TOKENS)
            llm.load_session(path)
            last = llm.n_tokens
            assert last in possible, f"kill {i}: {last} tokens instead of {possible}"
            assert llm.input_ids[:last].tolist() == tokens[:last], f"kill {i}: other tokens"
            for layer in layers:
                for found, expected in zip(llm.session.attached.rows_of(layer, 0, last), rows[layer]):
                    np.testing.assert_array_equal(found, expected[:last], f"kill {i}, layer {layer}")
    llm.close()
    print(f"{n_kills} kills: the last session that was saved, or the one after it, whole each time; {n_torn} came while a file was written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.kills, options.seed)
