"""REPA's loss on whichever stage has its block: the same in every layout, and what autograd makes of the plain sum."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import ranks
import tiny
from mpdit.config import Config

STEPS = 10
BOUND = 1e-5  # relative, fp32
WEIGHT = 0.5
UVIT = {"arch": "uvit", "depth": 5, "text_tokens": 7}

# name: (ranks, block that is aligned, parallel). Depth is 4 blocks.
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "micro-batches of 2":               (1, 2, {"micro_batch": 2}),
    "recompute":                        (1, 2, {"recompute": "full"}),
    "TP2":                              (2, 2, {"tp": 2}),
    "TP2 + SP":                         (2, 2, {"tp": 2, "sp": True}),
    "PP2, block on stage 0":            (2, 2, {"pp": 2}),
    "PP2, block on stage 1":            (2, 3, {"pp": 2}),
    "PP2, last block":                  (2, 4, {"pp": 2}),
    "PP4, block on stage 1":            (4, 2, {"pp": 4, "micro_batch": 2}),
    "CP2":                              (2, 2, {"cp": 2}),
    "DP2":                              (2, 2, {}),
    "PP2 x DP2, dist-opt, overlap":     (4, 3, {"pp": 2, "distributed_optimizer": True, "overlap_grad_reduce": True,
                                                "overlap_param_gather": True}),
    "PP2 x VPP2, chunk 1":              (2, 2, {"pp": 2, "vpp": 2}),
    "PP2 x VPP2, chunk 2":              (2, 3, {"pp": 2, "vpp": 2}),
    "TP2 x PP2 + SP":                   (4, 2, {"tp": 2, "pp": 2, "sp": True}),
    "TP2 x PP2 + SP, recompute":        (4, 3, {"tp": 2, "pp": 2, "sp": True, "recompute": "full"}),
    "TP2 x CP2 + SP":                   (4, 2, {"tp": 2, "cp": 2, "sp": True}),
}  # fmt: skip

# U-ViT's stream holds other tokens before the image's: joined, cut and shared out again.
UVIT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "CP2": (2, {"cp": 2}),
    "TP2 x CP2 + SP": (4, {"tp": 2, "cp": 2, "sp": True}),
    "PP2 uneven": (2, {"pp": 2, "pp_split": [2, 3]}),
}


def repa_config(data: Path, block: int, parallel: dict[str, Any], **sections: Any) -> Config:
    objective = {"repa_weight": WEIGHT, "repa_block": block}
    return tiny.config(data, parallel=parallel, objective=objective, **sections)


def train_repa(rank: int, world: int, config: Config) -> dict[str, Any]:
    """One rank of a run: losses, REPA's losses, gradient norms, and the names of the projector that it holds."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), Sets.open(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    found: dict[str, Any] = {"losses": [], "repa": [], "norms": []}
    for _ in range(STEPS):
        found["losses"].append(run.forward_backward(feed.next()))
        found["repa"].append(run.repa_loss())
        found["norms"].append(run.update())
    feed.close()
    groups.stop()
    names = [name for chunk in run.network.chunks for name, _ in chunk.module.named_parameters()]
    return {**found, "projector": [name for name in names if name.startswith("repa.")]}


def difference(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(wanted) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def same(results: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    errors = {key: difference(results[0][key], wanted[key]) for key in ("losses", "repa", "norms")}
    print("  ".join(f"{key} {error:.1e}" for key, error in errors.items()))
    assert max(errors.values()) <= BOUND, errors
    for key in ("losses", "repa"):
        assert all(result[key] == results[0][key] for result in results), f"ranks report different {key}"


@pytest.fixture(scope="module")
def narrow() -> Iterator[None]:
    """A projector of 64 features: that of 2048 has a hundred times the parameters of the network it is tested with."""
    ranks.warm()
    from mpdit.models import repa

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repa, "HIDDEN", 64)  # in the ranks too: they are forked from here
        yield


@pytest.fixture(scope="module")
def one_process(tiny_set: Path, narrow: None) -> dict[int, dict[str, Any]]:
    return {
        block: ranks.run(1, train_repa, config=repa_config(tiny_set, block, {}))[0]
        for block in sorted({block for _, block, _ in LAYOUTS.values()})
    }


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tiny_set: Path, one_process: dict[int, dict[str, Any]]) -> None:
    world, block, parallel = LAYOUTS[name]
    results = ranks.run(world, train_repa, config=repa_config(tiny_set, block, parallel))
    print(f"\n{name:38s}", end="")
    same(results, one_process[block])
    holders = [rank for rank, result in enumerate(results) if result["projector"]]
    assert len(holders) == world // parallel.get("pp", 1), "one stage holds the projector"


@pytest.mark.dist
def test_a_block_of_another_depth_learns_something_else(one_process: dict[int, dict[str, Any]]) -> None:
    """Or the layouts above could all be right without the block they name."""
    assert difference(one_process[2]["norms"], one_process[3]["norms"]) > 1e-3
    assert all(run["repa"][-1] < run["repa"][0] - 0.05 for run in one_process.values())


@pytest.mark.dist
def test_uvit(tiny_set: Path, narrow: None) -> None:
    wanted = ranks.run(1, train_repa, config=repa_config(tiny_set, 2, {}, model=UVIT))[0]
    for name, (world, parallel) in UVIT_LAYOUTS.items():
        print(f"\nuvit {name:33s}", end="")
        same(ranks.run(world, train_repa, config=repa_config(tiny_set, 2, parallel, model=UVIT)), wanted)


