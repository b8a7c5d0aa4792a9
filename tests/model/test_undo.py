"""Whatever ends a step or a prompt before its end: pool, history, lists, summary and counters are true at once, and what follows is what an
undisturbed model computes."""

import contextlib
import ctypes
import itertools
import operator

import numpy as np
import pytest

from kvcast import CallbackError, GenerationError, Llama, SparseConfig
from kvcast.blocks import BLOCK_TOKENS
from kvcast.engine.device_path import DevicePath
from kvcast.engine.guard import Guard
from kvcast.engine.session import Session
from kvcast.sparse.history import History
from kvcast.sparse.pool import Pool
from logits import logits_of
from tiny import N_VOCAB, SHAPES, write_tiny

N_PROMPT, N_STEPS = 400, 6
ALL = dict(predictor="ema", hold=2)  # and a budget over the context: what a step attends to does not depend on when sets were made
PATHS = {
    "dense": None,
    "host": SparseConfig(budget=1024, **ALL),
    "device": SparseConfig(budget=1024, path="device", **ALL),
    "device, small": SparseConfig(budget=256, path="device", **ALL, calibrate="layers:2"),
    "host, small": SparseConfig(budget=128, **ALL),
    "host, blocks": SparseConfig(budget=128, **ALL, grain=16),
    "host, layers calibrated": SparseConfig(budget=128, **ALL, calibrate="layers:2"),
    "host, calibrated": SparseConfig(budget=128, **ALL, calibrate="dense:2", min_recovery=0.9),
}
SPARSE = [path for path in PATHS if path != "dense"]
EXACT = ("dense", "host", "device")
TOKENS = np.random.default_rng(0).integers(3, N_VOCAB, 800).tolist()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("undo") / "tiny.gguf", SHAPES["llama"])


class Undisturbed:
    """Logits of a model of which nothing goes wrong, after a prompt of N_PROMPT tokens and single ones up to ``n``: of the tokens of
    ``parts``, one after another."""

    def __init__(self, llm):
        self.llm = llm
        self.known = {}

    def logits(self, n):
        if n not in self.known:
            self.llm.reset()
            self.llm.eval(TOKENS[:N_PROMPT])
            found = [logits_of(self.llm)]
            for token in TOKENS[N_PROMPT:n]:
                self.llm.eval([token])
            for part in parts(n):
                self.llm.eval(part)
                found.append(logits_of(self.llm))
            self.known[n] = found
        return self.known[n]


def parts(n):
    """Steps, a prompt, and steps."""
    after = n + N_STEPS
    return (*([t] for t in TOKENS[n:after]), TOKENS[after : after + 40], *([t] for t in TOKENS[after + 40 : after + 43]))


@pytest.fixture(scope="module")
def models(file):
    """By path: the one that is disturbed, and one that is not."""
    made = {}

    def pair(path, draft=False):
        if (path, draft) not in made:
            shared = dict(n_ctx=1024, n_batch=128, n_threads=2, n_threads_batch=2, verbose=False, flash_attn=True)
            more = {"draft_model": lambda ids, **_: np.array(TOKENS[len(ids) : len(ids) + 5])} if draft else {}
            llm, other = (Llama(file, sparse=PATHS[path], **shared, **more) for _ in range(2))
            made[path, draft] = llm, Undisturbed(other)
        made[path, draft][0].reset()
        return made[path, draft]

    yield pair
    for llm, other in made.values():
        llm.close()
        other.llm.close()


class Fault:
    """Raises at the n-th call of something, before or after it."""

    def __init__(self, monkeypatch, owner, name, at, error, after=False):
        self.n_left = at
        call = getattr(owner, name)

        def faulty(*arguments, **more):
            self.n_left -= 1
            if self.n_left == 0 and not after:
                raise error
            result = call(*arguments, **more)
            if self.n_left == 0:
                raise error
            return result

        monkeypatch.setattr(owner, name, faulty)

    @property
    def came(self):
        return self.n_left <= 0


