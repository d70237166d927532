"""The number of parameters of every preset: as the network has them, as others build it, as it was published."""

import importlib
import math
from typing import Any

import pytest
import torch
from torch import nn

import ranks
from mpdit import config as configs
from mpdit.presets import PARAMETERS, PRESETS
from reference import plain_common, plain_dit, plain_mmdit, plain_pixart, plain_uvit
from reference.plain_cases import count

LATENT_MMDITS = [name for name in PRESETS if name.startswith("mmdit") and name != "mmdit-demo"]


def of_family(prefix: str) -> list[str]:
    return [name for name in PRESETS if name.startswith(prefix)]


def heads(model: dict[str, Any]) -> int:
    return model["width"] // model["head_dim"]


# ---- ours ------------------------------------------------------------------------------------------------------------


def outlines(rank: int, world: int) -> dict[str, dict[str, int]]:
    """Parameter names and sizes of every preset; an unknown vocabulary counts as one row."""
    from mpdit.config import Parallel
    from mpdit.models.outline import outline
    from mpdit.parallel import groups

    groups.start(Parallel(), seed=0)
    found = {}
    for name, preset in PRESETS.items():
        model = {"preset": name} | ({"vocab_size": 1} if not preset["vocab_size"] else {})
        tags = outline(configs.from_dict({"model": model}))
        found[name] = {parameter: math.prod(tag.shape) for parameter, tag in tags.items()}
    groups.stop()
    return found


@pytest.fixture(scope="module")
def built() -> dict[str, dict[str, int]]:
    return ranks.run(1, outlines)[0]


@pytest.mark.dist
@pytest.mark.parametrize("name", PRESETS)
def test_the_table_says_how_many_parameters_the_network_has(name: str, built: dict[str, dict[str, int]]) -> None:
    unknown = "embed.text.weight" if PRESETS[name]["vocab_size"] == PRESETS[name]["text_dim"] == 0 else None
    assert sum(size for parameter, size in built[name].items() if parameter != unknown) == PARAMETERS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_gives_every_key_of_the_model(name: str) -> None:
    assert PRESETS[name].keys() == configs.to_dict(configs.Model()).keys() - {"preset"}


@pytest.mark.parametrize("name", PRESETS)
def test_sizes_that_have_to_divide_do(name: str) -> None:
    model = PRESETS[name]
    assert model["width"] % model["head_dim"] == model["width"] % 4 == model["image_size"] % model["patch"] == 0
    assert model["arch"] != "uvit" or model["depth"] % 2 == 1


# ---- the references of tests/reference, which import nothing of mpdit ------------------------------------------------


def shape(model: dict[str, Any]) -> dict[str, Any]:
    keys = ("width", "depth", "head_dim", "patch", "channels", "qk_norm", "learn_sigma")
    return {key: model[key] for key in keys} | {"vocab": model["vocab_size"]}


@pytest.mark.parametrize("name", [*of_family("dit"), *of_family("uvit"), *of_family("pixart"), "mmdit-demo"])
def test_the_reference_has_as_many(name: str) -> None:
    model, side = PRESETS[name], PRESETS[name]["image_size"] // PRESETS[name]["patch"]
    built = {
        "dit": lambda s: count(plain_dit, plain_common.Shape(**s)),
        "uvit": lambda s: count(plain_uvit, plain_uvit.Shape(**s, grid=(side, side), text_tokens=model["text_tokens"])),
        "pixart": lambda s: count(plain_pixart, plain_pixart.Shape(**s, text_dim=model["text_dim"])),
        "mmdit": lambda s: count(plain_mmdit, plain_common.Shape(**s)),
    }
    assert built[model["arch"]](shape(model)) == PARAMETERS[name]


# ---- diffusers -------------------------------------------------------------------------------------------------------


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def diffusers_model(cls: str, model: dict[str, Any], **settings: Any) -> nn.Module:
    with torch.device("meta"):
        assert torch.empty(0).is_meta  # else the largest takes 71 GB
        return getattr(importlib.import_module("diffusers"), cls)(
            sample_size=model["image_size"],
            patch_size=model["patch"],
            in_channels=model["channels"],
            out_channels=model["channels"] * (2 if model["learn_sigma"] else 1),
            num_layers=model["depth"],
            attention_head_dim=model["head_dim"],
            num_attention_heads=heads(model),
            **settings,
        )


