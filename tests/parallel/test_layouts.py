"""Law 3: the layout changes nothing. Every layout against the plain-PyTorch reference, on the project's data path."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ranks
import tiny
from mpdit.config import Config
from reference import plain_mmdit as plain

STEPS = 20
LOSS_BOUND = 1e-5  # relative, fp32
EMA_BOUND = 1e-4  # absolute, after 20 steps at a learning rate of 4e-3
BF16_BOUND = 3e-2

# name: (ranks, sections). Depth is 4 blocks unless said.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process":                          (1, {}),
    "one process, micro-batches of 2":      (1, {"micro_batch": 2}),
    "recompute":                            (1, {"recompute": "full"}),
    "TP2":                                  (2, {"tp": 2}),
    "TP4":                                  (4, {"tp": 4}),
    "TP2 + SP":                             (2, {"tp": 2, "sp": True}),
    "PP2":                                  (2, {"pp": 2}),
    "PP2 uneven 1+3":                       (2, {"pp": 2, "pp_split": [1, 3]}),
    "PP4":                                  (4, {"pp": 4}),
    "TP2 x PP2":                            (4, {"tp": 2, "pp": 2}),
    "TP2 x PP2 + SP":                       (4, {"tp": 2, "pp": 2, "sp": True}),
    "TP2 x PP2 + SP, recompute":            (4, {"tp": 2, "pp": 2, "sp": True, "recompute": "full"}),
    "PP2 x VPP2":                           (2, {"pp": 2, "vpp": 2}),
    "TP2 x PP2 x VPP2 + SP":                (4, {"tp": 2, "pp": 2, "vpp": 2, "sp": True, "micro_batch": 2}),
    "DP2":                                  (2, {}),
    "DP2, overlap":                         (2, {"overlap_grad_reduce": True}),
    "DP2, dist-opt":                        (2, {"distributed_optimizer": True}),
    "DP2, dist-opt, overlap":               (2, {"distributed_optimizer": True, "overlap_grad_reduce": True,
                                                 "overlap_param_gather": True}),
    "DP4, dist-opt":                        (4, {"distributed_optimizer": True}),
    "TP2 x DP2 + SP, dist-opt":             (4, {"tp": 2, "sp": True, "distributed_optimizer": True}),
    "PP2 x DP2, dist-opt":                  (4, {"pp": 2, "distributed_optimizer": True}),
    "PP2 x DP2, dist-opt, overlap":         (4, {"pp": 2, "distributed_optimizer": True, "overlap_grad_reduce": True,
                                                 "overlap_param_gather": True}),
    "PP2 x VPP2 x DP2, dist-opt, overlap":  (4, {"pp": 2, "vpp": 2, "distributed_optimizer": True,
                                                 "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "CP2":                                  (2, {"cp": 2}),
    "CP2 x DP2, dist-opt":                  (4, {"cp": 2, "distributed_optimizer": True}),
    "TP2 x CP2 + SP":                       (4, {"tp": 2, "cp": 2, "sp": True}),
    "CP2 x PP2":                            (4, {"cp": 2, "pp": 2}),
}  # fmt: skip

_NAMES = {  # the reference's words -> the project's
    "embed.token_table.": "embed.text.",
    ".in.": ".linear_1.",
    ".mid.": ".linear_2.",
    ".q_norm.": ".q_layernorm.",
    ".k_norm.": ".k_layernorm.",
}


def project_name(reference_name: str) -> str:
    for theirs, ours in _NAMES.items():
        reference_name = reference_name.replace(theirs, ours)
    return reference_name


def train_layout(rank: int, world: int, config: Config) -> dict[str, Any]:
    """One rank of a run: {name: (initial shard, sharded dim or None)}, its tensor rank, losses, gradient norms."""
    from megatron.core import parallel_state

    from mpdit.parallel import groups
    from mpdit.train import batches, loop, preflight, session

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), loop.Sets.open(config)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    shards = {
        name: (p.detach().clone(), p.partition_dim if getattr(p, "tensor_model_parallel", False) else None)
        for chunk in run.network.chunks
        for name, p in chunk.module.named_parameters()
    }
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    losses, norms = [], []
    for _ in range(STEPS):
        losses.append(run.forward_backward(feed.next()))
        run.ema.update()  # of the step before, as the loop does
        norms.append(run.update())
    feed.close()
    with run.settled():
        run.ema.update()
    ema = {name: value.clone() for name, value in run.ema.values.items()}
    groups.stop()
    return {"shards": shards, "tensor_rank": tensor_rank, "losses": losses, "norms": norms, "ema": ema}


def train_reference(rank: int, world: int, config: Config) -> dict[str, Any]:
    """The same run in plain PyTorch: the project's data, draws and initial weights, and nothing else of it."""
    from mpdit.data.decode import decode
    from mpdit.mup.table import Entry
    from mpdit.objective import draws, flow
    from mpdit.parallel import groups, init
    from mpdit.train import loop, preflight, session

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    sets, m = loop.Sets.open(config), config.model
    shape = plain.Shape(
        width=m.width, depth=m.depth, head_dim=m.head_dim, patch=m.patch, channels=m.channels, vocab=m.vocab_size
    )
    mup, optim = config.mup, config.optim
    recipe = plain.Recipe(
        base_width=mup.base_width,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        eps=optim.eps,
        adaln_init=mup.adaln_init,
        readout_init=mup.readout_init,
        output_mult=mup.output_mult,
    )
    table: dict[str, Entry] = dict(session.build_network(config).table)
    names = {name: project_name(name) for name in plain.parameters(shape)}
    initial = {name: init.full_value(ours, table[ours], config.train.seed) for name, ours in names.items()}

    def batches() -> Any:
        for step in range(STEPS):
            rows = sets.plan.batch(step)
            encoded, captions = zip(*(sets.train.read(int(i)) for i in rows.sample_ids), strict=True)
            images = decode(encoded, m.image_size, m.image_size)
            dropped = draws.uniform(config.train.seed, "caption drop", rows.sample_ids, rows.visits)
            kept = ["" if d < config.data.caption_drop else c for d, c in zip(dropped, captions, strict=True)]
            yield plain.Batch(
                image_BCYX=images,
                noise_BCYX=draws.noise(config.train.seed, rows.sample_ids, rows.visits, tuple(images.shape[1:])),
                t_B=flow.times(config.objective, config.train.seed, rows.sample_ids, rows.visits),
                ids_BL=torch.from_numpy(sets.tokenizer.encode(kept, m.text_tokens)),
            )

    def schedule(step: int) -> float:
        if step <= optim.warmup_steps:
            return step / optim.warmup_steps
        along = (step - optim.warmup_steps) / (config.train.steps - optim.warmup_steps)
        return optim.final_lr_ratio + 0.5 * (1 - optim.final_lr_ratio) * (1 + np.cos(np.pi * along))

    weights = {name: value.clone() for name, value in initial.items()}
    ema = {name: value.clone() for name, value in initial.items()}
    losses, norms = plain.train(
        weights,
        plain.rules(shape, recipe),
        batches(),
        STEPS,
        shape=shape,
        betas=(optim.beta1, optim.beta2),
        clip=optim.clip,
        schedule=schedule,
        ema=ema,
        ema_decay=config.train.ema_decay,
    )
    groups.stop()
    return {
        "losses": losses,
        "norms": norms,
        "initial": {names[n]: v for n, v in initial.items()},
        "ema": {names[n]: v for n, v in ema.items()},
    }


