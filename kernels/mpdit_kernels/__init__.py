"""Fused operations of diffusion transformers, each with its reference in PyTorch. Knows nothing of mpdit."""