@pytest.mark.parametrize("name", of_family("dit"))
def test_diffusers_dit_has_an_embedder_more_for_each_block_but_one(name: str) -> None:
    model = PRESETS[name]
    theirs = diffusers_model("DiTTransformer2DModel", model, num_embeds_ada_norm=model["vocab_size"] - 1)
    extra = sum(size(block.norm1.emb) for block in theirs.transformer_blocks[1:])
    assert size(theirs) - extra == PARAMETERS[name]


@pytest.mark.parametrize("name", of_family("pixart"))
def test_diffusers_pixart_has_as_many(name: str) -> None:
    model = PRESETS[name]
    theirs = diffusers_model(
        "PixArtTransformer2DModel",
        model,
        cross_attention_dim=model["width"],
        caption_channels=model["text_dim"],
        use_additional_conditions=False,  # no embedders of resolution and aspect ratio: those are for 1024 pixels
    )
    assert size(theirs) == PARAMETERS[name]


def stable_diffusion_3(model: dict[str, Any], text: int, pooled: int) -> int:
    return size(
        diffusers_model(
            "SD3Transformer2DModel",
            model,
            joint_attention_dim=text,
            caption_projection_dim=model["width"],
            pooled_projection_dim=pooled,
            qk_norm="rms_norm",
        )
    )


@pytest.mark.parametrize("name", LATENT_MMDITS)
def test_diffusers_stable_diffusion_3_has_as_many(name: str) -> None:
    """Its last block, too, feeds text into attention and reads none back."""
    text_dim = PRESETS[name]["text_dim"]
    assert stable_diffusion_3(PRESETS[name], text=text_dim, pooled=text_dim) == PARAMETERS[name]


def test_diffusers_stable_diffusion_3_projects_text_where_the_demo_looks_it_up() -> None:
    model, rows = PRESETS["mmdit-demo"], 1
    table_and_bias = rows * model["width"] + model["width"]
    theirs = stable_diffusion_3(model, text=rows, pooled=model["width"])
    assert theirs - table_and_bias == PARAMETERS["mmdit-demo"]


# ---- what was published ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "millions"), [("dit-s-2", 33), ("dit-b-2", 130), ("dit-l-2", 458), ("dit-xl-2", 675), ("dit-xl-4", 675)]
)
def test_dit_is_of_the_published_size(name: str, millions: int) -> None:
    assert PARAMETERS[name] / 1e6 == pytest.approx(millions, abs=0.6)


def test_dit_xl_2_is_the_official_one_without_its_fixed_positions() -> None:
    assert PARAMETERS["dit-xl-2"] == 675_129_632 - 256 * 1152


@pytest.mark.parametrize(
    ("name", "blocks", "millions"),
    [("uvit-s-2", 13, 44), ("uvit-m-2", 17, 131), ("uvit-l-2", 21, 287), ("uvit-h-2", 29, 501)],
)
def test_uvit_is_of_the_published_size(name: str, blocks: int, millions: int) -> None:
    """S is given without classes, which are 0.5 million."""
    assert PRESETS[name]["depth"] == blocks
    assert PARAMETERS[name] / 1e6 == pytest.approx(millions, abs=0.8)


def test_pixart_is_of_the_published_sizes() -> None:
    assert PARAMETERS["pixart-0.61b"] == 610_856_096
    assert PARAMETERS["pixart-0.04b"] / 1e9 == pytest.approx(0.04, abs=0.005)


def test_mmdit_is_of_the_two_sizes_that_the_paper_gives() -> None:
    """0.18B and 18B; the shape between them is ours: 17.74B, at ten times the width."""
    assert PARAMETERS["mmdit-0.18b"] / 1e9 == pytest.approx(0.18, abs=0.005)
    assert PARAMETERS["mmdit-18b"] / 1e9 == pytest.approx(17.74, abs=0.005)
    assert PRESETS["mmdit-18b"] == {**PRESETS["mmdit-0.18b"], "width": 5120}
