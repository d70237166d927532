"""What FP8 asks of a config and of a machine, and which blocks it acts on: plain arithmetic, without torch or a GPU.

The sizes are Transformer Engine's (2.20): pytorch/utils.py assert_dim_for_fp8_exec before the forward product,
common/gemm/cublaslt_gemm.cu CanonicalizeGemmInput before the backward ones, where the rows (tokens x samples) are the
inner dimension, and cuBLAS takes FP8 in strides of 16 bytes; MXFP8Quantizer for its blocks of 32. The hardware is
pytorch/quantization.py check_recipe_support.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

from mpdit.config import Config, Parallel, to_dict
from mpdit.errors import InputError

# Values of parallel.precision under which blocks multiply in FP8, and the backend that does it.
FP8 = {"fp8": "te", "fp8_emulated": "local"}
# DelayedScaling's own defaults: a scale is that of the largest value of so many steps.
AMAX_HISTORY, AMAX_ALGORITHM = 1024, "max"

_ARITHMETIC = ("precision", "backend", "fp8_recipe", "fp8_bf16_blocks")
_TILE = {"tensorwise": 16, "delayed": 16, "blockwise": 16, "mxfp8": 32}
_FORWARD_ROWS = {"tensorwise": 8, "delayed": 8, "blockwise": 8, "mxfp8": 32}  # that a rank quantises at once
_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
_BEYOND = {"mxfp8": (12, 0)}  # the first capability that has it no more
_CUDA = {"blockwise": (12, 9)}


def stored(precision: str) -> Literal["fp32", "bf16"]:
    """The type of parameters and of all that passes between layers: FP8 lives within a matrix product."""
    return "fp32" if precision == "fp32" else "bf16"


def arithmetic(parallel: Parallel | Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `parallel`, or of its part of a YAML file, that say how is computed, whatever the layout."""
    given = to_dict(parallel) if isinstance(parallel, Parallel) else parallel
    return {key: given[key] for key in _ARITHMETIC if key in given}


def said(parallel: Parallel) -> str:
    """The precision in a word or three."""
    if parallel.precision not in FP8:
        return parallel.precision
    return f"{parallel.precision} ({parallel.fp8_recipe})"


def anywhere(parallel: Parallel | Mapping[str, Any]) -> dict[str, Any]:
    """:func:`arithmetic` for a machine that may lack a GPU: what Transformer Engine computes in FP8 is in bf16 then, as
    its own passes without gradients are."""
    given = arithmetic(parallel)
    return {"precision": stored(given.get("precision", "fp32"))} if given.get("backend") == "te" else given


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
    backend = FP8[parallel.precision]
    if parallel.backend != backend:
        other = next(name for name, of in FP8.items() if of == parallel.backend)
        who = {"te": "Transformer Engine's linears", "local": "mpdit's own linears"}[backend]
        raise InputError(
            f"parallel.precision is {parallel.precision}, which {who} do, but parallel.backend is {parallel.backend}; "
            f"set parallel.backend={backend}{', on a GPU that has FP8' if backend == 'te' else ''}, or "
            f"parallel.precision={other}."
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


# ---- the machine -----------------------------------------------------------------------------------------------------


def number_format(recipe: str) -> Literal["hybrid", "e4m3"]:
    """hybrid: gradients in e5m2, for their range; scales of few numbers make e4m3 do for all."""
    return "hybrid" if recipe in ("tensorwise", "delayed") else "e4m3"


def recipes(capability: tuple[int, ...], cuda: tuple[int, ...] | None = None) -> tuple[str, ...]:
    """The values of ``parallel.fp8_recipe`` that a GPU of a compute capability has; `cuda` is torch's, if known."""
    return tuple(
        recipe
        for recipe, needed in _CAPABILITY.items()
        if capability >= needed
        and capability < _BEYOND.get(recipe, (1000, 0))
        and (cuda is None or cuda >= _CUDA.get(recipe, (0, 0)))
    )


def check_gpu(recipe: str, name: str, capability: tuple[int, int], cuda: tuple[int, int] | None = None) -> None:
    """Raises InputError where a GPU of this name and compute capability, with torch's `cuda`, lacks the recipe."""
    able = recipes(capability, cuda)
    if recipe in able:
        return
    instead = f"take {' or '.join(able)}, or " if able else ""
    needed = f"compute capability {_number(_CAPABILITY[recipe])}"
    if recipe in _BEYOND:
        needed += f" to below {_number(_BEYOND[recipe])}"
    if recipe in _CUDA:
        needed += f" and CUDA {_number(_CUDA[recipe])}"
    has = f"{_number(capability)}{f' and CUDA {_number(cuda)}' if cuda and recipe in _CUDA else ''}"
    raise InputError(
        f"parallel.fp8_recipe {recipe} needs {needed}, but {name} has {has}; {instead}set parallel.precision=bf16."
    )


def _number(pair: tuple[int, int]) -> str:
    return f"{pair[0]}.{pair[1]}"
