"""Tiny pretrained models with random weights, saved to disk as the libraries save them: T5, CLIP, AutoencoderKL."""

import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["a", "red", "green", "blue", "yellow", "square", "at", *"0123456789"]


def save_t5(folder: Path, *, vocab_size: int = 64, features: int = 24, seed: int = 0) -> Path:
    """An encoder of so many features a token; its tokenizer is sentencepiece, as T5's."""
    import sentencepiece
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False, "minloglevel": 2}
    with (folder / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(WORDS * 8), model_writer=file, vocab_size=60, num_threads=1, **options
        )
    transformers.T5Tokenizer.from_pretrained(folder, extra_ids=0).save_pretrained(folder)
    sizes = {"d_model": features, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": vocab_size}
    return _save(folder, "T5EncoderModel", transformers.T5Config(**sizes), seed)


def save_clip(folder: Path, *, projected: int = 0, seed: int = 0) -> Path:
    """A text half of 20 features a token; `projected`: with a projection of the pooled vector to so many."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(set("".join(WORDS)))
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)  # without model_max_length
    tokenizer.save_pretrained(folder)
    config = transformers.CLIPTextConfig(
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(words),
        max_position_embeddings=77,
        projection_dim=projected or 512,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    return _save(folder, "CLIPTextModelWithProjection" if projected else "CLIPTextModel", config, seed)


def save_vae(folder: Path, *, factor: int = 2, seed: int = 0, **settings: Any) -> Path:
    """An autoencoder with 4 latent channels; `settings` go into its config."""
    from diffusers import AutoencoderKL

    levels = factor.bit_length()
    torch.manual_seed(seed)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        **settings,
    )
    network.save_pretrained(folder)
    return folder


def _save(folder: Path, name: str, config: Any, seed: int) -> Path:
    import transformers

    torch.manual_seed(seed)
    network = getattr(transformers, name)(config)
    for parameter in network.parameters():  # the libraries' own are so small that all captions look alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    return folder
