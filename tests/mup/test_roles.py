"""Law 1: a parameter is tagged where it is born, its tag stays with it, and nobody guesses."""

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ranks
import tiny
from mpdit.config import Config, Model, Mup, Objective, Parallel
from mpdit.errors import InputError
from mpdit.mup.roles import (
    Group,
    Role,
    Tag,
    Width,
    base_of,
    collect,
    declare,
    matrix,
    on_residual_branch,
    table,
    vector,
)
from mpdit.mup.table import merge

D = Width(8, 4)
WEIGHT, BIAS = matrix(D, 3), vector(D)


class Layer(nn.Linear):
    """A shard: half of a [8, 3] weight's outputs."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        declare(self, weight=matrix(D, 3), bias=vector(D))


def model() -> nn.Module:
    return nn.ModuleDict({"a": Layer(), "deep": nn.ModuleDict({"b": Layer()})})


# ---- widths ----------------------------------------------------------------------------------------------------------

sizes, factors = st.integers(1, 9999), st.integers(1, 99)


@given(size=sizes, base=sizes, k=factors)
@settings(deadline=None)
def test_a_multiple_of_a_width_grows_too(size: int, base: int, k: int) -> None:
    """Written either way round, and again: 3 * D is what the proxy has 3 of."""
    for multiple in (k * Width(size, base), Width(size, base) * k, 1 * (k * Width(size, base))):
        assert isinstance(multiple, Width)
        assert (multiple, multiple.base) == (k * size, k * base)


@given(size=sizes, base=sizes)
@settings(deadline=None)
def test_a_width_is_its_size_and_any_other_number_finite(size: int, base: int) -> None:
    width = Width(size, base)
    assert (width, hash(width), f"{width}") == (size, hash(size), f"{size}")
    assert (base_of(width), base_of(size)) == (base, size)


def test_a_width_survives_copies_and_pickles() -> None:
    """Or no model could be copied: torch's layers keep the sizes that they were given."""
    for twin in (copy.copy(D), copy.deepcopy(D), pickle.loads(pickle.dumps(D))):
        assert (twin, base_of(twin)) == (8, 4)
    layer = nn.Linear(D, D)
    assert base_of(copy.deepcopy(layer).in_features) == 4


@given(size=sizes, base=sizes, other=sizes)
@settings(deadline=None)
def test_the_role_follows_from_what_grows(size: int, base: int, other: int) -> None:
    """From what each size is and not from how large it is: the proxy, where both are equal, has the same roles."""
    for width in (Width(size, base), Width(base, base)):
        assert matrix(width, other).role is Role.INPUT
        assert matrix(other, width).role is Role.OUTPUT
        assert matrix(3 * width, width).role is matrix(width, 4 * width).role is Role.HIDDEN
        assert table(other, width).role is Role.INPUT
    assert matrix(other, size).role is Role.INPUT  # both finite: scaled by nothing, as an input is
    assert vector(other).role is vector(Width(size, base)).role is Role.VECTOR


@given(size=sizes, base=sizes, other=sizes)
@settings(deadline=None)
def test_a_tag_has_the_proxys_fans_of_its_own_tensor(size: int, base: int, other: int) -> None:
    width = Width(size, base)

    def fans(tag: Tag) -> tuple[int, int, int, int]:
        assert type(tag.fan_in) is type(tag.fan_out) is type(tag.shape[0]) is int, "tags are compared and written"
        return tag.fan_in, tag.base_fan_in, tag.fan_out, tag.base_fan_out

    assert fans(matrix(3 * width, width)) == (size, base, 3 * size, 3 * base)
    assert fans(matrix(width, other)) == (other, other, size, base)
    assert fans(matrix(other, 4 * width)) == (4 * size, 4 * base, other, other)
    assert fans(matrix(other, size)) == (size, size, other, other)
    assert fans(table(other, width)) == (1, 1, size, base)
    assert fans(vector(2 * width)) == (1, 1, 2 * size, 2 * base)
    assert fans(vector(other)) == (1, 1, other, other)


# ---- tags ------------------------------------------------------------------------------------------------------------


def test_tags_are_collected_by_full_name_with_global_shapes() -> None:
    tags = {"a.weight": WEIGHT, "a.bias": BIAS, "deep.b.weight": WEIGHT, "deep.b.bias": BIAS}
    assert collect(model()) == tags
    assert collect(Layer()) == {"weight": WEIGHT, "bias": BIAS}


