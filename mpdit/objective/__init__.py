"""What is learned: targets, timesteps, and draws keyed by sample."""
