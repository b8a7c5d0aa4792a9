"""What is passed to kvcast: values that can be are taken, others are refused in one sentence, before llama.cpp sees them."""

import math
from contextlib import closing

import gguf
import numpy as np
import pytest

from kvcast import ArgumentError, KvcastError, Llama, ModelError, SparseConfig
from shapes import write_shape

NO = object()  # nothing that there is a use for
N_CTX = 300  # tokens, which llama.cpp rounds up to 512


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_shape(tmp_path_factory.mktemp("arguments") / "m.gguf", vocabulary="llama", n_layer=1)


@pytest.fixture(scope="module")
def llm(file):
    with closing(Llama(file, n_ctx=N_CTX, verbose=False)) as llm:
        yield llm


def refused(error, name):
    text = str(error)
    assert name in text and text.count(". ") == 0 and not text.endswith("."), text
    assert len(text) < 400


SETTINGS = [
    *(("budget", value) for value in (512.0, True, "512", None, 10**20, -(10**20), -5, 0, 95, math.nan)),
    *(("compression", value) for value in (math.nan, math.inf, 0.5, -1, "8", True, NO)),
    *((name, value) for name in ("sink", "window") for value in (0, 8, 17, -16, 16.0, None, True, 1 << 31)),
    *(("hold", value) for value in (0, -1, 1.5, "4", True, 10**20)),
    *(("grain", value) for value in (0, 2, 17, -1, 1.0, "4", None, True)),
    *(("dense_layers", value) for value in (-1, 1.0, None, 10**20)),
    *(("min_recovery", value) for value in (math.nan, 1, 1.0, -0.1, "0.5", None, True)),
    *(
        (name, value)
        for name in ("predictor", "predictor_device", "calibrate", "budget_allocation", "path")
        for value in (None, 3, b"auto", "", "x" * 9999)
    ),
    ("predictor", "onnx:"),
    ("predictor", "onnx:a\nb"),
    ("calibrate", "dense:0"),
    ("calibrate", "dense:٣"),
    ("calibrate", "layers:" + "9" * 30),
    *((name, value) for name in ("trace", "prefetch", "untested") for value in ("no", 2, None, 0.0)),
]


@pytest.mark.parametrize(("name", "value"), SETTINGS, ids=lambda value: repr(value)[:20])
def test_settings_that_cannot_be(name, value):
    with pytest.raises(ArgumentError) as error:
        SparseConfig(**{name: value})
    refused(error.value, name)


def test_numbers_of_numpy_become_those_of_python():
    config = SparseConfig(budget=np.int64(1024), compression=np.float32(8), min_recovery=np.float64(0.5), trace=np.True_, hold=np.uint8(3))
    assert config == SparseConfig(budget=1024, compression=8.0, min_recovery=0.5, trace=True, hold=3)
    assert type(config.budget) is int and type(config.compression) is float and config.trace is True


