"""The learned predictor: inference here (``infer``), everything else (data, model, training, export) needs torch."""