def test_tags_say_role_group_and_shape() -> None:
    hidden, ada, words = matrix(2 * D, D), matrix(6 * D, D, group=Group.MODULATION, gain=0.0), table(300, D, gain=0.02)
    assert (hidden.role, hidden.group, hidden.shape, hidden.gain) == ("hidden", "hidden", (16, 8), 1.0)
    assert (ada.role, ada.group, ada.shape, ada.gain) == ("hidden", "modulation", (48, 8), 0.0)
    assert (words.role, words.group, words.shape, words.gain) == ("input", "table", (300, 8), 0.02)
    assert (WEIGHT.role, WEIGHT.group) == ("input", "input")
    assert (matrix(3, D).role, matrix(3, D).group) == ("output", "output")
    assert (BIAS.role, BIAS.group, BIAS.shape, BIAS.fill, vector(3, fill=1.0).fill) == ("vector", "vector", (8,), 0, 1)
    assert not hidden.in_block


def test_what_lies_on_a_residual_branch_is_said_of_all_of_a_block_and_of_it_alone() -> None:
    network = model()
    assert on_residual_branch(network["deep"]) is network["deep"]
    tags = collect(network)
    assert {name for name, tag in tags.items() if tag.in_block} == {"deep.b.weight", "deep.b.bias"}
    assert dataclasses.replace(tags["deep.b.weight"], in_block=False) == tags["a.weight"] == WEIGHT


def test_an_untagged_parameter_is_refused_by_name() -> None:
    network = model()
    network["deep"].extra = nn.Linear(2, 5)
    with pytest.raises(InputError, match=r"parameter deep\.extra\.weight \(5, 2\) has no muP role"):
        collect(network)


def test_a_parameter_added_to_a_tagged_layer_is_refused_by_name() -> None:
    network = model()
    network["a"].gain = nn.Parameter(network["a"].bias.detach().clone())
    with pytest.raises(InputError, match=r"parameter a\.gain \(4,\) has no muP role"):
        collect(network)


def test_a_tag_does_not_reach_into_submodules() -> None:
    """Or a layer inside a tagged one would take its tags by the accident of a name."""

    class Outer(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 4)

    with pytest.raises(InputError, match=r"inner\.weight"):
        collect(Outer())


@pytest.mark.parametrize(("fan_out", "fan_in"), [(5, 3), (8, 2), (2, 3), (1, 1)])
def test_a_size_that_is_no_part_of_the_declared_shape_is_refused(fan_out: int, fan_in: int) -> None:
    layer = Layer()  # 4 x 3
    declare(layer, weight=matrix(fan_out, fan_in), bias=vector(4))
    with pytest.raises(
        InputError, match=rf"parameter weight \(4, 3\) is no shard of the declared \({fan_out}, {fan_in}\)"
    ):
        collect(layer)


def test_tags_survive_deepcopy_reload_and_replaced_data() -> None:
    network = model()
    tags = collect(network)
    twin = copy.deepcopy(network)
    assert collect(twin) == tags
    twin.load_state_dict(network.state_dict())
    twin["a"].weight = nn.Parameter(network["a"].weight.detach().clone())  # as FSDP and sharded loads do
    assert collect(twin.double()) == tags


def test_merge_joins_stages_sorted_by_name() -> None:
    first, second = {"b.weight": WEIGHT, "a.bias": BIAS}, {"c.weight": WEIGHT}
    merged = merge([second, first, first])
    assert merged == first | second
    assert list(merged) == ["a.bias", "b.weight", "c.weight"]
    assert first == {"b.weight": WEIGHT, "a.bias": BIAS}


@pytest.mark.parametrize(
    "changed",
    [
        matrix(Width(4, 4), 3),  # a local shape: the mistake this is for
        matrix(Width(8, 8), 3),
        matrix(8, 3),
        matrix(8, Width(3, 3)),
        dataclasses.replace(WEIGHT, group=Group.MODULATION),
        dataclasses.replace(WEIGHT, gain=2.0),
        dataclasses.replace(WEIGHT, in_block=True),
    ],
)
def test_merge_refuses_ranks_that_disagree(changed: Any) -> None:
    with pytest.raises(InputError, match=r"parameter b\.weight is .* on one rank and .* on another"):
        merge([{"b.weight": WEIGHT}, {"b.weight": changed}])


# ---- the whole model -------------------------------------------------------------------------------------------------

ARCHS = ("mmdit", "dit", "pixart", "uvit")


