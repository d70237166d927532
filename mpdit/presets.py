"""Named models, as one aligned table: sizes, and the number of parameters that are learned.

Published: DiT (Peebles & Xie, arXiv 2212.09748, Table 1) at patch 2, 4 and 8; U-ViT (Bao et al., arXiv 2209.12152,
Table 1); PixArt-alpha (Chen et al., arXiv 2310.00426) at 0.61B, and at the 0.04B of its proxy in Zheng et al.
(arXiv 2505.15270). DiT's authors count the fixed positions as well, tokens x width: 294,912 more for XL/2. U-ViT's
code counts blocks without the middle one; here depth counts all of them.

Derived: MMDiT. Zheng et al. give 0.18B at width 512 and 18B, not the shape. At a fixed depth parameters grow with
width squared, so x100 parameters is x10 width; 19 dual-stream blocks of 36 width^2 then give 0.182B and 17.7B.
"""

from typing import Any

# 32 x 32 x 4: 256 x 256 pixels under an autoencoder that shrinks the sides by 8.
_LATENTS: dict[str, Any] = {"image_size": 32, "channels": 4, "mlp_ratio": 4, "qk_norm": False, "learn_sigma": False}
_CLASSES = {**_LATENTS, "text_tokens": 1, "vocab_size": 1001, "text_dim": 0, "pooled_dim": 0}  # ImageNet's, "no class"
_CAPTIONS = {**_LATENTS, "vocab_size": 0, "text_dim": 4096, "pooled_dim": 0}  # features of T5-XXL

# What the rows of a family share.
_FAMILIES: dict[str, dict[str, Any]] = {
    "dit": {"arch": "dit", **_CLASSES, "learn_sigma": True},
    "uvit": {"arch": "uvit", **_CLASSES},
    "pixart": {"arch": "pixart", **_CAPTIONS, "text_tokens": 120, "learn_sigma": True},
    "mmdit": {"arch": "mmdit", **_CAPTIONS, "text_tokens": 128, "qk_norm": True},
    "pixels": {"arch": "mmdit", **_CAPTIONS, "text_tokens": 16, "text_dim": 0, "qk_norm": True, "channels": 3},
}

# fmt: off
_TABLE = [
    # name            family    width  depth  heads  patch      parameters
    ("dit-s-2",       "dit",      384,    12,     6,     2,     32_865_056),
    ("dit-s-4",       "dit",      384,    12,     6,     4,     32_920_448),
    ("dit-s-8",       "dit",      384,    12,     6,     8,     33_142_016),
    ("dit-b-2",       "dit",      768,    12,    12,     2,    130_315_808),
    ("dit-b-4",       "dit",      768,    12,    12,     4,    130_426_496),
    ("dit-b-8",       "dit",      768,    12,    12,     8,    130_869_248),
    ("dit-l-2",       "dit",     1024,    24,    16,     2,    457_840_672),
    ("dit-l-4",       "dit",     1024,    24,    16,     4,    457_988_224),
    ("dit-l-8",       "dit",     1024,    24,    16,     8,    458_578_432),
    ("dit-xl-2",      "dit",     1152,    28,    16,     2,    674_834_720),
    ("dit-xl-4",      "dit",     1152,    28,    16,     4,    675_000_704),
    ("dit-xl-8",      "dit",     1152,    28,    16,     8,    675_664_640),
    ("uvit-s-2",      "uvit",     512,    13,     8,     2,     44_772_516),
    ("uvit-m-2",      "uvit",     768,    17,    12,     2,    130_891_940),
    ("uvit-l-2",      "uvit",    1024,    21,    16,     2,    286_763_172),
    ("uvit-h-2",      "uvit",    1152,    29,    16,     2,    500_832_164),
    ("pixart-0.04b",  "pixart",   288,    28,     4,     2,     39_246_656),
    ("pixart-0.61b",  "pixart",  1152,    28,    16,     2,    610_856_096),
    ("mmdit-demo",    "pixels",   128,     4,     4,     4,      2_288_816),  # without its text table
    ("mmdit-0.18b",   "mmdit",    512,    19,     8,     2,    181_584_656),
    ("mmdit-0.7b",    "mmdit",   1024,    19,    16,     2,    717_058_832),
    ("mmdit-2.9b",    "mmdit",   2048,    19,    32,     2,  2_849_690_384),
    ("mmdit-18b",     "mmdit",   5120,    19,    80,     2, 17_741_050_640),
]
# fmt: on

PRESETS: dict[str, dict[str, Any]] = {
    name: {**_FAMILIES[family], "width": width, "depth": depth, "head_dim": width // heads, "patch": patch}
    for name, family, width, depth, heads, patch, _ in _TABLE
}
"""Every key of ``model`` by the name that ``model.preset`` takes."""

PARAMETERS: dict[str, int] = {name: parameters for name, *_, parameters in _TABLE}
"""Learned numbers of each preset, without rows for tokens where the data set says how many (vocab_size 0)."""
