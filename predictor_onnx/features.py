"""What a network is given: the inputs that kvcast and the training agree on."""

from __future__ import annotations

DECAYS = (0.0, 0.5, 0.8, 0.9, 0.97)  # the first is the last score itself
