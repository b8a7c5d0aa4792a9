"""``kvcast bench`` as a user runs it, to its end."""

import json

import pytest

from commands import command
from places import DATA

N_CONTEXT, BUDGET, N_STEPS, N_ROUNDS = 1024, 256, 8, 2


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "bench.json"
    done = command(
        "bench", "--model", small, "--context", N_CONTEXT, "--budget", BUDGET, "--steps", N_STEPS, "--rounds", N_ROUNDS, "--threads", 2,
        "--path", "host,device", "--compare", "ema", "--text", DATA / "code.txt", "--text", DATA / "log.txt", "--json", file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(file.read_text())


def test_figures_fit_one_another(run):
    _, report = run
    dense, sparse = report["dense"]["tok_s"], report["sparse"]["tok_s"]
    assert dense == max(report["dense_flash_on"]["tok_s"], report["dense_flash_off"]["tok_s"]) > 0
    assert report["speedup"] == pytest.approx(sparse / dense)
    assert sparse == report["paths"]["host"]["tok_s"] and report["paths"]["device"]["tok_s"] > 0
    assert all(len(report["rounds"][name]) == N_ROUNDS for name in ("dense", "sparse", "frozen"))
    kv = report["kv"]
    assert kv["read_reduction"] == pytest.approx(kv["read_bytes_dense"] / kv["read_bytes_sparse"]) and kv["read_reduction"] > 2
    assert kv["read_bytes_dense"] <= kv["store_bytes"]
    step = report["step_ms"]
    assert 0 < step["attention"] + step["observe"] <= step["total"]


def test_what_was_asked_for_was_measured(run):
    _, report = run
    assert (report["document"], report["context"], report["budget"]) == ("code", N_CONTEXT, BUDGET)
    assert report["documents"].keys() == {"code", "log"}
    for results in report["documents"].values():
        assert [(r["path"], r["predictor"]) for r in results] == [(p, n) for p in ("host", "device") for n in ("auto", "ema")]
        for r in results:
            assert 0.3 < r["middle_recovery"] < r["recovery"] < 1 and r["kl"] > 0 and r["n_steps"] == N_STEPS
    device = report["paths"]["device"]
    assert device["device"] == "CPU" and 2 < device["compression"] < N_CONTEXT / BUDGET and device["fill_bytes"] > 0


def test_the_table_says_the_same(run):
    table, report = run
    assert f"context {N_CONTEXT}" in table and f"{report['sparse']['tok_s']:.1f}" in table
    assert f"{report['speedup']:.2f}x" in table and f"{report['recovery']:.3f}" in table
