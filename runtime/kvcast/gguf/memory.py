"""What loading a model allocates, in bytes, from its header: the sums that native/attach.cpp and native/pool.cpp make.

Compute buffers and what a process holds besides are estimates. docs/plan.md explains them and compares with measurements.
"""

from __future__ import annotations

from ..blocks import BLOCK_TOKENS
from .header import Header
from .reader import row_size

KV_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}  # of the KV cache: ggml's types
STAGING_SHARE = 16  # a staging buffer holds one in so many of the pool's slots
STREAM_CELLS = 16384  # by which the buffers of a prompt grow: native/prefill_stream.cpp
HOST_RESERVE = 400 << 20  # Python, NumPy, Numba, ONNX Runtime
POOL_RESERVE = 100 << 20  # the same beside a pool: work space of taps
DEVICE_RESERVE = 700 << 20  # CUDA's context and work space beside the buffers, as measured on an H100


def _align(n: int) -> int:
    return -(-n // 256) * 256


def n_cells(n_ctx: int) -> int:
    """llama.cpp's KV cache for a context of ``n_ctx``."""
    return -(-n_ctx // 256) * 256


def _n_rows(header: Header) -> int:
    return header.n_layer_served * header.n_head_kv


def divides(header: Header, kv_type: str) -> bool:
    """Whether heads are whole blocks of the type, 32 values for the quantised ones: llama.cpp takes no others."""
    return kv_type in ("f16", "bf16") or not (header.head_dim_k % 32 or header.head_dim_v % 32)


def summary_bytes(header: Header, n_ctx: int) -> int:
    """Summary of the keys, host path: a quarter of the channels as 8-bit codes, block means of all, weights and estimates; estimates of
    every token of the layer that runs."""
    dim, n_blocks = header.head_dim_k, n_cells(n_ctx) // BLOCK_TOKENS
    n_channels = min(max(8, dim // 4), dim)
    n_padded = -(-n_blocks // 16) * 16
    by_row = n_channels * n_padded * BLOCK_TOKENS + dim * n_padded + 2 * 4 * n_blocks
    return _n_rows(header) * by_row + 4 * header.n_head_kv * n_padded * BLOCK_TOKENS


def tap_bytes(header: Header, n_ctx: int) -> int:
    """Scores of one token of a history batch."""
    return 4 * _n_rows(header) * (-(-n_ctx // BLOCK_TOKENS))


def scratch_bytes(header: Header, n_ctx: int) -> int:
    """Lists and scores that the native part holds on the host, without the summary."""
    n_blocks, rows, group = n_cells(n_ctx) // BLOCK_TOKENS, _n_rows(header), header.n_head // header.n_head_kv
    n_taps = n_taps_within(tap_bytes(header, n_ctx))
    by_row = 4 * rows * (2 * n_blocks + 1)  # lists, their lengths, scores
    of_taps = 4 * n_taps * (rows * n_blocks + header.n_layer_served * header.n_head)
    return by_row + of_taps + 4 * (n_cells(n_ctx) + 2 * n_blocks + header.n_head_kv * group * n_blocks)


def history_bytes(header: Header, n_ctx: int, pool_tokens: int = 0) -> int:
    """Of every block five averages, when it was seen and what was predicted of it, and the lists that selections work on, in Python; of
    every slot of a pool what eight steps gave it."""
    return 4 * _n_rows(header) * ((5 + 2 + 5) * (n_cells(n_ctx) // BLOCK_TOKENS) + (1 + 8) * (pool_tokens // BLOCK_TOKENS))


def move_bytes(header: Header, kv_type: str) -> int:
    """One block of one KV head, K and V."""
    kind = KV_TYPES[kv_type]
    return BLOCK_TOKENS * (row_size(kind, header.head_dim_k) + row_size(kind, header.head_dim_v))


def pool_sizes(header: Header, n_ctx: int, budget: int, kv_type: str) -> tuple[int, int, int]:
    """Pool, staging buffers and taps on the device, for a budget of tokens."""
    kind, rows, group = KV_TYPES[kv_type], _n_rows(header), header.n_head // header.n_head_kv
    k_row, v_row = row_size(kind, header.head_dim_k), row_size(kind, header.head_dim_v)
    n_blocks = min(budget, n_cells(n_ctx)) // BLOCK_TOKENS

    def blocks(n: int) -> int:
        return _align(n * BLOCK_TOKENS * k_row) + _align(n * BLOCK_TOKENS * v_row)

    n_staging = max(1, rows * n_blocks // STAGING_SHARE)
    staging = 2 * (blocks(n_staging) + _align(8 * n_staging))
    n_queries = header.n_layer_served * header.n_head
    taps = _align(rows * k_row) + _align(rows * v_row) + _align(4 * header.head_dim_k * n_queries) + _align(4 * n_blocks * n_queries)
    inbox = _align(8 * rows) + _align(4 * rows) + _align(2 * n_blocks * header.n_layer_served * BLOCK_TOKENS * group)
    return blocks(rows * n_blocks), staging, taps + inbox


def compute_bytes(header: Header, n_ctx: int, n_ubatch: int, kv_type: str, copies_kv: bool) -> int:
    """Estimate of llama.cpp's compute buffer where the layers are, for a batch of ``n_ubatch`` tokens.

    The larger of what its end needs, logits of all tokens, and what a layer needs: its feed-forward part, the attention mask and,
    where the KV cache is on the host and the layers on a device (``copies_kv``), room for K and V of two layers.
    """
    layer = header.store_bytes(n_ctx, KV_TYPES[kv_type], KV_TYPES[kv_type]) // header.n_layer
    end = n_ubatch * (4 * header.n_vocab + 8 * header.n_embd)
    return max(end, n_ubatch * (8 * header.n_ff + 2 * n_cells(n_ctx)) + 2 * layer * copies_kv)


def stream_bytes(header: Header, n_ctx: int, kv_type: str) -> int:
    """K and V of two layers on the device while a prompt is read, through which the KV cache on the host passes; freed after it. 0 where
    sliding-window layers lie between: the scheduler copies then."""
    if header.n_layer_swa:
        return 0
    n_rows = min(-(-n_cells(n_ctx) // STREAM_CELLS) * STREAM_CELLS, n_cells(n_ctx))
    return 2 * n_rows * header.n_head_kv * move_bytes(header, kv_type) // BLOCK_TOKENS


HISTORY_BYTES_MAX = 1 << 30  # of their scores, on the host


def n_taps_within(info_bytes_per_tap: int) -> int:
    """Tokens of a history batch whose scores fit the bound."""
    return max(1, min(HISTORY_TOKENS, HISTORY_BYTES_MAX // max(1, info_bytes_per_tap)))


HISTORY_TOKENS = 64  # of a prompt, its last ones, which are a batch of their own