LOADING = [
    *(
        (name, value)
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch")
        for value in (-1, 1.5, "8", 1 << 40, True)
    ),
    *(("n_batch", value) for value in (0, None)),
    *(("n_threads", value) for value in (513, 10**6)),
    *((name, value) for name in ("type_k", "type_v") for value in (-1, 4, 5, 31, 10**6, "f16", True)),
    *((name, value) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor") for value in (math.nan, "1", NO)),
    *((name, value) for name in ("use_mmap", "logits_all", "embedding", "verbose") for value in ("yes", 2, NO)),
    *((name, value) for name in ("pooling_type", "attention_type", "split_mode") for value in (-7, 99, 1.0, "none")),
    *(("tensor_split", value) for value in (["a"], [-1.0], [math.nan], "12", [0.5] * 1000)),
    *(("kv_overrides", value) for value in ([], {1: 2}, {"": 1}, {"k" * 128: 1}, {"a": "b" * 128}, {"a": 1 << 64}, {"a": NO})),
    *((name, NO) for name in ("chat_format", "chat_handler", "draft_model", "tokenizer", "lora_path", "lora_scale", "seed", "numa")),
    ("sparse", "yes"),
]


@pytest.mark.parametrize(("name", "value"), LOADING, ids=lambda value: repr(value)[:20])
def test_arguments_of_loading_that_cannot_be(file, name, value):
    with pytest.raises(ArgumentError) as error:
        Llama(file, **{"n_ctx": 256, "verbose": False, name: value})
    refused(error.value, name)


def test_an_argument_that_there_is_not(file):
    with pytest.raises(TypeError, match="no argument 'n_treads'; did you mean 'n_threads'"):
        Llama(file, n_treads=2)


OVERRIDES = [
    *({"llama.block_count": n} for n in (10**6, -1, 0, 513)),
    {"llama.attention.layer_norm_rms_epsilon": -1.0},
    {"llama.attention.layer_norm_rms_epsilon": math.inf, "llama.block_count": 10**9},
    {"llama.attention.sliding_window": 1 << 30},
    {"llama.attention.key_length": 1 << 30},
    {"llama.expert_count": 10**6},
    {"llama.expert_count": 1025, "llama.expert_used_count": 2},
    {"llama.expert_count": 4},
    {"llama.expert_count": 4, "llama.expert_used_count": 5},
    {"llama.expert_used_count": 1},
    {"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.expert_group_count": 3, "llama.expert_group_used_count": 1},
    {"llama.nextn_predict_layers": 7},
    {"llama.rope.scaling.type": "spiral"},
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_overrides_that_would_end_the_process(file, overrides):
    with pytest.raises(KvcastError, match="kv_overrides"):
        Llama(file, n_ctx=256, verbose=False, kv_overrides=overrides)


def test_overrides_that_llama_cpp_passes_over_are_no_reason(file):
    for overrides in ({"llama.block_count": "many"}, {"llama.block_count": True}, {"llama.context_length": 512}, {"nobody.knows": 1 << 40}):
        Llama(file, n_ctx=256, verbose=False, kv_overrides=overrides).close()


def adapter(path, arch="llama", kind="adapter", n=256):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string("general.type", kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((8, n), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.zeros((n, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_adapters_that_are_none(file, tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((b := open(adapter(tmp_path / "whole.gguf"), "rb").read())[: len(b) - 4000])
    for path, words in (
        (tmp_path / "nowhere.gguf", "there is no LoRA adapter"),
        (tmp_path, "there is no LoRA adapter"),
        (text, "not a GGUF"),
        (cut, "cut short"),
        (file, "not a LoRA adapter"),
        (adapter(tmp_path / "model.gguf", kind="model"), "not a LoRA adapter"),
        (adapter(tmp_path / "other.gguf", arch="qwen2"), "another family"),
        (adapter(tmp_path / "small.gguf", n=5), "damaged or for another model"),
    ):
        with pytest.raises(ModelError, match=words):
            Llama(file, n_ctx=256, verbose=False, lora_path=str(path))
    with closing(Llama(file, n_ctx=256, verbose=False, lora_path=adapter(tmp_path / "good.gguf"))) as llm:
        llm.eval([1, 2])


SAMPLING = [
    *((name, value) for name in ("temperature", "top_p", "min_p", "typical_p") for value in (math.nan, "1", NO)),
    ("temperature", 1e-30),
    *(("top_k", value) for value in (1.5, "40", 1 << 40)),
    *(("repeat_penalty", value) for value in (0.0, -1.0, math.inf, math.nan)),
    *((name, value) for name in ("frequency_penalty", "presence_penalty") for value in (math.nan, 1e30)),
    ("mirostat_mode", 7),
    ("logits_processor", NO),
    ("grammar", "root ::= 'a'"),
    *(("logit_bias", value) for value in ({"x": 1.0}, {10**9: 1.0}, {-1: 1.0}, {1: math.nan}, 5)),
]


@pytest.mark.parametrize(("name", "value"), SAMPLING, ids=lambda value: repr(value)[:20])
def test_arguments_of_sampling_that_cannot_be(llm, name, value):
    llm.reset()
    with pytest.raises((ArgumentError, TypeError)) as error:
        llm.create_completion("Once", max_tokens=2, **{name: value})
    assert str(error.value)
    assert llm.create_completion("Once", max_tokens=2, temperature=0, logit_bias={7: 50.0})["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize("tokens", [[-1], [1024], [10**12], ["a"], "text", [1.5], [[1, 2], [3]], {1: 2}, [None], [True]], ids=str)
def test_tokens_that_the_model_does_not_have(llm, tokens):
    llm.reset()
    llm.eval([1, 2, 3])
    for call in (llm.eval, lambda tokens: next(llm.generate(tokens))):
        with pytest.raises(ArgumentError):
            call(tokens)
        assert llm.n_tokens == 3


def test_a_context_is_as_long_as_llama_cpp_makes_it(llm, file, tmp_path):
    assert llm.n_ctx() == 512
    tokens = [int(t) for t in np.random.default_rng(0).integers(300, 1000, 400)]
    llm.reset()
    llm.eval(tokens)
    assert llm.input_ids[:400].tolist() == tokens
    llm.save_session(tmp_path / "s")
    with closing(Llama(file, n_ctx=N_CTX, verbose=False)) as other:
        other.load_session(tmp_path / "s")
        assert other.n_tokens == 400 and other.input_ids[:400].tolist() == tokens


def test_threads_bound_prompts_too(file):
    with closing(Llama(file, n_ctx=256, n_threads=1, verbose=False)) as llm:
        assert llm.n_threads == llm.n_threads_batch == 1
    with closing(Llama(file, n_ctx=256, n_threads=1, n_threads_batch=2, verbose=False)) as llm:
        assert (llm.n_threads, llm.n_threads_batch) == (1, 2)
