"""Law 2: one table. It is the same from every layout, and the optimizer and the initial weights do as it says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

import ranks
import tiny
from mpdit.config import Config

KEYS = ["name", "role", "shape", "fan_in", "fan_out", "init_std", "lr", "weight_decay", "eps", "multiplier"]
# A multiplier for every group, so that no two roles happen to get the same.
LR_MULT = {"input": 1.5, "table": 0.5, "hidden": 2.0, "modulation": 0.25, "output": 3.0, "vector": 0.75}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2 x PP2": (4, {"tp": 2, "pp": 2}),
    "PP2 x VPP2": (2, {"pp": 2, "vpp": 2}),
    "DP2, dist-opt": (2, {"distributed_optimizer": True}),
    "bf16": (1, {"precision": "bf16"}),
}
WARMUP = tiny.BASE["optim"]["warmup_steps"]


def one_step(rank: int, world: int, config: Config) -> dict[str, Any]:
    """The table's rows, each parameter's weights at first, and what the optimizer's groups hold after a step."""
    from mpdit.mup.table import rows
    from mpdit.parallel import groups, optimizer
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), Sets.open(config)
    named = {name: p for chunk in run.network.chunks for name, p in chunk.module.named_parameters()}
    initial = {name: p.detach().double() for name, p in named.items()}
    weights = {
        name: (w.numel(), w.mean().item(), w.std(unbiased=False).item(), w.min().item(), w.max().item())
        for name, w in initial.items()
    }
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    run.forward_backward(feed.next())
    run.update()
    feed.close()
    held, betas = {}, set()
    for parameter, slot in optimizer.slots(run.optimizer).items():
        name = next(n for n, p in named.items() if p is parameter)
        held[name] = tuple(slot.group[key] for key in ("lr", "min_lr", "eps", "weight_decay"))
        betas.add(slot.group["betas"])
        assert any(p is slot.main for p in slot.group["params"])
    modules = [module for chunk in run.network.chunks for module in chunk.module.modules()]
    acting = {
        name: [getattr(module, name) for module in modules if hasattr(module, name)]
        for name in ("multiplier", "residual_multiplier")
    }
    groups.stop()
    return {"rows": rows(run.network.table), "weights": weights, "held": held, "betas": betas, "acting": acting}


@pytest.fixture(scope="module")
def from_layout(tiny_set: Path) -> Any:
    done: dict[str, list[dict[str, Any]]] = {}

    def results(name: str) -> list[dict[str, Any]]:
        if name not in done:
            world, parallel = LAYOUTS[name]
            config = tiny.config(tiny_set, parallel=parallel, mup={"lr_mult": LR_MULT})
            done[name] = ranks.run(world, one_step, timeout_s=90, config=config)
        return done[name]

    return results


@pytest.mark.dist
def test_rows_have_the_contracts_keys(from_layout: Any) -> None:
    rows = from_layout("one process")[0]["rows"]
    for row in rows:
        assert set(row) == {*KEYS, "group"}
        assert [key for key in row if key != "group"] == KEYS, "users read this file: keep its order"
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


@pytest.mark.dist
def test_rows_of_an_mmdit(from_layout: Any) -> None:
    """One row of every kind, by hand: width 32 = 2 x 16, lr 4e-3, weight decay 0.1, eps 1e-6."""
    rows = {row["name"]: row for row in from_layout("one process")[0]["rows"]}
    expected = {
        # name: role, group, shape, fan_in, fan_out, init std, lr, weight decay, eps, multiplier
        "embed.patch.linear.weight":        ("input", "input", [32, 27], 27, 32, 27**-0.5, 6e-3, 0.1, 5e-7, 1),
        "embed.time.linear_1.weight":       ("input", "input", [32, 256], 256, 32, 1 / 16, 6e-3, 0.1, 5e-7, 1),
        "embed.time.linear_2.weight":       ("hidden", "hidden", [32, 32], 32, 32, 32**-0.5, 4e-3, 0.2, 5e-7, 1),
        "embed.pooled.linear_1.weight":     ("hidden", "hidden", [32, 32], 32, 32, 32**-0.5, 4e-3, 0.2, 5e-7, 1),
        "blocks.3.img.qkv.linear.weight":   ("hidden", "hidden", [96, 32], 32, 96, 32**-0.5, 4e-3, 0.2, 5e-7, 1),
        "blocks.0.txt.mlp.fc1.weight":      ("hidden", "hidden", [128, 32], 32, 128, 32**-0.5, 4e-3, 0.2, 5e-7, 1),
        "blocks.2.img.mlp.fc2.weight":      ("hidden", "hidden", [32, 128], 128, 32, 128**-0.5, 4e-3, 0.2, 5e-7, 1),
        "blocks.1.txt.ada.weight":          ("hidden", "modulation", [192, 32], 32, 192, 32**-0.5, 5e-4, 0.2, 5e-7, 1),
        "blocks.3.txt.ada.weight":          ("hidden", "modulation", [64, 32], 32, 64, 32**-0.5, 5e-4, 0.2, 5e-7, 1),
        "head.ada.weight":                  ("hidden", "modulation", [64, 32], 32, 64, 32**-0.5, 5e-4, 0.2, 5e-7, 1),
        "head.out.weight":                  ("output", "output", [27, 32], 32, 27, 1 / 4, 1.2e-2, 0.1, 5e-7, 0.75),
        "blocks.1.img.qkv.linear.bias":     ("vector", "vector", [96], 1, 96, 0, 3e-3, 0, 5e-7, 1),
        "blocks.1.img.qkv.q_layernorm.weight":  ("vector", "vector", [8], 1, 8, 0, 3e-3, 0, 1e-6, 1),
        "blocks.1.txt.qkv.k_layernorm.weight":  ("vector", "vector", [8], 1, 8, 0, 3e-3, 0, 1e-6, 1),
        "head.out.bias":                    ("vector", "vector", [27], 1, 27, 0, 3e-3, 0, 1e-6, 1),
    }  # fmt: skip
    for name, (role, group, shape, fan_in, fan_out, *numbers) in expected.items():
        row = rows[name]
        assert [row[k] for k in ("role", "group", "shape", "fan_in", "fan_out")] == [
            role,
            group,
            shape,
            fan_in,
            fan_out,
        ]
        assert [row[k] for k in KEYS[5:]] == pytest.approx(numbers), name
    assert rows["embed.text.weight"]["group"] == "table"
    assert rows["embed.text.weight"]["init_std"] == 1.0
    assert [n for n in rows if ".txt.mlp." in n and n.startswith("blocks.3.")] == [], "the last text stream is pre-only"
    constant = {name for name, row in rows.items() if row["eps"] == 1e-6}
    assert constant == {"head.out.bias"} | {name for name in rows if "_layernorm." in name}


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_table_is_the_same_from_every_rank_of_every_layout(name: str, from_layout: Any) -> None:
    wanted = from_layout("one process")[0]["rows"]
    assert [row["name"] for row in wanted] == sorted(row["name"] for row in wanted)
    for result in from_layout(name):
        assert result["rows"] == wanted


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_optimizer_holds_what_the_table_says(name: str, from_layout: Any) -> None:
    """Of every parameter, on every rank, when the schedule has moved once: one step into the warm-up."""
    results = from_layout(name)
    table = {row["name"]: row for row in results[0]["rows"]}
    seen = set()
    for result in results:
        for parameter, held in result["held"].items():
            row = table[parameter]
            seen.add(parameter)
            final = row["lr"] * tiny.BASE["optim"]["final_lr_ratio"]
            assert held == pytest.approx((row["lr"] / WARMUP, final, row["eps"], row["weight_decay"]), rel=1e-9), (
                parameter
            )
    assert seen == set(table), "parameters without a place in the optimizer"


