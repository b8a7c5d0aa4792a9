"""Faults on purpose, each kind `--count` times. `make faults`; the exit code says whether all held.

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
closes       another thread closes the model at a random moment of an answer
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import faulthandler
import functools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numba
from numba import types

from kvcast import CallbackError, GenerationError, Llama, SparseConfig, models, pool, session

N_TOKENS = 16  # of an answer
TEXT = "".join(f"Line {i}: {i} times two is {2 * i}.\n" for i in range(1, 20))  # its continuation is beyond doubt
LIMIT_S = 60  # for one fault


def load(path: str = "host", n_threads: int = 2) -> Llama:
    config = SparseConfig(budget=512, path=path, hold=1)
    return Llama(models.resolve("smollm2"), n_ctx=512, sparse=config, n_threads=n_threads, n_threads_batch=n_threads, verbose=False)


class Subject:
    """A model that has read a text, and how it goes on when nothing disturbs it."""

    def __init__(self, llm: Llama):
        self.llm = llm
        self.prompt = llm.tokenize(TEXT.encode())
        llm.eval(self.prompt[:-1])
        self._state = llm.save_state()
        self.answer()  # compiles
        begin = time.monotonic()
        self.expected = self.answer()
        self.seconds = time.monotonic() - begin

    def answer(self, before: Callable[[int], None] = lambda n: None) -> list[int]:
        """The answer, or as much of it as there is when something raises; ``before(n)`` is called before the token n."""
        self.llm.load_state(self._state)
        self.got: list[int] = []
        return self.go_on(before)

    def go_on(self, before: Callable[[int], None] = lambda n: None) -> list[int]:
        """The rest of an answer that was cut short."""
        generating = self.llm.generate(self.prompt + self.got, temp=0.0)
        while len(self.got) < N_TOKENS:
            before(len(self.got))
            self.got.append(next(generating))
        return self.got

    def check(self) -> None:
        """No token was wrong, and the model goes on as if nothing had been."""
        assert self.got == self.expected[: len(self.got)], f"wrong tokens: {self.got} for {self.expected}"
        assert self.go_on() == self.expected, f"wrong after the fault: {self.got} for {self.expected}"
        assert not self.llm.sparse.device or self.llm.session.attached.verify_pool() == 0


@functools.cache
def subject(path: str) -> Subject:
    return Subject(load(path))


@contextlib.contextmanager
def replaced(thing: object, name: str, value: object) -> Iterator[None]:
    before = getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        setattr(thing, name, before)


def after(seconds: float, call: Callable[[], object]) -> threading.Thread:
    def wait() -> None:
        time.sleep(seconds)
        call()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


# ---- the kinds: each injects one fault, number i, and checks


def python_callbacks(i: int, rng: random.Random) -> None:
    subject_ = subject(("host", "device")[i // 2 % 2])
    llm, at, where = subject_.llm, len(subject_.prompt) + rng.randrange(N_TOKENS - 1), rng.randrange(30)

    def attention(layer, step, scores):
        if (layer, step) == (where, at):
            raise ZeroDivisionError("injected")

    def kv(layer, block, k, v):
        raise ZeroDivisionError("injected")

    llm.on_attention(attention) if i % 2 else llm.on_kv(kv)
    try:
        subject_.answer()
    except CallbackError as error:
        assert isinstance(error.__cause__, ZeroDivisionError)
    else:
        raise AssertionError("the callback's error was lost")
    finally:
        llm.on_attention(None)
        llm.on_kv(None)
    subject_.check()


@functools.cache
def compiled(fails_in: int) -> tuple[object, object]:
    @numba.cfunc(types.int32(types.voidptr, types.int32, types.int32, types.CPointer(types.float32), types.int32, types.int32, types.int32))
    def attention(user, layer, pos, scores, n_taps, n_head_kv, stride):
        return 1 if layer == fails_in else 0

    @numba.cfunc(types.int32(types.int32, types.int32, types.voidptr, types.voidptr, types.int64, types.int64))
    def kv(layer, block, k, v, k_row_bytes, v_row_bytes):
        return 3 if layer == fails_in else 0

    return attention, kv


def compiled_callbacks(i: int, rng: random.Random) -> None:
    subject_ = subject(("host", "device")[i // 2 % 2])
    llm, at = subject_.llm, rng.randrange(N_TOKENS - 1)
    attention, kv = compiled((0, 13, 29)[i % 3])

    def before(n: int) -> None:
        if n == at and i % 2:
            llm.on_attention(attention.address)
        elif n == at:
            llm.on_kv(kv.address)

    try:
        subject_.answer(before)
    except GenerationError:
        pass
    else:
        assert i % 2 == 0, "the callback's error was lost"  # no block may have been completed after it was set
    finally:
        llm.on_attention(None)
        llm.on_kv(None)
    subject_.check()


def network(i: int, rng: random.Random) -> None:
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    subject_, n_left = subject(("host", "device")[i // 2 % 2]), rng.randrange(1, N_TOKENS)
    owner = subject_.llm.session.predictor._network

    class Failing:
        def __init__(self, network):
            self._network = network

        def run(self, *arguments):
            nonlocal n_left
            n_left -= 1
            if n_left == 0:
                raise Fail("injected")
            return self._network.run(*arguments)

    beside = 0 if i % 2 else 1 << 60
    with replaced(owner, "_session", Failing(owner._session)), replaced(session, "OVERLAP_MIN", beside):
        try:
            subject_.answer()
        except GenerationError as error:
            assert "Fail: injected" in str(error), error
        else:
            assert n_left > 0, "the network's error was lost"
    subject_.check()


def _prefetch(i: int, rng: random.Random, fault: Callable[[], None], failure: str | None) -> None:
    subject_, n_left, stage = subject("device"), rng.randrange(1, N_TOKENS - 1), pool.Pool.stage

    def spoiled(self, *arguments):
        nonlocal n_left
        if threading.current_thread() is not threading.main_thread():
            n_left -= 1
            if n_left == 0:
                fault()
        return stage(self, *arguments)

    with replaced(pool.Pool, "stage", spoiled):
        try:
            subject_.answer()
        except GenerationError as error:
            assert failure and failure in str(error), error
        else:
            assert failure is None, "the prefetch's error was lost"
    assert n_left <= 0
    subject_.check()


def late_prefetch(i: int, rng: random.Random) -> None:
    _prefetch(i, rng, lambda: time.sleep(rng.random() * 0.1), None)


def failing_prefetch(i: int, rng: random.Random) -> None:
    def fail() -> None:
        raise (OSError, MemoryError, SystemExit)[i % 3]("no more uploads")

    _prefetch(i, rng, fail, "beside the step failed")


def dying_prefetch(i: int, rng: random.Random) -> None:
    """An exception that is set from outside ends the thread before it takes up its next work."""
    subject_, at = subject("device"), rng.randrange(1, N_TOKENS - 1)

    def before(n: int) -> None:
        if n == at:
            thread = subject_.llm.session._worker_thread
            assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1

    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL + 1)
    try:
        subject_.answer(before)
    except GenerationError as error:
        assert "its thread has ended" in str(error), error
    else:
        raise AssertionError("the thread's end was not seen")
    finally:
        logging.getLogger("concurrent.futures").setLevel(logging.NOTSET)
    subject_.check()


def interrupts(i: int, rng: random.Random) -> None:
    subject_ = subject(("host", "device")[i % 2])
    thread = after(rng.random() * subject_.seconds, subject_.llm.interrupt)
    with contextlib.suppress(GenerationError):
        subject_.answer()
    thread.join()
    subject_.check()


def signals(i: int, rng: random.Random) -> None:
    subject_ = subject(("host", "device")[i % 2])
    if i % 3 == 0:  # a Python callback, for moments in which native code runs Python
        subject_.llm.on_attention(lambda *_: None)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001 + rng.random() * subject_.seconds)
        subject_.answer()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except (KeyboardInterrupt, GenerationError):  # on its way into a callback Python prints it and goes on: the step then fails
        pass
    finally:
        signal.signal(signal.SIGALRM, before)
        subject_.llm.on_attention(None)
    subject_.check()


def forks(i: int, rng: random.Random) -> None:
    subject_, pids = subject(("host", "device")[i % 2]), []
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
sys.path.insert(0, sys.argv[1])
import faults
faults.N_TOKENS = 400
subject = faults.Subject.__new__(faults.Subject)
subject.llm = llm = faults.load(("host", "device")[int(sys.argv[3])])
subject.prompt = llm.tokenize(faults.TEXT.encode())
def generate():
    begun.set()
    for _ in llm.generate(subject.prompt, temp=0.0):
        pass
begun = threading.Event()
threading.excepthook = lambda args: None if "closed" in str(args.exc_value) else print(args, file=sys.stderr)
threading.Thread(target=generate, daemon=True).start()
begun.wait()
time.sleep(float(sys.argv[2]))
"""


