"""What a parameter is. Declared where its layer is built (law 1), never guessed from a name or a local shape."""

import dataclasses
import math
from enum import StrEnum

from torch import nn

from mpdit.errors import InputError


class Role(StrEnum):
    """Which dimensions of a parameter grow with the width (arXiv 2505.15270, Table 1)."""

    INPUT = "input"  # finite fan-in -> width: patch, text and timestep features, tables
    HIDDEN = "hidden"  # width -> width
    OUTPUT = "output"  # width -> finite: the readout
    VECTOR = "vector"  # biases, norm gains


class Group(StrEnum):
    """Parameters that share a base learning-rate multiplier (``mup.lr_mult.*``): the roles, two of them split."""

    INPUT = "input"
    TABLE = "table"  # input: embedding tables
    HIDDEN = "hidden"
    MODULATION = "modulation"  # hidden: adaLN linears
    OUTPUT = "output"
    VECTOR = "vector"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """A parameter's role and *global* shape; the same on every rank of every layout.

    ``gain`` is the initial standard deviation in units of 1/sqrt(fan_in); ``fill`` is the constant that a vector starts
    from. ``eps_follows_width`` is False where the gradient does not shrink with the width (the readout's bias, gains
    shared by all heads: facts measured in the coordinate check).
    """

    role: Role
    group: Group
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    gain: float = 1.0
    fill: float = 0.0
    eps_follows_width: bool = True


def matrix(role: Role, fan_out: int, fan_in: int, *, group: Group | None = None, gain: float = 1.0) -> Tag:
    """The tag of a weight of shape [fan_out, fan_in]."""
    return Tag(
        role=role, group=group or Group(role.value), shape=(fan_out, fan_in), fan_in=fan_in, fan_out=fan_out, gain=gain
    )


def table(rows: int, width: int) -> Tag:
    """The tag of an embedding table [rows, width]: looked up by one-hot vectors, so its fan-in counts as one."""
    return Tag(role=Role.INPUT, group=Group.TABLE, shape=(rows, width), fan_in=1, fan_out=width)


def vector(size: int, *, fill: float = 0.0, eps_follows_width: bool = True) -> Tag:
    """The tag of a bias (fill 0) or a gain (fill 1) of shape [size]."""
    return Tag(
        role=Role.VECTOR,
        group=Group.VECTOR,
        shape=(size,),
        fan_in=1,
        fan_out=size,
        fill=fill,
        eps_follows_width=eps_follows_width,
    )


def declare(module: nn.Module, **tags: Tag) -> None:
    """Say what a module's own parameters are; call it in the constructor: ``declare(self, weight=..., bias=...)``."""
    module.mup_tags = tags  # type: ignore[assignment]


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
