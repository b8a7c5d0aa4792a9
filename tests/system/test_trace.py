"""Recordings, samples, and the figures made from them."""

import json

import numpy as np
import pytest

from commands import command
from kvcast import Llama, SparseConfig
from kvcast.errors import KvcastError
from kvcast.eval import record as trace
from kvcast.eval import recovery
from predictor_onnx import data
from predictor_onnx.features import DECAYS
from predictor_onnx.recording import decode, encode, load


def test_codes():
    scores = np.array([1.0, 0.5, 1e-3, 2e-7, 0.0, 20.0], np.float32)
    codes = encode(scores)
    assert codes.min() == 1
    np.testing.assert_allclose(decode(codes)[:3], scores[:3], rtol=0.041)
    assert decode(codes)[4] == 0 and decode(np.zeros(1, np.uint8)) == 0


@pytest.fixture(scope="module")
def recorded(smollm2, code, tmp_path_factory):
    config = SparseConfig(budget=256, predictor="ema", grain=16)
    llm = Llama(smollm2, n_ctx=1536, sparse=config, n_threads=2, n_threads_batch=2, verbose=False)
    tokens = llm.tokenize(code.encode())
    path = tmp_path_factory.mktemp("traces") / "code.npz"
    trace.record(llm, tokens[:1024], 1000, "code").save(path)
    averages = llm.session.history.averages.copy()
    llm.close()
    return path, averages


def test_a_recording_rolls_to_the_history_of_the_loop(recorded):
    path, averages = recorded
    t = load(path)
    assert t.truth.shape == (64 + 24, 90, 64) and t.seen.shape == t.estimate.shape == (24, 90, 64)
    assert t.about["document"] == "code" and t.about["config"]["budget"] == 256
    counts = (t.seen[3] != 0).sum(1)
    assert abs(counts.mean() - 16) < 1.1 and counts.std() > 1
    np.testing.assert_allclose(decode(t.truth[70]).sum(1), 1, atol=0.05)
    samples = data.samples(t, every=8, n_rows_kept=64)
    assert len(samples) == 3 and samples[0].averages.shape == (90, 5, 58) and samples[2].rows.shape == (90, 64, 64)
    # rolled to the end by hand, against what the live loop held
    decays = np.array(DECAYS, np.float32)[None, :, None]
    rolled = np.zeros((90, 5, 64), np.float32)
    for row in decode(t.truth[:64]):
        rolled = decays * rolled + (1 - decays) * row[:, None]
    for codes in t.seen:
        rolled = np.where((codes != 0)[:, None], decays * rolled + (1 - decays) * decode(codes)[:, None], rolled)
    np.testing.assert_allclose(rolled[:, 3], averages[:, 3, :64], rtol=0.06, atol=1e-5)


def test_damaged_recordings_are_refused(tmp_path, recorded):
    for content in (b"", b"PK\x03\x04nothing", recorded[0].read_bytes()[:2000]):
        (tmp_path / "x.npz").write_bytes(content)
        with pytest.raises(KvcastError, match="not a recording"):
            load(tmp_path / "x.npz")


def test_trace_goes_on_where_it_stopped(tmp_path):
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 80)
    (tmp_path / "b.txt").write_text("One line.")
    options = ["trace", "--text", tmp_path / "a.txt", "--text", tmp_path / "b.txt", "--context", "500", "--steps", "16", "--budget", "160"]
    done = command(*options, "--out", tmp_path / "t")
    assert done.returncode == 0 and "b has" in done.stderr and "1 recordings" in done.stderr, done.stderr
    file = next((tmp_path / "t").rglob("*.npz"))
    before = file.stat().st_mtime_ns
    assert command(*options, "--out", tmp_path / "t").returncode == 0
    assert file.stat().st_mtime_ns == before
    wrong = command("predictor", "train", tmp_path, "--out", tmp_path)
    assert wrong.returncode == 1 and len(wrong.stderr.strip().splitlines()) == 1


def test_copies_are_found():
    tokens = [9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 50, 51, 2, 3, 4, 5, 6, 7, 60]
    assert recovery.copied_from(tokens, 12) == {13: 2, 14: 3, 15: 4, 16: 5, 17: 6, 18: 7}


def test_evaluate_writes_what_it_promises(tmp_path, code):
    (tmp_path / "t.txt").write_text(code[:9000])
    options = ["--text", tmp_path / "t.txt", "--context", "1000", "--steps", "16", "--budget", "256", "--hold", "8"]
    options += [
        "--predictors",
        "window,ema,quest,onnx:paper,onnx:stream,oracle",
        "--budgets",
        "spread,uniform",
        "--json",
        tmp_path / "r.json",
    ]
    done = command("predictor", "evaluate", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert len(results) == 12
    by = {(r["predictor"], r["budgets"]): r for r in results}
    for r in results:
        assert {
            "recovery",
            "middle_recovery",
            "ratio_to_oracle",
            "churn",
            "ms_per_step",
            "state_bytes_per_block",
            "calibrate",
            "hold",
        } <= r.keys()
        assert r["recovery_interval"][0] <= r["recovery"] <= r["recovery_interval"][1]
    for budgets in ("spread", "uniform"):
        assert by["window", budgets]["recovery"] < by["ema", budgets]["recovery"] <= by["oracle", budgets]["recovery"] + 1e-6
        assert by["oracle", budgets]["ratio_to_oracle"] == 1
    done = command("predictor", "evaluate", "--predictors", "magic")
    assert done.returncode == 1 and "magic" in done.stderr and len(done.stderr.strip().splitlines()) == 1
