"""A tiny data set, built by the real builder, and a tiny run on it, for tests that train."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mpdit import config as configs
from mpdit.config import Config

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40)}


# Of a run on pictures of several shapes: 16, 24 and 24 patches, which tp x cp of 2 x 2 divides.
BUCKETS = [[12, 12], [18, 12], [12, 18]]
_SIZES = [(12, 12), (14, 10), (12, 12), (10, 14), (14, 10)]  # height, width


def build_set(folder: Path, *, labelled: bool = False, mixed: bool = False) -> Path:
    """60 pictures of coloured squares in 12 x 12 pixels with captions -> shards under `folder`.

    `labelled`: the captions are the colours, and those are the set's classes. `mixed`: some pictures are tall and some
    wide, and a third is held out.
    """
    from mpdit_tools.data.main import main

    source = folder / "source"
    source.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for number in range(60):
        name, colour = list(COLOURS.items())[number % len(COLOURS)]
        pixels = np.full((*(_SIZES[number % len(_SIZES)] if mixed else (12, 12)), 3), 255, np.uint8)
        x, y = generator.integers(0, 6, 2)
        pixels[y : y + 6, x : x + 6] = colour
        Image.fromarray(pixels).save(source / f"{number:03d}.png")
        (source / f"{number:03d}.txt").write_text(name if labelled else f"a {name} square at {x} {y}")
    out = folder / "set"
    arguments = ["--out", str(out), "--size", "12", "--vocab-size", "300", *(["--classes"] if labelled else [])]
    arguments += ["--aspect", "keep", "--val", "0.33"] if mixed else []
    assert main(["build", "folder", str(source), *arguments]) == 0
    return out


# Every rule and every path is active: m = 2, decay, clipping, warm-up and cosine, no zero init.
BASE: dict[str, Any] = {
    "model": {"width": 32, "depth": 4, "head_dim": 8, "patch": 3, "image_size": 12, "text_tokens": 8},
    "mup": {"base_width": 16, "adaln_init": "hidden", "readout_init": "base", "output_mult": 1.5},
    "optim": {
        "lr": 4e-3,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "clip": 0.7,
        "warmup_steps": 3,
        "schedule": "cosine",
        "final_lr_ratio": 0.1,
        "eps": 1e-6,
    },
    "train": {"steps": 20, "batch_size": 8, "seed": 3, "val_images": 2, "ema_decay": 0.9},
    "sample": {"steps": 2},
}


def config(data: Path, /, *overrides: str, **sections: dict[str, Any]) -> Config:
    """The tiny run on `data` with sections merged in and dotted overrides on top."""
    tree: dict[str, Any] = {key: {**value} for key, value in BASE.items()}
    tree["data"] = {"path": str(data)}
    for key, value in sections.items():
        tree[key] = {**tree.get(key, {}), **value}
    for assignment in overrides:
        configs.override(tree, assignment)
    return configs.from_dict(tree)


def with_run_dir(config: Config, path: Path) -> Config:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(path)))