def exits(i: int, rng: random.Random) -> None:
    command = [sys.executable, "-c", EXITING, os.path.dirname(os.path.abspath(__file__)), str(rng.random()), str(i % 2)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0 and not done.stderr, (done.returncode, done.stderr)


@functools.cache
def pair() -> tuple[Subject, Subject]:
    return Subject(load(n_threads=1)), Subject(load("device", n_threads=1))


def two(i: int, rng: random.Random) -> None:
    disturbed, other = pair() if i % 2 else pair()[::-1]
    failed: list[BaseException] = []

    def run() -> None:
        try:
            assert other.answer() == other.expected
        except BaseException as error:
            failed.append(error)
            raise

    beside = threading.Thread(target=run)
    beside.start()
    thread = after(rng.random() * disturbed.seconds, disturbed.llm.interrupt)
    with contextlib.suppress(GenerationError):
        disturbed.answer()
    disturbed_got = list(disturbed.got)
    thread.join()
    beside.join()
    assert not failed, failed
    disturbed.got = disturbed_got
    disturbed.check()
    other.check()


def closes(i: int, rng: random.Random) -> None:
    path = ("host", "device")[i % 2]
    known = subject(path)
    llm = load(path)
    pieces: list[str] = []
    thread = after(rng.random() * 1.5 * known.seconds, llm.close)
    try:
        for chunk in llm.create_completion(TEXT, max_tokens=N_TOKENS, temperature=0.0, stream=True):
            pieces.append(chunk["choices"][0]["text"])
    except GenerationError as error:
        assert "closed" in str(error) or "stopped" in str(error), error
    thread.join()
    expected = known.llm.detokenize(known.expected, prev_tokens=known.prompt).decode()
    assert expected.startswith("".join(pieces)), (pieces, expected)
    for use in (lambda: llm.eval([1]), lambda: llm.tokenize(b"x"), lambda: llm.n_ctx(), lambda: next(llm.generate([1]))):
        try:
            use()
        except GenerationError as error:
            assert "the model was closed" in str(error)
        else:
            raise AssertionError("a closed model was used")
    llm.close()


KINDS = (
    python_callbacks, compiled_callbacks, network, late_prefetch, failing_prefetch, dying_prefetch, interrupts, signals, forks, exits,
    two, closes,
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
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for kind in KINDS:
        if options.only in (None, kind.__name__):
            inject(kind, options.count, options.seed)
