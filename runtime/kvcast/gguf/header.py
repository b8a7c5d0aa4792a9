"""What kvcast needs to know of a model before anything large is loaded or allocated, from its GGUF's header."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ModelError
from .embedded_predictor import Embedded, embedded_in
from .identity import Stamp, stamps
from .reader import GgufFile, row_size

SWA_PERIOD = {"cohere2": 4, "gemma3": 6, "olmo2": 4}  # of so many layers the last attends to everything, where the file says nothing else
N_LAYER_MAX = 512  # llama.cpp's LLAMA_MAX_LAYERS
N_EXPERT_MAX = 1024  # LLAMA_MAX_EXPERTS
HEAD_MAX = 1 << 16  # heads, and channels of each
ROPE_SCALING = ("none", "linear", "yarn", "longrope")  # that llama.cpp knows
WINDOW_MAX = 1 << 24  # tokens; llama.cpp makes room for as many
SETTLED_NS = 2 * 10**9  # a file that was changed less than this ago may change again within the same tick of its clock
N_KEPT = 8  # headers

_read: dict[tuple[Stamp, tuple[tuple[str, str, str], ...]], Header] = {}  # a command asks for one several times


@dataclass(frozen=True, slots=True)
class Header:
    """Shape and size of a model.

    Attributes
    ----------
    weights_bytes : int
        Of all tensors.
    n_layer_swa, n_swa : int
        Layers with a sliding window, which llama.cpp serves by itself, and its tokens; 0 where the family's pattern is not known here.
    embedding_bytes : int
        Of the token embedding where the output has a matrix of its own: that much stays in host memory when the layers go to a device.
    embedded : Embedded or None
        The predictor that travels in the file, unchecked.
    n_split : int
        Files that the model lies in.
    """

    arch: str
    n_layer: int
    n_layer_swa: int
    n_swa: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_vocab: int
    n_ctx_train: int
    weights_bytes: int
    embedding_bytes: int
    embedded: Embedded | None
    n_split: int

    @property
    def n_layer_served(self) -> int:
        """Layers that attend to the whole context."""
        return self.n_layer - self.n_layer_swa

    def store_bytes(self, n_ctx: int, type_k: int = 1, type_v: int = 1, n_ubatch: int | None = None) -> int:
        """Bytes of the whole KV cache of ``n_ctx`` cells.

        type_k, type_v : int
            ggml's, f16 when not given.
        n_ubatch : int or None
            Sliding-window layers hold a window and a batch of so many tokens (``swa_full=False``); None: the whole context.
        """
        n_cells = -(-n_ctx // 256) * 256
        n_cells_swa = n_cells if n_ubatch is None else min(n_cells, -(-(self.n_swa + n_ubatch) // 256) * 256)
        k = row_size(type_k, self.n_head_kv * self.head_dim_k)
        v = row_size(type_v, self.n_head_kv * self.head_dim_v)
        return (n_cells * self.n_layer_served + n_cells_swa * self.n_layer_swa) * (k + v)


def read_header(path: str | os.PathLike[str], overrides: Mapping[str, bool | int | float | str] | None = None) -> Header:
    """Read and check the header of a GGUF file, with values that stand for its own (``kv_overrides``).

    Raises
    ------
    ModelError
        The file is missing, not a GGUF, shorter than its header says, or damaged; or cannot be with these overrides.
    """
    (stamp,) = stamps([os.fspath(path)])
    key = stamp, tuple(sorted((name, type(value).__name__, str(value)) for name, value in (overrides or {}).items()))
    settled = time.time_ns() - max(stamp.modified_ns, stamp.changed_ns) > SETTLED_NS
    if settled and key in _read:
        return _read[key]
    with GgufFile(path, overrides) as gguf:
        header = header_of(gguf)
    if settled and header.n_split < 2:
        if len(_read) >= N_KEPT:
            _read.clear()
        _read[key] = header
    return header


def header_of(gguf: GgufFile) -> Header:
    """The header of an open file.

    Raises
    ------
    ModelError
        It is damaged.
    """
    arch = gguf.get("general.architecture", "")

    def number(key: str, default: int) -> int:
        return _most(gguf.get(f"{arch}.{key}"), default)

    tokens = gguf.strings("tokenizer.ggml.tokens")
    if wrong := _damage(gguf, arch, tokens):
        if gguf.is_overridden:
            raise ModelError(f"{str(gguf.path)!r} cannot be loaded with these kv_overrides: {wrong}")
        raise ModelError(f"{str(gguf.path)!r} is damaged: {wrong}; fetch it again")
    n_embd, n_head = number("embedding_length", 0), number("attention.head_count", 0)
    head_dim = n_embd // n_head if n_head else 0
    n_layer, n_swa = number("block_count", 0), number("attention.sliding_window", 0)
    pattern = gguf.get(f"{arch}.attention.sliding_window_pattern", SWA_PERIOD.get(arch)) if arch in SWA_PERIOD and n_swa else None
    if isinstance(pattern, int):
        pattern = [pattern == 0 or i % pattern < pattern - 1 for i in range(n_layer)]
    bytes_of = {t.name: t.n_bytes for t in gguf.tensors()}
    return Header(
        arch=arch,
        n_layer=n_layer,
        n_layer_swa=sum(map(bool, pattern or [])),
        n_swa=n_swa if pattern else 0,
        n_embd=n_embd,
        n_ff=number("feed_forward_length", 0),
        n_head=n_head,
        n_head_kv=number("attention.head_count_kv", n_head),
        head_dim_k=number("attention.key_length", head_dim),
        head_dim_v=number("attention.value_length", head_dim),
        n_vocab=number("vocab_size", 0) or len(tokens),
        n_ctx_train=number("context_length", 0),
        weights_bytes=sum(bytes_of.values()),
        embedding_bytes=bytes_of.get("token_embd.weight", 0) if "output.weight" in bytes_of else 0,
        embedded=embedded_in(gguf),
        n_split=_most(gguf.get("split.count"), 1),
    )


def _most(value: object, default: int = 0) -> int:
    """A number, or the largest of those for each layer; the default for anything else, which llama.cpp refuses."""
    return max((x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)), default=default)


def _damage(gguf: GgufFile, arch: str, tokens: list[bytes]) -> str:
    """What would make llama.cpp end the process, found by fuzzing; "" for nothing."""
    n_layer = gguf.get(f"{arch}.block_count")
    if isinstance(n_layer, int) and not 0 < n_layer <= N_LAYER_MAX:
        return f"it claims {n_layer} layers, and there can be 1 to {N_LAYER_MAX}"
    window = gguf.get(f"{arch}.attention.sliding_window")
    if isinstance(window, int) and window > WINDOW_MAX:
        return f"it claims a sliding window of {window} tokens"
    heads, heads_kv = (_most(gguf.get(f"{arch}.attention.{key}")) for key in ("head_count", "head_count_kv"))
    if heads_kv > heads > 0 or heads > HEAD_MAX:  # products of larger ones begin again at 0
        return f"it claims {heads_kv} KV heads for {heads} heads"
    for key in ("key_length", "value_length", "key_length_swa", "value_length_swa"):
        n_channels = _most(gguf.get(f"{arch}.attention.{key}"))
        if n_channels > HEAD_MAX:
            return f"it claims heads of {n_channels} channels"
    for key in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        epsilon = gguf.get(f"{arch}.attention.{key}")
        if isinstance(epsilon, float) and not epsilon >= 0:
            return f"its {key} is {epsilon}, and not 0 or more"
    experts, used, groups, groups_used = (
        _most(gguf.get(f"{arch}.expert_{key}")) for key in ("count", "used_count", "group_count", "group_used_count")
    )
    dense = arch.startswith("hunyuan") and experts <= 1  # which llama.cpp passes over
    if not dense and (experts > N_EXPERT_MAX or used > experts or (experts > 0) != (used > 0)):
        return f"it claims {used} used experts of {experts}, and there can be {N_EXPERT_MAX} at most"
    if groups and (groups >= experts or (groups > 1 and (experts % groups or not 0 < groups_used < groups))):
        return f"it claims {groups_used} used groups of {groups} for {experts} experts"
    n_more = _most(gguf.get(f"{arch}.nextn_predict_layers"))
    if isinstance(n_layer, int) and n_more > n_layer:
        return f"it claims {n_more} layers that predict further tokens, of {n_layer}"
    scaling = gguf.get(f"{arch}.rope.scaling.type")
    if isinstance(scaling, str) and scaling not in ROPE_SCALING:
        return f"its RoPE scaling is {scaling[:40]!r}, and not one of {', '.join(ROPE_SCALING)}"
    return "its vocabulary has the same token twice" if len(set(tokens)) < len(tokens) else ""
