"""What shapes the operations take, said in one sentence where they are others."""

from torch import Tensor


def check_rows(x: Tensor, same: dict[str, Tensor], modulations: dict[str, Tensor | None]) -> None:
    """x [P, Q, D], `same` of that shape, modulations [1 or P, 1 or Q, D] that vary over P or over Q, not both.

    Raises ValueError.
    """
    shape = x.shape
    if len(shape) != 3 or shape[-1] == 0:
        raise ValueError(f"x has shape {list(shape)}, but should have three dimensions, the last of at least 1.")
    for name, tensor in same.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, but should have that of x, {list(shape)}.")
        _check_device(name, tensor, x)
    varies = [False, False]
    there = {name: tensor for name, tensor in modulations.items() if tensor is not None}
    for name, tensor in there.items():
        found = tensor.shape
        if len(found) != 3 or found[2] != shape[2] or any(found[dim] not in (1, shape[dim]) for dim in (0, 1)):
            P, Q, D = shape
            raise ValueError(
                f"{name} has shape {list(found)}, but with x {list(shape)} it should have [1, {Q}, {D}], [{P}, 1, {D}] "
                f"or [1, 1, {D}]."
            )
        _check_device(name, tensor, x)
        varies = [before or found[dim] > 1 for dim, before in enumerate(varies)]
    if all(varies):
        shapes = {name: list(tensor.shape) for name, tensor in there.items()}
        raise ValueError(
            f"the modulations have shapes {shapes}, but should all be the same along the first dimension or all be the "
            "same along the second."
        )


def check_vector(name: str, tensor: Tensor, x: Tensor) -> None:
    """`tensor` [D] of x [..., D]. Raises ValueError."""
    if tensor.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but should have [{x.shape[-1] if x.ndim else 1}], the last of x "
            f"{list(x.shape)}."
        )
    _check_device(name, tensor, x)


def check_heads(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """x [P, Q, H, d]; tables, both or none, [1 or P, 1 or Q, d / 2]. Raises ValueError."""
    shape = x.shape
    if len(shape) != 4 or 0 in shape[2:]:
        raise ValueError(f"x has shape {list(shape)}, but should have four dimensions, the last two of at least 1.")
    if cos is None and sin is None:
        return
    P, Q, _, d = shape
    if d % 2:
        raise ValueError(f"x has heads of {d} numbers, but for a rotation in pairs it should be an even number.")
    for name, table in {"cos": cos, "sin": sin}.items():
        if table is None:
            raise ValueError(f"{name} is missing, but cos and sin should come together.")
        found = table.shape
        if len(found) != 3 or found[2] != d // 2 or found[0] not in (1, P) or found[1] not in (1, Q):
            raise ValueError(
                f"{name} has shape {list(found)}, but with x {list(shape)} it should have [{P}, 1, {d // 2}], "
                f"[1, {Q}, {d // 2}] or [{P}, {Q}, {d // 2}]."
            )
        _check_device(name, table, x)
    assert cos is not None
    assert sin is not None
    if cos.shape != sin.shape:
        raise ValueError(f"cos has shape {list(cos.shape)} and sin {list(sin.shape)}, but they should be the same.")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, but should be where x is, on {x.device}.")
