"""What Transformer Engine and FP8 ask of a config and of the machine, each refused with one sentence on every rank."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError

H100 = ("NVIDIA H100 80GB HBM3", (9, 0), (13, 0))
B200 = ("NVIDIA B200", (10, 0), (13, 0))
RTX_5090 = ("NVIDIA GeForce RTX 5090", (12, 0), (13, 0))
ADA = ("NVIDIA L40S", (8, 9), (12, 6))
A100 = ("NVIDIA A100-SXM4-80GB", (8, 0), (13, 0))
HOPPER_OF_OLD = ("NVIDIA H100 80GB HBM3", (9, 0), (12, 8))
TE: dict[str, Any] = {"backend": "te"}
FP8: dict[str, Any] = {**TE, "precision": "fp8"}
MODEL = {"width": 64, "head_dim": 16}


def config(parallel: dict[str, Any], **sections: Any) -> Config:
    return tiny.config(Path("nowhere"), **{"model": MODEL, "parallel": parallel, **sections})


def refusal(check: Any, *arguments: Any) -> str:
    with pytest.raises(InputError) as caught:
        check(*arguments)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.fixture
def preflight() -> Any:
    ranks.warm()
    from mpdit.train import preflight

    return preflight


# ---- the machine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, preflight: Any) -> Any:
    """Let this be a machine with a GPU, and a Transformer Engine in some state."""

    def machine(gpu: Any, te: Any = None) -> None:
        from mpdit.parallel import accel, te_install

        found = te_install.Found(state="whole", version="2.20.2") if te is None else te
        monkeypatch.setattr(accel, "gpu", lambda: gpu)
        monkeypatch.setattr(te_install, "find_te", lambda: found)

    return machine


def test_te_without_a_gpu(preflight: Any) -> None:
    """For real, on a machine that has none."""
    if preflight.accel.gpu() is not None:
        pytest.skip("this machine has a GPU")
    said = refusal(preflight.machine, config(TE))
    assert said.startswith("parallel.backend te needs an NVIDIA GPU, and torch sees none on this machine; set")
    preflight.machine(config({}))


STATES = {
    "absent": ({"state": "absent"}, ["which is not installed", "pip install", "parallel.backend=local"]),
    "half": (
        {"state": "harmful", "why": "it is built for CUDA 12, but torch 2.13.0 for CUDA 13.0", "remedy": "run pip x"},
        ["built for CUDA 12, but torch 2.13.0 for CUDA 13.0: run pip x, or set parallel.backend=local."],
    ),
    "old": ({"state": "whole", "version": "2.9.0"}, ["2.14 or newer, but 2.9.0 is installed"]),
}


@pytest.mark.parametrize("state", STATES)
def test_te_that_is_not_there_or_does_not_match_torch(state: str, preflight: Any, on: Any) -> None:
    from mpdit.parallel import te_install

    found, words = STATES[state]
    on(H100, te_install.Found(**found))
    said = refusal(preflight.machine, config(FP8))
    assert said.startswith("parallel.backend te needs Transformer Engine")
    assert [word for word in words if word not in said] == [], said
    preflight.machine(config({"precision": "bf16"}))


LACKING: list[tuple[Any, str, list[str]]] = [
    (
        A100,
        "tensorwise",
        ["needs compute capability 8.9", "NVIDIA A100-SXM4-80GB has 8.0; set parallel.precision=bf16"],
    ),
    (A100, "delayed", ["8.9", "8.0; set parallel.precision"]),
    (ADA, "blockwise", ["9.0 and CUDA 12.9", "L40S has 8.9 and CUDA 12.6; take tensorwise or delayed, or set"]),
    (HOPPER_OF_OLD, "blockwise", ["and CUDA 12.9", "has 9.0 and CUDA 12.8; take tensorwise or delayed"]),
    (H100, "mxfp8", ["10.0 to below 12.0", "has 9.0; take tensorwise or delayed or blockwise, or set"]),
    (RTX_5090, "mxfp8", ["10.0 to below 12.0", "has 12.0; take tensorwise or delayed or blockwise"]),
]


@pytest.mark.parametrize(("gpu", "recipe", "words"), LACKING, ids=[f"{r} on {g[0]}" for g, r, _ in LACKING])
def test_hardware_that_lacks_a_recipe(gpu: Any, recipe: str, words: list[str], preflight: Any, on: Any) -> None:
    on(gpu)
    said = refusal(preflight.machine, config({**FP8, "fp8_recipe": recipe}))
    assert said.startswith(f"parallel.fp8_recipe {recipe} needs ")
    assert [word for word in words if word not in said] == [], said
    preflight.machine(config({**TE, "precision": "bf16"}))


@pytest.mark.parametrize(
    ("gpu", "recipes"),
    [
        (H100, {"tensorwise", "delayed", "blockwise"}),
        (B200, {"tensorwise", "delayed", "blockwise", "mxfp8"}),
        (ADA, {"tensorwise", "delayed"}),
        (A100, set()),
    ],
)
def test_hardware_that_has_it(gpu: Any, recipes: set[str], preflight: Any, on: Any) -> None:
    from mpdit.parallel import fp8_rules

    on(gpu)
    assert set(fp8_rules.recipes(gpu[1], gpu[2])) == recipes
    for recipe in recipes:
        preflight.machine(config({**FP8, "fp8_recipe": recipe}))


# ---- the config ------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[int, dict[str, Any], dict[str, Any], list[str]]] = {
    "fp8 on the local backend": (
        1, {"precision": "fp8"}, {},
        ["parallel.precision is fp8", "Transformer Engine", "parallel.backend is local", "set parallel.backend=te"],
    ),
    "emulation on te": (
        1, {**TE, "precision": "fp8_emulated"}, {},
        ["parallel.precision is fp8_emulated", "parallel.backend is te", "parallel.precision=fp8"],
    ),
    "te compiled": (1, {**TE, "compile": True}, {}, ["parallel.compile is for mpdit's own layers", "parallel.backend"]),
    "no block in fp8": (1, {**FP8, "fp8_bf16_blocks": 2}, {}, ["fp8_bf16_blocks 2 at each end", "model.depth 4"]),
    "fewer than no blocks": (1, {**FP8, "fp8_bf16_blocks": -1}, {}, ["parallel.fp8_bf16_blocks is -1", "at least 0"]),
    "features": (
        1, FP8, {"model": {"width": 72, "head_dim": 24}},
        ["model.width 72 over parallel.tp 1 is 72 features", "multiple of 16 (parallel.fp8_recipe tensorwise)"],
    ),
    "features of a tensor rank": (
        2, {**FP8, "tp": 2, "fp8_recipe": "mxfp8"}, {"model": {"width": 96, "head_dim": 16}},
        ["model.width 96 over parallel.tp 2 is 48 features", "multiple of 32 (parallel.fp8_recipe mxfp8)"],
    ),
    "rows of the text": (
        1, {**FP8, "micro_batch": 2}, {"model": {**MODEL, "text_tokens": 7}},
        ["model.text_tokens = 7 text tokens", "x parallel.micro_batch 2 = 14 rows are no multiple of 16"],
    ),
    "rows of the image": (
        1, {**FP8, "micro_batch": 2}, {"model": {**MODEL, "image_size": 9}},
        ["(model.image_size / model.patch)^2 = 9 image tokens x parallel.micro_batch 2 = 18 rows"],
    ),
    "rows of a context rank": (
        2, {**FP8, "cp": 2, "micro_batch": 2}, {"model": {**MODEL, "text_tokens": 8}},
        ["8 text tokens over parallel.cp 2 x parallel.micro_batch 2 = 8 rows"],
    ),
    "rows that tensor ranks quantise apart": (
        4, {**FP8, "tp": 4, "sp": True, "micro_batch": 2}, {"model": {**MODEL, "text_tokens": 8}},
        ["8 text tokens x parallel.micro_batch 2 = 16 rows are no multiple of 32"],
    ),
    "rows of a bucket": (
        1, {**FP8, "micro_batch": 2}, {"data": {"buckets": [[12, 12], [15, 9]]}},
        ["data.buckets [15, 9]", "15 image tokens x parallel.micro_batch 2 = 30 rows"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_config_that_can_not_be_in_fp8(what: str, preflight: Any) -> None:
    world, parallel, sections, words = BAD[what]
    said = refusal(preflight.without_data, config(parallel, **sections), world)
    assert [word for word in words if word not in said] == [], said


@pytest.mark.parametrize(
    ("world", "parallel"),
    [(1, FP8), (2, {**FP8, "tp": 2, "sp": True}), (4, {**FP8, "tp": 2, "pp": 2, "micro_batch": 4}), (2, TE)],
)
def test_what_fits_is_fine_on_any_machine(world: int, parallel: dict[str, Any], preflight: Any) -> None:
    """Plans and rehearsals ask as much; the machine is asked where ranks start."""
    given = config(parallel)
    found = preflight.without_data(given, world)
    left_open = ("micro_batch", "overlap_grad_reduce", "overlap_param_gather")
    resolved = dataclasses.replace(given.parallel, **{key: getattr(found.parallel, key) for key in left_open})
    assert found == dataclasses.replace(given, parallel=resolved)


def megatron_configs(rank: int, world: int, given: list[Config]) -> list[dict[str, Any]]:
    from mpdit.parallel import context

    keys = ("fp8", "fp8_recipe", "fp8_param", "bf16", "gradient_accumulation_fusion", "first_last_layers_bf16")
    found = [context.build(one).megatron for one in given]
    return [{key: getattr(one, key) for key in keys} | {"mup": getattr(one, "use_mup", False)} for one in found]


@pytest.mark.dist
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_megatron_is_told_what_it_has_to_know(recipe: str) -> None:
    """Of this project's fp8, so that its schedules tell layers of first micro-batches; but no muP of its own."""
    parallels = ({**FP8, "fp8_recipe": recipe}, {**TE, "precision": "bf16", "fp8_recipe": recipe})
    fp8, bf16 = ranks.run(1, megatron_configs, given=[config(parallel) for parallel in parallels])[0]
    form = "hybrid" if recipe in ("tensorwise", "delayed") else "e4m3"
    same = {"fp8_param": False, "bf16": True, "gradient_accumulation_fusion": False, "first_last_layers_bf16": False}
    assert fp8 == {"fp8": form, "fp8_recipe": recipe, **same, "mup": False}
    assert bf16 == {"fp8": None, "fp8_recipe": recipe, **same, "mup": False}
