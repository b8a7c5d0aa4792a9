"""One thread that works beside the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillRunning
from typing import Any

LOOK_S = 1.0  # how often one who waits looks whether the thread still lives


class Worker:
    """Runs one call at a time, on a thread of its own that is started when it is first needed, and again when it has died.

    Only one thread starts work and waits for it, that of the steps.
    """

    def __init__(self, name: str):
        self._name = name
        self._executor: ThreadPoolExecutor | None = None
        self.thread: threading.Thread | None = None
        self._running: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether something was started that nobody has waited for."""
        return self._running is not None

    def start(self, work: Callable[..., None], *arguments: Any) -> None:
        """Begin a call; ``settle`` or ``wait`` comes before the next one."""

        def note() -> None:
            self.thread = threading.current_thread()

        self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix=self._name, initializer=note)
        self._running = self._executor.submit(work, *arguments)

    def settle(self, *, interrupted: bool = False) -> BaseException | None:
        """Wait for what runs, whatever becomes of it; returns why it failed. ``interrupted``: something may run that was not noted."""
        if interrupted and self._running is None and self._executor is not None:
            self._running = self._executor.submit(lambda: None)
        if self._running is None:
            return None
        while True:
            try:
                error = self._running.exception(LOOK_S)  # an interrupt here leaves it to the next call
                break
            except StillRunning:
                if self.thread is not None and not self.thread.is_alive() and not self._running.done():
                    error, self._executor, self.thread = RuntimeError("its thread has ended"), None, None
                    break
        self._running = None
        return error

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True)
