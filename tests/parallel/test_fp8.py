"""FP8 products, emulated: which layers have them, what they multiply, and that a layout changes none of it.

Codes are steps: where a sum's last bit differs by the order of its terms, a code now and then is its neighbour, and a
loss differs by 1e-4 a step later. So layers are compared by their codes, and runs by their first loss.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError
from parallel.compared import difference, train_layout

RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")

# Widths and rows that blocks of 128 divide on two tensor ranks.
SIZES: dict[str, Any] = {
    "model": {"width": 256, "head_dim": 64, "text_tokens": 16},
    "train": {"steps": 2, "batch_size": 8, "val_images": 2},
    "optim": {"warmup_steps": 1},
    "mup": {"base_width": 128},
}


def fp8_config(data: Path, recipe: str, parallel: dict[str, Any] | None = None, **sections: Any) -> Config:
    mine = {"precision": "fp8_emulated", "fp8_recipe": recipe, "micro_batch": 4, **(parallel or {})}
    for name, section in sections.items():
        sections[name] = {**SIZES.get(name, {}), **section}
    return tiny.config(data, parallel=mine, **{**SIZES, **sections})


def in_fp32(rank: int, world: int, rank_function: Callable[..., Any], **arguments: Any) -> Any:
    """`rank_function` with fp32 in the place of bf16 between the products, so that roundings but FP8's are small."""
    from mpdit.parallel import fp8_rules

    fp8_rules.stored = lambda precision: "fp32"
    return rank_function(rank, world, **arguments)


# ---- which layers ----------------------------------------------------------------------------------------------------

_MLP = {"mlp.fc1", "mlp.fc2"}
LINEARS = {
    "dit": {"attn.qkv.linear", "attn.proj", *_MLP},
    "pixart": {"attn.qkv.linear", "attn.proj", *_MLP, "cross.q", "cross.kv", "cross.proj"},
    "uvit": {"attn.qkv.linear", "attn.proj", *_MLP, "skip"},
    "mmdit": {f"{stream}.{name}" for stream in ("img", "txt") for name in ("qkv.linear", "proj", *_MLP)},
}


def built(rank: int, world: int, config: Config) -> Any:
    from mpdit.parallel import fp8, groups
    from mpdit.train import session

    groups.start(config.parallel, config.train.seed)
    network = session.build_network(config)
    buffers = {name for chunk in network.chunks for name, _ in chunk.named_buffers() if "product" in name}
    return {name: type(product).__name__ for name, product in fp8.products(network.chunks)}, buffers


@pytest.mark.parametrize("arch", LINEARS)
@pytest.mark.parametrize("ends", [0, 2])
def test_hidden_linears_of_the_blocks_between_the_ends(arch: str, ends: int, tiny_set: Path) -> None:
    """Of depth 5; not embedders, adaLN, readout."""
    model = {**SIZES["model"], "arch": arch, "depth": 5, "vocab_size": 9}
    config = fp8_config(tiny_set, "delayed", {"fp8_bf16_blocks": ends}, model=model)
    found, buffers = ranks.run(1, built, config=config)[0]
    blocks = range(ends, 5 - ends)
    wanted = {f"blocks.{i}.{name}" for i in blocks for name in LINEARS[arch] if name != "skip" or i > 2}
    if arch == "mmdit" and ends == 0:  # the last block's text stream ends at its keys and values
        wanted -= {f"blocks.4.txt.{name}" for name in ("proj", *_MLP)}
    assert found == dict.fromkeys(wanted, "Delayed")
    assert buffers == {f"{name}.product.{buffer}" for name in wanted for buffer in ("scale", "history")}


def test_another_backend_is_refused(tiny_set: Path) -> None:
    from mpdit.parallel import fp8_rules

    config = fp8_config(tiny_set, "tensorwise")
    parallel = dataclasses.replace(config.parallel, backend="te")
    with pytest.raises(
        InputError, match=r"precision is fp8_emulated.*parallel.backend is te; set parallel.backend=local"
    ):
        fp8_rules.check(dataclasses.replace(config, parallel=parallel))


# ---- what they multiply ----------------------------------------------------------------------------------------------


