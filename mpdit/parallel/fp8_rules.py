"""What FP8 asks of a config, and which blocks it acts on: plain arithmetic, without torch or a GPU.

The sizes are Transformer Engine's (2.20): pytorch/utils.py assert_dim_for_fp8_exec before the forward product,
common/gemm/cublaslt_gemm.cu CanonicalizeGemmInput before the backward ones, where the rows (tokens x samples) are the
inner dimension, and cuBLAS takes FP8 in strides of 16 bytes; MXFP8Quantizer for its blocks of 32.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from mpdit.config import Config, Parallel, to_dict
from mpdit.errors import InputError

FP8 = ("fp8_emulated",)  # values of parallel.precision under which blocks multiply in FP8
# DelayedScaling's own defaults: a scale is that of the largest value of so many steps.
AMAX_HISTORY, AMAX_ALGORITHM = 1024, "max"

_ARITHMETIC = ("precision", "backend", "fp8_recipe", "fp8_bf16_blocks")
_TILE = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
_FORWARD_ROWS = {"tensorwise": 8, "delayed": 8, "blockwise": 8, "mxfp8": 32}  # that a rank quantises at once


def stored(precision: str) -> Literal["fp32", "bf16"]:
    """The type of parameters and of all that passes between layers: FP8 lives within a matrix product."""
    return "fp32" if precision == "fp32" else "bf16"


def arithmetic(parallel: Parallel | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `parallel`, or of its part of a YAML file, that say how is computed, whatever the layout."""
    given = to_dict(parallel) if isinstance(parallel, Parallel) else parallel
    return {key: given[key] for key in _ARITHMETIC if key in given}


def quantised(config: Config, block: int | None) -> bool:
    """Whether the linears of a block, counted from 0, multiply in FP8; None: what lies outside of the blocks."""
    ends = config.parallel.fp8_bf16_blocks
    return config.parallel.precision in FP8 and block is not None and ends <= block < config.model.depth - ends


def remembers(config: Config) -> dict[str, Any]:
    """How the numbers came about that FP8 keeps from step to step; empty where it keeps none."""
    parallel = config.parallel
    if parallel.precision not in FP8 or parallel.fp8_recipe != "delayed":
        return {}
    return {"fp8_recipe": parallel.fp8_recipe, "history": AMAX_HISTORY, "algorithm": AMAX_ALGORITHM}


def check(config: Config) -> None:
    """Backend, blocks and features of `config`. Raises InputError; nothing is asked of another precision."""
    model, parallel = config.model, config.parallel
    if parallel.precision not in FP8:
        return
    if parallel.backend != "local":
        raise InputError(
            f"parallel.precision is {parallel.precision}, which mpdit's own linears do, but parallel.backend is "
            f"{parallel.backend}; set parallel.backend=local."
        )
    if 2 * parallel.fp8_bf16_blocks >= model.depth:
        raise InputError(
            f"parallel.fp8_bf16_blocks {parallel.fp8_bf16_blocks} at each end leaves none of model.depth {model.depth} "
            "blocks in FP8; lower it, or set parallel.precision=bf16."
        )
    features, tile = model.width // parallel.tp, _TILE[parallel.fp8_recipe]
    if features % tile:
        raise InputError(
            f"model.width {model.width} over parallel.tp {parallel.tp} is {features} features a rank, but FP8 needs a "
            f"multiple of {tile} (parallel.fp8_recipe {parallel.fp8_recipe}); choose another width or tp, or set "
            "parallel.precision=bf16."
        )


def check_rows(config: Config, tokens: int, what: str) -> None:
    """A stream of `tokens` tokens of the whole model, in micro-batches of ``parallel.micro_batch``; `what` names it and
    its keys.

    Raises InputError where a rank's rows in training do not fit FP8's tiles.
    """
    parallel = config.parallel
    if parallel.precision not in FP8:
        return
    rows, tile = tokens // parallel.cp * parallel.micro_batch, _TILE[parallel.fp8_recipe]
    # Under SP a rank quantises its share of the tokens, which are joined afterwards.
    shares = parallel.tp if parallel.sp else 1
    wanted = math.lcm(tile, _FORWARD_ROWS[parallel.fp8_recipe] * shares)
    if rows % wanted == 0:
        return
    over = f" over parallel.cp {parallel.cp}" if parallel.cp > 1 else ""
    raise InputError(
        f"{what}{over} x parallel.micro_batch {parallel.micro_batch} = {rows} rows are no multiple of {wanted}, which "
        f"FP8 needs (parallel.fp8_recipe {parallel.fp8_recipe}); choose parallel.micro_batch or the tokens so, or set "
        "parallel.precision=bf16."
    )
