"""One model, several threads: whole answers wait for each other, and each is the one that it is alone. A signal ends what runs."""

import contextlib
import gc
import io
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

from kvcast import GenerationError, Llama, SparseConfig
from kvcast.bindings.log import _plain_log
from logits import logits_of
from shapes import write_shape
from tiny import N_VOCAB, SHAPES, write_tiny

PATHS = {"dense": None, "host": SparseConfig(budget=96), "device": SparseConfig(budget=256, path="device")}
PROMPTS = [np.random.default_rng(seed).integers(3, N_VOCAB, 150 + 70 * seed).tolist() for seed in range(4)]
N_ANSWER = 12
ENDED_S = 5  # after which what a signal was to end must have ended


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("turns") / "tiny.gguf", SHAPES["llama"], vocabulary="llama")


@pytest.fixture(params=PATHS)
def llm(request, file):
    llm = Llama(file, n_ctx=512, n_batch=128, n_threads=1, sparse=PATHS[request.param], verbose=False)
    yield llm
    llm.close()


def answer(llm, prompt, n=N_ANSWER):
    tokens = []
    with contextlib.closing(llm.generate(prompt, temp=0.0)) as generating:
        for token in generating:
            tokens.append(token)
            if len(tokens) == n:
                return tokens
    raise AssertionError("it ended early")


def together(*calls):
    """What each returned or raised, run at the same time."""
    found = [None] * len(calls)

    def run(i, call):
        try:
            found[i] = call()
        except Exception as error:  # noqa: BLE001 - looked at by the caller
            found[i] = error

    threads = [threading.Thread(target=run, args=(i, call)) for i, call in enumerate(calls)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return found


def test_answers_that_are_asked_for_at_once_are_those_of_one_after_another(llm):
    alone = [answer(llm, prompt) for prompt in PROMPTS]
    for _ in range(2):
        assert together(*(lambda p=prompt: answer(llm, p) for prompt in PROMPTS)) == alone


def test_chat_answers_at_once(llm):
    def ask(question):
        chunks = llm.create_chat_completion([{"role": "user", "content": question}], max_tokens=8, temperature=0, stream=True)
        return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)

    questions = ["Why?", "Tell me a story about a dog.", "Name three colours."]
    alone = [ask(q) for q in questions]
    assert together(*(lambda q=q: ask(q) for q in questions)) == alone


def test_langchain_s_batches(file):
    ChatKvcast = pytest.importorskip("kvcast.integrations.langchain").ChatKvcast
    llm = Llama(file, n_ctx=512, n_threads=1, sparse=PATHS["host"], verbose=False)
    model = ChatKvcast(client=llm, max_tokens=4, temperature=0.0)
    questions = ["Why?", "Who?", "Where is it?"]
    alone = [model.invoke(q).content for q in questions]
    assert [message.content for message in model.batch(questions)] == alone
    llm.close()


def test_who_evaluates_beside_an_answer_is_refused_before_anything_changes(llm):
    alone = answer(llm, PROMPTS[1])
    generating = llm.generate(PROMPTS[1], temp=0.0)
    tokens = [next(generating)]
    while len(tokens) < N_ANSWER:
        (error,) = together(lambda: llm.eval([5, 6]))
        assert isinstance(error, GenerationError) and "another thread" in str(error)
        tokens.append(next(generating))
    generating.close()
    assert tokens == alone
    assert together(lambda: llm.eval([5, 6])) == [None]


# ---- signals


