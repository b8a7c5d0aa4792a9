"""The device path: kernels against their twins, the pool against the store after every step, and what runs beside the steps."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import naive
from kvcast import GenerationError, Llama, SparseConfig
from kvcast.engine import device_path as device
from kvcast.engine.device_path import DevicePath
from kvcast.eval import sweep
from kvcast.planning import link_simulator as link
from kvcast.sparse import pool
from logits import logits_of
from places import DATA


@pytest.fixture
def make(small):
    made = []

    def load(n_ctx=1536, **config):
        config = SparseConfig(**{"budget": 256, "path": "device", **config})
        llm = Llama(small, n_ctx=n_ctx, sparse=config, n_threads=2, n_threads_batch=2, verbose=False)
        made.append(llm)
        return llm

    yield load
    for llm in made:
        llm.close()


def run(llm, tokens, n_context, n_steps, verify=True):
    llm.eval(tokens[:n_context])
    for token in tokens[n_context : n_context + n_steps]:
        llm.eval([token])
        assert not verify or llm.session.attached.verify_pool() == 0, llm.n_tokens
    return logits_of(llm)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "interpreted"])
def test_difference(compiled):
    f = pool._difference if compiled else pool._difference.py_func
    rng = np.random.default_rng(5)
    for n_rows, n_blocks, first in ((1, 12, 0), (4, 30, 3), (9, 64, 8)):
        table = np.full((n_rows, n_blocks), -1, np.int32)
        n_slots, every = np.full(n_rows, n_blocks * 2 // 3, np.int32), np.arange(n_rows, dtype=np.int32)
        for _ in range(30):
            n_wanted = rng.integers(0, n_slots - first + 1).astype(np.int32)
            wanted = np.stack([rng.permutation(n_blocks) for _ in range(n_rows)]).astype(np.int32)
            lists = [row[:n].tolist() for row, n in zip(wanted, n_wanted)]
            expected = naive.difference(table, n_slots, lists, first)
            moves = [np.zeros(n_rows * n_blocks, np.int32) for _ in range(3)]
            n = f(table, n_slots, wanted, n_wanted, first, every, len(moves[0]), *moves)
            got = [[] for _ in range(n_rows)]
            for row, slot, block in zip(*(m[:n].tolist() for m in moves)):
                got[row].append((slot, block))
                table[row, slot] = block
            assert got == expected
            assert all(set(w) <= set(table[r, first : n_slots[r]].tolist()) for r, w in enumerate(lists))
            if n > 1:
                to_empty = enumerate(naive.difference(np.full_like(table, -1), n_slots, lists, first))
                all_moves = [(row, *move) for row, moves_of in to_empty for move in moves_of]
                assert f(np.full_like(table, -1), n_slots, wanted, n_wanted, first, every, 1, *moves) == 1
                assert tuple(int(m[0]) for m in moves) == all_moves[0]
            table[rng.random(table.shape) < 0.1] = -1


@pytest.mark.sanitize
@pytest.mark.parametrize("kind", [1, 8], ids=["f16", "q8_0"])
def test_staged_blocks_are_those_of_the_store(small, kind):
    llm = Llama(small, n_ctx=512, sparse=SparseConfig(budget=256, path="device"), type_k=kind, type_v=1, n_threads=2, verbose=False)
    tokens = llm.tokenize((DATA / "code.txt").read_bytes())
    llm.eval(tokens[:400])
    llm.eval([tokens[400]])
    p, info = llm.session.path.pool, llm.session.attached.info
    rng = np.random.default_rng(1)
    n = 12
    rows, slots, blocks = p._moves[1]
    rows[:n], slots[:n], blocks[:n] = rng.integers(0, 12, n), 9, rng.integers(0, 20, n)
    p.upload(1, n)
    moves = [(r // 3, r % 3, b) for r, b in zip(rows[:n], blocks[:n])]
    for which, row_bytes, staged in ((0, info.k_row_bytes, 0), (1, info.v_row_bytes, p._k_bytes)):
        stores = [llm.session.attached.rows(layer)[which] for layer in range(info.n_layer)]
        expected = naive.gather(stores, row_bytes // 3, moves)
        np.testing.assert_array_equal(llm.session.attached.staging[1][0][staged : staged + len(expected)], expected)
    llm.close()


@pytest.mark.sanitize
@pytest.mark.parametrize("kinds", [(1, 1), (8, 8), (2, 8), (1, 2)], ids=["f16", "q8_0", "q4_0-q8_0", "f16-q4_0"])
@pytest.mark.parametrize("budgets", ["spread", "uniform"])
def test_the_pool_holds_what_its_table_says(small, code, kinds, budgets):
    config = SparseConfig(budget=512, path="device", budget_allocation=budgets, hold=3)
    llm = Llama(small, n_ctx=2048, sparse=config, type_k=kinds[0], type_v=kinds[1], n_threads=2, n_threads_batch=2, verbose=False)
    run(llm, llm.tokenize(code.encode()), 1400, 40)
    slots = llm.session.path.pool.n_slots
    assert slots.mean() == 32 and (slots % 16 == 0).all() and (slots.std() > 0) == (budgets == "spread")
    assert llm.session.attached.pool_info.device == b"CPU"
    assert sum(llm.session.times.moves) > 0
    llm.close()


def test_from_a_short_context_past_the_budget(make, code):
    """Everything is in the pool until the budget is reached; then the window goes on."""
    llm = make(budget=512)
    dense = Llama(llm.model_path, n_ctx=1536, flash_attn=True, offload_kqv=False, n_threads=2, n_threads_batch=2, verbose=False)
    tokens = llm.tokenize(code.encode())
    for x in (llm, dense):
        x.eval(tokens[:70])
    for i, token in enumerate(tokens[70:700]):
        llm.eval([token])
        n_blocks = llm.n_tokens // 16
        if i % 5 == 0 or 480 < i < 500:
            assert llm.session.attached.verify_pool() == 0
        if n_blocks < 32:
            dense.eval([token])
            if i % 40 == 0:
                assert np.abs(logits_of(llm) - logits_of(dense)).max() < 1.8
                assert (llm.session.result.n_attended == -(-llm.n_tokens // 16)).all()
    assert (llm.session.result.n_attended == 32).all()
    dense.close()


@pytest.mark.parametrize("calibrate", ["off", "dense:5", "layers:4"])
@pytest.mark.parametrize("predictor", ["ema", "window", "oracle", "onnx:stream"])
def test_every_calibration_and_predictor(make, code, calibrate, predictor):
    llm = make(calibrate=calibrate, predictor=predictor, hold=2)
    run(llm, llm.tokenize(code.encode()), 1000, 25)
    if predictor == "window":
        assert (llm.session.path.n_listed == 5).all()  # sink and window


@pytest.mark.parametrize("predictor", ["onnx:paper", "h2o", "quest"])
def test_predictors_of_all_rows_at_once(make, code, predictor):
    llm = make(predictor=predictor, hold=3)
    run(llm, llm.tokenize(code.encode()), 1000, 10)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["each asks", "one asks for all"])
def test_threads_that_select_change_nothing(make, code, monkeypatch, on_gpu):
    logits = []
    for n_helpers in (0, 3):
        llm = make(hold=4, calibrate="layers:4")
        monkeypatch.setattr(llm.session.predictor, "on_gpu", on_gpu)
        if n_helpers:
            monkeypatch.setattr(device, "PART_MIN", 1)
            llm.session.path._helpers = ThreadPoolExecutor(n_helpers)
        logits.append(run(llm, llm.tokenize(code.encode()), 1000, 12))
    np.testing.assert_array_equal(*logits)


@pytest.mark.sanitize
def test_a_new_plan_takes_the_last_scores_in_first(make, code):
    """They lie as the plan before says."""
    logits = []
    for at_once in (True, False):
        llm = make(hold=4)
        tokens = llm.tokenize(code.encode())
        run(llm, tokens, 1000, 6)
        if at_once:
            llm.session.take_in()
        llm.session.configure(SparseConfig(budget=256, path="device", hold=4, budget_allocation="uniform"))
        for token in tokens[1006:1012]:
            llm.eval([token])
        logits.append(logits_of(llm))
    np.testing.assert_array_equal(*logits)


@pytest.mark.sanitize
def test_host_calibration_is_exact(make, code):
    llm = make(calibrate="layers:1", trace=True)
    run(llm, llm.tokenize(code.encode()), 1000, 1)
    scores = np.zeros((3, llm.session.attached.info.n_blocks), np.float32)
    for layer in (0, 2, 3):
        for head in range(3):
            llm.session.attached.score_store(layer, head, scores[head])
        expected = np.pad(llm.attention_row(layer), ((0, 0), (0, 7))).reshape(3, 3, 63, 16).sum(-1).mean(1)
        np.testing.assert_allclose(scores[:, :63], expected, rtol=1e-3, atol=1e-6)
        assert not scores[:, 63:].any()


def test_prefetch_changes_nothing_but_the_time(make, code):
    """Without a prefetch the set of a step knows the step before: the same but for that; and it repeats itself."""
    sets, logits = [], []
    for prefetch in (True, True, False):
        llm = make(prefetch=prefetch, hold=4, calibrate="off")
        logits.append(run(llm, llm.tokenize(code.encode()), 1000, 30))
        assert (llm.session.path.worker.thread is not None) == prefetch
        sets.append({(r, b) for r in range(12) for b in llm.session.path.blocks[r, : llm.session.path.n_listed[r]]})
    np.testing.assert_array_equal(logits[0], logits[1])
    assert len(sets[0] & sets[2]) / len(sets[0]) > 0.8


@pytest.mark.sanitize
def test_a_late_prefetch_is_waited_for(make, code, monkeypatch):
    stage, wait = pool.Pool.stage, DevicePath._wait
    step_done, n_late = threading.Event(), 0

    def late(self, *arguments):
        nonlocal n_late
        if threading.current_thread() is not threading.main_thread():
            assert step_done.wait(60)
            step_done.clear()
            n_late += 1
        return stage(self, *arguments)

    def waits(self):
        if self.worker.busy:
            step_done.set()
        wait(self)

    logits = []
    for delayed in (False, True):
        if delayed:
            monkeypatch.setattr(pool.Pool, "stage", late)
            monkeypatch.setattr(DevicePath, "_wait", waits)
        llm = make(hold=2)
        logits.append(run(llm, llm.tokenize(code.encode()), 1000, 30))
    np.testing.assert_array_equal(*logits)
    assert n_late >= 25


@pytest.mark.parametrize("how", [ArithmeticError("no"), SystemExit(3), MemoryError()], ids=lambda e: type(e).__name__)
def test_a_failing_prefetch_is_an_error_and_the_session_goes_on(make, code, monkeypatch, how):
    llm = make(hold=2)
    tokens = llm.tokenize(code.encode())
    run(llm, tokens, 1000, 3)
    stage = pool.Pool.stage

    def fail(self, *arguments):
        if threading.current_thread() is not threading.main_thread():
            raise how
        return stage(self, *arguments)

    monkeypatch.setattr(pool.Pool, "stage", fail)
    with pytest.raises(GenerationError, match=type(how).__name__):
        for token in tokens[1003:1010]:
            llm.eval([token])
    n = llm.n_tokens
    assert 1003 <= n < 1006 and llm.session.n_tokens == n
    monkeypatch.undo()
    for token in tokens[n : n + 10]:
        llm.eval([token])
        assert llm.session.attached.verify_pool() == 0
    assert llm.n_tokens == n + 10


def test_plan_keeps_the_total_and_follows_the_mass():
    rng = np.random.default_rng(0)
    mass = -np.sort(-rng.random((12, 200)).astype(np.float32) * np.arange(1, 13)[:, None], 1)
    slots = pool.plan_slots(mass, 32, 16, 128)
    assert slots.sum() == 12 * 32 and (slots % 16 == 0).all() and slots.min() >= 16
    assert slots[-1] > slots[0]
    assert (pool.plan_slots(mass[:, :10], 32, 16, 128).sum()) == 12 * 32


def test_a_pool_does_not_grow(make):
    llm = make(budget=256)
    with pytest.raises(ValueError, match="pool of 256 tokens"):
        llm.session.configure(SparseConfig(budget=512, path="device"))


def test_link_simulator():
    slow, fast = link.Link(1e6, 0.0), link.Link(1e12, 0.0)
    moves = [100, 0, 0, 0] * 10
    common = dict(step_s=0.010, after_s=0.0, select_s=0.004)
    assert link.simulate(moves, 1000, fast, **common).tok_s == pytest.approx(100)
    assert link.simulate(moves, 1000, fast, **common, shared=1.0).tok_s == pytest.approx(1 / 0.011, rel=1e-4)
    assert link.simulate(moves, 1000, fast, **common, prefetch=False).tok_s == pytest.approx(1 / 0.011, rel=1e-4)
    late = link.simulate(moves, 1000, slow, **common)  # 100 KB take 100 ms, and a step hides 10 of the 104
    assert late.wait_ms == pytest.approx(94 / 4) and late.tok_s == pytest.approx(1 / (0.010 + 0.094 / 4))
    assert late.bytes_per_step == 25000


def test_the_simulator_takes_a_real_trace(make, code):
    llm = make(hold=2)
    run(llm, llm.tokenize(code.encode()), 1000, 20, verify=False)
    moves = llm.session.times.moves
    assert len(moves) == 20 and moves[0] == 12 * 16 and sum(moves[1:]) > 0
    measured = link.measure_link(llm.session.path)
    assert measured.bytes_per_s > 1e7 and 0 < measured.latency_s < 1
    assert link.simulate(moves, llm.session.path.pool.bytes_per_move, measured, 0.01, 0.0, 0.001).bytes_per_step > 0


def test_sweep_and_its_picture(small, code, tmp_path):
    config = SparseConfig(budget=512, path="device")
    rows = sweep.sweep(small, code, config, [640, 1024], [256, 512], [4, 8], n_threads=2, n_steps=8, n_rounds=1)
    assert [(r["context"], r["budget"], r["hold"]) for r in rows] == [
        (640, 0, 0), (640, 256, 8), (640, 512, 8), (1024, 0, 0), (1024, 256, 8), (1024, 512, 4), (1024, 512, 8),
    ]  # fmt: skip
    assert all(0.5 < r["recovery"] <= 1 and r["compression"] > 0 for r in rows if r["budget"])
    sweep.plot(rows, config, tmp_path / "sweep.png", "a title")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
