"""Numbers of which a kernel is not compiled again for every multiple of 16: the constant VECTOR tells what matters."""

_TENSORS = ("x", "branch", "gate", "shift", "scale", "out", "r", "ds", "do", "db", "dx", "table")

NUMBERS = [
    *("rows", "chunks", "chunk_rows", "chunk_tiles"),
    *(f"{tensor}_{step}" for tensor in _TENSORS for step in ("group", "row", "head")),
]
