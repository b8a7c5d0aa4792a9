"""The learned predictor: inference here (``infer``), everything else (data, model, training, export) needs torch."""

from .telemetry import switch_off

switch_off()
