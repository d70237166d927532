"""What a GPU is asked by test_te_gpu.py, in a process of its own: CUDA does not survive a fork.

python te_gpu_runs.py block mmdit        a network on both backends in bf16
python te_gpu_runs.py linear tensorwise  an FP8 linear against its emulation
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from mpdit.config import Config

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mmdit": {},
    "dit": {"model": {"arch": "dit", "text_tokens": 1, "qk_norm": False}, "data": {"text": "labels"}},
    "pixart": {"model": {"arch": "pixart"}},
    "uvit": {"model": {"arch": "uvit", "depth": 5, "text_tokens": 7}},
}
BATCH = 16


def config(arch: str = "mmdit", **parallel: Any) -> Config:
    """128 wide: rows and features fit every recipe's tiles."""
    sections = ARCHITECTURES[arch]
    model = {"width": 128, "head_dim": 32, "text_tokens": 16, "vocab_size": 11, **sections.get("model", {})}
    given = {**sections, "model": model, "mup": {"base_width": 64}, "parallel": parallel}
    return tiny.config(Path("nowhere"), **given)


def apart(one: Tensor, other: Tensor) -> float:
    """The norm of the difference over that of `other`."""
    one, other = one.detach().double().cpu(), other.detach().double().cpu()
    return float((one - other).norm() / other.norm().clamp(min=1e-30))


def block(arch: str) -> dict[str, float]:
    """Prediction, and gradients of all parameters, of Transformer Engine's layers against this project's own."""
    from mpdit.parallel import accel, groups

    accel.enter()
    given = config(arch, precision="bf16")
    groups.start(given.parallel, seed=0)
    te, own = (_computed(_with(given, backend=backend)) for backend in ("te", "local"))
    groups.stop()
    assert te.keys() == own.keys()
    return {name: apart(value, own[name]) for name, value in te.items()}


def _with(given: Config, **parallel: Any) -> Config:
    return dataclasses.replace(given, parallel=dataclasses.replace(given.parallel, **parallel))


def _computed(given: Config) -> dict[str, Tensor]:
    from mpdit import models
    from mpdit.models.layers import Inputs
    from mpdit.mup.roles import collect
    from mpdit.mup.table import resolve
    from mpdit.parallel import accel, context, init, stages

    ctx = context.build(given)
    (stage,) = stages.build(ctx, models.parts(ctx))
    init.initialise(stage, resolve(collect(stage), given), seed=0)
    stage.to(accel.device())
    draw, model = torch.Generator().manual_seed(1), given.model
    size = (BATCH, model.channels, model.image_size, model.image_size)
    inputs = Inputs(
        image_BCHW=torch.randn(size, generator=draw).to(accel.device()),
        time_B=torch.rand(BATCH, generator=draw).to(accel.device()),
        text_BL=torch.randint(1, model.vocab_size, (BATCH, model.text_tokens), generator=draw).to(accel.device()),
    )
    prediction = stage(inputs)
    prediction.float().square().mean().backward()
    gradients = {name: p.grad for name, p in stage.named_parameters() if p.grad is not None}
    return {"prediction": prediction, **gradients}


def linear(recipe: str) -> dict[str, float]:
    """y, dx and dw of a column- and a row-parallel linear in FP8 against the emulation, in a third pass: delayed
    scaling knows its scales by then."""
    from mpdit.parallel import accel, groups

    accel.enter()
    given = config(fp8_recipe=recipe)
    groups.start(given.parallel, seed=0)
    found = {}
    for name in ("ColumnLinear", "RowLinear"):
        te = _passes(_with(given, backend="te", precision="fp8"), name)
        own = _passes(_with(given, backend="local", precision="fp8_emulated"), name)
        found |= {f"{name} {what}": apart(value, own[what]) for what, value in te.items()}
    groups.stop()
    return found


def _passes(given: Config, name: str) -> dict[str, Tensor]:
    from mpdit.parallel import accel, backend, context

    ctx = context.build(given).of_block(1)
    draw = torch.Generator().manual_seed(2)
    layer = getattr(backend, name)(ctx, ctx.width, ctx.width)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    layer.to(accel.device())
    found: dict[str, Tensor] = {}
    for _ in range(3):
        x = torch.randn(64, BATCH, int(ctx.width), generator=draw).to(accel.device(), ctx.dtype).requires_grad_()
        dy = (1e-3 * torch.randn(64, BATCH, int(ctx.width), generator=draw)).to(accel.device(), ctx.dtype)
        layer.zero_grad()
        with backend.forward_pass(ctx):
            y = layer(x)
        y.backward(dy)
        assert x.grad is not None
        found = {"y": y, "dx": x.grad, "dw": layer.weight.grad}
    return found


if __name__ == "__main__":
    print(json.dumps({"block": block, "linear": linear}[sys.argv[1]](sys.argv[2])))
