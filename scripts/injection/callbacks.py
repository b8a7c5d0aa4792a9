"""What the runtime calls fails: callbacks of the user, compiled ones, the predictor's network."""

from __future__ import annotations

import functools
import random
import warnings

import numba
from numba import types

from injection.subject import N_TOKENS, PATHS, replaced, subject
from kvcast import CallbackError, GenerationError
from kvcast.engine import host_path
from predictor_onnx.runtime import unusable


def python_callbacks(i: int, rng: random.Random) -> None:
    subject_ = subject(PATHS[i // 2 % 2])
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
    subject_ = subject(PATHS[i // 2 % 2])
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
    """The average takes the network's place, which is said; nothing is lost."""
    subject_, n_left = subject(PATHS[i // 2 % 2]), rng.randrange(1, N_TOKENS)
    learned = subject_.llm.session.predictor
    owner = learned._network

    class Failing:
        def __init__(self, network):
            self._network = network

        def run(self, *arguments):
            nonlocal n_left
            n_left -= 1
            if n_left == 0:
                raise unusable()[0]("injected")
            return self._network.run(*arguments)

    beside = 0 if i % 2 else 1 << 60
    with (
        replaced(owner, "_session", Failing(owner._session)),
        replaced(host_path, "OVERLAP_MIN", beside),
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        subject_.answer()
    said = [str(w.message) for w in seen]
    assert len(said) == (n_left <= 0) and all("'ema' is used" in x and "injected" in x for x in said), f"{n_left}: {said}"
    subject_.check()
    learned._average = None  # back to the network, for the next one
