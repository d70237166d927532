"""REPA: the image tokens of one block, projected, point where a frozen teacher's features do (Yu et al., arXiv
2410.06940, section 3.3). The teacher itself is mpdit.objective.repa; only its number of features matters here.

S image tokens of this context rank, B samples, D width, F features of the teacher.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.config import Config, Objective
from mpdit.errors import InputError
from mpdit.models.layers import Inputs
from mpdit.parallel import tokens
from mpdit.parallel.context import Context
from mpdit.parallel.linears import Readout, ReplicatedLinear
from mpdit.parallel.stages import Auxiliary, Grid, Parts

HIDDEN = 2048  # of the projector, as in REPA's code
_FEATURES = {"efficientnet_lite0": 112}


def auxiliary(ctx: Context, parts: Parts) -> Auxiliary | None:
    """REPA's loss for whoever puts the network on stages; None where it is off. Raises InputError for no teacher."""
    objective = ctx.config.objective
    if not objective.repa_weight:
        return None
    features, block = teacher_features(objective), block_index(ctx.config)
    image = Grid.of(ctx.config.model)
    mixed = parts.streams(block + 1, image)[0].tokens != image.tokens
    return Auxiliary(
        block=block,
        weight=objective.repa_weight,
        build=lambda: Alignment(ctx, features, mixed=mixed),
    )


def block_index(config: Config) -> int:
    """The block, counted from 0, after which the tokens are aligned."""
    return (config.objective.repa_block or max(1, config.model.depth // 3)) - 1


def teacher_features(objective: Objective) -> int:
    """F, without loading the teacher. Raises InputError if ``objective.repa_teacher`` is neither known nor a DINOv2."""
    known = _FEATURES.get(objective.repa_teacher)
    return known or _dinov2_features(Path(objective.repa_teacher))


def _dinov2_features(folder: Path) -> int:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"objective.repa_teacher is {str(folder)!r}, but should be {', '.join(_FEATURES)}, or the local folder of "
            "a DINOv2 model with a config.json."
        )
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}), but should be a DINOv2's config.") from error
    kind, features = (found.get(key) if isinstance(found, dict) else None for key in ("model_type", "hidden_size"))
    if kind not in ("dinov2", "dinov2_with_registers") or type(features) is not int or features < 1:
        raise InputError(
            f"{path}: has model_type {kind!r} and hidden_size {features!r}, but should be of a dinov2 or "
            "dinov2_with_registers."
        )
    return features


class Alignment(nn.Module):
    """The projector, three linears with SiLU between them, and the loss. Every tensor rank computes it whole.

    The first linear is width -> finite, so under muP an output layer; the others are finite -> finite. `mixed`: the
    first stream ends with the image's tokens, but has others before them.
    """

    def __init__(self, ctx: Context, features: int, *, mixed: bool) -> None:
        super().__init__()
        self.ctx, self.mixed, self.image_tokens = ctx, mixed, Grid.of(ctx.config.model).tokens
        self.linear_1 = Readout(ctx, HIDDEN, gain=1.0)
        self.linear_2 = ReplicatedLinear(ctx, HIDDEN, HIDDEN)
        self.linear_3 = ReplicatedLinear(ctx, HIDDEN, features)

    def forward(self, streams: tuple[Tensor, ...], inputs: Inputs) -> Tensor | None:
        """The mean of 1 - cosine over this context rank's image tokens, fp32; None without a teacher's features."""
        if inputs.teacher_SBF is None:
            return None
        x_SBD = tokens.gather(self.ctx, streams[0])
        if self.mixed:  # a context rank's share of the stream is no share of the image
            x_SBD = tokens.own_context(tokens.join_context(x_SBD)[-self.image_tokens :])
        projected_SBF = self.linear_3(F.silu(self.linear_2(F.silu(self.linear_1(x_SBD)))))
        cosine_SB = F.cosine_similarity(projected_SBF.float(), inputs.teacher_SBF, dim=-1)
        return (1 - cosine_SB).mean()
