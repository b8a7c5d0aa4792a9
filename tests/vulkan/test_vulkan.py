"""Contracts 2 to 4 of the device path on a device that is not the CPU: a GPU, or Vulkan in software.

`make test-vulkan` builds what this needs; with libraries that have no such backend it is skipped.
"""

import os

import numpy as np
import pytest

os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")  # ggml leaves out devices that are CPUs unless they are named

from kvcast import Llama, SparseConfig, models
from kvcast.bindings.context import NativeContext
from kvcast.bindings.library import LIBRARY_DIR

if not any(any(LIBRARY_DIR.glob(f"*ggml-{name}*")) for name in ("vulkan", "cuda")):
    pytest.skip("these libraries have no backend but the CPU's", allow_module_level=True)

N_LAYER, N_EMBD, N_HEAD, N_HEAD_KV, D = 2, 256, 4, 2, 64
N_PROMPT, N_STEPS = 600, 40


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two layers of random weights, and the vocabulary of SmolLM2."""
    import gguf

    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    reader, writer = gguf.GGUFReader(models.resolve("smollm2")), gguf.GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith("tokenizer.") and field.types[0] == gguf.GGUFValueType.ARRAY:
            writer.add_array(field.name, field.contents())
        elif field.name.startswith("tokenizer."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    n_vocab = len(reader.get_field("tokenizer.ggml.tokens").contents())
    writer.add_block_count(N_LAYER)
    writer.add_context_length(4096)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(512)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(D)
    writer.add_vocab_size(n_vocab)
    rng = np.random.default_rng(0)

    def random(name, rows, columns):
        writer.add_tensor(name, (rng.standard_normal((rows, columns)) * columns**-0.5).astype(np.float16))

    random("token_embd.weight", n_vocab, N_EMBD)
    writer.add_tensor("output_norm.weight", np.ones(N_EMBD, np.float32))
    for i in range(N_LAYER):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(N_EMBD, np.float32))
        random(f"blk.{i}.attn_q.weight", N_EMBD, N_EMBD)
        random(f"blk.{i}.attn_k.weight", N_HEAD_KV * D, N_EMBD)
        random(f"blk.{i}.attn_v.weight", N_HEAD_KV * D, N_EMBD)
        random(f"blk.{i}.attn_output.weight", N_EMBD, N_EMBD)
        random(f"blk.{i}.ffn_gate.weight", 512, N_EMBD)
        random(f"blk.{i}.ffn_up.weight", 512, N_EMBD)
        random(f"blk.{i}.ffn_down.weight", N_EMBD, 512)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(path, **more):
    return Llama(path, n_ctx=1024, n_gpu_layers=-1, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False, **more)


def logits(llm):
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),)).copy()


def steps(llm, tokens):
    for end in (N_PROMPT,) if llm.sparse else (512, N_PROMPT - 64, N_PROMPT):  # the same batches
        llm.eval(tokens[llm.n_tokens : end])
    found = []
    for token in tokens[N_PROMPT:]:
        llm.eval([token])
        found.append(logits(llm))
    return np.stack(found)


@pytest.fixture(scope="module")
def tokens(code):
    llm = Llama(models.resolve("smollm2"), vocab_only=True, verbose=False)
    return llm.tokenize(code.encode())[: N_PROMPT + N_STEPS]


@pytest.mark.parametrize("kind", [1, 8], ids=["f16", "q8_0"])
def test_contracts(tiny, tokens, kind):
    dense = load(tiny, flash_attn=True, offload_kqv=False, type_k=kind, type_v=kind)
    expected = steps(dense, tokens)
    look = NativeContext(dense.ctx, 1)

    everything = load(tiny, sparse=SparseConfig(budget=1024, path="device"), type_k=kind, type_v=kind)
    got = steps(everything, tokens)
    info = everything.session.attached.pool_info
    assert info.device != b"CPU" and info.n_on_device == N_LAYER
    difference = np.abs(got - expected).max()
    print(f"\n{info.device.decode()}: logits differ from dense by {difference:.4f} at most")
    assert difference < 0.05 * np.abs(expected).max()
    everything.close()

    sparse = load(tiny, sparse=SparseConfig(budget=256, path="device", hold=2), type_k=kind, type_v=kind)
    sparse.eval(tokens[:N_PROMPT])
    for token in tokens[N_PROMPT:]:
        sparse.eval([token])
        assert sparse.session.attached.verify_pool() == 0
    assert sparse.session.attached.pool_info.n_on_device == N_LAYER
    for layer in range(N_LAYER):
        for ours, theirs in zip(sparse.session.attached.rows(layer), look.rows(layer)):
            n = len(tokens) if layer == 0 else N_PROMPT
            np.testing.assert_array_equal(ours[:n], theirs[:n], err_msg=f"layer {layer}")
    look.close()
    dense.close()
    sparse.close()


def test_edits_and_state(tiny, tokens):
    llm = load(tiny, sparse=SparseConfig(budget=256, path="device", hold=2))
    first = steps(llm, tokens)
    state = llm.save_state()
    llm.n_tokens = N_PROMPT - 100
    for token in tokens[N_PROMPT - 100 : N_PROMPT - 80]:
        llm.eval([token])
        assert llm.session.attached.verify_pool() == 0
    llm.load_state(state)
    llm.eval([tokens[5]])
    assert llm.session.attached.verify_pool() == 0 and np.isfinite(first).all()
    llm.close()


def test_the_device_scores_the_history(tiny, tokens):
    found = []
    for trace in (False, True):  # queries that are kept are scored on the CPU
        llm = load(tiny, sparse=SparseConfig(budget=256, path="device", trace=trace))
        llm.eval(tokens[:N_PROMPT])
        found.append(llm.session.attached.history_scores.copy())
        llm.close()
    np.testing.assert_allclose(found[0].sum(-1), 1, atol=2e-3)
    np.testing.assert_allclose(*found, atol=2e-3)
