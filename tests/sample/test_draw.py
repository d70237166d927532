"""Pictures are a function of weights, seed, prompt and its number: not of the layout or of the prompts beside."""

from pathlib import Path
from typing import Any

import pytest
import torch

import ranks
import tiny
from mpdit.config import Config

BOUND = 1e-4
PROMPTS = ["a red square at 0 0", "a blue square at 3 4", "a green square at 5 1", "a yellow square at 2 2", "red"]
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2 x PP2 x VPP2": (4, {"tp": 2, "pp": 2, "vpp": 2}),
    "TP2 x PP2 + SP": (4, {"tp": 2, "pp": 2, "sp": True}),
    "CP2": (2, {"cp": 2}),
    "DP2": (2, {}),
    "CP2 x DP2": (4, {"cp": 2}),
}


def draw(rank: int, world: int, config: Config, tries: dict[str, tuple[list[str], dict[str, Any]]]) -> dict[str, Any]:
    """Pictures of the initial network for each try: prompts, and what is different in the sample section."""
    import dataclasses

    from mpdit.parallel import groups
    from mpdit.train import preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    network, tokenizer = session.build_network(config), Sets.open(config).tokenizer
    let_text_in(network, config)
    pictures = {}
    for name, (prompts, changed) in tries.items():
        asked = dataclasses.replace(config, sample=dataclasses.replace(config.sample, **changed))
        pictures[name] = session.draw(network, asked, prompts, tokenizer)
    groups.stop()
    return pictures


def let_text_in(network: Any, config: Config) -> None:
    """PixArt's cross-attention starts at zero, so that no prompt would be seen in its pictures."""
    import dataclasses

    from mpdit.parallel import init

    for name, parameter in (pair for chunk in network.chunks for pair in chunk.named_parameters()):
        if name.endswith("cross.proj.weight"):
            entry = network.table[name]
            drawn = dataclasses.replace(entry, rule=dataclasses.replace(entry.rule, init_std=0.3))
            value = init.full_value(name, drawn, config.train.seed)
            parameter.data.copy_(init.shard(value, parameter, entry.tag))


def config(data: Path, parallel: dict[str, Any], /, *, sample: Any = None, **sections: dict[str, Any]) -> Config:
    """A readout small enough that pictures are not black and white."""
    sample = {"steps": 3, "guidance": 2.0, "seed": 4, **(sample or {})}
    return tiny.config(data, parallel=parallel, mup={"output_mult": 0.3}, sample=sample, **sections)


# (ranks, parallel, labelled, other sections): a learned variance, one class in the place of a text, pixels that meet
# those of another context rank.
NETWORKS: dict[str, tuple[int, dict[str, Any], bool, dict[str, Any]]] = {
    "dit, ddpm, TP2 x PP2 + SP": (
        4,
        {"tp": 2, "pp": 2, "sp": True},
        True,
        {
            "model": {"arch": "dit", "text_tokens": 1, "learn_sigma": True},
            "data": {"text": "labels"},
            "sample": {"sampler": "ddpm"},
        },
    ),
    "pixart, ddim, CP2 x PP2": (4, {"cp": 2, "pp": 2}, False, {"model": {"arch": "pixart", "learn_sigma": True}}),
    "uvit, ddpm, TP2 x CP2 + SP": (
        4,
        {"tp": 2, "cp": 2, "sp": True},
        False,
        {"model": {"arch": "uvit", "depth": 5, "text_tokens": 7}, "sample": {"sampler": "ddpm"}},
    ),
}
TRIES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "all": (PROMPTS, {}),
    "three": (PROMPTS[:3], {}),
    "one": (PROMPTS[:1], {}),
    "unguided": (PROMPTS[:3], {"guidance": 1.0}),
    "tall": (PROMPTS[:3], {"image_size": (18, 12)}),
}
OTHERS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "again": (PROMPTS, {}),
    "swapped": ([PROMPTS[1], PROMPTS[0], *PROMPTS[2:]], {}),
    "another seed": (PROMPTS, {"seed": 5}),
    "guidance 0": (PROMPTS, {"guidance": 0.0}),
    "guidance 2, empty prompts": ([""] * 5, {}),
    "guidance 1, empty prompts": ([""] * 5, {"guidance": 1.0}),
}


