"""Every layer of the four networks, built of Transformer Engine's classes, is the local backend's to the last mark."""

import dataclasses
from typing import Any

import pytest
import stub
import torch
from cases import ARCHITECTURES, FP8, LAYOUTS, RECIPES, config

import ranks
from mpdit.config import Config

# ---- what a rank builds ----------------------------------------------------------------------------------------------


def built(config: Config) -> tuple[Any, Any]:
    """The context and the one stage of this rank, its weights drawn."""
    from mpdit import models
    from mpdit.mup.roles import collect
    from mpdit.mup.table import resolve
    from mpdit.parallel import context, init, stages

    ctx = context.build(config)
    with stub.building():
        (stage,) = stages.build(ctx, models.parts(ctx))
    init.initialise(stage, resolve(collect(stage), config), config.train.seed)
    return ctx, stage


def seen(config: Config) -> dict[str, Any]:
    """All that the rest of the program can see of a backend's layers."""
    import transformer_engine.pytorch as te

    from mpdit.mup.roles import collect
    from mpdit.mup.table import resolve, rows
    from mpdit.parallel import linears
    from mpdit.parallel.attention import Attention

    _, stage = built(config)
    attentions = {name: module for name, module in stage.named_modules() if isinstance(module, Attention)}
    both = (linears.ColumnLinear, linears.RowLinear, te.Linear)
    norms = (linears.LayerNorm, te.LayerNorm)
    return {
        "types": {n: (tuple(p.shape), p.dtype, p.device.type) for n, p in stage.named_parameters()},
        "marks": {n: {k: v for k, v in vars(p).items() if not k.startswith("_")} for n, p in stage.named_parameters()},
        "tags": collect(stage),
        "table": rows(resolve(collect(stage), config)),
        "values": {n: p.detach().clone() for n, p in stage.named_parameters()},
        "linears": [name for name, module in stage.named_modules() if isinstance(module, both)],
        "norms": [name for name, module in stage.named_modules() if isinstance(module, norms)],
        "attentions": {name: module.softmax_scale for name, module in attentions.items()},
        "of te": [name for name, module in stage.named_modules() if isinstance(module, (te.Linear, te.LayerNorm))],
        "cores": {name: core(module.core) for name, module in attentions.items() if hasattr(module, "core")},
        "buffers": sorted(dict(stage.named_buffers())),
    }


def core(found: Any) -> dict[str, Any]:
    backends = (found, found.flash_attention, found.fused_attention, found.unfused_attention)
    return {
        "scale": {backend.softmax_scale for backend in backends},
        "mask": found.attn_mask_type,
        "heads": found.num_gqa_groups_per_partition,
        "head_dim": found.hidden_size_per_attention_head_k,
        "cp": found.cp_group,
        "dropout": found.attention_dropout,
    }


