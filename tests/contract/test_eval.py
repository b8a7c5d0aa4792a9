"""Evaluation: samples, selectors, fidelity against naive figures, answers that can be resumed."""

import json

import numpy as np
import pytest

from commands import command, one_sentence
from kvcast import Llama, SparseConfig
from kvcast.blocks import BLOCK_TOKENS
from kvcast.errors import KvcastError
from kvcast.eval import ask, fidelity, recovery, report, selectors, tasks


@pytest.fixture(scope="module")
def llm(smollm2):
    llm = Llama(smollm2, n_ctx=1024, sparse=SparseConfig(budget=256, trace=True), n_threads=2, n_threads_batch=2, verbose=False)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def sentences(prose):
    return tasks.sentences(prose)


def n_words(sample):
    return len(f"{sample.document} {sample.question} {sample.prefix}".replace("-", " - ").split())


@pytest.mark.parametrize("task", tasks.TASKS)
def test_samples(task, sentences):
    limit = 2048
    one = tasks.sample(task, 3, 5, limit, sentences, n_words)
    assert one == tasks.sample(task, 3, 5, limit, sentences, n_words)
    assert one != tasks.sample(task, 3, 6, limit, sentences, n_words) and one != tasks.sample(task, 4, 5, limit, sentences, n_words)
    assert limit * 0.95 < n_words(one) + one.n_generate <= limit
    assert all(r in one.document for r in one.references)
    assert not any(r in one.question + one.prefix for r in one.references)
    assert one.score("nothing") == 0
    assert one.score(" and ".join(one.references).upper()) == 1
    assert one.score(one.references[0]) == pytest.approx(1 / len(one.references))
    longer = tasks.sample(task, 3, 5, 2 * limit, sentences, n_words)
    assert n_words(longer) > 1.8 * n_words(one)


def test_parameters_of_the_tasks(sentences):
    made = {task: tasks.sample(task, 0, 0, 4096, sentences, n_words) for task in tasks.TASKS}
    n_references = {task: len(s.references) for task, s in made.items()}
    assert n_references == {
        "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 1, "niah_multikey_2": 1, "niah_multikey_3": 1,
        "niah_multivalue": 4, "niah_multiquery": 4, "vt": 5, "cwe": 10, "fwe": 3, "passkey": 1, "kv": 1,
    }  # fmt: skip
    assert made["niah_multikey_1"].document.count("vault code of") == made["niah_multiquery"].document.count("vault code of") == 4
    assert made["niah_multivalue"].document.count(f"vault code of {made['niah_multivalue'].prefix.split()[4]}") == 4
    assert len(made["niah_single_3"].references[0]) == len(made["niah_multikey_3"].references[0]) == 36
    words = made["cwe"].document.rsplit("\n\n", 1)[1].split()[1::2]
    assert all(words.count(w) == 30 for w in made["cwe"].references) and sorted({words.count(w) for w in set(words)}) == [3, 30]
    words = made["fwe"].document.rsplit("\n\n", 1)[1].split()
    ranked = sorted(set(words), key=words.count, reverse=True)
    assert ranked[0] == "..." and tuple(ranked[1:4]) == made["fwe"].references


def test_a_limit_that_is_too_small_is_named(sentences):
    with pytest.raises(KvcastError, match="cwe does not fit 300 tokens"):
        tasks.sample("cwe", 0, 0, 300, sentences, n_words)


def test_selectors_by_name():
    made = selectors.selector("default+min_recovery=0.9+hold=4+budgets=uniform", 512)
    assert made.config == SparseConfig(512, min_recovery=0.9, hold=4, budget_allocation="uniform") and not made.evicts
    assert selectors.selector("h2o", 512).evicts and selectors.selector("dense", 512).config is None
    for name, what in (("nothing", "no selector 'nothing'"), ("default+hold", "SETTING=VALUE"), ("default+hold=x", "not a number")):
        with pytest.raises(ValueError, match=what):
            selectors.selector(name, 512)
    assert selectors.budget_tokens("1/13", 8192) == 624 and selectors.budget_tokens("512", 8192) == 512
    with pytest.raises(ValueError, match="neither"):
        selectors.budget_tokens("many", 8192)