@pytest.fixture(scope="module")
def one_process(tiny_set: Path) -> dict[str, torch.Tensor]:
    return ranks.run(1, draw, timeout_s=90, config=config(tiny_set, {}), tries=TRIES | OTHERS)[0]


def differ(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.dist
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_draws_the_pictures_of_one_process(
    name: str, tiny_set: Path, one_process: dict[str, torch.Tensor]
) -> None:
    world, parallel = LAYOUTS[name]
    results = ranks.run(world, draw, timeout_s=90, config=config(tiny_set, parallel), tries=TRIES)
    for pictures in results:  # on every rank
        for what, found in pictures.items():
            assert found.shape == one_process[what].shape
            assert differ(found, one_process[what]) < BOUND, what


@pytest.mark.dist
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_draws_the_pictures_of_one_process(name: str, tiny_set: Path, labelled_set: Path) -> None:
    world, parallel, labelled, sections = NETWORKS[name]
    data, sections = labelled_set if labelled else tiny_set, {"objective": {"kind": "ddpm"}, **sections}
    prompts = ["red", "blue", "green", "yellow", "red"] if labelled else PROMPTS
    tries: dict[str, Any] = {"guided": (prompts, {}), "swapped": ([prompts[1], prompts[0], *prompts[2:]], {})}
    one = ranks.run(1, draw, timeout_s=90, config=config(data, {}, **sections), tries=tries)[0]
    for pictures in ranks.run(world, draw, timeout_s=90, config=config(data, parallel, **sections), tries=tries):
        for what, found in pictures.items():
            assert differ(found, one[what]) < BOUND, what
    guided = one["guided"]
    assert guided.shape == (5, 3, 12, 12)
    assert guided.std(0).mean() > 0.1
    assert differ(one["swapped"][:2], guided[:2]) > 10 * BOUND, "the prompt is not seen"
    assert differ(one["swapped"][2:], guided[2:]) < BOUND


@pytest.mark.dist
def test_pictures_are_pictures(one_process: dict[str, torch.Tensor]) -> None:
    """Finite, in range, not all of them clipped, and different: or the bounds of this file would say nothing."""
    found = one_process["all"]
    assert found.shape == (5, 3, 12, 12)
    assert found.abs().max() <= 1
    assert (found.abs() < 1).float().mean() > 0.5
    assert found.std(0).mean() > 0.1
    assert torch.equal(one_process["again"], found)


@pytest.mark.dist
def test_pictures_have_the_size_that_is_asked_for(one_process: dict[str, torch.Tensor]) -> None:
    """In layouts, too (above). Each is its own: not the square one stretched, cut or padded."""
    tall = one_process["tall"]
    assert tall.shape == (3, 3, 18, 12)
    assert (tall[:, :, 12:].abs() < 1).float().mean() > 0.5
    assert min(differ(tall[:, :, top : top + 12], one_process["three"]) for top in range(7)) > 0.1
    assert differ(tall[0], tall[1]) > 0.1


@pytest.mark.dist
def test_a_picture_does_not_depend_on_the_prompts_beside(one_process: dict[str, torch.Tensor]) -> None:
    for fewer in ("three", "one"):
        count = len(TRIES[fewer][0])
        assert differ(one_process[fewer], one_process["all"][:count]) < BOUND
    assert differ(one_process["swapped"][2:], one_process["all"][2:]) < BOUND


@pytest.mark.dist
def test_prompt_seed_and_guidance_are_seen_in_the_picture(one_process: dict[str, torch.Tensor]) -> None:
    found = one_process["all"]
    for number in range(2):
        assert differ(one_process["swapped"][number], found[number]) > 10 * BOUND, "the prompt is not seen"
    for number in range(5):
        assert differ(one_process["another seed"][number], found[number]) > 0.1, "the seed is not seen"
    for number in range(3):
        assert differ(one_process["unguided"][number], found[number]) > 10 * BOUND, "guidance is not seen"


@pytest.mark.dist
def test_guidance_goes_from_the_empty_caption_to_the_prompt(one_process: dict[str, torch.Tensor]) -> None:
    """The unconditional half is the empty caption, exactly what caption drop trained; and it is not the other half."""
    unconditional = one_process["guidance 1, empty prompts"]
    assert differ(one_process["guidance 0"], unconditional) < BOUND
    assert differ(one_process["guidance 2, empty prompts"], unconditional) < BOUND
