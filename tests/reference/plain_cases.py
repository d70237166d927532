"""What the tests of the references share: small shapes, batches, and weights with nothing at its neutral value."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from reference import plain_common, plain_dit, plain_mmdit, plain_pixart, plain_uvit

GRID = (6, 4)  # not square, so that rows and columns cannot be exchanged unseen
SMALL = {"width": 48, "depth": 3, "head_dim": 12, "patch": 2, "channels": 3, "vocab": 23}
TOKENS = 7

CASES: dict[str, tuple[ModuleType, plain_common.Shape]] = {
    "mmdit": (plain_mmdit, plain_mmdit.Shape(**SMALL)),
    "dit": (plain_dit, plain_dit.Shape(**SMALL)),
    "pixart": (plain_pixart, plain_pixart.Shape(**SMALL)),
    "pixart, features": (plain_pixart, plain_pixart.Shape(**SMALL, text_dim=10)),
    "uvit": (plain_uvit, plain_uvit.Shape(**SMALL, grid=GRID, text_tokens=TOKENS)),
    "uvit, features": (plain_uvit, plain_uvit.Shape(**SMALL, grid=GRID, text_tokens=TOKENS, text_dim=10)),
}


def make_batch(
    s: plain_common.Shape,
    *,
    batch: int = 3,
    grid: tuple[int, int] = GRID,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.float32,
) -> plain_common.Batch:
    """With one token labels, else captions with padding; features of the text where the shape wants them."""
    g = torch.Generator().manual_seed(5)
    size = (batch, s.channels, grid[0] * s.patch, grid[1] * s.patch)
    ids_BL = torch.randint(1, s.vocab, (batch, tokens), generator=g)
    if tokens > 1:
        ids_BL[0, 4:], ids_BL[1, 6:] = plain_mmdit.PAD, plain_mmdit.PAD
    text_dim = getattr(s, "text_dim", 0)
    return plain_common.Batch(
        image_BCYX=torch.randn(size, generator=g, dtype=dtype),
        noise_BCYX=torch.randn(size, generator=g, dtype=dtype),
        t_B=torch.rand(batch, generator=g, dtype=dtype),
        ids_BL=ids_BL,
        features_LBE=torch.randn(tokens, batch, text_dim, generator=g, dtype=dtype) if text_dim else None,
    )


def case_batch(plain: ModuleType, s: plain_common.Shape, dtype: torch.dtype = torch.float32) -> plain_common.Batch:
    return make_batch(s, tokens=1 if plain is plain_dit else TOKENS, dtype=dtype)


def make_weights(plain: ModuleType, s: plain_common.Shape, seed: int = 0) -> dict[str, Tensor]:
    """Weights with nothing at 0 or 1, biases and gains included, so that leaving one out is seen."""
    g = torch.Generator().manual_seed(seed)
    return {n: w + 0.1 * torch.randn(w.shape, generator=g) for n, w in plain.init(s, seed).items()}


def count(plain: ModuleType, s: plain_common.Shape) -> int:
    """Numbers in all parameters."""
    return sum(torch.Size(p.shape).numel() for p in plain.parameters(s).values())


def assert_rule(plain: ModuleType, s: plain_common.Shape, name: str, expected: tuple[float, ...]) -> None:
    """(init std, LR, weight decay, eps, multiplier) of a parameter at the width of `s`, from base width 48."""
    rule = plain.rules(s, plain_common.Recipe(base_width=48, lr=2e-3, weight_decay=0.1, eps=1e-6))[name]
    got = (rule.init_std, rule.lr, rule.weight_decay, rule.eps, rule.multiplier)
    assert got == pytest.approx(expected)


def swap_patch_order(rows: Tensor, s: plain_common.Shape) -> Tensor:
    """First dimension from (row, column, channel) to (channel, row, column), as torch's fold wants it."""
    return rows.unflatten(0, (s.patch, s.patch, -1)).movedim(2, 0).flatten(0, 2)


def assert_gradients_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 3e-5) -> None:
    """Under the twin's names, by the norm of each difference. Only the twin may lack some (tied copies).

    Rounding is all there is of some: a bias of keys adds the same to all scores of a query, which softmax undoes.
    """
    assert set(theirs) <= set(ours)
    rounding = 1e-7 * torch.stack([grad.norm() for grad in theirs.values()]).norm()
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= tolerance * grad.norm() + rounding, name