@pytest.fixture(scope="module")
def reference(tiny_set: Path) -> dict[str, Any]:
    return ranks.run(1, train_reference, config=tiny.config(tiny_set))[0]


@pytest.fixture(scope="module")
def header() -> None:
    columns = ("initial weights", "loss fp32", "grad norm", "EMA", "loss bf16")
    print(f"\n{'layout':38s} {'ranks':>5s} " + " ".join(f"{c:>15s}" for c in columns))


def difference(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(wanted)
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def whole(results: list[dict[str, Any]], key: str = "shards") -> dict[str, torch.Tensor]:
    """The whole model's tensors out of every rank's. What several ranks hold must be the same bits on all of them."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    dims = {name: dim for result in results for name, (_, dim) in result["shards"].items()}
    for result in results:
        for name, dim in ((name, dim) for name, (_, dim) in result["shards"].items()):
            value = result[key][name][0] if key == "shards" else result[key][name]
            place = 0 if dim is None else result["tensor_rank"]
            known = parts.setdefault(name, {}).setdefault(place, value)
            assert torch.equal(known, value), f"{name} differs between ranks that share it"
    return {
        name: places[0] if dims[name] is None else torch.cat([places[i] for i in sorted(places)], dims[name])
        for name, places in parts.items()
    }


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, tiny_set: Path, reference: dict[str, Any], header: None) -> None:
    world, parallel = LAYOUTS[name]
    fp32 = ranks.run(world, train_layout, config=tiny.config(tiny_set, parallel=parallel))
    bf16 = ranks.run(world, train_layout, config=tiny.config(tiny_set, parallel={**parallel, "precision": "bf16"}))

    initial, wanted = whole(fp32), reference["initial"]
    identical = initial.keys() == wanted.keys() and all(torch.equal(initial[n], v) for n, v in wanted.items())
    averaged = whole(fp32, "ema")
    ema_error = max((averaged[n] - v).abs().max().item() for n, v in reference["ema"].items())
    loss, norm = difference(fp32[0]["losses"], reference["losses"]), difference(fp32[0]["norms"], reference["norms"])
    loss_bf16 = difference(bf16[0]["losses"], reference["losses"])
    verdict = "identical" if identical else "DIFFERENT"
    numbers = "".join(f" {x:15.1e}" for x in (loss, norm, ema_error, loss_bf16))
    print(f"{name:38s} {world:5d} {verdict:>15s}{numbers}")
    assert identical
    assert loss <= LOSS_BOUND
    assert norm <= 10 * LOSS_BOUND
    assert ema_error <= EMA_BOUND
    assert loss_bf16 <= BF16_BOUND
    assert all(r["losses"] == fp32[0]["losses"] for r in fp32), "ranks report different losses"
