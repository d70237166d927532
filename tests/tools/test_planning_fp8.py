"""Launches for Transformer Engine and FP8, planned and rehearsed where there is neither."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import commands
import ranks
from mpdit import config as configs
from mpdit.config import Config

TE = ["parallel.backend=te", "parallel.precision=fp8"]
DIT = "dit-s-2"  # width 384, depth 12, 256 tokens


def planned(*argv: object) -> dict[str, Any]:
    code, told, error = commands.run("plan", *argv, "--json")
    assert (code, error) == (0, "")
    found: dict[str, Any] = json.loads(told)
    return found


def measured(rank: int, world: int, given: list[Config]) -> list[Any]:
    import torch.distributed as dist

    from mpdit.train import pieces

    dist.destroy_process_group()
    return [pieces.measure(config) for config in given]


def of(**parallel: Any) -> Config:
    tree = {"model": {"preset": DIT}, "objective": {"kind": "ddpm"}, "data": {"text": "labels"}, "parallel": parallel}
    return configs.from_dict(tree)


# ---- work, memory, time ----------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "sp": True}], ids=["TP1", "TP2", "TP2 + SP"])
def test_fp8_is_the_same_work_and_half_of_it_is_in_fp8(layout: dict[str, Any]) -> None:
    """Products of hidden linears in inner blocks, three to a layer, and none else."""
    fp8, bf16 = ranks.run(
        1,
        measured,
        given=[
            of(micro_batch=4, backend="te", precision="fp8", **layout),
            of(micro_batch=4, precision="bf16", **layout),
        ],
    )[0]
    rows, width, tp = 4 * 256, 384, layout.get("tp", 1)
    a_block = 2 * rows * 12 * width * width // tp  # qkv 3, proj 1, fc1 4, fc2 4
    for own, plain in zip(fp8, bf16, strict=True):
        inner = own.block in range(1, 11)
        for way, products in (("forward", 1), ("backward", 2)):
            work, like = getattr(own.piece, way), getattr(plain.piece, way)
            assert work.flops == like.flops
            in_fp8 = sum(op.flops for op in work.ops if op.name == "_scaled_mm")
            assert in_fp8 == (products * a_block if inner else 0)
        assert own.copies_bytes == (2 * 12 * width * width // tp if inner else 0)
        assert plain.copies_bytes == 0


@pytest.mark.dist
def test_fp8_keeps_a_byte_of_each_input() -> None:
    """Two less one of what a linear alone keeps: the modulated tokens before qkv and fc1, and fc2's four widths; one
    more of what attention keeps as well."""
    fp8, bf16 = ranks.run(
        1, measured, given=[of(micro_batch=4, backend="te", precision="fp8"), of(micro_batch=4, precision="bf16")]
    )[0]
    for own, plain in zip(fp8, bf16, strict=True):
        less = (1 + 1 + 4 - 1) * 4 * 256 * 384 if own.block in range(1, 11) else 0
        assert plain.piece.own_saved_bytes - own.piece.own_saved_bytes == less
        assert own.piece.saved_in == plain.piece.saved_in


@pytest.mark.dist
def test_tensor_ranks_send_a_byte_where_te_quantises_before_it_gathers() -> None:
    layout = {"tp": 2, "sp": True, "micro_batch": 4}
    fp8, bf16 = ranks.run(
        1, measured, given=[of(backend="te", precision="fp8", **layout), of(precision="bf16", **layout)]
    )[0]
    inner = next(i for i, part in enumerate(fp8) if part.block == 5)
    share = 4 * 256 * 384 // 2  # a tensor rank's tokens, in numbers
    # Forward: qkv and fc1 gather their input. Backward: they do again, and proj and fc2 gather the gradient.
    for way, gathers in (("forward", 2), ("backward", 4)):
        sent = [getattr(parts[inner].piece, way).sent_bytes("tp") for parts in (fp8, bf16)]
        assert sent[1] - sent[0] == gathers * share, way


def test_a_plan_in_fp8_is_faster_and_says_what_is_estimated() -> None:
    argv = ["--gpu", "h200", "mmdit-2.9b", "train.batch_size=32", "parallel.recompute=full"]
    bf16, fp8 = planned(*argv, "parallel.precision=bf16"), planned(*argv, *TE)
    assert fp8["parameters"] == bf16["parameters"]
    assert fp8["model_flops_per_step"] == bf16["model_flops_per_step"]
    assert 1.1 < bf16["estimated"]["pipeline_s"] / fp8["estimated"]["pipeline_s"] < 2
    assert fp8["estimated"]["mfu"] > bf16["estimated"]["mfu"]
    more = fp8["memory_bytes"][0]["weights"] - bf16["memory_bytes"][0]["weights"]
    hidden = 2 * 12 * 2048 * 2048  # of a block's two streams
    assert more == 2 * 17 * hidden
    _, told, _ = commands.run("plan", *argv, *TE)
    assert "1 H200, fp8 (tensorwise), recompute" in told
    assert "estimated after Transformer Engine's source" in told
    _, told, _ = commands.run("plan", *argv, "parallel.precision=bf16")
    assert "Transformer Engine" not in told


def test_te_in_bf16_is_planned_as_the_local_backend() -> None:
    argv = [DIT, "train.batch_size=4", "parallel.precision=bf16"]
    te, local = planned(*argv, "parallel.backend=te"), planned(*argv)
    assert te.pop("parallel") == {**local.pop("parallel"), "backend": "te"}
    assert te == local


def test_a_search_knows_fp8s_shapes() -> None:
    argv = ["--search", "--gpus", "2", "--gpus-per-node", "2", "train.batch_size=4", "model.text_tokens=1"]
    code, told, _ = commands.run("plan", DIT, *argv, *TE, "model.image_size=12", "--json")  # 36 tokens
    found = json.loads(told)
    assert code == 0
    assert any("= 36 rows are no multiple of 16" in one["reason"] for one in found if not one["fits"])
    assert {one["parallel"]["micro_batch"] for one in found if one["fits"]} == {4}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([*TE, "--gpu", "a100"], ["fp8_recipe tensorwise", "8.9", "A100 has 8.0", "parallel.precision=bf16"]),
        (
            [*TE, "parallel.fp8_recipe=mxfp8", "--gpu", "h100"],
            ["mxfp8 needs compute capability 10.0", "H100 has 9.0", "take tensorwise or delayed or blockwise"],
        ),
        (["parallel.precision=fp8"], ["which Transformer Engine's linears do", "parallel.backend is local"]),
        ([*TE, "parallel.fp8_bf16_blocks=6"], ["leaves none of model.depth 12"]),
        ([*TE, "parallel.fp8_recipe=e4m3"], ["parallel.fp8_recipe is 'e4m3'", "tensorwise, delayed, blockwise"]),
    ],
    ids=["no FP8", "no MXFP8", "local", "no block left", "recipe"],
)
def test_what_fp8_needs_is_one_sentence(argv: list[str], words: list[str]) -> None:
    code, told, error = commands.run("plan", DIT, "train.batch_size=4", *argv)
    assert (code, told) == (2, "")
    assert error.count("\n") == 1
    assert [word for word in words if word not in error] == [], error


# ---- a launch folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def launch(tiny_set: Path, tmp_path: Path) -> Path:
    model = {"arch": "mmdit", "width": 64, "depth": 4, "head_dim": 8, "patch": 3, "image_size": 12, "text_tokens": 8}
    tree = {
        "model": model,
        "mup": {"base_width": 32},
        "train": {"steps": 10, "batch_size": 8},
        "parallel": {"tp": 2, "sp": True, "pp": 2, "micro_batch": 4, "backend": "te", "precision": "fp8"},
        "data": {"path": str(tiny_set)},
        "run": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


@pytest.mark.dist
def test_a_launch_is_rehearsed_without_a_gpu(launch: Path) -> None:
    code, told, error = commands.run("rehearse", launch, "--gpus", "4")
    assert (code, error) == (0, "")
    assert told.endswith("GO: 8 checks.\n")
    assert "the shards of 4 distinct ranks tile " in told
    assert "losses as in one process within " in told


@pytest.mark.dist
def test_a_launch_for_gpus_without_its_recipe_is_no_go(launch: Path) -> None:
    code, told, _ = commands.run("rehearse", launch, "--gpus", "4", "--gpu", "a100", "--without", "narrow-run")
    assert code == 1
    assert "NO-GO  memory" in told
    assert "A100 has 8.0" in told


@pytest.mark.dist
@pytest.mark.parametrize("command", ["train", "coordcheck"])
def test_a_start_without_a_gpu_is_refused_with_a_sentence(command: str, launch: Path) -> None:
    code, told, error = commands.run(
        command, launch / "config.yaml", "parallel.pp=1", "parallel.tp=1", "parallel.sp=false"
    )
    assert (code, told) == (2, "")
    assert error == (
        "mpdit: parallel.backend te needs an NVIDIA GPU, and torch sees none on this machine; set "
        "parallel.backend=local, or start it where there is one (mpdit plan and rehearse take the config as it is).\n"
    )


def test_the_mup_table_does_not_depend_on_the_backend(launch: Path) -> None:
    found = [
        commands.run("mup-table", launch / "config.yaml", "--json", *more) for more in ([], ["parallel.backend=local"])
    ]
    assert found[0][0] == 0
    assert found[0] == found[1]


def test_sampling_options_draw_such_a_run_in_bf16_anywhere(launch: Path) -> None:
    from mpdit_tools import sample

    arguments = sample.Arguments(run=launch, prompts=Path("prompts.txt"))
    assert sample.sample_config(arguments).parallel == dataclasses.replace(configs.Parallel(), precision="bf16")


def test_a_proxy_is_transferred_to_a_target_in_fp8(launch: Path, tmp_path: Path) -> None:
    """The folder's config is the target's, its plan FP8's, its batch script in the container that has both."""
    proxy = yaml.safe_load((launch / "config.yaml").read_text())
    proxy |= {"parallel": {}, "mup": {"base_width": 64}, "optim": {"lr": 1e-3}}
    (tmp_path / "proxy.yaml").write_text(yaml.safe_dump(proxy))
    (tmp_path / "wide.yaml").write_text("model: {width: 128}\nparallel: {tp: 2, sp: true, micro_batch: 4}\n")
    out = tmp_path / "out"
    options = ["--from", tmp_path / "proxy.yaml", "--to", tmp_path / "wide.yaml", "--image", "team/mpdit:0.1.0"]
    code, _, error = commands.run("transfer", *TE, *options, "--out", out)
    assert code == 0, error
    parallel = configs.load(out).parallel
    assert (parallel.backend, parallel.precision, parallel.fp8_recipe) == ("te", "fp8", "tensorwise")
    assert json.loads((out / "plan.json").read_text())["parallel"]["precision"] == "fp8"
    assert "fp8 (tensorwise)" in (out / "REPORT.md").read_text()
    assert '--container-image="${CONTAINER_IMAGE:-team/mpdit:0.1.0}"' in (out / "launch.sbatch").read_text()
