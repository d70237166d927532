"""Which layers are asked to multiply in FP8, when; and that what surrounds them is the local backend's."""

import dataclasses
from typing import Any

import pytest
import torch
from cases import ARCHITECTURES, FP8, LAYOUTS, RECIPES, config
from test_layers import built

import ranks
from mpdit.config import Config

CLASSES = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


def batch(config: Config) -> Any:
    from mpdit.models.layers import Inputs

    draw = torch.Generator().manual_seed(1)
    model = config.model
    return Inputs(
        image_BCHW=torch.randn(2, model.channels, model.image_size, model.image_size, generator=draw),
        time_B=torch.rand(2, generator=draw),
        text_BL=torch.randint(1, model.vocab_size, (2, model.text_tokens), generator=draw),
    )


# ---- the same numbers ------------------------------------------------------------------------------------------------


def computed(rank: int, world: int, config: Config) -> list[dict[str, torch.Tensor]]:
    """Prediction and gradients of both backends."""
    from stand_in import computing

    from mpdit.parallel import groups

    groups.start(config.parallel, seed=0)
    found = []
    for backend in ("te", "local"):
        parallel = dataclasses.replace(config.parallel, backend=backend)
        _, stage = built(dataclasses.replace(config, parallel=parallel))
        with computing():
            prediction = stage(batch(config))
        prediction.square().mean().backward()
        gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
        found.append({"prediction": prediction.detach(), **gradients})
    groups.stop()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_network_of_te_layers_computes_the_same(arch: str, layout: str) -> None:
    """Layers in their places, tokens and heads where TE expects them, recompute or not."""
    world, parallel = LAYOUTS[layout]
    for te, own in ranks.run(world, computed, config=config(arch, **parallel)):
        assert te.keys() == own.keys()
        for name, value in te.items():
            torch.testing.assert_close(value, own[name], rtol=1e-4, atol=1e-6, msg=name)


# ---- FP8 contexts ----------------------------------------------------------------------------------------------------


def passes(rank: int, world: int, config: Config, gradients: bool) -> dict[str, tuple[str, str | None, bool | None]]:
    """By layer: the recipe it ran under, which ranks scale with it, whether it was told of a first micro-batch."""
    from megatron.core import parallel_state
    from stand_in import computing

    from mpdit.parallel import groups

    groups.start(config.parallel, seed=0)
    _, stage = built(config)
    names = {module: name for name, module in stage.named_modules()}
    with computing((10, 0)) as calls, torch.set_grad_enabled(gradients):
        stage(batch(config))
    amax = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    groups.stop()
    assert len({names[call.layer] for call in calls}) == len(calls)
    known = {None: None, amax: "amax"}
    return {names[call.layer]: (call.recipe, known.get(call.group, "another"), call.first) for call in calls}


def linear_names(arch: str) -> set[str]:
    both = {"attn.proj", "mlp.fc1", "mlp.fc2"}
    return {
        "mmdit": {f"{s}.{n}" for s in ("img", "txt") for n in ("qkv.linear", "proj", "mlp.fc1", "mlp.fc2")},
        "dit": both | {"attn.qkv.linear"},
        "pixart": both | {"attn.qkv.linear", "cross.q", "cross.kv", "cross.proj"},
        "uvit": both | {"attn.qkv.linear", "skip"},
    }[arch]


@pytest.mark.dist
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_hidden_linears_of_inner_blocks_run_in_fp8_and_nothing_else(arch: str, recipe: str, recompute: str) -> None:
    given = config(arch, **FP8, fp8_recipe=recipe, recompute=recompute)
    found = ranks.run(1, passes, config=given, gradients=True)[0]
    in_fp8 = {name for name, (kind, _, _) in found.items() if kind != "bf16"}
    inner = range(1, given.model.depth - 1)
    wanted = {f"blocks.{block}.{name}" for block in inner for name in linear_names(arch)}
    if arch == "uvit":  # only what lies behind the middle takes a skip
        wanted -= {f"blocks.{block}.skip" for block in (1, 2)}
    assert in_fp8 == wanted
    assert {found[name] for name in in_fp8} == {(CLASSES[recipe], "amax", True)}
    assert {found[name] for name in found.keys() - in_fp8} == {("bf16", None, None)}


@pytest.mark.dist
def test_passes_without_gradients_are_in_bf16() -> None:
    """Validation and pictures, whose batches have any size."""
    found = ranks.run(1, passes, config=config("mmdit", **FP8), gradients=False)[0]
    assert {kind for kind, _, _ in found.values()} == {"bf16"}


def first_micro_batches(rank: int, world: int, config: Config) -> list[set[bool | None]]:
    """What FP8 linears were told of two micro-batches in each of two steps of Megatron's schedule."""
    from stand_in import computing

    from mpdit.parallel import groups, schedule

    groups.start(config.parallel, seed=0)
    ctx, stage = built(config)
    from mpdit import models

    @dataclasses.dataclass
    class MicroBatch:
        inputs: Any
        size: int = 2

    told = []
    for _ in range(2):
        with computing() as calls:
            schedule.forward_backward(
                ctx,
                [stage],
                [MicroBatch(batch(config)) for _ in range(2)],
                lambda prediction, _: prediction.float().square().mean(),
                models.crossing(ctx),
            )
        linears = [call for call in calls if call.recipe != "bf16"]
        told += [{call.first for call in half} for half in (linears[: len(linears) // 2], linears[len(linears) // 2 :])]
    groups.stop()
    return told


@pytest.mark.dist
def test_fp8_weights_are_made_anew_with_the_first_micro_batch_of_each_step() -> None:
    given = config("dit", **FP8)
    assert ranks.run(1, first_micro_batches, config=given)[0] == [{True}, {False}, {True}, {False}]