def attended(llm, tokens, n_context, name, n_steps=40):
    """Sets of every step, bool (n_steps, n_rows, n_blocks)."""
    llm.session.history.keep_steps(64)
    llm.reset()
    llm.eval(tokens[:n_context])
    llm.session.configure(selectors.selector(name, 256).config)
    llm.session.observers.on_attended = recorder = recovery.Recorder(llm)
    for token in tokens[n_context : n_context + n_steps]:
        llm.eval([token])
    llm.session.observers.on_attended = None
    return np.stack(recorder.masks)


def test_published_methods_choose_as_they_should(llm, code):
    tokens = llm.tokenize(code.encode())
    n_context = 600
    sets = {name: attended(llm, tokens, n_context, name) for name in ("streaming", "h2o", "snapkv")}
    for name, masks in sets.items():
        assert (masks.sum(2) == 16).all(), name
        assert masks[:, :, 0].all(), name  # the sink
    last = (n_context + np.arange(40)) // 16
    assert all(masks[:, last[i] - 14 : last[i] + 1].all() for i, masks in enumerate(sets["streaming"]))
    for name in ("streaming", "h2o"):  # what is gone stays gone
        for i in range(1, 40):
            assert not (sets[name][i] & ~sets[name][i - 1])[:, : last[i - 1] + 1].any(), name
    prompt = sets["snapkv"][:, :, : n_context // 16 - 4]
    assert (prompt[-1] <= prompt[0]).all() and prompt[-1].sum() > 0.6 * prompt[0].sum()  # fixed, but for what generated ones take
    assert not (sets["h2o"][0] == sets["snapkv"][0]).all() or sets["h2o"][0].any()


def dense_log_probabilities(llm, tokens, n_context, n_batch):
    """Of the next token after each of tokens[n_context:], with the context evaluated n_batch tokens at a time."""
    llm.reset()
    for at in range(0, n_context, n_batch):
        llm.eval(tokens[at : min(at + n_batch, n_context)])
    rows = []
    for token in tokens[n_context:]:
        llm.dense_eval(token)
        x = recovery.next_logits(llm).astype(np.float64)
        rows.append(x - x.max() - np.log(np.exp(x - x.max()).sum()))
    return np.array(rows)


def test_fidelity(llm, code):
    tokens = llm.tokenize(code.encode())
    chosen = [selectors.selector(name, 256) for name in ("default", "window", "oracle")]
    chosen += [
        selectors.Selector("blocks", SparseConfig(budget=256, grain=16)),
        selectors.Selector("everything", SparseConfig(budget=1024)),
    ]
    rows = fidelity.fidelity(llm, {"code": tokens[:729]}, 600, 128, chosen)
    by = {r["selector"]: r for r in rows if r["document"] == "code"}
    assert {r["selector"] for r in rows if r["document"] == "mean"} == set(by)
    whole, window, default = by["everything"], by["window"], by["default"]
    # dense runs that differ by rounding alone: the context in one batch and in several
    dense, again = (dense_log_probabilities(llm, tokens[:728], 600, n_batch) for n_batch in (600, 64))
    rounding = (np.exp(dense) * (dense - again)).sum(1).mean()
    assert 0 < whole["kl_mean"] < 1.5 * rounding < 0.5 * default["kl_mean"] and whole["top1_agreement"] > 0.95
    assert whole["output_error"] < 1e-6 and whole["recovery"] == 1
    assert whole["ppl_sparse"] == pytest.approx(whole["ppl_dense"], rel=0.01)
    assert window["kl_mean"] > 3 * default["kl_mean"] > 0 and window["output_error"] > 1.5 * default["output_error"] > 0
    assert window["kl_p99"] >= window["kl_mean"] > window["kl_median"] > 0
    # the oracle is of whole blocks, and so a bound for those that choose blocks; tokens go past them
    assert 0 < by["blocks"]["ratio_to_oracle"] < 1 == by["oracle"]["ratio_to_oracle"]
    assert by["blocks"]["middle_recovery"] < default["middle_recovery"] and default["kl_mean"] < by["blocks"]["kl_mean"]
    nll = -dense[np.arange(128), tokens[601:729]]
    assert default["ppl_dense"] == pytest.approx(np.exp(nll.mean()), rel=1e-3)


def test_output_error_against_naive(llm, code):
    from kvcast.eval.output_error import Outputs

    tokens = llm.tokenize(code.encode())
    llm.reset()
    llm.eval(tokens[:300])
    outputs = Outputs(llm, 300)
    recovery.true_scores(llm, tokens[300:303], outputs.note)
    outputs.end_of_dense_pass()
    rng = np.random.default_rng(0)
    masks = [rng.random((90, 64)) < 0.5 for _ in range(3)]
    for m in masks:
        m[:, 0] = True
    cells = [np.repeat(m, BLOCK_TOKENS, axis=1) & (rng.random((90, 1024)) < 0.7) for m in masks]
    for of_step in cells:
        of_step[:, 0] = True
    got, steps = outputs.errors([[np.packbits(of_step, axis=1) for of_step in cells]], [(16, 64)])[0]
    errors, held = [], np.zeros((3, 3))
    for layer in range(30):
        k, v = (x[:303].view(np.float16).reshape(303, 3, 64).astype(np.float64) for x in llm.session.attached.rows(layer))
        for step in range(3):
            for head in range(9):
                q = outputs._queries[step][layer, head] / 8
                p = np.exp(k[: 301 + step, head // 3] @ q)
                kept = cells[step][layer * 3 + head // 3, : 301 + step]
                middle = slice(16, 304 - 64)
                share = p / p.sum()
                held[step] += np.array([share[kept].sum(), share[middle][kept[middle]].sum(), share[middle].sum()]) / 9 / 30
                whole = p @ v[: 301 + step, head // 3] / p.sum()
                part = (p * kept) @ v[: 301 + step, head // 3] / (p * kept).sum()
                errors.append(np.linalg.norm(part - whole) / np.linalg.norm(whole))
    assert got == pytest.approx(np.mean(errors), rel=1e-4)
    np.testing.assert_allclose(steps[:, 0], held[:, 0], rtol=1e-4)
    np.testing.assert_allclose(steps[:, 1] / steps[:, 2], held[:, 1] / held[:, 2], rtol=1e-4)


@pytest.fixture(scope="module")
def easy(llm):
    """A sample that fits and that even a small model answers."""
    document = "\n".join([*[tasks.FILLER] * 5, "The vault code of bright-lamp is 7315204.", *[tasks.FILLER] * 15])
    question, prefix = "What is the vault code of bright-lamp?", "The vault code of bright-lamp is"
    return tasks.Sample("niah_single_1", document, question, prefix, ("7315204",), 24)


@pytest.mark.parametrize("turns", [1, 2])
def test_answers_equal_those_of_separate_runs(llm, easy, turns):
    prompts = ask.Prompts(llm, turns)
    chosen = [selectors.selector(name, 256) for name in ("dense", "default", "streaming", "dense")]
    dense, default, streaming, again = ask.answers(llm, prompts, easy, chosen)
    assert dense["score"] == 1 and dense["answer"] == again["answer"] and dense["n_dense_steps"] is None
    assert default["score"] == 1 and streaming["score"] == 0  # the needle is out of its sight
    assert dense["n_context"] == prompts.n_tokens(easy)
    first, last = prompts(easy)
    assert bool(last) == (turns == 2)
    llm.reset()
    llm.eval(first)
    if last:
        llm.eval(last)
    made = []
    while len(made) < dense["n_tokens"]:
        made.append(int(recovery.next_logits(llm).argmax()))
        llm.dense_eval(made[-1])
    assert llm.detokenize(made).decode() == dense["answer"]


def test_answers_are_resumed(llm, sentences, tmp_path):
    journal = tmp_path / "x.jsonl"
    about = dict(model_sha256="m", context=900, budget=256, turns=1, seed=0, haystack="prose")
    chosen = [selectors.selector(name, 256) for name in ("dense", "default", "window")]
    said = []

    def go(indices, journal=journal, about=about):
        return ask.run(llm, 1, ["passkey"], indices, chosen, 1, 0, 900, sentences, about, journal, lambda *a: said.append(a))

    first = go(range(1))
    assert [(d["index"], d["selector"]) for d in first] == [(0, "dense"), (0, "default"), (0, "window")] and said[-1] == (1, 1)
    with open(journal, "a") as file:
        file.write('{"task": "passkey", "ind')  # killed while it wrote
    lines = journal.read_text().count("\n")
    both = go(range(2))
    assert [(d["index"], d["selector"]) for d in both[3:]] == [(1, "dense"), (1, "default")]  # the third only answers one
    assert both[:3] == json.loads(json.dumps(first)) and journal.read_text().count("\n") == lines + 3
    assert go(range(2)) == both
    chosen[2] = selectors.Selector("window", SparseConfig(budget=256, predictor="window", sink=32))  # the same name, other settings
    n_before = journal.read_text().count("\n")
    again = go(range(2))
    assert len(again) == 5 and [d["config"]["sink"] for d in again if d["selector"] == "window"] == [32]
    assert journal.read_text().count("\n") == n_before + 1
    with pytest.raises(KvcastError, match="other settings"):
        go(range(1), about={**about, "budget": 512})


def test_scores_and_their_report(tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        {"task": task, "index": i, "selector": name, "score": float(rng.random() < p)}
        for task in ("a", "b") for i in range(20) for name, p in (("dense", 0.9), ("default", 0.7))
    ]  # fmt: skip
    results = report.scores(samples)
    by = {(r["task"], r["selector"]): r for r in results}
    for task in ("a", "b"):
        values = [100 * s["score"] for s in samples if s["task"] == task and s["selector"] == "default"]
        assert by[task, "default"]["score"] == pytest.approx(np.mean(values)) and by[task, "default"]["n"] == 20
        assert by[task, "default"]["interval"][0] <= by[task, "default"]["score"] <= by[task, "default"]["interval"][1]
    mean = by["mean", "default"]
    assert mean["score"] == pytest.approx((by["a", "default"]["score"] + by["b", "default"]["score"]) / 2)
    assert mean["difference"] == pytest.approx(mean["score"] - by["mean", "dense"]["score"])
    assert by["mean", "dense"]["difference_interval"] == (0, 0)
    text = report.markdown(report.score_table(results), "title", ["a note"])
    assert text.count("|") == 4 * 5 and f"{mean['score']:.1f} ({mean['difference']:+.1f}" in text
    report.bars(results, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_commands(tmp_path):
    out = tmp_path / "out.json"
    done = command("eval", "fidelity", "--context", "700", "--budget", "256", "--budget", "320", "--steps", "16", "--limit", "1",
                   "--selectors", "default,oracle", "--json", out)  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())
    keys = "selector ppl_dense ppl_sparse kl_mean kl_p99 top1_agreement recovery middle_recovery ratio_to_oracle output_error".split()
    assert all(set(keys) <= set(r) for r in made["results"]) and len(made["model_sha256"]) == 64
    assert out.with_suffix(".md").exists() and out.with_suffix(".png").exists()
    done = command("eval", "multiturn", "--context", "600", "--budget", "256", "--tasks", "passkey", "--samples", "1", "--json", out)
    assert done.returncode == 0 and "passkey" in done.stdout, done.stderr
    assert [r["selector"] for r in json.loads(out.read_text())["samples"]] == ["dense", "default"]
    one_sentence(command("eval", "ruler", "--tasks", "nothing"), "no task 'nothing'")
    one_sentence(command("eval", "fidelity", "--selectors", "dense"), "leaves nothing to measure")
    one_sentence(command("eval", "ruler", "--context", "600", "--budget", "x"), "neither tokens nor a share")
