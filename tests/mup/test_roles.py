"""Law 1: a parameter is tagged where it is born, its tag stays with it, and nobody guesses."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError
from mpdit.mup.roles import Group, Role, collect, declare, matrix, table, vector
from mpdit.mup.table import merge


class Layer(nn.Linear):
    """A shard: half of a [8, 3] weight's outputs."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        declare(self, weight=matrix(Role.HIDDEN, 8, 3), bias=vector(8))


def model() -> nn.Module:
    return nn.ModuleDict({"a": Layer(), "deep": nn.ModuleDict({"b": Layer()})})


WEIGHT, BIAS = matrix(Role.HIDDEN, 8, 3), vector(8)


def test_tags_are_collected_by_full_name_with_global_shapes() -> None:
    tags = {"a.weight": WEIGHT, "a.bias": BIAS, "deep.b.weight": WEIGHT, "deep.b.bias": BIAS}
    assert collect(model()) == tags
    assert collect(Layer()) == {"weight": WEIGHT, "bias": BIAS}


def test_tags_say_role_group_and_fans() -> None:
    assert (WEIGHT.role, WEIGHT.group, WEIGHT.shape, WEIGHT.fan_in, WEIGHT.fan_out) == (
        "hidden",
        "hidden",
        (8, 3),
        3,
        8,
    )
    ada = matrix(Role.HIDDEN, 24, 4, group=Group.MODULATION)
    assert (ada.role, ada.group) == (Role.HIDDEN, Group.MODULATION)
    words = table(300, 8)
    assert (words.role, words.group, words.shape, words.fan_in, words.fan_out) == ("input", "table", (300, 8), 1, 8)
    assert (BIAS.role, BIAS.group, BIAS.shape) == (Role.VECTOR, Group.VECTOR, (8,))


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
    declare(layer, weight=matrix(Role.HIDDEN, fan_out, fan_in), bias=vector(4))
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
        matrix(Role.HIDDEN, 4, 3),  # a local shape: the mistake this is for
        matrix(Role.INPUT, 8, 3),
        dataclasses.replace(WEIGHT, group=Group.MODULATION),
        dataclasses.replace(WEIGHT, gain=2.0),
        dataclasses.replace(WEIGHT, eps_follows_width=False),
    ],
)
def test_merge_refuses_ranks_that_disagree(changed: Any) -> None:
    with pytest.raises(InputError, match=r"parameter b\.weight is .* on one rank and .* on another"):
        merge([{"b.weight": WEIGHT}, {"b.weight": changed}])


# ---- the whole model -------------------------------------------------------------------------------------------------


def refusals(rank: int, world: int, config: Config) -> dict[str, str]:
    """What is said of a model with an untagged layer, of a table without a parameter, and of a wrapped model's tags."""
    from mpdit.parallel import groups, optimizer
    from mpdit.train import session

    groups.start(config.parallel, config.train.seed)
    network = session.build_network(config)
    chunks = optimizer.wrap(network.ctx, network.chunks)
    said = {"kept": str(collect(chunks[0].module) == collect(network.chunks[0]))}
    table = {name: entry for name, entry in network.table.items() if name != "blocks.0.img.qkv.weight"}
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
    assert "parameter blocks.0.img.qkv.weight is not in the muP table" in said["optimizer"]
    assert "parameter blocks.0.img.adapter.weight (2, 2) has no muP role" in said["collect"]
    assert said["kept"] == "True"
