"""``exact=True``: answers of dense attention, drafted by sparse steps."""

import os

import numpy as np
import pytest

from kvcast import GenerationError, Llama, SparseConfig
from kvcast.eval.exactness import compare, rounding

N_CONTEXT = 400


def load(model, budget=96, **options):
    sparse = SparseConfig(budget=budget, exact=True, **options)
    return Llama(model, n_ctx=1024, sparse=sparse, n_threads=2, n_threads_batch=2, verbose=False)


@pytest.fixture(scope="module")
def exact(smollm2):
    with_drafts = load(smollm2)
    yield with_drafts
    with_drafts.close()


@pytest.fixture(scope="module")
def dense(smollm2):
    llm = Llama(smollm2, n_ctx=1024, flash_attn=True, n_threads=2, n_threads_batch=2, verbose=False)
    yield llm
    llm.close()


@pytest.mark.parametrize("kind", ["code", "prose"])
def test_greedy_answers_are_those_of_dense(dense, exact, kind, request):
    tokens = dense.tokenize(request.getfixturevalue(kind).encode())[:N_CONTEXT]
    row = compare(dense, exact, tokens, 60)
    near = rounding(dense, tokens, 30)
    assert row["short"] < near, row
    assert row["n_same"] == 60 or row["gap"] < near, row
    assert 0 < row["n_accepted"] < row["n_drafted"] and row["n_checks"] + row["n_accepted"] <= 60 + 31
    exact.reset()
    exact.eval(tokens)
    for i in range(0, 56, 8):  # by the batches that check, nothing is left to rounding
        part = row["answer"][i : i + 8]
        exact.eval(part)
        logits = np.ctypeslib.as_array(exact._ctx.get_logits(), shape=(8, exact.n_vocab()))
        assert logits.argmax(1).tolist() == row["answer"][i + 1 : i + 9]


def test_every_logit_is_dense(exact, code):
    """What is in the store after an answer came of dense batches, drafts or not: the next logits are those of reading it all."""
    tokens = exact.tokenize(code.encode())[:N_CONTEXT]
    answer = []
    for token in exact.generate(tokens, temp=0.0):
        answer.append(token)
        if len(answer) == 60:
            break
    exact.eval([answer[-1]] if exact.n_tokens == N_CONTEXT + 59 else [])
    n = exact.n_tokens
    k, v = (np.copy(exact.session.attached.rows(5)[i]) for i in (0, 1))
    seen = exact.input_ids[:n].tolist()
    exact.reset()
    exact.eval(seen)
    for got, expected in zip((k, v), exact.session.attached.rows(5), strict=True):
        a, b = (x[:n].view(np.float16).astype(np.float32) for x in (got, expected))
        assert np.abs(a - b).max() < 0.05 * np.abs(b).max()


def test_sampled_tokens_follow_the_dense_distribution(small, code):
    """A chi-square test of two tokens, the second of which is checked with its draft, of top_k=3."""
    llm = load(small)
    tokens = llm.tokenize(code.encode())[:300]

    def likeliest(prompt):
        llm.reset()
        llm.eval(prompt)
        x = np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).astype(np.float64)
        kept = np.argsort(-x)[:3]
        p = np.exp(x[kept] - x.max())
        return dict(zip(kept.tolist(), (p / p.sum()).tolist(), strict=True))

    expected = {(a, b): pa * pb for a, pa in likeliest(tokens).items() for b, pb in likeliest([*tokens, a]).items()}
    n_draws, counts = 2000 if os.environ.get("KVCAST_LONG") else 300, dict.fromkeys(expected, 0)
    for seed in range(n_draws):
        llm.set_seed(seed)
        draw = llm.generate(tokens, temp=1.0, top_k=3, top_p=1.0, min_p=0.0, repeat_penalty=1.0)
        counts[next(draw), next(draw)] += 1
    assert llm.session.times.n_steps >= n_draws  # drafts
    chi_square = sum((counts[pair] - n_draws * p) ** 2 / (n_draws * p) for pair, p in expected.items())
    assert chi_square < 26.1, (chi_square, counts)  # the .1 % quantile for 8 degrees of freedom
    llm.close()


@pytest.mark.parametrize(("path", "budget"), [("host", 96), ("device", 256)])
def test_a_draft_leaves_nothing(small, code, path, budget):
    llm = load(small, budget, path=path)
    tokens = llm.tokenize(code.encode())[:600]
    llm.eval(tokens)
    reported = []
    llm.on_kv(lambda layer, block, k, v: reported.append(block))
    before = llm.n_tokens, llm.session.n_tokens
    drafted = llm.draft(tokens[0], 20)
    assert len(drafted) == 20 or llm.token_eos() in drafted
    assert (llm.n_tokens, llm.session.n_tokens) == before and not reported
    assert llm.draft(tokens[0], 0) == []
    llm.close()


def test_a_draft_that_is_stopped(small, code):
    llm = load(small)
    tokens = llm.tokenize(code.encode())[:600]
    llm.eval(tokens)
    llm.on_attention(lambda layer, step, scores: llm.interrupt() if step == 603 else None)
    with pytest.raises(GenerationError):
        llm.draft(tokens[0], 20)
    llm.on_attention(None)
    assert llm.n_tokens == llm.session.n_tokens == 600
    expected = load(small)
    expected.eval(tokens)
    for one in (llm, expected):
        one.eval(tokens[:1])
    np.testing.assert_allclose(*(one._ctx.get_logits_ith(-1)[: one.n_vocab()] for one in (llm, expected)), atol=1e-4)
    llm.close()
    expected.close()