@pytest.mark.dist
def test_mixed_shapes(mixed_set: Path, narrow: None) -> None:
    """Teacher and tokens have the same rows and columns at every step, of whichever bucket."""

    def config(parallel: dict[str, Any]) -> Config:
        asked = repa_config(mixed_set, 2, parallel)
        buckets = tuple((height, width) for height, width in tiny.BUCKETS)
        return dataclasses.replace(asked, data=dataclasses.replace(asked.data, buckets=buckets))

    wanted = ranks.run(1, train_repa, config=config({}))[0]
    for name, world, parallel in (("CP2 x PP2", 4, {"cp": 2, "pp": 2}), ("TP2 + SP", 2, {"tp": 2, "sp": True})):
        print(f"\n{name:38s}", end="")
        same(ranks.run(world, train_repa, config=config(parallel)), wanted)


# ---- against plain autograd ------------------------------------------------------------------------------------------


def gradients(rank: int, world: int, config: Config) -> float:
    """The largest difference of a gradient from that of mean(loss + weight * REPA's loss), in units of its largest."""
    from mpdit.parallel import groups, optimizer
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), Sets.open(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    run.forward_backward(feed.next())  # nothing of the step before is counted
    micro_batches = feed.next()
    reported = run.forward_backward(micro_batches)
    (stage,) = (chunk.module for chunk in run.network.chunks)
    found = {name: optimizer.gradient(p).clone() for name, p in stage.named_parameters()}

    losses, alignments = [], []
    for micro_batch in micro_batches:
        streams = stage.embed(micro_batch.inputs)
        for number, block in enumerate(stage.blocks.values(), 1):
            streams = block(*streams)
            if number == config.objective.repa_block:
                hidden, m = streams[0], config.model.width / config.mup.base_width
                projector = stage.repa
                y = F.silu(F.linear(hidden, projector.linear_1.weight * config.mup.output_mult / m))
                y = F.silu(F.linear(y, projector.linear_2.weight))  # biases start at zero
                y = F.linear(y, projector.linear_3.weight)
                teacher = micro_batch.inputs.teacher_SBF
                cosine = (y * teacher).sum(-1) / (y.norm(dim=-1) * teacher.norm(dim=-1))
                alignments.append((1 - cosine).mean())
        losses.append(batches.loss(config, stage.head(*streams), micro_batch))
    loss, alignment = torch.stack(losses).mean(), torch.stack(alignments).mean()
    assert reported == pytest.approx(loss.item(), rel=BOUND)
    assert run.repa_loss() == pytest.approx(alignment.item(), rel=BOUND)
    matrices = {name: p for name, p in stage.named_parameters() if not (name.startswith("repa.") and p.ndim == 1)}
    wanted = torch.autograd.grad(loss + config.objective.repa_weight * alignment, list(matrices.values()))
    feed.close()
    groups.stop()
    assert any(name.startswith("repa.") for name in matrices)
    return max(
        ((found[name] - want).abs().max() / want.abs().max()).item()
        for name, want in zip(matrices, wanted, strict=True)
        if want.any()
    )


@pytest.mark.dist
@pytest.mark.parametrize("micro_batch", [8, 2])
def test_one_process_is_the_plain_sum(micro_batch: int, tiny_set: Path, narrow: None) -> None:
    config = repa_config(tiny_set, 2, {"micro_batch": micro_batch})
    assert ranks.run(1, gradients, config=config)[0] <= BOUND


# ---- muP -------------------------------------------------------------------------------------------------------------


def projector_table(rank: int, world: int, config: Config) -> dict[str, tuple[str, str, float, float, float]]:
    """name -> role, group, initial std, multiplier in the table, multiplier in the layer (1 where it has none)."""
    from mpdit.parallel import groups
    from mpdit.train import preflight, session

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run = session.build(config)
    (stage,) = (chunk.module for chunk in run.network.chunks)
    layers = {"repa.linear_1.weight": stage.repa.linear_1.multiplier}
    groups.stop()
    return {
        name: (e.tag.role.value, e.tag.group.value, e.rule.init_std, e.rule.multiplier, layers.get(name, 1.0))
        for name, e in run.network.table.items()
        if name.startswith("repa.")
    }


@pytest.mark.dist
def test_the_projector_reads_out_of_the_width_under_mup(tiny_set: Path) -> None:
    """width -> 2048 is an output layer: the proxy's init, 1/m forward. Behind it nothing grows."""
    ranks.warm()
    from mpdit.models import repa

    mup = {"base_width": 8, "output_mult": 1.0, "readout_init": "zero"}
    table = ranks.run(1, projector_table, config=repa_config(tiny_set, 2, {}, mup=mup))[0]
    assert {name.removeprefix("repa.") for name in table} == {
        f"linear_{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")
    }
    m, hidden = 32 / 8, repa.HIDDEN
    assert table["repa.linear_1.weight"] == ("output", "output", pytest.approx(8**-0.5), 1 / m, 1 / m)
    for name in ("repa.linear_2.weight", "repa.linear_3.weight"):
        assert table[name] == ("input", "input", pytest.approx(hidden**-0.5), 1.0, 1.0)
