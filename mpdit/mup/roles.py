"""What a parameter is. Declared where its layer is built, never guessed from a name or a local shape."""

import dataclasses
import math
from enum import StrEnum
from typing import SupportsIndex

from torch import nn

from mpdit.errors import InputError


class Role(StrEnum):
    """Which dimensions of a parameter grow with the width (arXiv 2505.15270, Table 1)."""

    INPUT = "input"  # finite fan-in -> width: patch, text and timestep features, tables
    HIDDEN = "hidden"  # width -> width
    OUTPUT = "output"  # width -> finite: the readout, the first layer of REPA's projector
    VECTOR = "vector"  # biases, norm gains


class Group(StrEnum):
    """Parameters that share a base learning-rate multiplier (``mup.lr_mult.*``): the roles, two of them split."""

    INPUT = "input"
    TABLE = "table"  # input: embedding tables
    HIDDEN = "hidden"
    MODULATION = "modulation"  # hidden: adaLN linears
    OUTPUT = "output"
    VECTOR = "vector"


class Width(int):
    """A size that grows with the width, and its size in the proxy; ``3 * D`` grows too. Any other int is finite."""

    base: int

    def __new__(cls, size: int, base: int) -> "Width":
        self = super().__new__(cls, size)
        self.base = base
        return self

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.base  # torch layers keep their sizes, and are copied and pickled

    def __mul__(self, factor: SupportsIndex) -> "Width":
        return Width(int(self) * int(factor), self.base * int(factor))

    __rmul__ = __mul__


def base_of(size: int) -> int:
    """`size` in the proxy: smaller for a :class:`Width`, the same for a finite size."""
    return size.base if isinstance(size, Width) else size


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """A parameter's role and *global* shape; the same on every rank of every layout.

    ``base_fan_in`` and ``base_fan_out`` are those of the same parameter in the proxy: each tensor has its own ratio.
    ``gain`` is the initial standard deviation in units of 1/sqrt(fan_in), zero for an init at zero; ``fill`` is the
    constant that a vector starts from. ``in_block`` parameters lie on a residual branch: CompleteP's eps follows depth.
    """

    role: Role
    group: Group
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    base_fan_in: int
    base_fan_out: int
    gain: float = 1.0
    fill: float = 0.0
    in_block: bool = False


def matrix(fan_out: int, fan_in: int, *, group: Group | None = None, gain: float = 1.0) -> Tag:
    """The tag of a weight of shape [fan_out, fan_in]; its role follows from which of the two is a :class:`Width`."""
    grows = isinstance(fan_in, Width), isinstance(fan_out, Width)
    role = {(True, True): Role.HIDDEN, (True, False): Role.OUTPUT}.get(grows, Role.INPUT)
    return _tag(role, group or Group(role.value), (fan_out, fan_in), fan_out, fan_in, gain=gain)


def table(rows: int, width: Width, *, gain: float = 1.0) -> Tag:
    """The tag of a table [rows, width]: looked up by one-hot vectors, or added, so its fan-in counts as one."""
    return _tag(Role.INPUT, Group.TABLE, (rows, width), width, 1, gain=gain)


def vector(size: int, *, fill: float = 0.0) -> Tag:
    """The tag of a bias (fill 0) or a gain (fill 1) of shape [size]."""
    return _tag(Role.VECTOR, Group.VECTOR, (size,), size, 1, fill=fill)


def _tag(
    role: Role, group: Group, shape: tuple[int, ...], fan_out: int, fan_in: int, gain: float = 1.0, fill: float = 0.0
) -> Tag:
    return Tag(
        role=role,
        group=group,
        shape=tuple(int(size) for size in shape),
        fan_in=int(fan_in),
        fan_out=int(fan_out),
        base_fan_in=base_of(fan_in),
        base_fan_out=base_of(fan_out),
        gain=gain,
        fill=fill,
    )


def declare(module: nn.Module, **tags: Tag) -> None:
    """Say what a module's own parameters are; call it in the constructor: ``declare(self, weight=..., bias=...)``."""
    module.mup_tags = tags  # type: ignore[assignment]


def on_residual_branch(block: nn.Module) -> nn.Module:
    """Mark all that is declared under `block` as part of a residual branch; the block itself.

    But what says ``on_main_path`` lies between branches, as a U-ViT's skip layer does.
    """
    for module in block.modules():
        tags: dict[str, Tag] = getattr(module, "mup_tags", {})
        if tags and not getattr(module, "on_main_path", False):
            declare(module, **{name: dataclasses.replace(tag, in_block=True) for name, tag in tags.items()})
    return block


def collect(model: nn.Module) -> dict[str, Tag]:
    """The tags of all parameters under `model`, by full name.

    Raises InputError for a parameter that no layer declared, or whose size can't be a shard of the declared shape.
    """
    tags: dict[str, Tag] = {}
    for prefix, module in model.named_modules():
        declared: dict[str, Tag] = getattr(module, "mup_tags", {})
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if local not in declared:
                raise InputError(
                    f"parameter {name} {tuple(parameter.shape)} has no muP role; declare it where its layer is built "
                    "(mpdit.mup.roles.declare)."
                )
            tag = declared[local]
            if math.prod(tag.shape) % parameter.numel():
                raise InputError(f"parameter {name} {tuple(parameter.shape)} is no shard of the declared {tag.shape}.")
            tags[name] = tag
    return tags