def network(arch: str, width: int, base: int, **mup: Any) -> Config:
    shape: dict[str, Any] = {"arch": arch, "depth": 3, "head_dim": 8, "patch": 2, "image_size": 8, "vocab_size": 11}
    return Config(
        model=Model(width=width, **shape),
        mup=Mup(base_width=base, **mup),
        objective=Objective(repa_weight=0.0 if arch in ("dit", "pixart") else 0.5),
    )


def outlines(rank: int, world: int, configs: list[Config]) -> list[dict[str, Tag]]:
    from mpdit.models.outline import outline
    from mpdit.parallel import groups

    groups.start(Parallel(), seed=0)
    tags = [outline(config) for config in configs]
    groups.stop()
    return tags


@pytest.mark.dist
@pytest.mark.parametrize("arch", ARCHS)
def test_every_tensor_knows_its_fans_in_the_proxy(arch: str) -> None:
    """What a network of width 48 says of a proxy of width 40 is what that proxy is; roles and gains are its, too."""
    tags, proxy = ranks.run(1, outlines, configs=[network(arch, 48, 40), network(arch, 40, 40)])[0]
    assert tags.keys() == proxy.keys()
    assert len(tags) > 40
    for name, tag in tags.items():
        there = proxy[name]
        assert (tag.base_fan_in, tag.base_fan_out) == (there.fan_in, there.fan_out), name
        same = [getattr(there, key) for key in ("role", "group", "gain", "fill", "in_block")]
        assert [getattr(tag, key) for key in ("role", "group", "gain", "fill", "in_block")] == same, name
        # A U-ViT's skip layer lies in a block, but on the main path.
        assert tag.in_block is (name.startswith("blocks.") and ".skip." not in name), name
        grows = tag.fan_in != there.fan_in, tag.fan_out != there.fan_out
        if tag.role is not Role.VECTOR:
            assert tag.role is {(True, True): Role.HIDDEN, (True, False): Role.OUTPUT}.get(grows, Role.INPUT), name


@pytest.mark.dist
@pytest.mark.parametrize("arch", ARCHS)
def test_the_initial_zeros_are_the_configs(arch: str) -> None:
    """adaLN and readout start at zero where asked; a cross-attention's projection always, a table at 0.02."""
    configs = [network(arch, 48, 40, **keys) for keys in ({}, {"adaln_init": "hidden"}, {"readout_init": "base"})]
    found = ranks.run(1, outlines, configs=configs)[0]
    zero, no_ada, no_readout = ({name for name, tag in tags.items() if tag.gain == 0.0} for tags in found)
    cross = {name for name in zero if name.endswith(".cross.proj.weight")}
    adaln = {name for name, tag in found[0].items() if tag.group is Group.MODULATION}
    assert bool(cross) == (arch == "pixart")
    assert bool(adaln) == (arch != "uvit")
    assert zero == {"head.out.weight"} | cross | adaln
    assert no_ada == {"head.out.weight"} | cross
    assert no_readout == cross | adaln
    assert {tag.gain for name, tag in found[0].items() if name.endswith(".table")} <= {0.02}


def refusals(rank: int, world: int, config: Config) -> dict[str, str]:
    """What is said of an untagged layer, of a table that lacks a parameter, and of a wrapped model's tags."""
    from mpdit.parallel import groups, optimizer
    from mpdit.train import session

    groups.start(config.parallel, config.train.seed)
    network = session.build_network(config)
    chunks = optimizer.wrap(network.ctx, network.chunks)
    said = {"kept": str(collect(chunks[0].module) == collect(network.chunks[0]))}
    table = {name: entry for name, entry in network.table.items() if name != "blocks.0.img.qkv.linear.weight"}
    try:
        optimizer.build(network.ctx, chunks, table)
    except InputError as error:
        said["optimizer"] = str(error)
    network.chunks[0].blocks["0"].img.adapter = nn.Linear(2, 2)
    try:
        collect(network.chunks[0])
    except InputError as error:
        said["collect"] = str(error)
    groups.stop()
    return said


@pytest.mark.dist
def test_the_optimizer_refuses_a_parameter_that_is_not_in_the_table() -> None:
    config = tiny.config(Path("unused"), "model.vocab_size=40", "model.depth=1", "parallel.micro_batch=1")
    said = ranks.run(1, refusals, timeout_s=60, config=config)[0]
    assert "parameter blocks.0.img.qkv.linear.weight is not in the muP table" in said["optimizer"]
    assert "parameter blocks.0.img.adapter.weight (2, 2) has no muP role" in said["collect"]
    assert said["kept"] == "True"
