"""What loading a model allocates, in bytes, from its header.

What the native part allocates it counts itself. Compute buffers and what a process holds besides are estimates. docs/plan.md explains
them and compares with measurements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..blocks import BLOCK_TOKENS
from ..errors import ModelError
from .header import Header
from .reader import row_size

if TYPE_CHECKING:
    from ..bindings.api import kvcast_sizes

KV_TYPES = {"f16": 1, "bf16": 30, "q8_0": 8, "q4_0": 2}  # of the KV cache: ggml's types
STAGING_SHARE = 16  # a staging buffer holds one in so many of the pool's slots
HOST_RESERVE = 400 << 20  # Python, NumPy, Numba, ONNX Runtime
POOL_RESERVE = 100 << 20  # the same beside a pool: work space of taps
ELEMENTS_MAX = 1 << 50  # of a KV cache; sums of more could pass 64 bits
DEVICE_RESERVE = 700 << 20  # CUDA's context and work space beside the buffers, as measured on an H100


def n_cells(n_ctx: int) -> int:
    """llama.cpp's KV cache for a context of ``n_ctx``."""
    return -(-n_ctx // 256) * 256


def _n_rows(header: Header) -> int:
    return header.n_layer_served * header.n_head_kv


def divides(header: Header, kv_type: str) -> bool:
    """Whether heads are whole blocks of the type, 32 values for the quantised ones: llama.cpp takes no others."""
    return kv_type in ("f16", "bf16") or not (header.head_dim_k % 32 or header.head_dim_v % 32)


def allocated(header: Header, n_ctx: int, kind: int = 1, pool_tokens: int = 0, n_batch: int = 0) -> kvcast_sizes:
    """What kvcast's native part allocates for a context, on either path: what a path has no use for, it does not allocate.

    Parameters
    ----------
    n_ctx, pool_tokens, n_batch : int
        Tokens of the context, of the device path's budget and of the largest batch on a GPU.
    kind : int
        ggml's type of the KV cache.

    Returns
    -------
    kvcast_sizes
        Bytes; native/kvcast.h says of what.

    Raises
    ------
    ModelError
        The header's numbers are none of a language model, or more than any machine holds.
    """
    from ..bindings.api import kvcast_info, kvcast_params, kvcast_sizes_of

    cells = n_cells(n_ctx)
    dims = (header.head_dim_k, header.head_dim_v)
    if min(_n_rows(header), header.n_head, *dims, cells) < 1 or _n_rows(header) * cells * sum(dims) > ELEMENTS_MAX:
        raise ModelError(
            f"the header claims {header.n_layer} layers with {header.n_head_kv} KV heads of {header.head_dim_k} channels; "
            f"with {n_ctx} tokens no machine holds their KV cache; take another file"
        )
    shape = kvcast_info(
        n_layer=header.n_layer_served,
        n_head=header.n_head,
        n_head_kv=header.n_head_kv,
        head_dim_k=header.head_dim_k,
        head_dim_v=header.head_dim_v,
        n_cells=cells,
        n_blocks=cells // BLOCK_TOKENS,
        max_taps=n_taps_within(tap_bytes(header, n_ctx)),
        type_k=kind,
        type_v=kind,
        k_row_bytes=header.n_head_kv * row_size(kind, header.head_dim_k),
        v_row_bytes=header.n_head_kv * row_size(kind, header.head_dim_v),
    )
    pool_blocks = min(pool_tokens, cells) // BLOCK_TOKENS
    params = kvcast_params(max_taps=shape.max_taps, summary=1, pool_blocks=pool_blocks, staging_share=STAGING_SHARE)
    return kvcast_sizes_of(shape, params, n_batch)


def tap_bytes(header: Header, n_ctx: int) -> int:
    """Scores of one token of a history batch."""
    return 4 * _n_rows(header) * (-(-n_ctx // BLOCK_TOKENS))


def history_bytes(header: Header, n_ctx: int, pool_tokens: int = 0) -> int:
    """NumPy arrays, of every block: five averages, when it was seen and what was predicted of it; the lists that a step's are selected
    into, two arrays on the host path and five on the device path. Of every slot of a pool: its block, and what eight steps gave it."""
    of_block = 5 + 2 + (5 if pool_tokens else 2)
    return 4 * _n_rows(header) * (of_block * (n_cells(n_ctx) // BLOCK_TOKENS) + (1 + 8) * (pool_tokens // BLOCK_TOKENS))


def move_bytes(header: Header, kv_type: str) -> int:
    """One block of one KV head, K and V."""
    kind = KV_TYPES[kv_type]
    return BLOCK_TOKENS * (row_size(kind, header.head_dim_k) + row_size(kind, header.head_dim_v))


def compute_bytes(header: Header, n_ctx: int, n_ubatch: int, kv_type: str, copies_kv: bool) -> int:
    """Estimate of llama.cpp's compute buffer where the layers are, for a batch of ``n_ubatch`` tokens.

    The larger of what its end needs, logits of all tokens, and what a layer needs: its feed-forward part, the attention mask and,
    where the KV cache is on the host and the layers on a device (``copies_kv``), room for K and V of two layers.
    """
    layer = header.store_bytes(n_ctx, KV_TYPES[kv_type], KV_TYPES[kv_type]) // header.n_layer
    end = n_ubatch * (4 * header.n_vocab + 8 * header.n_embd)
    return max(end, n_ubatch * (8 * header.n_ff + 2 * n_cells(n_ctx)) + 2 * layer * copies_kv)


HISTORY_BYTES_MAX = 1 << 30  # of their scores, on the host


def n_taps_within(info_bytes_per_tap: int) -> int:
    """Tokens of a history batch whose scores fit the bound."""
    return max(1, min(HISTORY_TOKENS, HISTORY_BYTES_MAX // max(1, info_bytes_per_tap)))


HISTORY_TOKENS = 64  # of a prompt, its last ones, which are a batch of their own
