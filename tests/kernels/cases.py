"""Inputs that training produces, and those that are at the edge of what the operations take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import oracle
from kernels.oracle import Leaves, random
from mpdit_kernels import heads, modulate

OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    name: (getattr(module, name), getattr(oracle, name))
    for module, names in {
        modulate: (
            *("layer_norm_modulate", "gated_residual", "gated_residual_modulate"),
            *("layer_norm", "residual_layer_norm"),
        ),
        heads: ("head_norm",),
    }.items()
    for name in names
}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """x of `shape` and modulations that broadcast to it. `modulation`: a shape, out of one tensor in six chunks."""

    shape: tuple[int, int, int]
    modulation: tuple[int, int, int]
    view: str = "contiguous"  # of x and the branch: contiguous, transposed, every other, columns

    def leaves(self, dtype: torch.dtype, device: str, modulation_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        P, Q, D = self.shape
        stored = {
            "contiguous": (P, Q, D),
            "transposed": (Q, P, D),
            "every other": (2 * P, Q, D + 3),
            "columns": (P, D, Q),
        }[self.view]
        first, second, _ = self.modulation
        return {
            "x": random(*stored, seed=1, dtype=dtype, device=device),
            "branch": random(*stored, seed=2, dtype=dtype, device=device),
            "modulation": random(first, second, 6 * D, seed=3, dtype=modulation_dtype or dtype, device=device),
            "affine": random(2, D, seed=4, dtype=modulation_dtype or dtype, device=device),
        }

    def seen(self, stored: Tensor) -> Tensor:
        D = self.shape[2]
        return {
            "contiguous": lambda: stored,
            "transposed": lambda: stored.transpose(0, 1),
            "every other": lambda: stored[::2, :, :D],
            "columns": lambda: stored.transpose(1, 2),
        }[self.view]()

    def arguments(self, operation: str, *, gated: bool = True) -> Callable[[Leaves], tuple[Any, ...]]:
        def made(leaves: Leaves) -> tuple[Any, ...]:
            x, branch = self.seen(leaves["x"]), self.seen(leaves["branch"])
            shift, scale, gate, *_ = leaves["modulation"].chunk(6, -1)
            gain, bias = leaves["affine"]
            gate = gate if gated else None
            return {
                "layer_norm_modulate": (x, shift, scale),
                "gated_residual": (x, gate, branch),
                "gated_residual_modulate": (x, gate, branch, shift, scale),
                "layer_norm": (x, gain, bias),
                "residual_layer_norm": (x, branch, gain, bias),
            }[operation]

        return made


USED = {
    "layer_norm_modulate": ("x", "modulation"),
    "gated_residual": ("x", "branch", "modulation"),
    "gated_residual_modulate": ("x", "branch", "modulation"),
    "layer_norm": ("x", "affine"),
    "residual_layer_norm": ("x", "branch", "affine"),
}


def rows_errors(
    operation: str,
    rows: Rows,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    gated: bool = True,
    multiplier: float | None = None,
    modulation_dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """:func:`oracle.errors` of one of USED."""
    used = [name for name in USED[operation] if gated or not (name == "modulation" and operation == "gated_residual")]
    arguments, leaves = rows.arguments(operation, gated=gated), rows.leaves(dtype, device, modulation_dtype)
    absent = {name: leaf for name, leaf in leaves.items() if name not in used}
    constants = () if multiplier is None else (multiplier,)
    return oracle.errors(
        *OPERATIONS[operation],
        {name: leaves[name] for name in used},
        # The oracle's arguments are float64 throughout, also those that an operation does not use.
        lambda given: arguments({**absent, **given}),
        *constants,
    )


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Queries, keys or values: one of three in a tensor [P, Q, H, 3, d], or in [P, Q, H, d] by itself."""

    shape: tuple[int, int, int, int]
    packed: bool = True
    table: tuple[int, int] | None = None  # leading dimensions of cos and sin

    def errors(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, float]:
        P, Q, H, d = self.shape
        leaves = {
            "x": random(*((P, Q, H, 3, d) if self.packed else self.shape), seed=1, dtype=dtype, device=device),
            "gain": random(d, seed=2, dtype=dtype, device=device),
        }
        if self.table:
            angle = random(*self.table, d // 2, seed=3)
            leaves |= {"_cos": angle.cos().to(device), "_sin": angle.sin().to(device)}

        def arguments(given: Leaves) -> tuple[Any, ...]:
            x = given["x"][..., 1, :] if self.packed else given["x"]
            return x, given["gain"], 1e-6, given.get("_cos"), given.get("_sin")

        return oracle.errors(*OPERATIONS["head_norm"], leaves, arguments)


WIDTHS = (64, 72, 288, 1009, 1152, 5120)  # 1009 is prime: no two of its numbers can be loaded at once

LAYOUTS: dict[str, Rows] = {
    "sequence first": Rows(shape=(11, 2, 72), modulation=(1, 2, 72)),
    "batch first": Rows(shape=(2, 11, 72), modulation=(2, 1, 72)),
    "one for all samples": Rows(shape=(11, 2, 72), modulation=(1, 1, 72)),
    "many chunks": Rows(shape=(150, 1, 16), modulation=(1, 1, 16)),
    "transposed": Rows(shape=(11, 2, 72), modulation=(1, 2, 72), view="transposed"),
    "every other token": Rows(shape=(11, 2, 72), modulation=(1, 2, 72), view="every other"),
    "columns of another": Rows(shape=(5, 3, 72), modulation=(1, 3, 72), view="columns"),
    "one token": Rows(shape=(1, 3, 72), modulation=(1, 3, 72)),
    "one sample": Rows(shape=(7, 1, 72), modulation=(1, 1, 72)),
    "one row": Rows(shape=(1, 1, 72), modulation=(1, 1, 72)),
    "no tokens": Rows(shape=(0, 3, 72), modulation=(1, 3, 72)),
    "no samples": Rows(shape=(7, 0, 72), modulation=(1, 0, 72)),
    "no samples, one for all": Rows(shape=(7, 0, 72), modulation=(1, 1, 72)),
    "width 1": Rows(shape=(5, 2, 1), modulation=(1, 2, 1)),
    "width 3": Rows(shape=(5, 2, 3), modulation=(1, 2, 3)),  # of 2, n is 1 and -1 and x has no gradient
}

HEADS: dict[str, Heads] = {
    "sequence first": Heads(shape=(11, 2, 5, 64)),
    "batch first": Heads(shape=(2, 11, 5, 64)),
    "PixArt's heads of 72": Heads(shape=(9, 2, 4, 72)),
    "heads of 8": Heads(shape=(9, 2, 4, 8)),
    "heads of an odd width": Heads(shape=(5, 2, 3, 13)),
    "by itself": Heads(shape=(7, 2, 3, 64), packed=False),
    "one row": Heads(shape=(1, 1, 1, 64)),
    "no tokens": Heads(shape=(0, 2, 3, 64)),
    "no samples": Heads(shape=(5, 0, 3, 64)),
    "rotated": Heads(shape=(11, 2, 5, 64), table=(11, 1)),
    "rotated, batch first": Heads(shape=(2, 11, 5, 64), table=(1, 11)),
    "rotated, positions of each sample": Heads(shape=(6, 3, 2, 72), table=(6, 3)),
    "rotated, the same for all": Heads(shape=(6, 3, 2, 6), table=(1, 1)),
}
