"""Drafts verified in one batch: the same tokens as without, the history true, the pool right."""

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from kvcast import Llama, SparseConfig
from kvcast.llama.speculative import VERIFY_TOKENS
from logits import logits_of

N_TOKENS = 40
COUNTING = "".join(f"Line {i}: {i} times two is {2 * i}.\n" for i in range(1, 32))  # longer than a batch; answers beyond doubt
LONG_CONTEXT = dict(n_ctx=768, n_batch=128, n_threads=2, n_threads_batch=2, verbose=False)
CONFIGS = {
    "dense": {"sparse": None},
    "host": {"sparse": SparseConfig(budget=768)},
    "device": {"sparse": SparseConfig(budget=768, path="device")},
}


@pytest.fixture
def load(smollm2):
    made = []

    def make(draft=10, **more):
        draft_model = LlamaPromptLookupDecoding(num_pred_tokens=draft) if draft else None
        made.append(Llama(smollm2, draft_model=draft_model, **{**LONG_CONTEXT, **more}))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def greedy(llm, prompt, n=N_TOKENS):
    llm.reset()
    return [token for token, _ in zip(llm.generate(prompt, temp=0.0), range(n))]


def watch(llm, monkeypatch):
    """Sizes of the batches that are evaluated."""
    owner, name = (llm, "_decode") if llm.sparse is None else (llm.session, "decode")
    sizes, decode = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda tokens, n_past: (sizes.append(len(tokens)), decode(tokens, n_past)))
    return sizes


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_same_tokens_as_without(load, monkeypatch, kind):
    llm, other = load(**CONFIGS[kind]), load(draft=0, **CONFIGS[kind])
    prompt = llm.tokenize(COUNTING.encode())
    assert len(prompt) > 3 * llm.n_batch
    sizes = watch(llm, monkeypatch)
    assert greedy(llm, prompt) == greedy(other, prompt)
    verified = [n for n in sizes if 1 < n <= 11]
    assert len(verified) > 2 and len(verified) < N_TOKENS  # drafts were made, and some held
    if kind == "device":
        assert llm.session.attached.verify_pool() == 0


def test_the_history_is_that_of_the_tokens_that_stay(load, monkeypatch):
    """Drafts that are all wrong, and none: what steps attend to is what dense batches of the same tokens would have taught."""
    llm = load(**CONFIGS["host"])
    tokens = llm.tokenize(COUNTING.encode())
    wrong = [(t + 1) % 1000 for t in tokens]
    llm.eval(tokens[:400])
    for i in range(400, 406):
        llm.eval([tokens[i], *wrong[i : i + 5]])
        llm.n_tokens = i + 1  # as llama-cpp-python takes a draft back
    llm.eval([tokens[406]])
    got = llm.session.history.averages.copy()
    assert llm.session.history.n_observed == 64 + 7

    other = load(**CONFIGS["host"])
    other.eval(tokens[:400])
    for i in range(400, 406):
        other.eval([tokens[i], wrong[i]])
        other.n_tokens = i + 1
    other.eval([tokens[406]])
    settled = slice(0, 400 // 16)  # whole blocks before the cut
    np.testing.assert_allclose(got[:, :, settled], other.session.history.averages[:, :, settled], atol=1e-3)
    assert got[:, 3, 1 : 400 // 16].any()


def test_a_draft_that_stays_teaches_as_much_as_steps(load):
    llm, other = load(**CONFIGS["host"]), load(draft=0, **CONFIGS["host"])
    tokens = llm.tokenize(COUNTING.encode())
    for x in (llm, other):
        x.eval(tokens[:400])
    llm.eval(tokens[400:410])
    for token in tokens[400:410]:
        other.eval([token])
    np.testing.assert_allclose(logits_of(llm), logits_of(other), atol=1.8)
    for x in (llm, other):
        x.eval([tokens[410]])
    assert llm.session.history.n_observed == other.session.history.n_observed == 64 + 11
    assert np.abs(llm.session.history.averages - other.session.history.averages)[:, 3].mean() < 1e-3


@pytest.mark.parametrize("kind", ["dense", "host"])
def test_long_drafts_are_cut_to_a_batch(load, monkeypatch, kind):
    llm = load(draft=200, **{**CONFIGS[kind], "n_batch": 64, "n_ubatch": 64})
    generating = llm.generate(llm.tokenize(COUNTING.encode()), temp=0.0)
    next(generating)
    sizes = watch(llm, monkeypatch)
    for _ in zip(generating, range(10)):
        pass
    assert max(sizes) == VERIFY_TOKENS


def test_logits_of_all_tokens_where_they_are_asked_for(load):
    llm, other = load(logits_all=True), load(draft=0, logits_all=True)
    completions = [
        x.create_completion(COUNTING[:600], max_tokens=12, temperature=0.0, logprobs=1)["choices"][0]["logprobs"]["token_logprobs"]
        for x in (llm, other)
    ]
    np.testing.assert_allclose(*completions, atol=0.1)
    with pytest.raises(ValueError, match="logits_all"):
        load().create_completion(COUNTING, max_tokens=2, logprobs=1)


def test_the_server_takes_a_draft_model(small):
    from kvcast.server.model_manager import ModelManager
    from kvcast.server.settings import ModelSettings

    said = []
    for draft in ({}, {"draft_model": "prompt-lookup-decoding", "draft_model_num_pred_tokens": 5}):
        proxy = ModelManager([ModelSettings(model=str(small), n_ctx=512, n_threads=2, sparse=SparseConfig(budget=512), **draft)], None)
        llm = proxy()
        assert (llm.draft_model is not None) == bool(draft)
        said.append(llm.create_completion(COUNTING[:600], max_tokens=20, temperature=0.0)["choices"][0]["text"])
        proxy.free()
    assert said[0] == said[1]
