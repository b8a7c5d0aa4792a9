"""``kvcast plan``: what of a model goes where, what fits, and how fast it may be, from the header alone.

    device:  weights, pool, staging, taps, compute buffers, driver       <= --vram
    host:    store, summary (host path), scores and history, token embedding, (without a device: weights, compute buffers) <= --ram

Every term is in gguf/memory.py and in docs/plan.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from ..blocks import BLOCK_TOKENS
from ..config import POOL_STEP, SparseConfig
from ..errors import KvcastError, ModelError
from ..gguf import memory as sizes
from ..gguf.header import Header, header_of
from ..gguf.reader import GgufFile
from ..gguf.support import CANNOT_LOAD, why_dense
from . import gpu_cards as cards
from .link_simulator import Forecast

GIB = 1 << 30
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SHARE = 16  # a budget is the context divided by this, at least:
LEAST_BUDGET = {"device": 2048, "host": 512}
N_UBATCH, N_UBATCH_CPU = 2048, 512  # tokens of a batch: with a GPU, without
DEFAULT = SparseConfig()


def parse_size(text: str) -> int:
    """Bytes of ``8G``, ``800M``, ``1.5G``; K, M, G and T are powers of 1024, with or without ``B`` or ``iB`` behind.

    Raises
    ------
    KvcastError
        It is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise KvcastError(f"{text!r} is not a size; write a number and a unit, as 8G or 800M")
    return int(float(found[1]) * UNITS[found[2].upper()])


