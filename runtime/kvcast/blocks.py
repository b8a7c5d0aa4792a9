"""The block: the unit of transfer, of the history and of budgets."""

from __future__ import annotations

BLOCK_TOKENS = 16
