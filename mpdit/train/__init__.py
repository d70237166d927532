"""The loop, checkpoints, EMA, meters and tracking."""
