"""At a random moment of an answer it is interrupted, a signal comes, or the model is closed."""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import threading

from injection.subject import N_TOKENS, PATHS, TEXT, Subject, after, load, subject
from kvcast import GenerationError


def interrupts(i: int, rng: random.Random) -> None:
    subject_ = subject(PATHS[i % 2])
    thread = after(rng.random() * subject_.seconds, subject_.llm.interrupt)
    with contextlib.suppress(GenerationError):
        subject_.answer()
    thread.join()
    subject_.check()


def signals(i: int, rng: random.Random) -> None:
    subject_ = subject(PATHS[i % 2])
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
    path = PATHS[i % 2]
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
