"""``mpdit sweep``: base hyperparameters searched on the proxy, each trial a training run of its own."""
