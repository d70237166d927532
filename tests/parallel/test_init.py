"""Initial weights are f(seed, parameter name, global shape): nothing else about a run, and in particular no layout."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

import ranks
from mpdit.config import Config, Parallel
from mpdit.mup.roles import Tag, Width, matrix, table, vector
from mpdit.mup.rules import Rule
from mpdit.mup.table import Entry


def hidden(fan_out: int, fan_in: int) -> Tag:
    return matrix(Width(fan_out, fan_out), Width(fan_in, fan_in))


WEIGHT = hidden(24, 16)


def entry(tag: Tag = WEIGHT, std: float = 1.0) -> Entry:
    return Entry(tag=tag, rule=Rule(init_std=std, lr=1e-3, weight_decay=0.0, eps=1e-8, multiplier=1.0))


@pytest.fixture(scope="module")
def init() -> Any:
    ranks.warm()
    from mpdit.parallel import init

    return init


def test_the_same_seed_name_and_shape_give_the_same_bits(init: Any) -> None:
    torch.manual_seed(1)
    one, state = init.full_value("blocks.0.fc1.weight", entry(), 3), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state), "the program's generator is left alone"
    torch.manual_seed(2)
    assert torch.equal(init.full_value("blocks.0.fc1.weight", entry(), 3), one)
    assert (one.shape, one.dtype) == ((24, 16), torch.float32)


def test_the_role_scales_the_draw_and_does_not_change_it(init: Any) -> None:
    """So that sp and mup, and any learning rate, start from one draw."""
    one = init.full_value("a", entry(), 3)
    assert torch.equal(init.full_value("a", entry(std=0.5), 3), 0.5 * one)
    assert torch.equal(init.full_value("a", entry(matrix(Width(24, 24), 16)), 3), one)
    richer = dataclasses.replace(entry(), rule=Rule(init_std=1.0, lr=9.0, weight_decay=9.0, eps=9.0, multiplier=9.0))
    assert torch.equal(init.full_value("a", richer, 3), one)


def test_another_seed_name_or_shape_gives_other_values(init: Any) -> None:
    shapes = [hidden(24, 16), hidden(16, 24), table(384, Width(1, 1))]  # as many values each
    keys = [*itertools.product((0, 1, 12), ("a", "b", "2/a"), shapes)]
    drawn = torch.stack([init.full_value(name, entry(tag), seed).flatten() for seed, name, tag in keys])
    correlation = torch.corrcoef(drawn) - torch.eye(len(keys))
    assert correlation.abs().max() < 6 / math.sqrt(384)


def test_values_are_normal_with_the_tables_std(init: Any) -> None:
    drawn = init.full_value("a", entry(hidden(120, 100), std=0.02), 0).double()
    assert drawn.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * 12_000))
    assert abs(drawn.mean().item()) < 5 * 0.02 / math.sqrt(12_000)
    assert (drawn.abs() < 0.02).double().mean().item() == pytest.approx(0.6827, abs=0.025)
    assert 3.2 < drawn.abs().max().item() / 0.02 < 5.5


def test_vectors_and_zero_init_are_constants(init: Any) -> None:
    assert init.full_value("a", entry(vector(5)), 3).tolist() == [0.0] * 5
    assert init.full_value("a", entry(vector(5, fill=1.0)), 3).tolist() == [1.0] * 5
    assert torch.equal(init.full_value("a", entry(std=0.0), 3), torch.zeros(24, 16))


def test_the_values_of_a_key_stay_what_they_are(init: Any) -> None:
    """A changed key or generator would change every run that is done again; a salted hash would even by process."""
    found = init.full_value("blocks.0.img.qkv.weight", entry(), 0)[0, :3].tolist()
    assert found == pytest.approx([1.36564803, 1.00615942, -0.37351483], abs=1e-5)


# ---- shards ----------------------------------------------------------------------------------------------------------


def shards(rank: int, world: int, parallel: Parallel) -> dict[str, Any]:
    """This rank's parts of a column-, a row- and an unsharded layer, and what a part of another size is met with."""
    from mpdit.mup.roles import collect
    from mpdit.mup.table import resolve
    from mpdit.parallel import context, groups, init
    from mpdit.parallel.linears import ColumnLinear, ReplicatedLinear, RowLinear

    config = dataclasses.replace(Config(), parallel=parallel)
    groups.start(parallel, seed=rank)  # not the seed of the weights
    torch.manual_seed(100 + rank)
    ctx = context.build(config)
    layers = {
        "column": ColumnLinear(ctx, ctx.width, 2 * ctx.width),
        "row": RowLinear(ctx, 2 * ctx.width, ctx.width),
        "whole": ReplicatedLinear(ctx, 12, ctx.width),
    }
    model = torch.nn.ModuleDict(layers)
    rules = resolve(collect(model), config)
    init.initialise(model, rules, seed=7)
    found: dict[str, Any] = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrong = dataclasses.replace(rules["row.weight"].tag, shape=(128, 512))
    try:
        init.shard(torch.zeros(wrong.shape), model["row"].weight, wrong)
    except ValueError as error:
        found["refusal"] = str(error)
    groups.stop()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("ways", [1, 2, 4])
def test_shards_joined_are_the_whole_value(ways: int, init: Any) -> None:
    results = ranks.run(ways, shards, timeout_s=60, parallel=Parallel(tp=ways))
    names = {"column.weight": 0, "column.bias": 0, "row.weight": 1, "row.bias": None, "whole.weight": None}
    tags = {
        "column.weight": hidden(256, 128),
        "column.bias": vector(256),
        "row.weight": hidden(128, 256),
        "row.bias": vector(128),
        "whole.weight": matrix(Width(128, 128), 12),
    }
    for name, dim in names.items():
        whole = init.full_value(name, entry(tags[name], std=1 / math.sqrt(tags[name].fan_in)), 7)
        parts = [result[name] for result in results]
        if dim is None:
            assert all(torch.equal(part, whole) for part in parts), name
        else:
            assert torch.equal(torch.cat(parts, dim), whole), name
    assert all("gives a shard" in result["refusal"] for result in results)
