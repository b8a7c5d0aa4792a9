"""What to attend to: history, predictors, selection, pool."""
