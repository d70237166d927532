"""mpdit: model-parallel pretraining of text-to-image diffusion transformers under muP."""

__version__ = "0.1.0"