def by_hand(recipe: str, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw by the casts alone, each operand cut along what its GEMM sums over."""
    from mpdit_kernels import fp8

    def one(t: Tensor, format: torch.dtype) -> Tensor:
        if recipe == "delayed":  # before anything was seen
            return fp8.quantize_tensor(t, format, torch.tensor(1.0)).dequantized()
        return fp8.quantize_tensor(t, format, fp8.scale_of(fp8.amax(t), format)).dequantized()

    if recipe in ("tensorwise", "delayed"):
        q_x, q_w, q_dy = one(x, fp8.E4M3), one(w, fp8.E4M3), one(dy, fp8.E5M2)
        return q_x @ q_w.t(), q_dy @ q_w, q_dy.t() @ q_x
    cut = fp8.quantize_mx if recipe == "mxfp8" else fp8.quantize_blocks

    def rows(t: Tensor) -> Tensor:
        return cut(t).dequantized()

    def columns(t: Tensor) -> Tensor:
        return cut(t.t()).dequantized().t()

    w_rows, w_columns = rows(w), columns(w)
    if recipe == "blockwise":
        w_rows = w_columns = fp8.quantize_blocks(w, block=(128, 128)).dequantized()
    return rows(x) @ w_rows.t(), rows(dy) @ w_columns, columns(dy).t() @ columns(x)


def one_product(rank: int, world: int, recipe: str, dtype: torch.dtype) -> None:
    from mpdit.config import Parallel
    from mpdit.parallel import fp8, groups

    groups.start(Parallel(), 0)
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 50, 200), (72, 200), (3, 50, 72)))
    b = torch.randn(72, generator=generator).to(dtype)
    for t in (x, w, b):
        t.requires_grad_()
    y = fp8._RECIPES[recipe]()(x, w, b)
    y.backward(dy)
    wanted = by_hand(recipe, x.detach().view(150, 200), w.detach(), dy.view(150, 72))
    assert y.dtype is x.grad.dtype is w.grad.dtype is dtype
    torch.testing.assert_close(y.view(150, 72), (wanted[0] + b.float()).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(x.grad.view(150, 200), wanted[1].to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(w.grad, wanted[2].to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(b.grad, dy.float().sum((0, 1)).to(dtype), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_product_has_its_own_casts(recipe: str, dtype: torch.dtype) -> None:
    ranks.run(1, one_product, recipe=recipe, dtype=dtype)


def delayed_steps(rank: int, world: int) -> list[float]:
    """The scales of x through training passes, a pass without gradients, and recompute."""
    from mpdit.config import Parallel
    from mpdit.parallel import fp8, groups

    groups.start(Parallel(), 0)
    product, w, scales = fp8.Delayed(), torch.ones(16, 16, requires_grad=True), []

    def once(size: float) -> None:
        product(torch.full((16, 16), size), w, None).sum().backward()

    for size in (2.0, 1.0):
        once(size)
        scales.append(product.scale[0].item())
    with torch.no_grad():
        product(torch.full((16, 16), 100.0), w, None)
    scales.append(product.scale[0].item())
    block = fp8.run_twice(lambda x: product(x, w, None))
    with torch.no_grad():
        first = block(torch.full((16, 16), 4.1))
    scales.append(product.scale[0].item())
    second = block(torch.full((16, 16), 4.1))
    assert torch.equal(first, second), "recompute has to use the scales of the first pass"
    scales.append(product.scale[0].item())
    assert product.scale[2].item() == 57344.0
    assert (product.history != 0).sum(0).tolist() == [3, 3, 2]  # a row a pass, the recomputed one once
    return scales


def test_delayed_scaling_learns_from_training_passes_alone() -> None:
    assert ranks.run(1, delayed_steps)[0] == [224, 224, 224, pytest.approx(448 / 4.1), pytest.approx(448 / 4.1)]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def sharded_layer(rank: int, world: int, config: Config) -> None:
    """A column- and a row-parallel layer on two ranks quantise to the bit what one rank does, and compute the same."""
    from megatron.core import parallel_state

    from mpdit.parallel import context, groups
    from mpdit.parallel.linears import ColumnLinear, RowLinear

    groups.start(config.parallel, 0)
    ctx = context.build(config).of_block(1)
    tp, sp = parallel_state.get_tensor_model_parallel_rank(), config.parallel.sp
    generator = torch.Generator().manual_seed(0)
    for kind, out, inside in ((ColumnLinear, 512, 256), (RowLinear, 256, 512)):
        layer, column = kind(ctx, ctx.width * (inside // 256), ctx.width * (out // 256)), kind is ColumnLinear
        x_SBK = torch.randn(64, 4, inside, generator=generator) * torch.randn(64, 4, 1, generator=generator).exp()
        w_NK, dy_SBN = torch.randn(out, inside, generator=generator), torch.randn(64, 4, out, generator=generator)
        b_N = torch.randn(out, generator=generator)
        whole = {"x": x_SBK, "w": w_NK, "b": b_N}
        for t in whole.values():
            t.requires_grad_()
        alone, codes = type(layer.product)(), {}
        alone.watch = lambda name, t, q, codes=codes: codes.update({name: q})
        y_SBN = alone(x_SBK, w_NK, b_N)
        y_SBN.backward(dy_SBN)

        mine: dict[str, Any] = {}
        layer.product.watch = lambda name, t, q, mine=mine: mine.update({name: q})
        with torch.no_grad():
            layer.weight.copy_(w_NK.chunk(2, 0 if column else 1)[tp])
            layer.bias.copy_(b_N.chunk(2)[tp] if column else b_N)
        tokens = slice(32 * tp, 32 * tp + 32) if sp else slice(None)
        x = (x_SBK[tokens] if column else x_SBK.chunk(2, -1)[tp]).detach().clone().requires_grad_()
        y = layer(x)
        y.backward(dy_SBN.chunk(2, -1)[tp] if column else dy_SBN[tokens])
        for name, dim in {"x": None if column else 1, "w": 0 if column else 1, "dy": 1 if column else None}.items():
            their = codes[name].codes.view(torch.uint8)
            assert torch.equal(mine[name].codes.view(torch.uint8), their if dim is None else their.chunk(2, dim)[tp])
        near = {"rtol": 1e-5, "atol": 1e-3}
        torch.testing.assert_close(y, y_SBN.chunk(2, -1)[tp] if column else y_SBN[tokens], **near)
        wanted_dx = x_SBK.grad[tokens] if column else x_SBK.grad.chunk(2, -1)[tp]
        torch.testing.assert_close(x.grad, wanted_dx, **near)
        torch.testing.assert_close(layer.weight.grad, w_NK.grad.chunk(2, 0 if column else 1)[tp], **near)


@pytest.mark.dist
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("sp", [False, True])
def test_tensor_ranks_have_the_codes_of_one(recipe: str, sp: bool, tiny_set: Path) -> None:
    config = fp8_config(tiny_set, recipe, {"tp": 2, "sp": sp})
    ranks.run(2, in_fp32, rank_function=sharded_layer, config=config)


# The first loss of a run against that of one process: within EXACT where all operands are the same, within ONE_CODE
# where the last bit of some differs (of half the tokens a GEMM of the embedders sums otherwise, and a code flips), and
# within FLIPS where other tokens share a scale. All steps are within FLIPS.
EXACT, ONE_CODE, FLIPS = 3e-5, 1e-4, 4e-3
FOUR = {"tp": 2, "pp": 2, "sp": True, "recompute": "full", "distributed_optimizer": True}
RUNS: list[tuple[str, str, int, dict[str, Any], dict[str, Any], float]] = [
    ("tensorwise", "TP2", 2, {"tp": 2}, {}, EXACT),
    ("tensorwise", "TP2 + SP", 2, {"tp": 2, "sp": True}, {}, EXACT),
    ("tensorwise", "PP2", 2, {"pp": 2}, {}, EXACT),
    ("tensorwise", "DP2", 2, {}, {}, EXACT),
    ("tensorwise", "CP2", 2, {"cp": 2}, {}, FLIPS),
    ("delayed", "TP2 x PP2 + SP, recompute", 4, FOUR, {}, EXACT),
    ("delayed", "DP2", 2, {}, {"micro_batch": 8}, EXACT),  # as many micro-batches a rank: one
    ("delayed", "CP2", 2, {"cp": 2}, {}, EXACT),
    ("blockwise", "TP2 x PP2 + SP, recompute", 4, FOUR, {}, EXACT),
    ("blockwise", "CP2", 2, {"cp": 2}, {}, ONE_CODE),  # its first loss: of dw blocks are cut along the tokens
    ("mxfp8", "TP2 x PP2 + SP, recompute", 4, FOUR, {}, EXACT),
    ("mxfp8", "CP2", 2, {"cp": 2}, {}, ONE_CODE),
]


@pytest.fixture(scope="module")
def alone(tiny_set: Path) -> Callable[..., list[float]]:
    """Losses of one process by recipe and layout, trained when first asked for."""
    known: dict[str, list[float]] = {}

    def losses(recipe: str, parallel: dict[str, Any]) -> list[float]:
        key = f"{recipe} {parallel}"
        if key not in known:
            config = fp8_config(tiny_set, recipe, parallel)
            known[key] = ranks.run(1, in_fp32, rank_function=train_layout, config=config)[0]["losses"]
        return known[key]

    return losses


@pytest.mark.dist
@pytest.mark.parametrize(
    ("recipe", "world", "parallel", "beside", "bound"),
    [(recipe, *row) for recipe, _, *row in RUNS],
    ids=[f"{recipe}, {name}" for recipe, name, *_ in RUNS],
)
def test_layouts(
    recipe: str,
    world: int,
    parallel: dict[str, Any],
    beside: dict[str, Any],
    bound: float,
    tiny_set: Path,
    alone: Callable[..., list[float]],
) -> None:
    config = fp8_config(tiny_set, recipe, parallel)
    found = ranks.run(world, in_fp32, rank_function=train_layout, config=config)[0]["losses"]
    wanted = alone(recipe, beside)
    assert difference(found[:1], wanted[:1]) <= bound
    assert difference(found, wanted) <= FLIPS


# ---- muP's multipliers -----------------------------------------------------------------------------------------------


def operands(rank: int, world: int, config: Config) -> dict[str, Any]:
    """Bytes of what the first FP8 block's products multiply in a forward pass, for streams that are given, and whether
    a weight is the parameter itself."""
    from mpdit import models
    from mpdit.mup.roles import collect
    from mpdit.mup.table import resolve
    from mpdit.parallel import context, fp8, groups, init

    groups.start(config.parallel, 0)
    ctx = context.build(config)
    block = models.parts(ctx).block(1)
    init.initialise(block, resolve(collect(block), config), seed=0)
    generator, seen = torch.Generator().manual_seed(0), {}
    streams = [torch.randn(n, 8, 256, generator=generator).to(ctx.dtype) for n in (16, 16, 1)]
    for name, product in fp8.products([block]):
        weight = block.get_parameter(f"{name}.weight")

        def watch(which: str, t: Tensor, q: Any, name: str = name, weight: Tensor = weight) -> None:
            assert which != "w" or t is weight or t.data_ptr() == weight.data_ptr()
            seen[name, which] = q.codes.clone().view(torch.uint8), q.inverse.clone()

        product.watch = watch
    block(*streams)
    return seen


def test_no_multiplier_of_mup_is_in_a_product(tiny_set: Path) -> None:
    """Multipliers of the readout, of residual branches (completep) and of the logits change what comes after the
    products that they follow, but no operand of these."""
    plain = fp8_config(tiny_set, "tensorwise", mup={"parametrization": "completep", "adaln_init": "hidden"})
    base = ranks.run(1, operands, config=plain)[0]
    after = {"residual": {"img.mlp.fc1", "img.mlp.fc2", "txt.mlp.fc1", "txt.mlp.fc2"}, "output": set()}
    after["logits"] = {*after["residual"], "img.proj", "txt.proj"}
    changes = {"residual": {"base_depth": 1}, "output": {"output_mult": 7.0}, "logits": {"base_head_dim": 16}}
    for what, keys in changes.items():
        config = dataclasses.replace(plain, mup=dataclasses.replace(plain.mup, **keys))
        found = ranks.run(1, operands, config=config)[0]
        changed = {
            name
            for (name, which), values in found.items()
            if not all(torch.equal(a, b) for a, b in zip(values, base[name, which], strict=True))
        }
        assert changed == after[what], what
        assert len(found) == 2 * 8


# ---- statistics ------------------------------------------------------------------------------------------------------


def counts(rank: int, world: int) -> Any:
    from mpdit.config import Parallel
    from mpdit.parallel import fp8, fp8_statistics, groups

    groups.start(Parallel(), 0)
    layer = torch.nn.Module()
    layer.product = fp8.Delayed()
    layer.product.scale.fill_(1.0)
    # 1000 saturates in e4m3, 2^-11 and 2^-20 are lost, 0 is no loss; in e5m2 2^-18 is.
    x = torch.tensor([[1000.0, 1.0, 0.0, 2.0**-11]]).repeat(4, 1).requires_grad_()
    w = torch.tensor([[1.0, 2.0**-20, 1.5, 448.0]]).repeat(2, 1).requires_grad_()
    with fp8_statistics.counted([torch.nn.ModuleDict({"linear": layer})]) as found:
        assert not found
        y = layer.product(x, w, None)
        y.backward(torch.tensor([[2.0**-18, 3.0]]).expand(4, 2))
    layer.product(x, w, None)  # is not counted
    assert layer.product.watch is None
    return found


def test_statistics_count_what_is_lost() -> None:
    found = ranks.run(1, counts)[0]
    assert sorted(found) == [("linear", "dy"), ("linear", "w"), ("linear", "x")]
    x, w, dy = (found["linear", name] for name in ("x", "w", "dy"))
    assert (x.nonzero, x.underflow, x.saturation, x.amax) == (12, 1 / 3, 1 / 3, 1000)
    assert x.error == pytest.approx(552 / (1e6 + 1) ** 0.5, rel=1e-5)
    assert (w.nonzero, w.underflow, w.saturation, w.amax) == (8, 1 / 4, 0, 448)
    assert (dy.nonzero, dy.underflow, dy.saturation, dy.amax) == (8, 1 / 2, 0, 3)
    both = x + x
    assert (both.nonzero, both.underflow, both.amax, both.error) == (24, x.underflow, 1000, pytest.approx(x.error))
