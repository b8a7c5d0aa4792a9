"""The same tokens have the same answer, to the bit, whatever was generated, read or taken back in between."""

import itertools

import numpy as np
import pytest

from kvcast import Llama, SparseConfig
from kvcast.chat.conversation import Conversation
from logits import logits_of
from tiny import N_VOCAB, SHAPES, write_tiny

N_PROMPT, N_ANSWER = 700, 8
CONFIGS = {
    "host": {"budget": 256},
    "host, pieces": {"budget": 256, "grain": 4},
    "host, blocks": {"budget": 256, "grain": 16},
    "host, ema, a poor step": {"budget": 256, "predictor": "ema", "min_recovery": 0.97},
    "host, calibrated": {"budget": 256, "predictor": "last", "calibrate": "dense:3"},
    "host, layers calibrated": {"budget": 256, "predictor": "ema", "calibrate": "layers:2"},
    "host, steps kept": {"budget": 256, "predictor": "onnx:paper", "hold": 2},
    "host, h2o": {"budget": 256, "predictor": "h2o", "hold": 1},
    "host, oracle": {"budget": 256, "predictor": "oracle", "hold": 1},
    "device": {"budget": 256, "path": "device", "hold": 2},
    "device, calibrated": {"budget": 256, "path": "device", "predictor": "ema", "hold": 2, "calibrate": "layers:2"},
    "device, steps kept": {"budget": 256, "path": "device", "predictor": "onnx:paper", "hold": 3},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("again") / "tiny.gguf", SHAPES["llama"], vocabulary="llama")