@dataclass(frozen=True, slots=True)
class Part:
    """Something that is allocated; ``where`` is ``device`` or ``host``."""

    what: str
    where: str
    n_bytes: int
    estimate: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Where everything goes.

    Attributes
    ----------
    path : str
        ``device``, ``host``, or ``dense``: everything is attended to.
    weights : str
        ``device`` or ``host``.
    budget : int
        Tokens; 0 where the path is dense.
    why_dense : str
        "" where the model is served sparse.
    device_bytes, host_bytes : int
        Sums of the parts.
    largest_context : int
        Tokens, with this path and these weights.
    compression : float
        Device path: KV bytes of a dense cache to those held on the device. Host path: KV bytes read by a dense step to those read by a
        sparse one. 1 where the path is dense.
    dense_fits : bool
        Weights and the whole KV cache fit the device.
    forecast : Forecast or None
        Of the device path on a named card.
    dense_tok_s : float or None
        Of dense llama.cpp on the card, where it fits.
    command : str
    """

    model: str
    context: int
    kv_type: str
    path: str
    weights: str
    budget: int
    why_dense: str
    parts: tuple[Part, ...] = field(repr=False)
    device_bytes: int
    host_bytes: int
    vram_bytes: int
    ram_bytes: int
    largest_context: int
    compression: float
    dense_fits: bool
    forecast: Forecast | None
    dense_tok_s: float | None
    command: str


@dataclass(frozen=True, slots=True)
class Planner:
    """The sums for one model and one machine; ``path`` and ``weights`` everywhere as in ``Plan``."""

    header: Header
    kv_type: str
    vram_bytes: int
    ram_bytes: int

    def budget(self, path: str, n_ctx: int) -> int:
        """Tokens; 0 where the path is dense."""
        if path == "dense":
            return 0
        return min(max(LEAST_BUDGET[path], n_ctx // SHARE // POOL_STEP * POOL_STEP), sizes.n_cells(n_ctx))

    def parts(self, path: str, weights: str, n_ctx: int) -> tuple[Part, ...]:
        """Everything that is allocated, for the path, where the weights are, and a context in tokens."""
        header, kind = self.header, sizes.KV_TYPES[self.kv_type]
        on_device = weights == "device"
        store_at = weights if path == "dense" else "host"
        copies_kv = on_device and store_at == "host"
        embedding = header.embedding_bytes if on_device else 0
        n_ubatch = N_UBATCH if on_device or (self.vram_bytes and path != "dense") else N_UBATCH_CPU
        found = [
            Part("weights", weights, header.weights_bytes - embedding),
            Part("token embedding", "host", embedding),
            Part("KV cache (store)", store_at, header.store_bytes(n_ctx, kind, kind, None if path == "dense" else n_ubatch)),
        ]
        if path != "dense":
            pool_tokens = self.budget(path, n_ctx) if path == "device" else 0
            held = sizes.allocated(header, n_ctx, kind, pool_tokens, n_ubatch)
            found += [Part("scores and history", "host", held.scratch + sizes.history_bytes(header, n_ctx, pool_tokens))]
            if path == "host":
                found += [Part("summary of keys", "host", held.summary)]
            else:
                found += [Part("pool", "device", held.pool), Part("staging", "device", held.staging), Part("taps", "device", held.taps)]
                found += [Part("staging and taps, host side", "host", held.mirrors)]
            if on_device and not header.n_layer_swa:  # where those lie between, llama.cpp's scheduler copies
                found += [Part("a prompt's K and V", "device", held.stream), Part("the same, on their way", "host", held.landing)]
        compute = sizes.compute_bytes(header, n_ctx, n_ubatch, self.kv_type, copies_kv)
        found += [
            Part("compute buffers", weights, compute, estimate=True),
            Part("driver", "device", (sizes.DEVICE_RESERVE + sizes.POOL_RESERVE * (path == "device")) * on_device, estimate=True),
            Part("Python and its libraries", "host", sizes.HOST_RESERVE, estimate=True),
        ]
        return tuple(p for p in found if p.n_bytes)

    def fits(self, path: str, weights: str, n_ctx: int) -> bool:
        """Whether device and host have room for a context of ``n_ctx`` tokens."""
        parts = self.parts(path, weights, n_ctx)
        return total(parts, "device") <= self.vram_bytes and total(parts, "host") <= self.ram_bytes

    def largest_context(self, path: str, weights: str) -> int:
        """Tokens; 0 where nothing fits. Every part grows with the context, so halving finds it."""
        most = self.header.n_ctx_train
        low, high = 0, -(-most // 256)
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(path, weights, min(256 * middle, most)):
                low = middle
            else:
                high = middle - 1
        return min(256 * low, most)

    def compression(self, path: str, n_ctx: int) -> float:
        """Bytes of a dense cache, to those of KV on the device; host path: to those that a step reads."""
        header, kind, budget = self.header, sizes.KV_TYPES[self.kv_type], self.budget(path, n_ctx)
        if path == "device":
            held = sizes.allocated(header, n_ctx, kind, budget)
            return n_ctx * header.store_bytes(256, kind, kind) / 256 / float(held.pool + held.staging + held.taps)
        if path == "host":
            # choosing reads an eighth of the channels of every key, and block means, 8 bits each, at about four steps of five
            chooses = header.head_dim_k // 8 * BLOCK_TOKENS + header.head_dim_k
            return 1 / (min(1, budget / n_ctx) + 0.8 * chooses / sizes.move_bytes(header, self.kv_type))
        return 1.0


def total(parts: tuple[Part, ...], where: str) -> int:
    return sum(p.n_bytes for p in parts if p.where == where)


def plan(
    model: Path, vram_bytes: int, ram_bytes: int, context: int = 0, card: cards.Card | None = None, kv_type: str = "f16", name: str = ""
) -> Plan:
    """Decide where a model's parts go.

    The first of these that holds the context is taken, or else the one that holds most: weights and pool on the device; weights on the
    device, attention on the CPU; everything on the CPU. A model that is not served sparse: everything on the device, or on the CPU.

    Parameters
    ----------
    model : Path
        A GGUF file; only its header is read.
    vram_bytes, ram_bytes : int
        Of the device (0: none) and of the host.
    context : int
        Tokens; 0: as many as the model was trained for, or as many as fit.
    card : Card, optional
        To forecast tokens per second of.
    kv_type : str
        Of the KV cache: f16, bf16, q8_0 or q4_0.
    name : str
        What the command line calls the model; its path when not given.

    Raises
    ------
    KvcastError
        The context is longer than the model's, the KV type is none of these, or nothing fits.
    ModelError
        The file is not a GGUF of a model that llama.cpp can load, or one part of several.
    """
    if kv_type not in sizes.KV_TYPES:
        raise KvcastError(f"the KV type is {kv_type!r}; choose one of {', '.join(sizes.KV_TYPES)}")
    with GgufFile(model) as gguf:
        header, n_parts = header_of(gguf), gguf.get("split.count", 1)
    if n_parts > 1:
        raise ModelError(f"{str(model)!r} is one of {n_parts} parts; join them with llama.cpp's `llama-gguf-split --merge` first")
    if not (header.n_layer and header.n_head and header.n_head_kv and header.n_ctx_train):
        raise ModelError(f"the header of {str(model)!r} does not give the shape of a language model; take another file")
    if context < 0 or context > header.n_ctx_train:
        raise KvcastError(f"a context of {context} tokens is not within the model's 1 to {header.n_ctx_train}; choose a smaller one")

    if not sizes.divides(header, kv_type):
        raise KvcastError(f"a KV cache of {kv_type} needs heads of a multiple of 32 channels, and the model's are not; use --kv-type f16")
    reason = why_dense(model)
    if reason == CANNOT_LOAD:
        raise ModelError(f"{str(model)!r} is of no use here: {reason}; take another file")
    planner = Planner(header, kv_type, vram_bytes, ram_bytes)
    ways = [("dense", "device"), ("dense", "host")] if reason else [("device", "device"), ("host", "device"), ("host", "host")]
    ways = [way for way in ways if vram_bytes or way[1] == "host"]
    largest = {way: planner.largest_context(*way) for way in ways}
    wanted = context or header.n_ctx_train
    way = next((w for w in ways if largest[w] >= wanted), max(ways, key=lambda w: largest[w]))
    if largest[way] < (context or 1):
        most = f"the longest that fits is {largest[way]}" if largest[way] else "not even the shortest fits"
        raise KvcastError(
            f"a context of {wanted} tokens does not fit {vram_bytes / GIB:.1f} GiB on the device and {ram_bytes / GIB:.1f} GiB on the "
            f"host; {most}; take a smaller model or --kv-type q8_0"
        )
    path, weights = way
    n_ctx = min(wanted, largest[way])
    budget, parts = planner.budget(path, n_ctx), planner.parts(path, weights, n_ctx)
    dense_fits = vram_bytes > 0 and planner.fits("dense", "device", n_ctx)
    forecast = None
    if card is not None and path == "device":
        forecast = cards.sparse_forecast(card, header, n_ctx, budget, kv_type, DEFAULT.sink + DEFAULT.window)
    return Plan(
        model=model.name,
        context=n_ctx,
        kv_type=kv_type,
        path=path,
        weights=weights,
        budget=budget,
        why_dense=reason,
        parts=parts,
        device_bytes=total(parts, "device"),
        host_bytes=total(parts, "host"),
        vram_bytes=vram_bytes,
        ram_bytes=ram_bytes,
        largest_context=largest[way],
        compression=planner.compression(path, n_ctx),
        dense_fits=dense_fits,
        forecast=forecast,
        dense_tok_s=cards.dense_tok_s(card, header, n_ctx, kv_type) if card and dense_fits else None,
        command=_command(name or str(model), n_ctx, path, weights, budget, kv_type),
    )


def _command(name: str, n_ctx: int, path: str, weights: str, budget: int, kv_type: str) -> str:
    words = ["kvcast", "chat", "--model", name, "--context", str(n_ctx)]
    words += ["--dense"] if path == "dense" else ["--path", path, "--budget", str(budget)]
    words += ["--gpu-layers", "-1"] if weights == "device" else []
    words += ["--kv-type", kv_type] if kv_type != "f16" else []
    return " ".join(words)
