"""While a prompt is read: a callback raises, an interrupt or a signal comes. What is read after it ends as an undisturbed prompt."""

from __future__ import annotations

import functools
import random
import signal

from injection.subject import PATHS, Subject, after, load
from kvcast import GenerationError

N_BATCH = 32  # tokens: a prompt of many batches


@functools.cache
def subject(path: str) -> Subject:
    return Subject(load(path, n_batch=N_BATCH))


def prompts(i: int, rng: random.Random) -> None:
    subject_, kind = subject(PATHS[i % 2]), i // 2 % 4
    llm, tokens = subject_.llm, subject_.prompt[:-1]
    n_left = rng.randrange(1, 60)

    def fail(*_):
        nonlocal n_left
        n_left -= 1
        if n_left == 0:
            raise ZeroDivisionError("injected")

    llm.reset()
    first = rng.randrange(len(tokens))  # some prompts are read on a context that holds something
    llm.eval(tokens[:first])
    begin = llm.n_tokens
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    thread = None
    try:
        if kind == 0:
            llm.on_kv(fail)
        elif kind == 1:
            llm.on_attention(fail)
        elif kind == 2:
            thread = after(rng.random() * subject_.seconds, llm.interrupt)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0.001 + rng.random() * subject_.seconds)
        llm.eval(tokens[first:])
        signal.setitimer(signal.ITIMER_REAL, 0)
    except (GenerationError, KeyboardInterrupt):
        pass
    finally:
        signal.signal(signal.SIGALRM, before)
        llm.on_kv(None)
        llm.on_attention(None)
        if thread:
            thread.join()
    assert begin <= llm.n_tokens <= len(tokens)
    subject_.got = []
    if kind == 3 and llm.n_tokens < len(tokens):
        llm.eval(tokens[llm.n_tokens :])
    subject_.check()