def both(rank: int, world: int, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    from mpdit.parallel import groups

    groups.start(config.parallel, seed=0)
    found = [seen(dataclasses.replace(config, parallel=p)) for p in (config.parallel, local(config))]
    groups.stop()
    return found[0], found[1]


def local(config: Config) -> Any:
    return dataclasses.replace(config.parallel, backend="local", precision="bf16")


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_are_those_of_the_local_backend(arch: str, layout: str) -> None:
    world, parallel = LAYOUTS[layout]
    given = config(arch, **FP8, **parallel)
    for te, own in ranks.run(world, both, config=given):
        for key in ("types", "marks", "tags", "table", "linears", "norms", "attentions", "buffers"):
            assert te[key] == own[key], key
        assert list(te["values"]) == list(own["values"])
        assert all(torch.equal(value, own["values"][name]) for name, value in te["values"].items())
        assert te["of te"] == sorted([*te["linears"], *te["norms"]], key=te["of te"].index)
        assert own["of te"] == []
        assert all(name.startswith("blocks.") for name in te["linears"])
        assert te["cores"].keys() == te["attentions"].keys() != set()
        cp, tp = parallel.get("cp", 1), parallel.get("tp", 1)
        for one in te["cores"].values():
            # muP's: base_head_dim 8, head_dim 16.
            assert one == {
                **{"scale": {8**0.5 / 16}, "mask": "no_mask", "heads": 4 // tp // cp, "head_dim": 16},
                **{"cp": None, "dropout": 0.0},
            }


@pytest.mark.dist
def test_layers_take_what_they_were_told_and_not_megatrons_defaults() -> None:
    """A width of its own in every place: what is counted, sharded and declared is the global shape."""
    world, parallel = LAYOUTS["TP2 + SP"]
    te, _ = ranks.run(world, both, config=config("uvit", **FP8, **parallel))[0]
    types, marks = te["types"], te["marks"]
    assert types["blocks.3.skip.weight"][0] == (32, 128)
    assert te["tags"]["blocks.3.skip.weight"].shape == (64, 128)
    assert te["tags"]["blocks.3.skip.weight"].in_block is False
    assert types["blocks.0.mlp.fc2.weight"][0] == (64, 128)
    assert marks["blocks.0.mlp.fc2.weight"]["partition_dim"] == 1
    assert marks["blocks.0.mlp.fc2.bias"] == {"sequence_parallel": True, "allreduce": True}
    assert marks["blocks.0.norm_1.weight"] == {"sequence_parallel": True}
    assert marks["head.norm.weight"] == {"sequence_parallel": False}
    assert "blocks.0.attn.qkv.linear.bias" not in types


# ---- FP8 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_what_their_names_say(name: str) -> None:
    from mpdit.parallel import te

    recipe = te.recipe(name)
    kinds = {"tensorwise": "float8_current_scaling", "blockwise": "float8_block_scaling"}
    assert [one for one in RECIPES if getattr(recipe, kinds.get(one, one))()] == [name]
    hybrid = name in ("tensorwise", "delayed")
    assert recipe.fp8_format.name == ("HYBRID" if hybrid else "E4M3")
    assert not recipe.fp8_dpa
    assert te.recipe(name) is recipe
    if name == "delayed":
        assert (recipe.amax_history_len, recipe.amax_compute_algo, recipe.reduce_amax) == (1024, "max", True)


def of_blocks(rank: int, world: int, config: Config) -> tuple[dict[str, bool], dict[str, float], list[str], Any]:
    """Linears: in FP8? Parameters: forward multiplier. Modules that multiply their input. Of Megatron's config."""
    import transformer_engine.pytorch as te

    from mpdit.mup.roles import collect
    from mpdit.mup.table import resolve
    from mpdit.parallel import groups

    groups.start(config.parallel, seed=0)
    ctx, stage = built(config)
    linears = {name: module.quantised for name, module in stage.named_modules() if isinstance(module, te.Linear)}
    multipliers = {name: entry.rule.multiplier for name, entry in resolve(collect(stage), config).items()}
    scaled = [name for name, module in stage.named_modules() if hasattr(module, "multiplier")]
    groups.stop()
    keys = ("fp8", "fp8_recipe", "bf16", "tp_comm_overlap", "fp8_param")
    megatron = {key: getattr(ctx.megatron, key) for key in keys}
    return linears, multipliers, scaled, megatron | {"use_mup": getattr(ctx.megatron, "use_mup", False)}


@pytest.mark.dist
@pytest.mark.parametrize("parametrization", ["sp", "mup", "completep"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_multiplier_sits_in_an_fp8_product(arch: str, parametrization: str) -> None:
    """Forward multipliers, at m = 2 with one tuned besides, are the readout's alone, which is no layer of TE's."""
    given = config(arch, **FP8)
    mup = dataclasses.replace(given.mup, parametrization=parametrization, output_mult=1.5, base_depth=2)
    linears, multipliers, scaled, _ = ranks.run(1, of_blocks, config=dataclasses.replace(given, mup=mup))[0]
    assert {name for name in scaled if name in linears} == set()
    assert {multipliers[f"{name}.weight"] for name in linears} == {1.0}
    assert [name for name, multiplier in multipliers.items() if multiplier != 1.0] == ["head.out.weight"]


@pytest.mark.dist
@pytest.mark.parametrize("ends", [0, 1])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_blocks_at_the_ends_stay_in_bf16(arch: str, ends: int) -> None:
    given = config(arch, **FP8, fp8_bf16_blocks=ends, fp8_recipe="blockwise")
    linears, _, _, megatron = ranks.run(1, of_blocks, config=given)[0]
    depth = given.model.depth
    assert {int(name.split(".")[1]) for name, quantised in linears.items() if quantised} == {*range(ends, depth - ends)}
    assert {int(name.split(".")[1]) for name in linears} == {*range(depth)}
    assert megatron == {
        **{"fp8": "e4m3", "fp8_recipe": "blockwise", "bf16": True, "tp_comm_overlap": False, "fp8_param": False},
        **{"use_mup": False},
    }


def fused(rank: int, world: int, config: Config) -> tuple[set[bool], bool]:
    """Whether TE's linears add to the gradient buffers themselves, and whether Megatron's own are to."""
    import transformer_engine.pytorch as te

    from mpdit.parallel import groups
    from mpdit.train import session

    groups.start(config.parallel, seed=0)
    with stub.building():
        run = session.build(config)
    linears = [layer for chunk in run.network.chunks for layer in chunk.modules() if isinstance(layer, te.Linear)]
    buffered = {hasattr(layer.weight, "main_grad") for layer in linears}
    found = {layer.fuse_wgrad_accumulation for layer in linears}
    groups.stop()
    assert found == buffered
    return found, run.network.ctx.megatron.gradient_accumulation_fusion


@pytest.mark.dist
@pytest.mark.parametrize(("parallel", "fuses"), [(FP8, True), ({"backend": "te", "precision": "fp32"}, False)])
def test_gradients_are_added_in_the_product_where_there_is_a_buffer(parallel: dict[str, Any], fuses: bool) -> None:
    """In TE's linears alone: Megatron's would ask for apex."""
    assert ranks.run(1, fused, config=config("pixart", **parallel)) == [({fuses}, False)]
