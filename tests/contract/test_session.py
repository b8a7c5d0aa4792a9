"""The loop itself: selection beside the step, calibration, determinism."""

import numpy as np
import pytest

from kvcast import GenerationError, Llama, SparseConfig
from kvcast.engine import host_path
from kvcast.sparse import predictors
from logits import logits_of


@pytest.fixture
def make(small):
    made = []

    def load(model=small, **config):
        llm = Llama(model, n_ctx=1536, sparse=SparseConfig(**{"budget": 256, **config}), n_threads=2, n_threads_batch=2, verbose=False)
        made.append(llm)
        return llm

    yield load
    for llm in made:
        llm.close()


def run(llm, tokens, n_context, n_steps):
    llm.eval(tokens[:n_context])
    for token in tokens[n_context : n_context + n_steps]:
        llm.eval([token])
    return logits_of(llm)


def test_selection_beside_the_step_is_deterministic(make, code, monkeypatch):
    monkeypatch.setattr(host_path, "OVERLAP_MIN", 0)
    runs = []
    for _ in range(2):
        llm = make(calibrate="dense:24")
        tokens = llm.tokenize(code.encode())
        runs.append(run(llm, tokens, 1000, 60))
        assert llm.session.path.worker.thread is not None
        assert llm.session.times.n_steps == 60
    np.testing.assert_array_equal(*runs)


def test_selection_beside_the_step_sees_the_step_before(make, code, monkeypatch):
    """The sets of both ways differ by one step of scores, not more."""
    sets = []
    for least in (1 << 60, 0):
        monkeypatch.setattr(host_path, "OVERLAP_MIN", least)
        llm = make(calibrate="off")
        tokens = llm.tokenize(code.encode())
        run(llm, tokens, 1000, 9)
        sets.append({(r, b) for r in range(llm.session.n_rows) for b in llm.session.path.blocks[r, : llm.session.path.n_listed[r]]})
    common = len(sets[0] & sets[1]) / len(sets[0])
    assert 0.85 < common <= 1


def test_a_selection_that_fails_beside_the_step_is_an_error_and_the_session_goes_on(make, code, monkeypatch):
    monkeypatch.setattr(host_path, "OVERLAP_MIN", 0)
    llm = make(calibrate="off")
    tokens = llm.tokenize(code.encode())
    llm.eval(tokens[:1000])
    healthy = llm.session.predictor

    class Broken:
        def predict(self, history, n_blocks):
            raise ArithmeticError("no prediction")

    n = 1000
    with pytest.raises(GenerationError, match="ArithmeticError: no prediction"):
        for i in range(20):
            llm.eval([tokens[n]])
            n += 1
            if i == 2:
                llm.session.predictor = Broken()
    llm.session.predictor = healthy
    assert llm.n_tokens == llm.session.n_tokens
    for token in tokens[llm.n_tokens : llm.n_tokens + 20]:
        llm.eval([token])


def test_calibration_attends_to_everything_at_its_interval(make, code):
    llm = make(calibrate="dense:5")
    tokens = llm.tokenize(code.encode())
    full = []
    llm.session.observers.on_attended = lambda position: full.append(bool((llm.session.result.n_attended == position // 16 + 1).all()))
    run(llm, tokens, 1000, 20)
    assert full == [i % 5 == 4 for i in range(20)]


def test_host_calibration_takes_the_layers_in_turn(make, code):
    llm = make(calibrate="layers:2", budget_allocation="uniform")
    tokens = llm.tokenize(code.encode())
    full = []

    def note(position):
        n = llm.session.result.n_attended.reshape(llm.session.attached.info.n_layer, -1)
        full.append(set(np.flatnonzero((n == position // 16 + 1).all(1)).tolist()))
        assert (np.delete(n, list(full[-1]), 0) <= 17).all()

    llm.session.observers.on_attended = note
    run(llm, tokens, 1000, 20)
    assert all(len(layers) == 2 for layers in full)
    assert set().union(*full[:2]) == set(range(4))


def test_spread_keeps_the_total(make, code):
    llm = make(budget_allocation="spread", calibrate="off", budget=320)
    tokens = llm.tokenize(code.encode())
    run(llm, tokens, 1200, 1)
    assert llm.session.path.n_listed.sum() == 20 * llm.session.n_rows
    assert llm.session.path.n_listed.std() > 1


def test_predictors_and_compression(make, code):
    for config in ({"predictor": "window"}, {"predictor": "last"}, {"predictor": "oracle"}, {"compression": 4.0}):
        llm = make(calibrate="off", **config)
        tokens = llm.tokenize(code.encode())
        run(llm, tokens, 1000, 3)
        mean = llm.session.path.n_listed.mean()
        assert mean == (5 if config.get("predictor") == "window" else 15 if "compression" in config else 16)


def test_dense_layers_attend_to_everything(make, smollm2, code):
    llm = make(smollm2, dense_layers=2)
    run(llm, llm.tokenize(code.encode()), 1000, 3)
    n = (llm.session.path.n_listed + llm.session.path.n_topk).reshape(llm.session.attached.info.n_layer, -1)
    assert (n[:2] == -(-1003 // 16)).all() and 13 < n[2:].mean() < 17


def note_full(session, into):
    return lambda position: into.append(bool((session.result.n_attended == position // 16 + 1).all()))


@pytest.mark.parametrize("path", ["host", "device"])
def test_a_poor_step_is_followed_by_one_over_everything(make, code, path):
    """With a minimum that no sparse step reaches, every other step is dense; with one that all reach, none is."""
    for minimum, expected in ((0.999, [False, True] * 4), (0.01, [False] * 8)):
        llm = make(min_recovery=minimum, path=path)
        tokens, full = llm.tokenize(code.encode()), []
        llm.session.observers.on_attended = note_full(llm.session, full)
        run(llm, tokens, 1000, 8)
        assert full == expected


def test_guard_takes_the_average_where_the_network_is_worse(make, code, monkeypatch):
    class Worse(predictors.OnnxPredictor):
        def predict(self, history, n_blocks):
            return -history.averages[:, 3, :]

    monkeypatch.setattr(predictors, "OnnxPredictor", Worse)
    llm = make(predictor="onnx:stream")
    with pytest.warns(UserWarning, match="'onnx:stream' does worse than the plain average"):
        llm.eval(llm.tokenize(code.encode())[:1000])
    assert isinstance(llm.session.predictor, predictors.EmaPredictor)
