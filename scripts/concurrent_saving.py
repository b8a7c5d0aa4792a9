"""Many processes save sessions under one name at once, while others open it. `make writers`; the exit code says whether all held.

Each forked writer saves sessions of lengths of its own, and says which it saved; readers load the file all the while. Every load must be
one of the sessions, whole; every save must be said to be done or refused; in the end the file is one that was saved last by somebody,
nothing is left beside it, and nothing hangs.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import fuzzing  # noqa: F401 - which finds tests/helpers/tiny.py
from kvcast import Llama, SessionError, SparseConfig
from tiny import SHAPES, write_tiny

N_TOKENS, LIMIT_S = 240, 300


def length(i: int, n: int) -> int:
    """Tokens of the n-th session of a writer; each is a part of the one before."""
    return N_TOKENS - i % 150 - n


def load(model: Path) -> Llama:
    """A process that was forked has a model of its own."""
    return Llama(model, n_ctx=256, sparse=SparseConfig(budget=96, predictor="ema", untested=True), n_threads=1, verbose=False)


def writer(model: Path, tokens: list[int], path: Path, i: int, n_saves: int) -> int:
    """Exit code: how many saves were refused."""
    llm = load(model)
    llm.eval(tokens)
    n_refused = 0
    for n in range(n_saves):
        llm.n_tokens = length(i, n)
        try:
            llm.save_session(path, {"writer": i, "save": n})
        except SessionError as error:
            print(f"writer {i}: {error}", flush=True)
            n_refused += 1
    return min(n_refused, 100)


def reader(model: Path, tokens: list[int], path: Path, until: Path) -> int:
    """Exit code: 0 when every load was a whole session."""
    llm = load(model)
    n_loads = 0
    while not until.exists() or not n_loads:
        if path.exists():
            llm.load_session(path)
            assert llm.input_ids[: llm.n_tokens].tolist() == tokens[: llm.n_tokens] and llm.n_tokens > 20
            n_loads += 1
    return 0


def fork(run, *arguments) -> int:
    child = os.fork()
    if child == 0:
        code = 101
        try:
            code = run(*arguments)
        except BaseException as error:  # noqa: BLE001 - a child must end here
            print(f"{run.__name__}: {type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(code)
    return child


def main(n_writers: int, n_readers: int, n_saves: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny(Path(folder) / "tiny.gguf", SHAPES["llama"])
        llm = load(model)
        tokens = [int(t) for t in np.random.default_rng(0).integers(3, 500, N_TOKENS)]
        llm.eval(tokens)
        there = Path(folder) / "sessions"
        there.mkdir()
        path, done = there / "x", Path(folder) / "done"
        llm.save_session(Path(folder) / "start")  # the model's hash is known now
        begin = time.monotonic()
        readers = [fork(reader, model, tokens, path, done) for _ in range(n_readers)]
        writers = [fork(writer, model, tokens, path, i, n_saves) for i in range(n_writers)]
        refused, running = 0, {*readers, *writers}
        try:
            for group in (writers, readers):
                for child in group:
                    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
                        if time.monotonic() - begin > LIMIT_S:
                            raise SystemExit("something hangs")
                        time.sleep(0.01)
                    running.remove(child)
                    code = os.waitstatus_to_exitcode(ended[1])
                    assert 0 <= code <= (100 if group is writers else 0), f"a process ended with {code}"
                    refused += code
                done.touch()
        finally:
            for child in running:
                os.kill(child, 9)
        about = llm.load_session(path)
        assert about["save"] == n_saves - 1 and llm.input_ids[: llm.n_tokens].tolist() == tokens[: llm.n_tokens]
        assert llm.n_tokens == length(about["writer"], about["save"])
        left = [p.name for p in there.iterdir()]
        assert left == ["x"], left
        llm.close()
    print(
        f"{n_writers} processes saved {n_saves} sessions each under one name, {n_readers} opened it meanwhile: every one whole, "
        f"{refused} saves refused, nothing left, {time.monotonic() - begin:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writers", type=int, default=200)
    parser.add_argument("--readers", type=int, default=2)
    parser.add_argument("--saves", type=int, default=5)
    options = parser.parse_args()
    main(options.writers, options.readers, options.saves)
