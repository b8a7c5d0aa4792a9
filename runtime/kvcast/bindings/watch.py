"""Ending what llama.cpp does from outside: a load, a prompt, a step."""

from __future__ import annotations

import ctypes
from collections.abc import Generator

from . import api as native
from .loaded import llama_cpp
from .log import MutedLog, is_lost, take_lost


def _answers(raised: list[tuple[BaseException, MutedLog]]) -> Generator[int, None, None]:
    """Whether to go on, again and again. Python handles signals where its own code goes on: that is inside the ``try`` here, while what a
    handler raises at the first line of a function would be lost in the native code that called it."""
    while True:
        try:
            while True:  # inside, as Python handles signals at a loop's end, too
                yield 0 if raised or is_lost() else 1
        except GeneratorExit:
            return
        except BaseException as error:  # noqa: BLE001 - ``take_raised`` brings it to where Python goes on
            raised.append((error, MutedLog()))  # llama.cpp would say that it failed


class Watch:
    """Says whether llama.cpp is to go on. It is asked between two nodes that the CPU computes, and between two tensors that are loaded.

    It stops when ``stop`` was called, and when a signal handler raised: Python handles signals when a native call returns, so the thread
    that waits for llama.cpp is brought back to Python five times a second.
    """

    def __init__(self) -> None:
        self._raised: list[tuple[BaseException, MutedLog]] = []
        answers = _answers(self._raised)
        next(answers)
        self._poll = native.watch_poll(answers.__next__)
        self.address: int = native.kvcast_watch_new(self._poll)

    def stop(self) -> None:
        """Let what runs end. From any thread, and from a signal handler."""
        if self.address:
            native.kvcast_watch_stop(self.address, 1)

    def go_on(self) -> None:
        """Forget that it was to stop."""
        self._raised.clear()
        if self.address:
            native.kvcast_watch_stop(self.address, 0)

    def take_raised(self) -> BaseException | None:
        """What a signal handler raised meanwhile, once."""
        if self._raised:
            return self._raised.pop()[0]
        return take_lost()

    def over_loading(self, params: llama_cpp.llama_model_params) -> None:
        """Ask while a model is loaded with these parameters."""
        params.progress_callback = llama_cpp.llama_progress_callback(_address("kvcast_watch_goes_on"))
        params.progress_callback_user_data = self.address  # type: ignore[assignment]  # ctypes takes an int

    def over_context(self, ctx: int) -> None:
        """Ask while a context computes."""
        llama_cpp.llama_set_abort_callback(ctx, llama_cpp.ggml_abort_callback(_address("kvcast_watch_stops")), self.address)

    def close(self) -> None:
        """Nothing asks any more."""
        address, self.address = self.address, 0
        if address:
            native.kvcast_watch_free(address)


def _address(name: str) -> int:
    found = ctypes.cast(getattr(llama_cpp._lib, name), ctypes.c_void_p).value
    assert found is not None
    return found
