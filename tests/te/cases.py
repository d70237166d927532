"""The four networks, small, in layouts that exercise each mark of a parameter."""

from pathlib import Path
from typing import Any

import tiny
from mpdit.config import Config

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mmdit": {"model": {"depth": 4}},
    "dit": {"model": {"arch": "dit", "text_tokens": 1, "qk_norm": False}, "data": {"text": "labels"}},
    "pixart": {"model": {"arch": "pixart"}},
    "uvit": {"model": {"arch": "uvit", "depth": 5, "text_tokens": 7}},  # 1 + 7 + 16 tokens
}
# name: (ranks, section `parallel`)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "TP2": (2, {"tp": 2}),
    "TP2 + SP": (2, {"tp": 2, "sp": True}),
    "CP2": (2, {"cp": 2}),
}
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
FP8 = {"backend": "te", "precision": "fp8"}


def config(arch: str, /, **parallel: Any) -> Config:
    """Width 64 over a proxy of 32, so that muP's table is not trivial; four heads."""
    sections = ARCHITECTURES[arch]
    sizes = {"width": 64, "head_dim": 16, "vocab_size": 11, **sections["model"]}
    given = {**sections, "model": sizes, "mup": {"base_width": 32, "base_head_dim": 8}, "parallel": parallel}
    return tiny.config(Path("nowhere"), **given)
