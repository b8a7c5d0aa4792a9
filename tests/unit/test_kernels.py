"""Numba kernels against their naive twins: compiled, interpreted, and (in a subprocess) with bounds checked."""

import numpy as np
import pytest

import naive
from kvcast.sparse import history, selection
from predictor_onnx.features import DECAYS

SHAPES = [(1, 9), (3, 10), (6, 40), (90, 123)]


@pytest.fixture(params=["compiled", "interpreted"])
def how(request, monkeypatch):
    if request.param == "interpreted":
        for module, name in (
            (selection, "_select"),
            (selection, "_spread"),
            (selection, "_weigh"),
            (history, "_observe_listed"),
            (history, "_observe_all"),
            (history, "_observe_later"),
            (history, "_catch_up"),
            (history, "_keep_listed"),
            (history, "_changed"),
            (history, "_gather"),
            (history, "_gather_changed"),
            (history, "_scatter"),
        ):
            monkeypatch.setattr(module, name, getattr(module, name).py_func)
    return request.param


def lists(blocks, n_listed):
    return [row[:n].tolist() for row, n in zip(blocks, n_listed)]


@pytest.mark.parametrize(("n_rows", "n_used"), SHAPES)
@pytest.mark.parametrize("n_budget", [9, 12, 30, 200])
@pytest.mark.parametrize("budgets", ["uniform", "spread"])
def test_select(n_rows, n_used, n_budget, budgets, how):
    rng = np.random.default_rng(n_rows * 1000 + n_used)
    for scores in (
        rng.random((n_rows, n_used + 7)).astype(np.float32),
        np.zeros((n_rows, n_used), np.float32),
        rng.integers(0, 3, (n_rows, n_used)).astype(np.float32),
        np.full((n_rows, n_used), -1, np.float32),
    ):
        blocks, n_listed, shares = np.zeros((n_rows, n_used + 9), np.int32), np.zeros(n_rows, np.int32), np.zeros(n_rows, np.float32)
        selection.select(scores, n_used, n_budget, 4, 4, blocks, n_listed, shares, budgets)
        expected = naive.select(scores, n_used, n_budget, 4, 4, budgets)
        assert lists(blocks, n_listed) == expected
        if n_budget < n_used and scores.min() >= 0 and scores[:, :n_used].any():
            held = np.array([scores[r, e].sum() / scores[r, :n_used].sum() for r, e in enumerate(expected)])
            np.testing.assert_allclose(shares, held, rtol=1e-4)


@pytest.mark.parametrize(("n_rows", "n_used"), SHAPES)
@pytest.mark.parametrize("n_budget", [9, 12, 30, 200])
@pytest.mark.parametrize("budgets", ["uniform", "spread"])
def test_select_candidates(n_rows, n_used, n_budget, budgets, how):
    scores = np.random.default_rng(7).random((n_rows, n_used + 7)).astype(np.float32)
    blocks, n_listed, n_topk = np.zeros((n_rows, n_used + 9), np.int32), np.zeros(n_rows, np.int32), np.zeros(n_rows, np.int32)
    weights = np.full((n_rows, n_used), -1, np.float32)
    begin, end = selection.select_candidates(scores, n_used, n_budget, 4, 4, blocks, n_listed, n_topk, weights, budgets)
    if n_budget >= n_used:
        assert (begin, end) == (0, 0) and not n_topk.any() and lists(blocks, n_listed) == [list(range(n_used))] * n_rows
        return
    assert lists(blocks, n_listed) == [[*range(4), *range(max(4, n_used - 4), n_used)]] * n_rows
    assert n_topk.tolist() == [len(e) - 8 for e in naive.select(scores, n_used, n_budget, 4, 4, budgets)]
    assert n_topk.sum() == n_rows * min(n_budget - 8, end - begin)
    np.testing.assert_allclose(weights[:, begin:end], np.sqrt(np.maximum(scores[:, begin:end], 0) + 1e-6), rtol=1e-5)


