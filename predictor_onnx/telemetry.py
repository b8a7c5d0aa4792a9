"""Nothing is sent anywhere: what dependencies would report of themselves is off in every process that imports kvcast."""

from __future__ import annotations

import os

OFF = {
    # from 1.29 on ONNX Runtime leaves a device id in the user's cache folder and sends events to its maker, from its import on;
    # what it was told when it was imported holds until the process ends. The second name is that of its first builds with this.
    "ORT_DISABLE_TELEMETRY": "1",
    "ORT_TELEMETRY_DISABLED": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub and transformers, for downloads that the user asks for
}


def switch_off() -> None:
    """Set what has to be set before those packages are imported. It goes before what the user has set, and on to child processes."""
    os.environ.update(OFF)
