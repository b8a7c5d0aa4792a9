"""A predictor's card: JSON that travels beside or with a network, and comes from where the network does."""

from __future__ import annotations

import json
from typing import Any

from .protobuf import Damaged

BYTES_MAX = 1 << 18
WORD_MAX, TEXT_MAX = 80, 2000  # characters of a name, and of a description
WORDS, TEXTS = ("name", "architecture"), ("description",)
NUMBERS = ("parameters", "multiply_adds_per_block", "state_bytes_per_block", "seconds_to_train", "difference_to_torch", "opset")
TABLES = {"ms_per_prediction": 1, "middle_recovery_24_blocks_held_out": 2}  # how deep their numbers lie


def read_card(content: str | bytes) -> dict[str, Any]:
    """A card, whose name is there and whose known entries are of their type.

    Raises
    ------
    Damaged
    """
    if len(content) > BYTES_MAX:
        raise Damaged(f"it has {len(content):,} characters, and a card at most {BYTES_MAX:,}")
    try:
        card = json.loads(content)
    except (ValueError, RecursionError):
        raise Damaged("it is not JSON") from None
    if not isinstance(card, dict):
        raise Damaged("it is no JSON object")
    if "name" not in card:
        raise Damaged("it has no name")
    for key, value in card.items():
        if (key in WORDS and not _is_text(value, WORD_MAX)) or (key in TEXTS and not _is_text(value, TEXT_MAX)):
            raise Damaged(f"its {key} is no text that can be shown")
        if key in NUMBERS and not _is_number(value):
            raise Damaged(f"its {key} is no number")
        if key in TABLES and not _is_table(value, TABLES[key]):
            raise Damaged(f"its {key} is no table of numbers")
    return card


def _is_text(value: Any, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most and value.isprintable()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e18


def _is_table(value: Any, depth: int) -> bool:
    if depth == 0:
        return _is_number(value)
    return isinstance(value, dict) and all(_is_text(k, WORD_MAX) and _is_table(v, depth - 1) for k, v in value.items())