def true(llm, tokens):
    """What holds after every fault, at once."""
    assert llm.input_ids[: llm.n_tokens].tolist() == tokens[: llm.n_tokens]
    if llm.sparse is None:
        return
    session = llm.session
    assert session.n_tokens == llm.n_tokens and not session.busy
    assert not session.path.worker.busy
    n_used = -(-llm.n_tokens // BLOCK_TOKENS)
    assert not session.history.averages[:, :, n_used:].any()
    if llm.sparse.device:
        assert session.attached.verify_pool() == 0
        assert session.path.blocks.max() < n_used


def goes_on(llm, other, exact):
    """The rest of the prompt where it was cut, and then what an undisturbed model computes."""
    if llm.n_tokens < N_PROMPT:
        llm.eval(TOKENS[llm.n_tokens : N_PROMPT])
        # a prompt is dense: to the bit, but for stock llama.cpp, where batches begin at other places now
        alike(logits_of(llm), other.logits(N_PROMPT)[0], 0 if llm.sparse else 0.002)
    n = llm.n_tokens
    for part, expected in zip(parts(n), other.logits(n)[1:], strict=True):
        llm.eval(part)
        alike(logits_of(llm), expected, 0.02 if exact else 5)
        assert llm.sparse is None or not llm.sparse.device or llm.session.attached.verify_pool() == 0


def alike(got, expected, share):
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() <= share * np.abs(expected).max(), np.abs(got - expected).max()


OF_PROMPTS = {  # what raises
    "decode": (lambda llm: (llm._ctx, "decode")),
    "collect": (lambda llm: (llm.session.attached, "collect")),
    "finish": (lambda llm: (type(llm.session.path), "finish_batch")),
    "run": (lambda llm: (Session, "_run_batch")),
    "observe all": (lambda llm: (History, "observe_all")),
    "guard": (lambda llm: (Guard, "fails")),
    "end prompt": (lambda llm: (llm.session.attached, "end_prompt")),
    "checkpoint": (lambda llm: (llm.session.checkpoints, "ended")),
    "state": (lambda llm: (Session, "_state")),
}
OF_STEPS = {
    "decode": OF_PROMPTS["decode"],
    "collect": OF_PROMPTS["collect"],
    "finish": (lambda llm: (type(llm.session.path), "finish")),
    "run": (lambda llm: (llm.session, "decode")),
    "prepare": (lambda llm: (type(llm.session.path), "prepare")),
    "place set": (lambda llm: (type(llm.session.path), "_place")),
    "predict": (lambda llm: (type(llm.session.predictor), "predict")),
    "observe": (lambda llm: (Session, "_observe")),
    "learn": (lambda llm: (type(llm.session.path), "_learn")),
    "observe listed": (lambda llm: (History, "observe_listed")),
}
OF_DEVICE = {
    "take scores": (lambda llm: (DevicePath, "_learn_later")),
    "put": (lambda llm: (Pool, "put")),
    "upload": (lambda llm: (Pool, "upload")),
    "apply": (lambda llm: (Pool, "apply")),
    "scatter": (lambda llm: (llm.session.attached, "scatter")),
}
NEVER = {(point, path) for point in ("learn", "observe listed") for path in ("device", "device, small")} | {("predict", "device")}
ERRORS = [MemoryError(), KeyboardInterrupt(), RuntimeError("llama_decode returned -3"), GeneratorExit()]
MOMENTS = [(1, ERRORS[0], False), (2, ERRORS[1], True), (4, ERRORS[2], False), (1, ERRORS[3], True), (3, ERRORS[1], False)]


def raised_as(error):
    return GenerationError if isinstance(error, Exception) else type(error)


def answers(llm):
    """A prompt is in, and three steps after it."""
    llm.reset()
    llm.eval(TOKENS[:N_PROMPT])
    for token in TOKENS[N_PROMPT : N_PROMPT + 3]:
        llm.eval([token])


@pytest.mark.parametrize("point", OF_PROMPTS)
@pytest.mark.parametrize("path", ["host", "device", "host, calibrated", "device, small"])
def test_any_exception_in_a_prompt(models, monkeypatch, path, point):
    llm, other = models(path)
    n_came = 0
    for at, error, after in MOMENTS:
        for n_before in (0, N_PROMPT + 3):
            answers(llm) if n_before else llm.reset()
            with monkeypatch.context() as patched:
                fault = Fault(patched, *OF_PROMPTS[point](llm), at, error, after)
                with contextlib.suppress(GenerationError, KeyboardInterrupt, GeneratorExit):
                    llm.eval(TOKENS[n_before : n_before + N_PROMPT - 10 * (n_before > 0)])
            n_came += fault.came
            true(llm, TOKENS)
            if not n_before:
                goes_on(llm, other, path in EXACT)
            else:  # the rest; and once more, where nothing was
                llm.eval(TOKENS[llm.n_tokens : 2 * N_PROMPT - 7])
                got = logits_of(llm)
                answers(llm)
                llm.eval(TOKENS[N_PROMPT + 3 : 2 * N_PROMPT - 7])
                alike(got, logits_of(llm), 0)
    assert n_came


@pytest.mark.parametrize("point", {**OF_STEPS, **OF_DEVICE})
@pytest.mark.parametrize("path", ["host", "device", "host, layers calibrated", "device, small"])
def test_any_exception_in_a_step(models, monkeypatch, path, point):
    if point in OF_DEVICE and "device" not in path:
        return
    llm, other = models(path)
    n_came = 0
    for at, error, after in MOMENTS:
        llm.reset()
        llm.eval(TOKENS[:N_PROMPT])
        with monkeypatch.context() as patched:
            fault = Fault(patched, *{**OF_STEPS, **OF_DEVICE}[point](llm), at, error, after)
            with contextlib.suppress(GenerationError, KeyboardInterrupt, GeneratorExit):
                for token in TOKENS[N_PROMPT : N_PROMPT + 5]:
                    llm.eval([token])
        n_came += fault.came
        true(llm, TOKENS)
        goes_on(llm, other, path in EXACT)
    assert bool(n_came) != ((point, path) in NEVER)


@pytest.mark.parametrize("path", ["host, small", "device, small"])
def test_a_signal_in_a_compiled_kernel(models, monkeypatch, path):
    """Numba returns a result with an exception set, of which Python makes a SystemError."""
    llm, other = models(path)
    llm.reset()
    llm.eval(TOKENS[:N_PROMPT])
    error, inner = (SystemError("returned a result with an exception set") for _ in range(2))
    error.__cause__, inner.__cause__ = inner, KeyboardInterrupt()
    with monkeypatch.context() as patched:
        Fault(patched, llm.session, "decode", 1, error)
        with pytest.raises(KeyboardInterrupt):
            llm.eval([TOKENS[N_PROMPT]])
    true(llm, TOKENS)
    goes_on(llm, other, exact=False)


@pytest.mark.parametrize("code", [1, 2, -3])
@pytest.mark.parametrize("after", [False, True], ids=["refused", "computed"])
@pytest.mark.parametrize("path", PATHS)
def test_errors_of_llama_decode(models, monkeypatch, path, after, code):
    llm, other = models(path)
    kind = RuntimeError if path == "dense" and code != 2 else GenerationError
    for at in (1, 3, 4, 5, 7):  # of the prompt's four batches (dense: 128, 128, 128, 16), then steps
        llm.reset()
        with monkeypatch.context() as patched:
            Fault(patched, llm._ctx, "decode", at, RuntimeError(f"llama_decode returned {code}"), after)
            with pytest.raises(kind, match="stopped" if code == 2 else f"returned {code}"):
                llm.eval(TOKENS[:N_PROMPT])
                for token in TOKENS[N_PROMPT : N_PROMPT + 4]:
                    llm.eval([token])
        true(llm, TOKENS)
        assert llm._requires_eval  # llama.cpp has no logits, or those of what does not count
        n = llm.n_tokens
        if n:  # sampling from what is there evaluates it first
            generating = llm.generate(TOKENS[:n], temp=0.0)
            first = next(generating)
            generating.close()
            other.llm.reset()
            expected = next(other.llm.generate(TOKENS[:n], temp=0.0))
            assert path not in EXACT or first == expected
        goes_on(llm, other, path in EXACT)


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("path", SPARSE)
def test_a_kv_callback_that_raises(models, path, error):
    """The tokens are in the store, and the session is the one that has read them."""
    llm, other = models(path)
    kind = CallbackError if isinstance(error, Exception) else type(error)
    for fails_at in (0, 9, 24, 25):  # blocks: in the first batch, the second, the last one of the prompt, and a step

        def fail(layer, block, k, v, at=fails_at):
            if block == at:
                raise error

        llm.reset()
        llm.on_kv(fail)
        with pytest.raises(kind):
            llm.eval(TOKENS[:N_PROMPT])
            for token in TOKENS[N_PROMPT : N_PROMPT + 17]:
                llm.eval([token])
        llm.on_kv(None)
        true(llm, TOKENS)
        assert llm.n_tokens > 16 * fails_at
        goes_on(llm, other, path in EXACT)
    # further text, in one batch, as when a follow-up is read
    pair = llm, other.llm
    for x in pair:
        answers(x)
    llm.on_kv(fail := lambda *_: (_ for _ in ()).throw(error))
    assert fail is not None
    with pytest.raises(kind):
        llm.eval(TOKENS[N_PROMPT + 3 : N_PROMPT + 45])
    llm.on_kv(None)
    other.llm.eval(TOKENS[N_PROMPT + 3 : N_PROMPT + 45])
    for token in TOKENS[N_PROMPT + 45 : N_PROMPT + 60]:
        for x in pair:
            x.eval([token])
        alike(*map(logits_of, pair), 0)  # whatever the budget
        assert not llm.sparse.device or llm.session.attached.verify_pool() == 0


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("path", SPARSE)
def test_an_attention_callback_that_raises(models, path, error):
    llm, other = models(path)
    kind = CallbackError if isinstance(error, Exception) else type(error)
    for position in (N_PROMPT - 1, N_PROMPT, N_PROMPT + 2):

        def fail(layer, step, scores, at=position):
            if (layer, step) == (1, at):
                raise error

        llm.reset()
        llm.on_attention(fail)
        with pytest.raises(kind):
            llm.eval(TOKENS[:N_PROMPT])
            for token in TOKENS[N_PROMPT : N_PROMPT + 4]:
                llm.eval([token])
        llm.on_attention(None)
        true(llm, TOKENS)
        assert llm.n_tokens == (N_PROMPT - 64 if position < N_PROMPT else position)
        goes_on(llm, other, path in EXACT)


@pytest.mark.parametrize("path", SPARSE)
@pytest.mark.parametrize("how", ["interrupt", "raise"])
def test_reading_that_is_stopped_between_two_batches(models, path, how):
    llm, other = models(path)

    def stop(n_done, n_tokens):
        if n_done >= 256:
            if how == "raise":
                raise KeyboardInterrupt
            llm.interrupt()

    for n_before in (0, N_PROMPT):
        answers(llm) if n_before else llm.reset()
        llm.session.observers.on_progress = stop
        with pytest.raises(KeyboardInterrupt if how == "raise" else GenerationError, match=None if how == "raise" else "stopped"):
            llm.eval(TOKENS[llm.n_tokens : llm.n_tokens + 350])
        llm.session.observers.on_progress = None
        true(llm, TOKENS)
        if not n_before:
            assert llm.n_tokens == 256
            goes_on(llm, other, path in EXACT)


@pytest.mark.parametrize("path", PATHS)
def test_a_generation_that_is_closed(models, path):
    llm, other = models(path)
    for n in (1, 2, 5):
        llm.reset()
        generating = llm.generate(TOKENS[:N_PROMPT], temp=0.0)
        tokens = [*TOKENS[:N_PROMPT], *(next(generating) for _ in range(n))]
        generating.close()
        true(llm, tokens)
        llm.n_tokens = N_PROMPT
        goes_on(llm, other, path in EXACT)


@pytest.mark.parametrize("path", ["host", "device"])
def test_drafts(models, monkeypatch, path):
    llm, other = models(path, draft=True)
    for error, (owner, name) in itertools.product(
        ERRORS, (("_ctx", "decode"), ("session.path", "finish_batch"), ("session", "_run_batch"), ("session.path", "drop"))
    ):
        llm.reset()
        llm.eval(TOKENS[:N_PROMPT])
        with monkeypatch.context() as patched:
            Fault(patched, operator.attrgetter(owner)(llm), name, 2, error)
            with pytest.raises(raised_as(error)):
                for i in range(0, 30, 6):
                    llm.eval(TOKENS[N_PROMPT + i : N_PROMPT + i + 6])
        true(llm, TOKENS)
        goes_on(llm, other, exact=True)


@pytest.mark.parametrize("path", ["host, small", "device, small", "host", "device"])
def test_the_thread_beside_dies(models, monkeypatch, path):
    from kvcast.engine import host_path

    monkeypatch.setattr(host_path, "OVERLAP_MIN", 0)
    llm, other = models(path)
    llm.eval(TOKENS[:N_PROMPT])
    n = N_PROMPT
    while llm.session.path.worker.thread is None or not llm.session.path.worker.thread.is_alive():
        llm.eval([TOKENS[n]])
        n += 1
    thread = llm.session.path.worker.thread
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1
    with pytest.raises(GenerationError, match="beside the step failed"):
        for token in TOKENS[n : n + 20]:
            llm.eval([token])
    true(llm, TOKENS)
    goes_on(llm, other, path in EXACT)


@pytest.mark.parametrize("path", ["host", "device"])
def test_an_undoing_that_is_interrupted_is_done_by_what_comes_next(models, monkeypatch, path):
    llm, other = models(path)
    for owner, name in ((llm.session.path, "settle"), (llm.session.path, "clear"), (llm.session, "truncate")):
        llm.reset()
        llm.eval(TOKENS[:N_PROMPT])
        llm.eval([TOKENS[N_PROMPT]])
        with monkeypatch.context() as patched:
            Fault(patched, llm._ctx, "decode", 1, RuntimeError("llama_decode returned -3"))
            Fault(patched, owner, name, 1, KeyboardInterrupt())
            with pytest.raises(KeyboardInterrupt):
                llm.eval([TOKENS[N_PROMPT + 1]])
        assert llm.n_tokens == N_PROMPT + 1 and llm.session.busy
        goes_on(llm, other, exact=True)
