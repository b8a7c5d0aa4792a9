"""Edits of a session: truncate, regenerate, prefix reuse, load_state. Sparse over all blocks must still equal dense."""

import numpy as np
import pytest
from llama_cpp import LlamaDiskCache, LlamaRAMCache

import kvcast
from kvcast import GenerationError, Llama, SparseConfig
from kvcast.bindings import api as native
from kvcast.chat.conversation import Conversation
from logits import LOGIT_DIFFERENCE, logits_of

N_EDITS = 50


def agree(sparse, dense, bound):
    a, b = logits_of(sparse), logits_of(dense)
    assert sparse.n_tokens == dense.n_tokens
    assert np.abs(a - b).max() <= bound
    second, first = np.sort(b)[-2:]
    if first - second > 2 * bound:
        assert a.argmax() == b.argmax()


@pytest.mark.parametrize("path", ["host", "device"])
def test_50_random_edits(small, code, path):
    rng = np.random.default_rng(7)
    make = {"n_ctx": 1536, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
    sparse = Llama(small, sparse=SparseConfig(budget=1536, path=path), **make)
    dense = Llama(small, flash_attn=True, offload_kqv=False, **make)
    text = sparse.tokenize(code.encode())
    both = (sparse, dense)

    def run(tokens):
        for llm in both:
            for i in range(0, len(tokens)):
                llm.eval([tokens[i]]) if len(tokens) < 8 else None
            if len(tokens) >= 8:
                llm.eval(tokens)

    run(text[:600])
    saved = [llm.save_state() for llm in both]
    kinds = []
    for i in range(N_EDITS):
        kind = ("truncate", "regenerate", "prefix", "load")[rng.integers(4)] if i >= 4 else ("truncate", "regenerate", "prefix", "load")[i]
        kinds.append(kind)
        start = int(rng.integers(len(text) - 400))
        if kind == "truncate":
            n = int(rng.integers(20, sparse.n_tokens))
            for llm in both:
                llm.n_tokens = n
            run(text[start : start + int(rng.integers(1, 6))])
        elif kind == "regenerate":
            n_answer = int(rng.integers(1, min(30, sparse.n_tokens - 10)))
            for llm in both:
                llm.n_tokens -= n_answer
            run(text[start : start + int(rng.integers(1, 200))])
        elif kind == "prefix":
            n = int(rng.integers(1, sparse.n_tokens))
            prompt = sparse.input_ids[:n].tolist() + text[start : start + int(rng.integers(1, 120))]
            for llm in both:
                first = next(llm.generate(prompt, temp=0.0))
                llm.eval([prompt[-1] if first is None else text[start]])
        else:
            for llm, state in zip(both, saved):
                llm.load_state(state)
            run(text[start : start + 3])
        agree(sparse, dense, LOGIT_DIFFERENCE["smollm2"])
        assert path == "host" or sparse.session.attached.verify_pool() == 0
        if sparse.n_tokens > 1200:
            for llm in both:
                llm.n_tokens = 500
            run(text[:20])
    assert set(kinds) == {"truncate", "regenerate", "prefix", "load"}
    for llm in both:
        llm.close()


@pytest.mark.sanitize
def test_edits_drop_what_is_known_past_the_cut(small, code):
    llm = Llama(small, n_ctx=1024, sparse=SparseConfig(budget=256), n_threads=2, verbose=False)
    tokens = llm.tokenize(code.encode())
    llm.eval(tokens[:800])
    for token in tokens[800:820]:
        llm.eval([token])
    history, epoch = llm.session.history, llm.session.history.epoch
    assert history.averages[:, 3, :51].sum() > 0
    llm.n_tokens = 400
    llm.eval([tokens[400]])
    assert history.epoch > epoch
    assert not history.averages[:, :, 26:].any()
    assert history.averages[:, 3, 1:25].any()
    assert (
        llm.session.path.blocks.max(initial=0, where=np.arange(llm.session.path.blocks.shape[1]) < llm.session.path.n_listed[:, None]) <= 25
    )
    llm.close()


@pytest.mark.sanitize
def test_history_is_made_again_after_a_load(small, code):
    llm = Llama(small, n_ctx=1024, sparse=SparseConfig(budget=256), n_threads=2, verbose=False)
    tokens = llm.tokenize(code.encode())
    llm.eval(tokens[:700])
    state = llm.save_state()
    before = llm.session.history.averages.copy()
    llm.reset()
    llm.eval(tokens[1000:1200])
    llm.load_state(state)
    assert not llm.session.history.primed
    llm.eval([tokens[700]])
    assert llm.session.history.primed and llm.n_tokens == 701
    again = llm.session.history.averages
    # the same 64 queries and one more
    assert np.abs(again - before)[:, 4].max() < 0.1 and again[:, 4].any()
    llm.close()


@pytest.mark.parametrize(
    "config", [SparseConfig(budget=160), SparseConfig(budget=256, path="device"), None], ids=["host", "device", "dense"]
)
def test_context_full_is_an_error_and_keeps_the_session(small, code, config):
    """Never a token from beyond it: see docs/limits.md."""
    llm = Llama(small, n_ctx=256, sparse=config, n_threads=2, verbose=False)
    tokens = llm.tokenize(code.encode())
    full = GenerationError if config else RuntimeError
    llm.eval(tokens[:256])
    with pytest.raises(full, match="context is full" if config else "llama_decode"):
        llm.eval([tokens[256]])
    assert llm.n_tokens == llm.n_ctx()
    llm.n_tokens -= 20
    llm.eval([tokens[0]])

    answer = llm.create_completion(tokens[:250], max_tokens=50, temperature=0.0, stop=[])
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["total_tokens"] == 256
    with pytest.raises(ValueError, match="exceed context window"):
        llm.create_completion(tokens[:256], max_tokens=1)
    got = []
    with pytest.raises(full):
        for token in llm.generate(tokens[:250], temp=0.0):
            got.append(token)
    assert len(got) == 7  # the last of them needs no cell
    if config is None:  # sparse, the first token comes from a batch, which is dense, or from a step
        assert llm.detokenize(got[:6]).decode() == answer["choices"][0]["text"]
    llm.n_tokens = 100
    llm.eval(tokens[100:110])
    conversation = Conversation(llm)
    with pytest.raises(GenerationError, match="context of 256 tokens is full"):
        list(conversation.ask("word " * 300, max_tokens=4))
    assert conversation.messages == []
    assert list(conversation.ask("Hello?", max_tokens=2, temperature=0.0))
    llm.close()


@pytest.mark.parametrize("kind, path", [("ram", "host"), ("disk", "device")])
def test_caches_of_llama_cpp_python(smollm2, code, tmp_path, monkeypatch, kind, path):
    """A shared prefix comes from the cache, and the answer is that of a model without one."""
    cached, plain = (Llama(smollm2, n_ctx=n, sparse=SparseConfig(budget=512, path=path), n_threads=2, verbose=False) for n in (512, 768))
    make = (lambda: LlamaRAMCache()) if kind == "ram" else (lambda: LlamaDiskCache(str(tmp_path)))
    cached.set_cache(make())
    ask = dict(max_tokens=6, temperature=0.0)
    first, other, more = "Count on: " + ", ".join(map(str, range(90))), "Once upon a time there was", ", 90, 91, 92"
    loads = []
    load_state = Llama.load_state
    monkeypatch.setattr(Llama, "load_state", lambda self, state: loads.append(state.n_tokens) or load_state(self, state))
    answers = [cached.create_completion(prompt, **ask)["choices"][0]["text"] for prompt in (first, other, first + more)]
    assert len(loads) == 1 and loads[0] > 100
    expected = [plain.create_completion(prompt, **ask)["choices"][0]["text"] for prompt in (first, other, first + more)]
    assert answers == expected and "93" in answers[2]
    if kind == "disk":  # by another process, with a larger context
        plain.set_cache(make())
        plain.reset()
        assert plain.create_completion(first, **ask)["choices"][0]["text"] == expected[0]
        assert len(loads) == 2
        plain.eval(plain.tokenize(code.encode())[: 700 - plain.n_tokens])
        assert plain.n_tokens == 700
    cached.close()
    plain.close()


@pytest.mark.sanitize
def test_a_bad_list_stops_the_step_and_nothing_is_lost(small, code):
    llm = Llama(small, n_ctx=512, sparse=SparseConfig(budget=160), n_threads=2, verbose=False)
    tokens = llm.tokenize(code.encode())
    llm.eval(tokens[:300])
    llm.eval([tokens[300]])
    session = llm.session
    n = llm.n_tokens

    place = session.path._place

    def spoil(*arguments):
        place(*arguments)
        session.attached.blocks[3, 1, 0] = 31

    session.path._place = spoil
    with pytest.raises(GenerationError, match="layer 3, KV head 1"):
        llm.eval([tokens[301]])
    session.path._place = place
    assert llm.n_tokens == n
    llm.eval([tokens[301]])
    assert llm.n_tokens == n + 1
    llm.close()


@pytest.mark.sanitize
@pytest.mark.parametrize("path", ["host", "device"])
def test_interrupt_keeps_the_session(small, code, path):
    """An abort between two nodes, at every kind of step, then on as if nothing had been."""
    make = {"n_ctx": 1024, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
    llm, other = (Llama(small, sparse=SparseConfig(budget=2048, path=path), **make) for _ in range(2))
    tokens = llm.tokenize(code.encode())
    for x in (llm, other):
        x.eval(tokens[:600])

    def stop(*_):
        llm.interrupt()
        return 0

    for i, token in enumerate(tokens[600:620]):
        if i % 4 == 0:
            llm.session.attached.set_attention_callback(stop)
            with pytest.raises(GenerationError):
                llm.eval([token])
            llm.session.attached.set_attention_callback(None)
        llm.eval([token])
        other.eval([token])
    assert llm.n_tokens == other.n_tokens == 620
    np.testing.assert_allclose(logits_of(llm), logits_of(other), atol=LOGIT_DIFFERENCE["smollm2"])
    llm.close()
    other.close()


def test_one_version():
    assert native.kvcast_version().decode() == kvcast.__version__
