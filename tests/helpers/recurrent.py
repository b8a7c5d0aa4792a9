"""Small models with recurrent layers, random weights and no vocabulary: what sparse attention does not serve and sessions do."""

import gguf
import numpy as np

N_VOCAB, N_EMBD, N_FF, N_HEAD, N_HEAD_KV = 512, 64, 128, 4, 2


def write_recurrent(path, kind):
    """``mamba``: recurrent layers only; ``lfm2``: one of each; ``lfm2-windows``: with a sliding window too."""
    rng = np.random.default_rng(0)
    arch = kind.split("-")[0]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(N_EMBD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name, *size):
        writer.add_tensor(name, (rng.standard_normal(size) * size[-1] ** -0.5).astype(np.float32))

    matrix("token_embd.weight", N_VOCAB, N_EMBD)
    matrix("token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight", N_EMBD)
    if arch == "mamba":
        n_inner, n_state, rank = 2 * N_EMBD, 16, 4
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(n_inner)
        writer.add_ssm_state_size(n_state)
        writer.add_ssm_time_step_rank(rank)
    else:
        writer.add_feed_forward_length(N_FF)
        writer.add_head_count(N_HEAD)
        writer.add_head_count_kv([0, N_HEAD_KV])
        writer.add_uint32("lfm2.shortconv.l_cache", 3)
        if kind == "lfm2-windows":
            writer.add_sliding_window(32)
    for i in range(2):
        at = f"blk.{i}."
        matrix(f"{at}attn_norm.weight", N_EMBD)
        if arch == "mamba":
            matrix(f"{at}ssm_in.weight", 2 * n_inner, N_EMBD)
            matrix(f"{at}ssm_conv1d.weight", n_inner, 4)
            matrix(f"{at}ssm_conv1d.bias", n_inner)
            matrix(f"{at}ssm_x.weight", rank + 2 * n_state, n_inner)
            matrix(f"{at}ssm_dt.weight", n_inner, rank)
            matrix(f"{at}ssm_dt.bias", n_inner)
            writer.add_tensor(f"{at}ssm_a", -np.ones((n_inner, n_state), np.float32))
            matrix(f"{at}ssm_d", n_inner)
            matrix(f"{at}ssm_out.weight", N_EMBD, n_inner)
            continue
        matrix(f"{at}ffn_norm.weight", N_EMBD)
        for name, *size in (("gate", N_FF, N_EMBD), ("up", N_FF, N_EMBD), ("down", N_EMBD, N_FF)):
            matrix(f"{at}ffn_{name}.weight", *size)
        if i == 0:
            matrix(f"{at}shortconv.conv.weight", N_EMBD, 3)
            matrix(f"{at}shortconv.in_proj.weight", 3 * N_EMBD, N_EMBD)
            matrix(f"{at}shortconv.out_proj.weight", N_EMBD, N_EMBD)
            continue
        dim = N_EMBD // N_HEAD
        matrix(f"{at}attn_q_norm.weight", dim)
        matrix(f"{at}attn_k_norm.weight", dim)
        for name, n in (("q", N_HEAD), ("k", N_HEAD_KV), ("v", N_HEAD_KV)):
            matrix(f"{at}attn_{name}.weight", n * dim, N_EMBD)
        matrix(f"{at}attn_output.weight", N_EMBD, N_EMBD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
