"""Blocks chosen within the step: the summary's estimates, the choice and the scores against NumPy."""

import numpy as np
import pytest

import naive
from kvcast import Llama, SparseConfig
from kvcast.bindings import api as native
from kvcast.bindings.context import NativeContext
from kvcast.errors import GenerationError
from stored import F16, Q8_0, compare, rows_as_float

N = 1000  # tokens before the step


def attach(path, code, kind, n_threads=2):
    llm = Llama(path, n_ctx=2048, verbose=False, flash_attn=True, offload_kqv=False, n_threads=n_threads, type_k=kind, type_v=kind)
    tokens = llm.tokenize(code.encode())
    attached = NativeContext(llm.ctx, 64, native.TRACE_HEAD | native.TRACE_SCORES, summary=True)
    llm.eval(tokens[: N - 60])
    attached.set_mode(native.HISTORY)
    llm.eval(tokens[N - 60 : N])
    power = (attached.trace_q[:, :60].reshape(attached.info.n_layer, 60, attached.info.n_head_kv, -1, attached.info.head_dim_k) ** 2).sum(
        (1, 3)
    )
    attached.prepare_summary()
    attached.set_mode(native.SPARSE)
    return llm, attached, tokens, power


@pytest.mark.sanitize
@pytest.mark.parametrize(("name", "kind"), [("smollm2", F16), ("smollm2", Q8_0), ("qwen", F16), ("qwen", Q8_0), ("gemma3", F16)])
def test_choice_against_numpy(name, kind, request, code, kernels):
    llm, attached, tokens, power = attach(request.getfixturevalue(name), code, kind)
    info = attached.info
    rng = np.random.default_rng(3)
    group, d = info.n_head // info.n_head_kv, info.head_dim_k
    for position in (N, N + 1):
        n_used = position // 16 + 1
        listed = np.array([0, 1, 7, n_used - 2, n_used - 1])  # 7 lies in the range and may not be chosen twice
        begin, end = 2, n_used - 2
        attached.blocks[..., : len(listed)] = listed
        attached.n_listed[:] = len(listed)
        attached.n_topk[:] = rng.integers(0, 20, attached.n_topk.shape)
        attached.n_topk[1] = 0
        attached.weights[:] = rng.random(attached.weights.shape) + 0.1
        attached.set_topk_range(begin, end)
        attached.reselect()
        llm.eval([tokens[position]])
        lists = {}
        for layer in range(info.n_layer):
            k = rows_as_float(attached.rows(layer)[0], kind, info.n_head_kv)
            for head in range(info.n_head_kv):
                n = attached.n_topk[layer, head]
                got = attached.blocks[layer, head, : len(listed) + n]
                lists[layer, head] = got
                assert got[: len(listed)].tolist() == listed.tolist() and len(set(got.tolist())) == len(got)
                assert (np.diff(got[len(listed) :]) > 0).all()
                if n == 0:
                    continue
                q = attached.trace_q[layer, 0, head * group : (head + 1) * group] * info.kq_scale
                keys = k[: n_used * 16, head].reshape(-1, 16, d)
                logits = naive.summary(keys[: n_used - 1], power[layer, head], max(8, d // 4), max(4, d // 8), q)
                ends = np.concatenate([keys[0] @ q.T, keys[-1, : position % 16 + 1] @ q.T])
                reference = np.log(np.exp(ends - ends.max(0)).sum(0)) + ends.max(0)
                expected = naive.exp2_linear((logits - reference[:, None, None] - np.log(group)) / np.log(2)).sum((0, 2))
                estimates = attached.estimates[layer, head, begin:end]
                # a code that falls on the other side of a half changes an estimate by a little
                close = np.isclose(estimates, expected[begin:end], rtol=0.02, atol=1e-6)
                assert close.mean() > 0.97, (layer, head, np.abs(estimates / expected[begin:end] - 1).max())
                value = estimates * attached.weights[layer, head, begin:end]
                value[7 - begin] = -1
                best = begin + np.argsort(-value)[:n]
                assert set(got[len(listed) :].tolist()) == set(best.tolist())
                chosen = estimates[np.isin(np.arange(begin, end), got[len(listed) :])].sum()
                left = estimates[~np.isin(np.arange(begin, end), got)].sum()
                measured = attached.scores[layer, head, len(listed) : len(got)].sum()
                np.testing.assert_allclose(attached.shares[layer, head], 1 / (1 + measured * left / chosen), rtol=2e-3)
        compare(attached, 0, n_used, lambda layer, c=lists: [c[layer, h] for h in range(info.n_head_kv)], position)
    attached.close()
    llm.close()


@pytest.mark.sanitize
@pytest.mark.parametrize("grain", [1, 4])
@pytest.mark.parametrize(("name", "kind"), [("smollm2", F16), ("smollm2", Q8_0), ("qwen", F16), ("gemma3", F16)])
def test_tokens_against_numpy(name, kind, grain, request, code, kernels):
    llm, attached, tokens, power = attach(request.getfixturevalue(name), code, kind)
    info = attached.info
    rng = np.random.default_rng(3)
    group, d = info.n_head // info.n_head_kv, info.head_dim_k
    attached.set_grain(grain)
    n_used = N // 16 + 1
    listed = np.array([0, 1, 7, n_used - 2, n_used - 1])  # 7 lies in the range
    begin, end = 2, n_used - 2
    attached.blocks[..., : len(listed)] = listed
    attached.n_listed[:] = len(listed)
    attached.n_topk[:] = rng.integers(0, 20, attached.n_topk.shape)
    attached.n_topk[1] = 0
    attached.set_topk_range(begin, end)
    attached.reselect()
    llm.eval([tokens[N]])
    overlap = []
    for layer in range(info.n_layer):
        k = rows_as_float(attached.rows(layer)[0], kind, info.n_head_kv)
        for head in range(info.n_head_kv):
            n, chosen = attached.n_topk[layer, head], attached.chosen_cells(layer, head)
            assert len(chosen) == 16 * n and (np.diff(chosen) > 0).all()
            pieces = chosen.reshape(-1, grain)
            assert (pieces[:, 0] % grain == 0).all() and (pieces == pieces[:, :1] + np.arange(grain)).all()
            assert np.isin(chosen // 16, np.setdiff1d(np.arange(begin, end), listed)).all()
            got = attached.blocks[layer, head, : len(listed) + attached.n_chosen[layer, head]]
            assert got.tolist() == [*listed, *np.unique(chosen // 16)]

            q = attached.trace_q[layer, 0, head * group : (head + 1) * group]
            cells = np.concatenate([np.arange(16 * b, min(16 * b + 16, N + 1)) for b in listed] + [chosen])
            p, lse = naive.cell_scores(q, k[:, head], cells, info.kq_scale)
            np.testing.assert_allclose(attached.lse[layer, 0, head * group : (head + 1) * group], lse, atol=2e-3)
            expected = np.bincount(cells // 16, p.mean(0), n_used)[got]
            np.testing.assert_allclose(attached.scores[layer, head, : len(got)], expected, rtol=2e-3, atol=1e-6)
            if n:
                keys = k[: n_used * 16, head].reshape(-1, 16, d)
                logits = naive.summary(keys[: n_used - 1], power[layer, head], max(8, d // 4), max(4, d // 8), q * info.kq_scale)
                ends = np.concatenate([keys[0] @ q.T, keys[-1, : N % 16 + 1] @ q.T]) * info.kq_scale
                reference = np.log(np.exp(ends - ends.max(0)).sum(0)) + ends.max(0)
                value = naive.exp2_linear((logits - reference[:, None, None] - np.log(group)) / np.log(2)).sum(0)
                value[[0, 1, 7, *range(end, n_used - 1)]] = -1
                best = np.argsort(-value.reshape(-1, grain).sum(1))[: len(pieces)]
                overlap.append(np.isin(pieces[:, 0] // grain, best).mean())
    assert np.mean(overlap) > 0.98, np.mean(overlap)  # a code that falls on the other side of a half changes an estimate by a little
    attached.close()
    llm.close()


@pytest.mark.sanitize
@pytest.mark.parametrize("grain", [1, 4])
@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_all_tokens_are_all_blocks(small, code, kind, grain, kernels):
    llm, attached, tokens, _ = attach(small, code, kind)
    found = []
    for of_step in (16, grain):
        llm.n_tokens = N - 3
        llm._ctx.kv_cache_seq_rm(-1, N - 3, -1)
        attached.invalidate(N - 3)
        attached.set_grain(of_step)
        attached.blocks[..., :3] = [0, 61, 62]
        attached.n_listed[:], attached.n_topk[:] = 3, 60
        attached.set_topk_range(1, 61)
        attached.reselect()
        for i in range(-3, 3):
            llm.eval([tokens[N + i]])
        found.append(np.array(llm._ctx.get_logits_ith(-1)[: llm.n_vocab()]))
    # what differs by a rounding can differ by a step of a quantised key
    np.testing.assert_allclose(found[0], found[1], atol=1e-3 if kind == F16 else 0.6)
    assert np.abs(found[0] - found[1]).mean() < (1e-4 if kind == F16 else 0.1)
    attached.close()
    llm.close()


@pytest.mark.sanitize
@pytest.mark.parametrize("n_threads", [1, 5])
def test_steady_rows_pause_and_keep_their_choice(small, code, n_threads):
    llm, attached, tokens, _ = attach(small, code, F16, n_threads)
    attached.blocks[..., :2] = [0, 62]
    attached.n_listed[:], attached.n_topk[:] = 2, 5
    attached.set_topk_range(1, 60)
    attached.weights[:] = 1
    attached.weights[::2, :, 10:15] = 1e30  # these rows always choose the same
    chosen = []
    for i in range(6):
        before = attached.estimates.copy()
        llm.eval([tokens[N + i]])
        chosen.append(attached.blocks[..., 2:7].copy())
        estimated = (attached.estimates[..., 1:60] != before[..., 1:60]).any(-1)
        # the first choice is all new, the second steady: then a pause of one step, then of three
        assert (estimated[::2] == (i in (0, 1, 3))).all(), i
        assert estimated[1::2].any(), i  # among the other rows some never are steady
        assert (chosen[-1][::2] == np.arange(10, 15)).all()
    assert (chosen[0][1::2] != chosen[-1][1::2]).any()
    attached.reselect()
    before = attached.estimates.copy()
    llm.eval([tokens[N + 6]])
    assert (attached.estimates[..., 1:60] != before[..., 1:60]).any(-1).all()
    attached.close()
    llm.close()


@pytest.mark.sanitize
def test_an_impossible_choice_stops_the_step(small, code):
    llm = Llama(small, n_ctx=1024, sparse=SparseConfig(budget=256), n_threads=2, verbose=False)
    tokens = llm.tokenize(code.encode())
    llm.eval(tokens[:600])
    place = llm.session.path._place

    def spoil(*arguments):
        place(*arguments)
        llm.session.attached.n_topk[2, 1] = 40

    llm.session.path._place = spoil
    with pytest.raises(GenerationError, match="layer 2, KV head 1 cannot choose 40 blocks"):
        llm.eval([tokens[600]])
    llm.session.path._place = place
    assert llm.n_tokens == 600
    llm.eval([tokens[600]])
    llm.close()


def test_edits_drop_the_summary_of_what_was_edited(small, code, prose):
    """The same text reached by another way is summarised alike: the same steps follow."""
    found = []
    for detour in (False, True):
        llm = Llama(small, n_ctx=2048, sparse=SparseConfig(budget=256, predictor="ema"), n_threads=2, verbose=False)
        tokens, other = llm.tokenize(code.encode()), llm.tokenize(prose.encode())
        if detour:
            llm.eval(tokens[:1000])
            for token in other[:40]:
                llm.eval([token])
            llm.n_tokens = 936
        llm.eval(tokens[llm.n_tokens : 1000])
        for token in tokens[1000:1010]:
            llm.eval([token])
        sets = [set(r[:n].tolist()) for r, n in zip(llm.session.path.blocks, llm.session.result.n_attended)]
        found.append(sets)
        llm.close()
    same = np.mean([len(a & b) / len(a) for a, b in zip(*found)])
    assert same > 0.9, same