@pytest.mark.parametrize(("n_rows", "n_used"), SHAPES)
def test_observe(n_rows, n_used, how):
    rng = np.random.default_rng(2)
    decays = np.array(DECAYS, np.float32)
    ours = rng.random((n_rows, len(decays), n_used + 3)).astype(np.float32)
    theirs = ours.astype(np.float64)
    blocks = np.tile(np.arange(n_used, dtype=np.int32), (n_rows, 1))
    n_listed = rng.integers(0, n_used + 1, n_rows).astype(np.int32)
    scores, shares = rng.random((n_rows, n_used)).astype(np.float32), rng.random(n_rows).astype(np.float32)
    seen = np.zeros((n_rows, n_used + 3), np.int32)
    history._observe_listed(ours, seen, 7, decays, blocks, n_listed, scores, shares)
    assert seen.tolist() == [[7] * n + [0] * (n_used + 3 - n) for n in n_listed]
    naive.observe_listed(theirs, decays, blocks, n_listed, scores, shares)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    taps = rng.random((n_rows, 5, 1, n_used + 3)).astype(np.float32)
    history._observe_all(ours, decays, taps, 1, 4, n_used)
    naive.observe_all(theirs, decays, taps[:, 1:], 3, n_used)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(("n_rows", "n_used"), SHAPES)
def test_what_is_observed_later_is_the_same(n_rows, n_used, how):
    """To the bit: over lists that change now and then, for rows asked for at different times, and when more steps wait than fit."""
    rng = np.random.default_rng(3)
    now, later = history.History(n_rows, 1, n_used + 3), history.History(n_rows, 1, n_used + 3)
    blocks, n_listed = np.tile(np.arange(n_used + 3, dtype=np.int32), (n_rows, 1)), np.full(n_rows, n_used // 2, np.int32)
    for step in range(40):
        if step % 3 == 0:
            row = step % n_rows
            blocks[row, :n_used] = rng.permutation(n_used)
            n_listed[row] = rng.integers(0, n_used + 1)
        scores, shares = rng.random((n_rows, n_used)).astype(np.float32), rng.random(n_rows).astype(np.float32)
        now.observe_listed(blocks, n_listed, scores, shares)
        later.observe_later(blocks, n_listed, scores, shares)
        if step % 4 == 0:
            rows = slice(step % 5, n_rows)
            later.catch_up(rows)
            np.testing.assert_array_equal(later.averages[rows], now.averages[rows])
            assert (later._seen[rows] >= now._seen[rows]).all()
        if step == 20:
            for x in (now, later):
                x.truncate(16 * (n_used // 2))
    np.testing.assert_array_equal(later.save()[0], now.averages)


@pytest.mark.parametrize(("n_rows", "n_used"), SHAPES)
@pytest.mark.parametrize("reach", [1, 3])
def test_changed(n_rows, n_used, how, reach):
    """The segments hold every block within reach of a change once, and nothing that is far from all; gathered, each has its neighbours."""
    rng = np.random.default_rng(4)
    known = history.History(n_rows, 1, n_used + 3)
    known.averages[:] = rng.random(known.averages.shape)
    since = rng.integers(-1, 3, n_rows)
    known._seen[:] = rng.integers(0, 4, known._seen.shape) * (rng.random(known._seen.shape) < 0.1)
    segments, predicted = known.changed(slice(0, n_rows), n_used, since, reach)
    covered = np.zeros((n_rows, n_used), int)
    at = 0
    for row, begin, end in segments:
        covered[row, begin:end] += 1
        padded = np.pad(known.averages[row, :, :n_used], ((0, 0), (reach, reach)))
        n = end - begin + 2 * reach
        np.testing.assert_array_equal(predicted[:, at : at + n], padded[:, begin : end + 2 * reach])
        at += n
    near = np.array([
        [(known._seen[r, max(0, b - reach) : min(n_used, b + reach + 1)] > since[r]).any() for b in range(n_used)] for r in range(n_rows)
    ])  # fmt: skip
    assert (covered[near] == 1).all() and covered.max(initial=0) <= 1
    scores = np.zeros((n_rows, n_used), np.float32)
    known.scatter(predicted[0], segments, reach, scores)
    np.testing.assert_array_equal(scores, np.where(covered, known.averages[:, 0, :n_used], 0))