@contextlib.contextmanager
def alarm(seconds):
    """A signal after a while, whose handler raises, as Ctrl-C does."""

    def handle(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Takes seconds to load and minutes for a prompt."""
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    return write_shape(path, vocabulary="llama", n_layer=40, n_embd=2048, n_ff=8192, n_head=16, n_head_kv=4)


def test_a_signal_ends_loading(large):
    with alarm(0.2):
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            Llama(large, n_ctx=256, use_mmap=False, verbose=False)
        assert time.monotonic() - begin < ENDED_S


@pytest.mark.parametrize("verbose", [False, True])
def test_no_signal_is_lost_in_what_llama_cpp_says(file, monkeypatch, verbose):
    """Wherever it comes while a model is loaded: it ends that, or what follows is as if it had come then."""
    n_raised, lost = 0, []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: lost.append((found.exc_type, found.err_msg or "")))
    for i in range(12):
        gc.collect()  # Python itself loses what is raised in a destructor
        try:
            with alarm(0.002 + 0.003 * i):
                llm = Llama(file, n_ctx=512, n_threads=1, verbose=verbose)
                llm.eval(PROMPTS[3] + PROMPTS[0])
                llm.close()
                time.sleep(0.1)
        except KeyboardInterrupt:
            n_raised += 1
    of_signals = [how for kind, how in lost if kind is KeyboardInterrupt]
    assert not any("callback" in how for how in of_signals)
    assert n_raised + len(of_signals) == 12


def test_loading_takes_no_lock_of_logging(file, monkeypatch):
    """Python 3.11 does not let go of it when a signal comes in the middle, and then whoever logs on another thread waits for ever."""
    from llama_cpp import _logger

    monkeypatch.setattr(_logger.logger, "setLevel", lambda level: pytest.fail("it was taken"))
    for verbose, level in ((True, 10), (False, 40)):
        Llama(file, n_ctx=256, n_threads=1, verbose=verbose).close()
        assert _logger.logger.level == level


def test_messages_that_nobody_can_read_are_no_error(monkeypatch):
    for broken in (open(os.devnull), io.TextIOWrapper(io.BytesIO(), encoding="ascii"), None):
        monkeypatch.setattr(sys, "stderr", broken)
        _plain_log(3, "é\n".encode())
        if broken is not None:
            broken.close()
            _plain_log(3, b"x\n")


@pytest.mark.parametrize("path", ["host", "device"])
def test_no_signal_is_lost_in_a_callback(file, path):
    llm = Llama(file, n_ctx=512, n_batch=128, n_threads=1, sparse=PATHS[path], verbose=False)
    llm.on_attention(lambda layer, step, scores: time.sleep(0.001))
    llm.eval(PROMPTS[0])
    for i in range(10):
        with pytest.raises(KeyboardInterrupt), alarm(0.01 + 0.001 * i):
            while True:
                llm.eval([5])
                llm.n_tokens = len(PROMPTS[0])
        assert llm.n_tokens - len(PROMPTS[0]) in (0, 1)  # it may come just after a step
        llm.n_tokens = len(PROMPTS[0])
    llm.on_attention(None)
    llm.eval(PROMPTS[1])
    assert llm.n_tokens == len(PROMPTS[0]) + len(PROMPTS[1])
    llm.close()


@pytest.mark.parametrize("path", PATHS)
def test_a_signal_ends_a_prompt_in_the_middle_of_its_batch(large, path):
    llm = Llama(large, n_ctx=2048, n_batch=2048, n_ubatch=2048, sparse=PATHS[path], verbose=False)
    tokens = [t % 900 + 50 for t in range(1500)]
    llm.eval(tokens[:20])
    begin = time.monotonic()
    with alarm(0.5), pytest.raises(KeyboardInterrupt):
        llm.eval(tokens[20:])
    assert time.monotonic() - begin < ENDED_S
    assert llm.n_tokens == 20
    llm.eval(tokens[20:25])
    assert llm.n_tokens == 25 and np.isfinite(logits_of(llm)).all()
    llm.close()


def test_a_callback_that_a_signal_cut_off_as_it_began_is_over(file, monkeypatch):
    llm = Llama(file, n_ctx=512, n_threads=1, sparse=PATHS["host"], verbose=False)
    calling_back, begun = llm._calling_back, []

    class CutOff:
        def __enter__(self):
            begun.append(calling_back())
            begun[-1].__enter__()  # and its end never comes
            raise KeyboardInterrupt

        def __exit__(self, *_):
            raise AssertionError

    monkeypatch.setattr(llm, "_calling_back", CutOff)
    llm.on_attention(lambda layer, step, scores: None)
    with pytest.raises(KeyboardInterrupt):
        llm.eval(PROMPTS[0])
    llm.on_attention(None)
    llm.eval(PROMPTS[0])
    assert len(begun) == 1 and llm.n_tokens >= len(PROMPTS[0])
    llm.close()


@pytest.mark.parametrize("sparse", [SparseConfig(budget=256), None])
def test_a_signal_ends_a_prompt_without_llama_cpps_words(small, code, sparse, capfd):
    llm = Llama(small, n_ctx=4096, sparse=sparse, n_threads=1, n_threads_batch=1, verbose=False)
    tokens = (llm.tokenize(code.encode()) * 4)[:4000]
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.eval(tokens)
    timer.join()
    assert capfd.readouterr().err == ""
    llm.eval(tokens[:10])
    llm.close()
