"""A model in the middle of a text, and what it says when nothing disturbs it."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator

from kvcast import Llama, SparseConfig, models

N_TOKENS = 16  # of an answer
TEXT = "".join(f"Line {i}: {i} times two is {2 * i}.\n" for i in range(1, 20))  # its continuation is beyond doubt
PATHS = ("host", "device")


def load(path: str = "host", n_threads: int = 2, n_batch: int = 512) -> Llama:
    config = SparseConfig(budget=512, path=path, hold=1)
    threads = {"n_threads": n_threads, "n_threads_batch": n_threads}
    return Llama(models.resolve("smollm2"), n_ctx=512, n_batch=n_batch, sparse=config, **threads, verbose=False)


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