@pytest.fixture
def load(file):
    made = []

    def make(config="host", **more):
        shared = dict(n_ctx=1024, n_batch=128, n_threads=2, n_threads_batch=2, verbose=False, seed=1)
        made.append(Llama(file, sparse=SparseConfig(**CONFIGS[config]), **{**shared, **more}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def text(n, seed=0):
    return np.random.default_rng(seed).integers(3, N_VOCAB, n).tolist()


PROMPT = text(N_PROMPT)


def answer(llm, prompt=PROMPT, n=N_ANSWER, **options):
    """Tokens, and the logits of each."""
    tokens, logits = [], []
    for token in llm.generate(prompt, **{"temp": 0.0, **options}):
        logits.append(logits_of(llm))
        tokens.append(token)
        if len(tokens) == n:
            return tokens, np.stack(logits)
    raise AssertionError("it ended early")


def same(a, b):
    assert a[0] == b[0]
    np.testing.assert_array_equal(a[1], b[1])


def hot(llm):
    llm.set_seed(3)
    answer(llm, n=40, temp=2.0)


def others(llm):
    for n_shared, n in ((0, 90), (5, 200), (130, 700), (650, 200), (N_PROMPT - 1, 101), (0, 1)):
        answer(llm, PROMPT[:n_shared] + text(n, seed=n), n=3)


def longer(llm):
    answer(llm, PROMPT + text(30, seed=2), n=5)


def shorter(llm):
    for n in (300, 129, 128, N_PROMPT - 64, N_PROMPT - 20):
        for n_answer in (5, 1):
            answer(llm, PROMPT[:n], n=n_answer)


def step_by_step(llm):
    for token in text(20, seed=4):
        llm.eval([token])


def nothing(llm):
    pass


@pytest.mark.filterwarnings("ignore:predictor")
@pytest.mark.parametrize("config", CONFIGS)
def test_whatever_came_in_between(load, config):
    llm = load(config)
    first = answer(llm)
    fresh = load(config)
    same(answer(fresh), first)
    for between in (nothing, hot, others, longer, shorter, step_by_step):
        between(llm)
        same(answer(llm), first)
    assert llm.sparse.path != "device" or llm.session.attached.verify_pool() == 0


@pytest.mark.parametrize("config", ["host", "device"])
@pytest.mark.parametrize("then", ["the rest", "another token", "another text"])
def test_taken_back_to_any_place(load, config, then):
    llm = load(config)
    first = answer(llm)
    for n in (0, 1, 17, 127, 128, 129, 600, 636, 637, N_PROMPT - 1, N_PROMPT, N_PROMPT + 1, N_PROMPT + N_ANSWER - 1):
        llm.n_tokens = n
        if then != "the rest":
            llm.eval(text(1 if then == "another token" else 80, seed=1000 + n))
        same(answer(llm), first)


@pytest.mark.parametrize("config", ["host", "host, ema, a poor step", "device"])
def test_in_a_later_turn(load, config):
    """A follow-up goes on from what is there; and once more, it has the answer that it had."""
    llm, other = load(config), load(config)
    turns = []
    prompt = PROMPT
    for i in range(3):
        tokens, logits = answer(llm, prompt)
        turns.append((prompt, (tokens, logits)))
        same(answer(other, prompt), (tokens, logits))
        hot_turn = prompt
        llm.set_seed(5)
        answer(llm, hot_turn, n=20, temp=2.0)
        same(answer(llm, prompt), (tokens, logits))
        prompt = prompt + tokens + text(10 + 60 * i, seed=50 + i)
        llm.eval(tokens[-1:])  # the answer, whole
        other.eval(tokens[-1:])
    for prompt, expected in reversed(turns):
        same(answer(llm, prompt), expected)


def test_a_turn_that_goes_on_reads_what_is_new_only(load, monkeypatch):
    llm = load()
    sizes, decode = [], llm.session.decode
    monkeypatch.setattr(llm.session, "decode", lambda tokens, n_past: (sizes.append(len(tokens)), decode(tokens, n_past)))
    tokens, _ = answer(llm)
    assert sizes == [128, 128, 128, 128, 124, 64, *[1] * (N_ANSWER - 1)]
    sizes.clear()
    answer(llm, PROMPT + tokens + text(30, seed=9), n=2)
    assert sizes == [31, 1]
    sizes.clear()
    answer(llm, PROMPT + tokens + text(30, seed=9), n=2)  # again
    assert sizes == [31, 1]
    sizes.clear()
    answer(llm, n=2)  # the turn before, again: its last batch
    assert sizes == [64, 1]
    sizes.clear()
    answer(llm, PROMPT[:400] + text(300, seed=8), n=2)  # from the last whole batch that both have
    assert sizes == [128, 124, 64, 1]


@pytest.mark.parametrize("config", ["host", "host, ema, a poor step", "host, steps kept", "device"])
def test_after_a_session_was_kept(load, config, tmp_path):
    llm, other = load(config), load(config)
    first = answer(llm)
    for _ in range(2):
        llm.save_session(tmp_path / "x")
        answer(other, text(200, seed=7))
        other.load_session(tmp_path / "x")
        assert other.n_tokens == llm.n_tokens
        for x in (llm, other):
            same(answer(x), first)
            hot(x)
            same(answer(x), first)
            others(x)
            same(answer(x), first)
            step_by_step(x)
        llm.n_tokens = 690  # saved as it was cut


def test_of_a_state_that_was_loaded(load):
    """Nobody knows in what batches its tokens were read; from there on all is the same."""
    llm = load()
    answer(llm)
    state = llm.save_state()
    found = []
    for between in (hot, others, step_by_step):
        llm.load_state(state)
        found.append(answer(llm, PROMPT + text(100, seed=11)))
        between(llm)
    for a, b in itertools.pairwise(found):
        same(a, b)


def test_with_drafts(load):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    llm = load(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=6))
    prompt = (text(40) * 20)[:N_PROMPT]
    first = answer(llm, prompt, n=20)
    for _ in range(2):
        answer(llm, prompt, n=11, temp=1.5)
        same(answer(llm, prompt, n=20), first)
        others(llm)


def test_a_question_asked_again(load):
    llm = load()
    asked = "word1 word2 word3 " * 30
    found = []
    for options in ({"temperature": 0.0}, {"temperature": 2.0, "seed": 4}, {"temperature": 0.0}):
        conversation = Conversation(llm, "")
        found.append("".join(conversation.ask(asked, max_tokens=12, **options)))
    assert found[0] == found[2] != found[1]
