"""Small GGUF models with random weights, one per family, with no vocabulary or a tiny one: what a family's graph does, in a second."""

from dataclasses import dataclass, field

import gguf
import numpy as np

from shapes import add_tokens

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV = 512, 128, 256, 4, 2


@dataclass(frozen=True)
class Shape:
    """What sets a family apart from llama. ``norms``: of a layer, with the width of each where it is not the model's."""

    arch: str = "llama"
    n_layer: int = 2
    head_dim: int = 64
    norms: dict = field(default_factory=lambda: {"attn_norm": 0, "ffn_norm": 0})
    norm_bias: bool = False
    qkv_bias: bool = False
    qkv_in_one: bool = False
    gate: str = "alone"  # "alone", "with_up", "none"
    out_bias: bool = False  # of attention's output and the feed-forward part
    n_expert: int = 0
    sinks: bool = False
    output: bool = True  # a matrix of its own
    keys: dict = field(default_factory=dict)  # of the family, unless they hold a colon: then of the whole file
    factors: dict = field(default_factory=dict)  # rope factors: tensor's name, head_dim/2 values


def _post_norms(*names: str, head_dim: int = 64) -> dict:
    norms = {"attn_norm": 0, "ffn_norm": 0, "post_attention_norm": 0, "post_ffw_norm": 0}
    return norms | {name: head_dim for name in names}


LLAMA3 = np.where(np.arange(32) < 8, 1.0, 8.0)  # short wavelengths stay, long ones are stretched
SHAPES = {
    "llama": Shape(),
    "llama-rope-factors": Shape(factors={"rope_freqs": LLAMA3}),
    "llama-rope-linear": Shape(keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama-rope-yarn": Shape(
        keys={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 256}
    ),
    "mistral3": Shape("mistral3"),
    "qwen2": Shape("qwen2", head_dim=32, qkv_bias=True),
    "qwen3": Shape("qwen3", norms={"attn_norm": 0, "ffn_norm": 0, "attn_q_norm": 64, "attn_k_norm": 64}),
    "qwen3moe": Shape("qwen3moe", norms={"attn_norm": 0, "ffn_norm": 0, "attn_q_norm": 64, "attn_k_norm": 64}, n_expert=2),
    "gemma": Shape("gemma", head_dim=256, output=False),
    "gemma3": Shape(
        "gemma3", n_layer=6, head_dim=128, norms=_post_norms("attn_q_norm", "attn_k_norm", head_dim=128), output=False,
        keys={"attention.sliding_window": 64, "attention.sliding_window_pattern": 3},
    ),
    "phi3": Shape(
        "phi3", head_dim=32, qkv_in_one=True, gate="with_up", factors={"rope_factors_short": LLAMA3[:16], "rope_factors_long": LLAMA3[:16]},
        keys={"rope.scaling.original_context_length": 256},
    ),
    "granite": Shape(
        "granite", keys={"logit_scale": 4.0, "attention.scale": 0.2, "residual_scale": 0.5, "embedding_scale": 3.0}
    ),
    "olmo2": Shape(
        "olmo2", head_dim=32, norms={"attn_q_norm": 128, "attn_k_norm": 64, "post_attention_norm": 0, "post_ffw_norm": 0}
    ),
    "olmo2-windows": Shape(
        "olmo2", n_layer=4, head_dim=32, norms={"attn_q_norm": 128, "attn_k_norm": 64, "post_attention_norm": 0, "post_ffw_norm": 0},
        keys={"attention.sliding_window": 64},
    ),
    "cohere2": Shape(
        "cohere2", n_layer=4, head_dim=32, norms={"attn_norm": 0}, output=False, keys={"attention.sliding_window": 64, "logit_scale": 0.5}
    ),
    "starcoder2": Shape("starcoder2", head_dim=32, norm_bias=True, qkv_bias=True, gate="none", out_bias=True),
    "smollm3": Shape("smollm3", n_layer=4),
    "glm4": Shape("glm4", norms=_post_norms(), gate="with_up", keys={"rope.dimension_count": 32}),
}  # fmt: skip

UNTESTED = Shape("internlm2", head_dim=32)
WITH_SINKS = Shape(
    "gpt-oss",
    norms={"attn_norm": 0, "post_attention_norm": 0},
    out_bias=True,
    n_expert=2,
    sinks=True,
    keys={"attention.sliding_window": 64},
)


def write_tiny(path, shape: Shape, n_ctx: int = 4096, vocabulary: str = "no_vocab"):
    """A file of that shape, in f16 with f32 norms; random, the same at every call. ``vocabulary``: see ``shapes.write_shape``."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_block_count(shape.n_layer)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model(vocabulary)
    if vocabulary != "no_vocab":
        add_tokens(writer, vocabulary, N_VOCAB)
    if "rope.dimension_count" not in shape.keys:
        writer.add_rope_dimension_count(shape.head_dim)
    for key, value in shape.keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{shape.arch}.{key}", value)

    def matrix(name, *size, bias=False):
        writer.add_tensor(f"{name}.weight", (rng.standard_normal(size) * size[-1] ** -0.5).astype(np.float16))
        if bias:
            vector(f"{name}.bias", size[:-1], 0.0)

    def vector(name, n, mean):
        writer.add_tensor(name, (mean + 0.1 * rng.standard_normal(n)).astype(np.float32))

    def norm(name, n):
        vector(f"{name}.weight", n, 1.0)
        if shape.norm_bias:
            vector(f"{name}.bias", n, 0.0)

    if shape.n_expert:
        writer.add_expert_count(shape.n_expert)
        writer.add_expert_used_count(shape.n_expert)  # all of them: a choice would turn rounding into another answer
        writer.add_expert_feed_forward_length(N_FF)
    matrix("token_embd", N_VOCAB, N_EMBD)
    norm("output_norm", N_EMBD)
    if shape.output:
        matrix("output", N_VOCAB, N_EMBD)
    for name, factors in shape.factors.items():
        writer.add_tensor(f"{name}.weight", factors.astype(np.float32))
    n_q, n_kv = N_HEAD * shape.head_dim, N_HEAD_KV * shape.head_dim
    for i in range(shape.n_layer):
        at = f"blk.{i}."
        for name, width in shape.norms.items():
            norm(at + name, width or N_EMBD)
        if shape.qkv_in_one:
            matrix(at + "attn_qkv", n_q + 2 * n_kv, N_EMBD)
        else:
            for name, n in (("attn_q", n_q), ("attn_k", n_kv), ("attn_v", n_kv)):
                matrix(at + name, n, N_EMBD, bias=shape.qkv_bias)
        matrix(at + "attn_output", N_EMBD, n_q, bias=shape.out_bias)
        if shape.sinks:
            vector(at + "attn_sinks.weight", N_HEAD, 0.0)
        if shape.n_expert:
            matrix(at + "ffn_gate_inp", shape.n_expert, N_EMBD, bias=shape.out_bias)
            for name, *size in (("gate", N_FF, N_EMBD), ("up", N_FF, N_EMBD), ("down", N_EMBD, N_FF)):
                matrix(f"{at}ffn_{name}_exps", shape.n_expert, *size, bias=shape.out_bias)
            continue
        if shape.gate == "alone":
            matrix(at + "ffn_gate", N_FF, N_EMBD)
        matrix(at + "ffn_up", N_FF * (2 if shape.gate == "with_up" else 1), N_EMBD, bias=shape.out_bias)
        matrix(at + "ffn_down", N_EMBD, N_FF, bias=shape.out_bias)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
