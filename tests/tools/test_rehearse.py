"""Guards `mpdit rehearse`: what works is go, and each of ten planted faults is found by the check it belongs to."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import commands
import ranks
from mpdit import config as configs
from mpdit_tools.rehearse import narrow

CONFIG: dict[str, Any] = {
    "model": {"arch": "mmdit", "width": 64, "depth": 4, "head_dim": 8, "patch": 3, "image_size": 12, "text_tokens": 8},
    "mup": {"base_width": 32},
    "train": {"steps": 10, "batch_size": 8},
    "parallel": {"tp": 2, "sp": True, "pp": 2},
}


def rehearsed(rank: int, world: int, argv: list[str], plant: Callable[[], None] | None) -> tuple[int, str]:
    """Exit code and what is printed, in a process of its own with a fault planted."""
    if plant is not None:
        plant()
    code, out, _ = commands.commands(rank, world, [["rehearse", *argv]])[0]
    return code, out


def run(argv: list[str], plant: Callable[[], None] | None = None) -> tuple[int, str]:
    found: tuple[int, str] = ranks.run(1, rehearsed, argv=argv, plant=plant)[0]
    return found


@pytest.fixture
def launch(tiny_set: Path, tmp_path: Path) -> Path:
    tree = {**CONFIG, "data": {"path": str(tiny_set)}, "run": {"dir": str(tmp_path / "run")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def against(told: str) -> dict[str, str]:
    """The checks that are no-go, each with its sentence."""
    lines = [line.removeprefix("NO-GO") for line in told.splitlines() if line.startswith("NO-GO  ")]
    return {line[:18].strip(): line[18:].strip() for line in lines}


@pytest.mark.dist
def test_a_launch_that_works_is_go(launch: Path) -> None:
    code, told = run([str(launch), "--gpus", "8"])
    assert against(told) == {}
    assert code == 0
    assert told.endswith("GO: 8 checks.\n")
    assert "the shards of 4 distinct ranks tile " in told
    assert "2 data-parallel ranks" in told
    assert "4 ranks, width 16, 2 micro-batches, 3 steps: losses as in one process within " in told
    assert not (launch / "run").exists()


def wrong_layers() -> None:
    from mpdit.parallel import stages

    own = stages._own_chunks
    stages._own_chunks = lambda parallel: [(i + 1) % parallel.pp for i in own(parallel)]


def whole_modulation() -> None:
    """adaLN as a plain linear layer: right in its numbers, and a third of the model on every tensor rank."""
    from mpdit.models import mmdit
    from mpdit.mup.roles import Group, declare, matrix, vector
    from mpdit.parallel.linears import ReplicatedLinear

    class Whole(ReplicatedLinear):
        def __init__(self, ctx: Any, parts: int) -> None:
            super().__init__(ctx, ctx.width, parts * ctx.width)
            self.parts = parts
            weight = matrix(parts * ctx.width, ctx.width, group=Group.MODULATION)
            declare(self, weight=weight, bias=vector(parts * ctx.width))

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x).chunk(self.parts, -1)

    mmdit.Modulation = Whole  # type: ignore[misc, assignment]


def shard_of_a_shard() -> None:
    """A layer that takes its size from what it holds."""
    from mpdit.parallel import linears

    init = linears.RowLinear.__init__

    def smaller(self: Any, ctx: Any, fan_in: int, fan_out: int, **more: Any) -> None:
        init(self, ctx, fan_in, fan_out, **more)
        if fan_in > fan_out:  # the MLP's second
            self.weight = torch.nn.Parameter(self.weight[:, ::2].detach())
            linears._mark_sharded(self.weight, 1)

    linears.RowLinear.__init__ = smaller  # type: ignore[method-assign]


FAULTS: dict[str, tuple[list[str], Callable[[], None] | None, str, list[str]]] = {
    "wrong layers": ([], wrong_layers, "stages", ["stage 0", "holds blocks [2, 3]", "should hold [0, 1]"]),
    "adaLN whole": ([], whole_modulation, "stages", ["blocks.0.img.ada.weight", "is not sharded"]),
    "shard too small": ([], shard_of_a_shard, "stages", ["blocks.0.img.mlp.fc2.weight", "do not make up the whole"]),
    "disk full": (["train.keep_last=100000000"], None, "disk", ["GB free", "train.keep_last 100000000"]),
    "server dead": (["run.mlflow_uri=http://127.0.0.1:9"], None, "tracking server", ["127.0.0.1:9", "does not answer"]),
    "batch": (["train.batch_size=9"], None, "config", ["train.batch_size 9", "multiple of 2"]),
    "text odd under SP": (["model.text_tokens=7"], None, "config", ["model.text_tokens is 7", "multiple of 2"]),
    "memory": (["model.width=8192", "model.depth=24"], None, "memory", ["stage", "of an A100's 80"]),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_by_name(name: str, launch: Path) -> None:
    overrides, plant, check, words = FAULTS[name]
    also = {"memory": {"disk"}, "shard too small": {"memory"}}.get(name, set())  # 77 billion parameters; can't be run
    code, told = run([str(launch), *overrides, "--gpus", "8", "--gpu", "a100", "--without", "narrow-run"], plant)
    found = against(told)
    assert code == 1
    assert set(found) == {check, *also}
    assert [word for word in words if word not in found[check]] == []
    assert told.endswith(".\n")


@pytest.mark.dist
def test_a_missing_shard_of_data_is_found(launch: Path, tiny_set: Path) -> None:
    copy = launch / "set"
    shutil.copytree(tiny_set, copy)
    lost = sorted(copy.glob("train-*.tar"))[0]
    lost.unlink()
    code, told = run([str(launch), f"data.path={copy}"])
    assert code == 1
    assert lost.name in against(told)["data"]
    assert "narrow run" not in told


def gradient_not_summed() -> None:
    """Under SP what multiplies a slice of the tokens has a part of the gradient on each tensor rank."""
    from mpdit.parallel import linears

    forward = linears.Modulation.forward

    def partial(self: Any, cond_1BD: torch.Tensor) -> Any:
        self.sum_gradient = False
        return forward(self, cond_1BD)

    linears.Modulation.forward = partial  # type: ignore[method-assign]


@pytest.mark.dist
def test_numbers_that_go_with_the_layout_are_found_by_the_narrow_run(launch: Path) -> None:
    code, told = run([str(launch)], gradient_not_summed)
    assert code == 1
    assert set(against(told)) == {"narrow run"}
    assert "they differ by" in told


def test_the_narrow_run_is_of_the_largest_bucket() -> None:
    narrowed = narrow.narrowed(configs.from_dict({**CONFIG, "parallel": {**CONFIG["parallel"], "micro_batch": 2}}), 1)
    assert narrowed.data.buckets == ()
    several = {**CONFIG, "data": {"buckets": [[12, 12], [12, 18], [6, 24]]}, "parallel": {"micro_batch": 2}}
    assert narrow.narrowed(configs.from_dict(several), 1).data.buckets == ((12, 18),)


def test_a_config_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("modle: {}\n")
    code, told = run([str(tmp_path)])
    assert (code, told) == (2, "")
