"""Expected tokens per second on a named graphics card, from its data sheet, the model's size and recorded moves.

The constants were fitted to one H100 with 16 cores (docs/device.md); docs/plan.md shows how far they are off there. Nobody has
measured the other cards: take the figures as a first guess and measure with `kvcast bench`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..blocks import BLOCK_TOKENS
from ..errors import KvcastError
from ..gguf.header import Header
from ..gguf.memory import KV_TYPES, move_bytes
from .link_simulator import Forecast, Link, simulate

DATA = Path(__file__).parent.parent / "data"
LANE_GB_PER_S = {3: 0.985, 4: 1.969, 5: 3.938}
LINK_SHARE = 0.84  # of what the lanes can do: 53 GB/s measured of 63
UPLOAD_S = 50e-6  # three copies of 16 us
READ_SHARE = 0.6  # of the memory's bandwidth, for weights and dense attention
POOL_SHARE = 0.17  # the same for attention over the pool, with its taps
LAYER_S, POOL_LAYER_S = 25e-6, 13e-6  # beside reading: of any layer, of attention over the pool
SELECT_S = 20e-9  # predict and select, for a block of a KV head, on half of 16 cores
SELECT_LEAST_S = 1.5e-3  # what calls and threads cost
OBSERVE_S = 1.1e-3  # a step's part that waits for the host
N_HELD = 8  # steps


@dataclass(frozen=True, slots=True)
class Card:
    """A graphics card, by its data sheet; ``bytes_per_s`` is its memory's bandwidth."""

    name: str
    vram_bytes: int
    bytes_per_s: float
    pcie: int
    lanes: int

    @property
    def link(self) -> Link:
        return Link(1e9 * LANE_GB_PER_S[self.pcie] * self.lanes * LINK_SHARE, UPLOAD_S)


def cards() -> list[Card]:
    """All that are known."""
    known = json.loads((DATA / "cards.json").read_text())["cards"]
    return [Card(name, c["vram_gib"] << 30, 1e9 * c["gb_per_s"], c["pcie"], c["lanes"]) for name, c in known.items()]


def find(name: str) -> Card:
    """A card by name, upper or lower case.

    Raises
    ------
    KvcastError
        It is not in the table; the message lists what is.
    """
    known = cards()
    for card in known:
        if card.name.lower() == name.strip().lower():
            return card
    raise KvcastError(f"there is no card {name!r} in the table; choose one of {', '.join(c.name for c in known)}, or give --vram alone")


def _dense_step_s(card: Card, header: Header) -> float:
    """A step without its attention."""
    return (header.weights_bytes - header.embedding_bytes) / (READ_SHARE * card.bytes_per_s) + header.n_layer * LAYER_S


def dense_tok_s(card: Card, header: Header, n_ctx: int, kv_type: str) -> float:
    """Tokens per second of dense llama.cpp with weights and KV cache on the card, at a context of ``n_ctx`` tokens."""
    kv = header.store_bytes(n_ctx, KV_TYPES[kv_type], KV_TYPES[kv_type])
    return 1 / (_dense_step_s(card, header) + kv / (READ_SHARE * card.bytes_per_s))


def sparse_forecast(card: Card, header: Header, n_ctx: int, budget: int, kv_type: str, n_fixed: int) -> Forecast:
    """The device path: what the link simulator makes of moves as they were recorded on SmolLM2 (data/churn.json).

    n_fixed : int
        Tokens of sink and window.
    """
    rows = header.n_layer_served * header.n_head_kv
    n_critical = (budget - n_fixed) // BLOCK_TOKENS * rows / N_HELD  # of the layers that one step renews
    shares = [s for recorded in json.loads((DATA / "churn.json").read_text()).values() for s in recorded]
    moves = [round(s * n_critical) for s in shares]
    bytes_per_move = move_bytes(header, kv_type)
    pool_s = rows * budget / BLOCK_TOKENS * bytes_per_move / (POOL_SHARE * card.bytes_per_s)
    step_s = _dense_step_s(card, header) + pool_s + header.n_layer_served * POOL_LAYER_S
    select_s = SELECT_LEAST_S + rows * n_ctx / BLOCK_TOKENS / N_HELD * SELECT_S
    return simulate(moves, bytes_per_move, card.link, step_s, OBSERVE_S, select_s)
