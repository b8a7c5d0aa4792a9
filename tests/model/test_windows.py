"""Models with sliding-window layers: only the others are served, under the model's numbers, and going back far stays right."""

import numpy as np
import pytest

from kvcast import Llama, SparseConfig
from kvcast.chat.documents import DocumentCache
from kvcast.gguf.header import read_header
from logits import logits_of
from tiny import N_VOCAB, SHAPES, write_tiny

SERVED = [2, 5]  # of six layers every third


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny.gguf", SHAPES["gemma3"])


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, N_VOCAB, 1500).tolist()


@pytest.fixture
def load(file):
    made = []

    def make(path="host", **config):
        sparse = SparseConfig(path=path, predictor="ema", **config)
        made.append(Llama(file, n_ctx=1536, n_batch=64, n_ubatch=64, sparse=sparse, n_threads=2, n_threads_batch=2, verbose=False))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.mark.parametrize("path", ["host", "device"])
def test_users_see_the_numbers_of_the_model(load, tokens, path):
    llm = load(path, budget=256, trace=True)
    attention, kv = [], []
    llm.on_attention(lambda layer, step, scores: attention.append((layer, step, scores.shape)))
    llm.on_kv(lambda layer, block, k, v: kv.append((layer, block, k.shape)))
    llm.eval(tokens[:400])
    llm.eval([tokens[400]])
    assert attention[-2:] == [(layer, 400, (2, 26)) for layer in SERVED]
    assert kv == [(layer, block, (16, 2, 128)) for block in range(25) for layer in SERVED]
    rows = llm.attention_row(5)
    assert rows.shape == (4, 401)
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-5)
    for layer in (0, 6):
        with pytest.raises(IndexError, match=f"layer {layer} is not served; choose one of 2, 5"):
            llm.attention_row(layer)


def test_dense_layers_are_the_models_first(load, tokens):
    for n_dense, everything in ((2, [False, False]), (3, [True, False]), (6, [True, True])):
        llm = load(budget=256, dense_layers=n_dense)
        llm.eval(tokens[:600])
        llm.eval([tokens[600]])
        n_attended = llm.session.result.n_attended.reshape(2, 2)
        assert [(n == 38).all() for n in n_attended] == everything, n_dense


def test_an_error_names_the_layer_of_the_model(load, tokens):
    llm = load(budget=256)
    llm.eval(tokens[:400])
    attached = llm.session.attached
    attached.blocks[1, 0, :3] = 0, 2, 1
    attached.n_listed[:], attached.n_listed[1, 0] = 26, 3
    attached.blocks[0], attached.blocks[1, 1] = (np.arange(attached.info.n_blocks) for _ in range(2))
    llm.session.path._age, llm.session.path._n_known = 1, 26
    with pytest.raises(Exception, match="block list of layer 5, KV head 0"):
        llm.eval([tokens[400]])


@pytest.mark.parametrize("path", ["host", "device"])
def test_going_back(load, file, tokens, path):
    """The window of 64 and a batch of 64 leave 256 cells: what needs more than those is run again from the beginning."""
    llm = load(path, budget=1536)
    dense = Llama(file, n_ctx=1536, flash_attn=True, offload_kqv=False, n_threads=2, n_threads_batch=2, verbose=False)  # swa_full
    at, ran = 0, []
    llm.session.observers.on_progress = lambda done, total: ran.append(total)
    for n_kept, n_new, again in ((0, 900, 900), (880, 1, 1), (830, 5, 5), (300, 1, 301), (290, 3, 3), (20, 200, 220), (0, 70, 70)):
        ran.clear()
        for model in (llm, dense):
            model.n_tokens = n_kept
            model.eval(tokens[at : at + n_new])
        at += n_new
        assert llm.n_tokens == dense.n_tokens == n_kept + n_new
        # a cut within what was read goes back to a whole batch of it, and to the last 64 tokens, which are a batch of their own
        assert again <= (ran[-1] if ran else 1) <= again + llm.n_batch + 63, (n_kept, n_new)
        for _ in range(2):
            for model in (llm, dense):
                model.eval([tokens[at]])
            at += 1
            expected = logits_of(dense)
            assert np.abs(logits_of(llm) - expected).max() < 0.01 * np.abs(expected).max(), (n_kept, n_new)
    dense.close()


@pytest.mark.parametrize("path", ["host", "device"])
def test_state_and_documents(load, tokens, path, tmp_path):
    llm, cache = load(path, budget=1536), DocumentCache(tmp_path)
    llm.eval(tokens[:900])
    assert cache.save(llm, tokens[:900], "x")
    llm.eval([tokens[900]])
    expected = logits_of(llm)
    ran = []
    llm.session.observers.on_progress = lambda done, total: ran.append(total)
    assert cache.load(llm, tokens[:900])
    llm.eval([tokens[900]])
    assert not ran  # nothing is run once more
    assert np.abs(logits_of(llm) - expected).max() < 0.01 * np.abs(expected).max()
    whole = Llama(llm.model_path, n_ctx=1536, flash_attn=True, offload_kqv=False, n_threads=2, verbose=False)
    assert not cache.load(whole, tokens[:900])  # a window's cache is not a whole one
    whole.close()


def test_sizes_are_what_loading_allocates(load, file):
    import llama_cpp

    header = read_header(file)
    assert (header.n_layer, header.n_layer_swa, header.n_layer_served, header.n_swa) == (6, 4, 2, 64)
    llm = load(budget=256)
    llm.eval(list(range(100)))
    one_row = 2 * 2 * 2 * 128
    assert header.store_bytes(1536, n_ubatch=64) == one_row * (2 * 1536 + 4 * 256)
    assert header.store_bytes(1536) == one_row * 6 * 1536
    assert llama_cpp.llama_state_get_size(llm.ctx) < header.store_bytes(1536, n_ubatch=64)
