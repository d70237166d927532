"""Named models, as aligned tables. Public shapes say where they come from; the MMDiT's is derived and says so.

MMDiT: the paper (Zheng et al., arXiv 2505.15270) gives 0.18B at width 512 and 18B, not the shape. At a fixed depth,
parameters grow with width squared, so x100 parameters is x10 width; 19 dual-stream blocks of 36 width^2 then give both.
"""

from typing import Any

# fmt: off
#  name                    arch      width  depth  head_dim  patch  image_size  channels  text_tokens
_TABLE = [
    ("mmdit-demo",        "mmdit",    128,     4,       32,     4,         32,        3,          16),
    ("mmdit-0.18b",       "mmdit",    512,    19,       64,     2,         32,        4,         128),
    ("mmdit-0.7b",        "mmdit",   1024,    19,       64,     2,         32,        4,         128),
    ("mmdit-2.9b",        "mmdit",   2048,    19,       64,     2,         32,        4,         128),
    ("mmdit-18b",         "mmdit",   5120,    19,       64,     2,         32,        4,         128),
]
# fmt: on
_COLUMNS = ("arch", "width", "depth", "head_dim", "patch", "image_size", "channels", "text_tokens")

PRESETS: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, *row in _TABLE}