@pytest.mark.dist
@pytest.mark.parametrize("name", ["one process", "TP2 x PP2"])
def test_the_initial_weights_are_as_wide_as_the_table_says(name: str, from_layout: Any) -> None:
    results = from_layout(name)
    table = {row["name"]: row for row in results[0]["rows"]}
    drawn = 0
    for result in results:
        for parameter, (count, mean, spread, low, high) in result["weights"].items():
            std = table[parameter]["init_std"]
            if std == 0.0:
                fill = 1.0 if parameter.endswith("_layernorm.weight") else 0.0
                assert (low, high) == (fill, fill), parameter
                continue
            drawn += 1
            assert abs(mean) < 5 * std / math.sqrt(count), parameter
            assert abs(spread / std - 1) < 5 / math.sqrt(2 * count), parameter
    assert drawn > 30


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_readout_has_the_tables_multiplier(name: str, from_layout: Any) -> None:
    found = [multiplier for result in from_layout(name) for multiplier in result["acting"]["multiplier"]]
    assert found
    assert set(found) == {0.75}  # 1.5 / 2


@pytest.mark.dist
def test_vectors_are_decayed_by_the_optimizer_when_asked(tiny_set: Path) -> None:
    """Megatron by itself leaves biases and gains out; with sp, every parameter has the same rule."""
    config = tiny.config(tiny_set, mup={"wd_vector": True, "parametrization": "sp"})
    result = ranks.run(1, one_step, timeout_s=60, config=config)[0]
    assert {held[2:] for held in result["held"].values()} == {(1e-6, 0.1)}
    assert result["held"].keys() == result["weights"].keys()


@pytest.mark.dist
def test_depth_batch_size_and_length_reach_network_and_optimizer(tiny_set: Path) -> None:
    """By hand: twice as deep as the proxy; 4 times its batch, 16 times its images, so r = 1/4 and its root 1/2."""
    mup = {"parametrization": "completep", "base_depth": 2, "base_batch_size": 2, "base_images": 10}
    result = ranks.run(1, one_step, timeout_s=60, config=tiny.config(tiny_set, mup=mup))[0]
    (betas,) = result["betas"]
    assert betas == pytest.approx((0.975, 0.9875))
    assert set(result["acting"]["residual_multiplier"]) == {0.5}
    assert len(result["acting"]["residual_multiplier"]) == 8  # both streams of 4 blocks
    assert set(result["acting"]["multiplier"]) == {0.75}
    expected = {
        # name: lr, eps, weight decay
        "embed.patch.linear.weight":           (2e-3, 1e-6, 0.05),
        "embed.time.linear_2.weight":          (1e-3, 1e-6, 0.1),
        "blocks.1.img.mlp.fc2.weight":         (1e-3, 5e-7, 0.1),
        "blocks.1.img.mlp.fc2.bias":           (2e-3, 5e-7, 0.0),
        "blocks.1.img.qkv.q_layernorm.weight": (2e-3, 1e-6, 0.0),
        "head.out.weight":                     (2e-3, 1e-6, 0.05),
        "head.out.bias":                       (2e-3, 2e-6, 0.0),
    }  # fmt: skip
    for name, (lr, eps, weight_decay) in expected.items():
        final = lr * tiny.BASE["optim"]["final_lr_ratio"]
        assert result["held"][name] == pytest.approx((lr / WARMUP, final, eps, weight_decay)), name
