"""Images of another shape at each step: every layout's losses are the plain-PyTorch reference's, and one step has one.

Middle stages see no image: they know the shape from the micro-batch. The square comes again after other shapes, so
that nothing may be left of those.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ranks
import tiny
from mpdit import config as configs
from mpdit.config import Config
from parallel.compared import difference, reference_trained, trained, whole
from parallel.layouts import CASES, DIST_OPT_OVERLAP, Layout
from reference import plain_objective

LOSS_BOUND, EMA_BOUND = 1e-5, 1e-4  # as between the layouts of test_layouts.py
VOCABULARY = 20
# 16, 24, 8, 16, 20 and 16 patches of 3 x 3; the middle of 5 lies between two patches of 4.
SHAPES = ((12, 12), (18, 12), (6, 12), (6, 24), (15, 12), (12, 12), (12, 18))
LAYOUTS: dict[str, Layout] = {
    "one process, micro-batches of 2": (1, {"micro_batch": 2}),
    "TP2 x PP2": (4, {"tp": 2, "pp": 2}),
    "TP2 x PP2 x VPP2 + SP, recompute": (
        4, {"tp": 2, "pp": 2, "vpp": 2, "sp": True, "micro_batch": 2, "recompute": "full"},
    ),
    "CP2 x PP2": (4, {"cp": 2, "pp": 2}),
    "PP4": (4, {"pp": 4, "micro_batch": 1}),
    "DP2, dist-opt, overlap": (2, DIST_OPT_OVERLAP),
}  # fmt: skip
ROWS = [
    *(("mmdit", name) for name in LAYOUTS),
    ("pixart", "TP2 x PP2"),
    ("pixart", "CP2 x PP2"),
    ("dit", "TP2 x PP2"),
]


def config_of(of: str, parallel: dict[str, Any]) -> Config:
    """The tiny run of test_layouts.py, and as it comes without a data set its vocabulary."""
    tree = {key: dict(value) for key, value in tiny.BASE.items()}
    for key, value in (CASES[of].sections | {"parallel": parallel}).items():
        tree[key] = {**tree.get(key, {}), **value}
    tree["model"]["vocab_size"] = VOCABULARY
    tree["train"] |= {"steps": len(SHAPES), "seed": 3}
    tree["data"] = {**tree.get("data", {}), "buckets": [list(shape) for shape in sorted(set(SHAPES))]}
    return configs.from_dict(tree)


def question(config: Config, step: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Images and text of the whole batch of a step, its sample ids and visits."""
    size, model = config.train.batch_size, config.model
    generator = torch.Generator().manual_seed(step)
    images_BCHW = torch.rand(size, model.channels, *SHAPES[step], generator=generator) * 2 - 1
    text_BL = torch.randint(1, VOCABULARY, (size, model.text_tokens), generator=generator)
    return images_BCHW, text_BL, np.arange(step * size, (step + 1) * size), np.zeros(size, np.int64)


def train_mixed(rank: int, world: int, config: Config) -> dict[str, Any]:
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session

    config = preflight.without_data(config, world)
    groups.start(config.parallel, config.train.seed)

    def micro_batches(step: int) -> Iterator[Any]:
        rows = question(config, step)
        share, size = config.train.batch_size // groups.data_size(), config.parallel.micro_batch
        first = groups.data_rank() * share
        for start in range(first, first + share, size):
            if groups.is_first_stage() or groups.is_last_stage():
                yield batches.noised_batch(config, *(x[start : start + size] for x in rows))
            else:
                yield batches.Batch(size=size, height=SHAPES[step][0], width=SHAPES[step][1])

    found = trained(config, session.build(config), lambda step: list(micro_batches(step)))
    groups.stop()
    return found


def train_reference(rank: int, world: int, config: Config, of: str) -> dict[str, Any]:
    from mpdit.objective import draws, flow
    from mpdit.parallel import groups
    from mpdit.train import preflight

    config = preflight.without_data(config, world)
    groups.start(config.parallel, config.train.seed)
    plain, seed = CASES[of].plain, config.train.seed

    def batches() -> Iterator[Any]:
        for step in range(config.train.steps):
            images, ids_BL, samples, visits = question(config, step)
            noise = draws.noise(seed, samples, visits, tuple(images.shape[1:]))
            if config.objective.kind == "ddpm":
                uniform = torch.from_numpy(draws.uniform(seed, "time", samples, visits))
                yield plain_objective.diffusion(images, noise, uniform, ids_BL)
            else:
                t_B = flow.times(config.objective, seed, samples, visits)
                yield plain.Batch(image_BCYX=images, noise_BCYX=noise, t_B=t_B, ids_BL=ids_BL)

    found = reference_trained(config, CASES[of], batches())
    groups.stop()
    return found


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    names = dict.fromkeys(of for of, _ in ROWS)
    return {of: ranks.run(1, train_reference, config=config_of(of, {}), of=of)[0] for of in names}


