"""GGUF files that are all header: any shape, tensors of the right size without data (a sparse file), no vocabulary or a tiny one."""

import os

import gguf
import numpy as np

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
PAIRED = b"aZ1- \n'.\xc3\xa9\xe4\xb8\xad"  # bytes of every class of character, which pair up


def write_shape(path, arch="llama", *, n_layer=2, n_embd=256, n_ff=512, n_head=4, n_head_kv=2, n_vocab=1024, n_ctx=4096,
                vocabulary="no_vocab", pre="default", template=TEMPLATE, special=(), **numbers):  # fmt: skip
    """``numbers``: further integer keys, of the family unless they hold a point. Matrices are Q4_0, norms f32; llama's and gemma3's.
    ``vocabulary``: a tokenizer's name gives tokens for all bytes, as it writes them, and a chat template; those of ``gpt2`` pair up,
    so that it shows where ``pre``, its rule for words, cuts. ``special``: texts of further tokens, which are none of a text's own."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(n_layer)
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(n_head)
    writer.add_head_count_kv(n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(n_vocab)
    writer.add_file_type(2)
    writer.add_tokenizer_model(vocabulary)
    if vocabulary != "no_vocab":
        add_tokens(writer, vocabulary, n_vocab, pre, special)
        writer.add_chat_template(template)
    for key, value in numbers.items():
        writer.add_uint32(key if "." in key else f"{arch}.{key.replace('__', '.')}", value)
    n_bytes = 0

    def add(name, *shape):
        nonlocal n_bytes
        quantised = len(shape) == 2
        size = int(np.prod(shape)) * 18 // 32 if quantised else 4 * shape[0]
        kind = gguf.GGMLQuantizationType.Q4_0 if quantised else gguf.GGMLQuantizationType.F32
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, kind)
        n_bytes += -(-size // 32) * 32

    dim = n_embd // n_head
    add("token_embd.weight", n_vocab, n_embd)
    add("output_norm.weight", n_embd)
    if arch == "llama":
        add("output.weight", n_vocab, n_embd)
    for i in range(n_layer):
        for norm in ("attn_norm", "ffn_norm", *(("post_attention_norm", "post_ffw_norm") if arch == "gemma3" else ())):
            add(f"blk.{i}.{norm}.weight", n_embd)
        for norm in ("attn_q_norm", "attn_k_norm") if arch == "gemma3" else ():
            add(f"blk.{i}.{norm}.weight", dim)
        for name, rows, columns in (
            ("attn_q", n_embd, n_embd), ("attn_k", n_head_kv * dim, n_embd), ("attn_v", n_head_kv * dim, n_embd),
            ("attn_output", n_embd, n_embd), ("ffn_gate", n_ff, n_embd), ("ffn_up", n_ff, n_embd), ("ffn_down", n_embd, n_ff),
        ):  # fmt: skip
            add(f"blk.{i}.{name}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-os.path.getsize(path) // 32) * 32 + n_bytes)
    return path


def add_tokens(writer, vocabulary, n_vocab, pre="default", more_special=()):
    special, control, normal, byte = ["<unk>", "<s>", "</s>", *more_special], 3, 1, 6
    words = [f"word{i}" for i in range(n_vocab)]
    if vocabulary == "gpt2":  # printable bytes are themselves, others come after U+00FF
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in shown]
        of_bytes, kind = [chr(b) if b in shown else chr(256 + others.index(b)) for b in range(256)], normal
        pairs = [(of_bytes[a], of_bytes[b]) for a in PAIRED for b in PAIRED][: max(0, n_vocab - 256 - len(special))]
        writer.add_token_merges([f"{a} {b}" for a, b in pairs])
        writer.add_tokenizer_pre(pre)
        words = [a + b for a, b in pairs] + words
    elif vocabulary == "rwkv":
        of_bytes, kind = [f"\\x{b:02x}" for b in range(256)], normal
    else:
        of_bytes, kind = [f"<0x{b:02X}>" for b in range(256)], byte
    words = words[: n_vocab - 256 - len(special)]
    if vocabulary != "gpt2":
        writer.add_token_scores([0.0] * n_vocab)
    writer.add_token_list([*special, *of_bytes, *words])
    writer.add_token_types([control] * len(special) + [kind] * 256 + [normal] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