@pytest.mark.dist
@pytest.mark.parametrize(("of", "name"), ROWS, ids=[f"{of}, {name}" for of, name in ROWS])
def test_mixed_shapes_equal_the_reference(of: str, name: str, references: Any) -> None:
    (world, parallel), reference = LAYOUTS[name], references[of]
    results = ranks.run(world, train_mixed, config=config_of(of, parallel))
    averaged = whole(results, "ema")
    loss, norm = (difference(results[0][key], reference[key]) for key in ("losses", "norms"))
    ema = max((averaged[n] - v).abs().max().item() for n, v in reference["ema"].items())
    print(f"\n{of:8s} {name:36s} loss {loss:.1e}  grad norm {norm:.1e}  EMA {ema:.1e}")
    assert loss <= LOSS_BOUND
    assert norm <= 10 * LOSS_BOUND
    assert ema <= EMA_BOUND
    assert all(result["losses"] == results[0]["losses"] for result in results), "ranks report different losses"


# ---- positions -------------------------------------------------------------------------------------------------------


def positions(rank: int, world: int, config: Config, shape: tuple[int, int]) -> torch.Tensor:
    """What the embedder adds to the patches of an image of this shape, [rows, columns, width]."""
    from mpdit.models.layers import PatchEmbed
    from mpdit.parallel import context, groups

    groups.start(config.parallel, config.train.seed)
    embed = PatchEmbed(context.build(config))
    with torch.no_grad():
        embed.linear.weight.zero_(), embed.linear.bias.zero_()
        added_SBD = embed(torch.zeros(1, config.model.channels, *shape))
    groups.stop()
    patch = config.model.patch
    return added_SBD.detach()[:, 0].unflatten(0, (shape[0] // patch, shape[1] // patch))


@pytest.mark.dist
def test_grids_share_their_middle() -> None:
    """By an even difference of sides the larger grid holds the smaller, whose middle is its own."""
    config = config_of("mmdit", {})
    square, tall, wide = (ranks.run(1, positions, config=config, shape=s)[0] for s in ((12, 12), (18, 12), (6, 24)))
    assert torch.equal(tall[1:-1], square)
    assert torch.equal(wide[:, 2:-2], square[1:-1])
    assert not torch.equal(tall[:-2], square)


@pytest.mark.dist
@pytest.mark.parametrize("side", [16, 32, 13])
def test_the_square_is_as_ever(side: int) -> None:
    """Counted from 0 in the upper left, in float64 and then rounded, to the bit: older checkpoints were trained so."""
    config = config_of("mmdit", {})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, patch=1, image_size=side))
    features = config.model.width // 2
    frequency = 10000.0 ** (-torch.arange(features // 2, dtype=torch.float64) / (features // 2))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angles.sin(), angles.cos()], -1).float()
    wanted = torch.cat([axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], -1)
    assert torch.equal(ranks.run(1, positions, config=config, shape=(side, side))[0], wanted)


# ---- one step, one shape ---------------------------------------------------------------------------------------------


def step_of_two_shapes(rank: int, world: int, config: Config) -> str:
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session

    config = preflight.without_data(config, world)
    groups.start(config.parallel, config.train.seed)
    run = session.build(config)
    try:
        run.forward_backward([batches.noised_batch(config, *question(config, step)) for step in (0, 1)])
    except ValueError as error:
        return str(error)
    finally:
        groups.stop()
    return ""


@pytest.mark.dist
def test_a_step_of_two_shapes_is_refused() -> None:
    """Every boundary between stages has one size a step: what else comes would be read as something it is not."""
    said = ranks.run(1, step_of_two_shapes, config=config_of("mmdit", {"micro_batch": 4}))[0]
    assert said == "micro-batches of one step have images of [(12, 12), (18, 12)] pixels"
