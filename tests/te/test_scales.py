"""Delayed scaling's state goes with checkpoints as plain numbers, into any layout; where it does not belong, a word."""

import zlib
from pathlib import Path
from typing import Any

import pytest
import stub
import torch
from cases import FP8, config

import ranks
import tiny
from mpdit.config import Config

DELAYED = {**FP8, "fp8_recipe": "delayed"}
BF16 = {"backend": "local", "precision": "bf16"}
LAYERS = 4 * 2  # of a DiT's block, in its two inner blocks


def of_layer(name: str) -> torch.Tensor:
    """Numbers of its own for each layer, other than any default."""
    from mpdit.parallel import fp8_rules

    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.rand(fp8_rules.SCALES_SHAPE, generator=draw) + 0.5


class Bench:
    """A session on a rank."""

    def __init__(self, config: Config) -> None:
        from mpdit.parallel import groups
        from mpdit.train import session

        groups.start(config.parallel, config.train.seed)
        with stub.building():
            self.run = session.build(config)
        self.config, self.folder = config, Path(config.run.dir)
        self.ctx, self.chunks = self.run.network.ctx, [chunk.module for chunk in self.run.network.chunks]

    def layers(self) -> dict[str, Any]:
        from mpdit.parallel import backend

        return {name: layer for chunk in self.chunks for name, layer in backend.scaled_layers(self.ctx, chunk)}

    def scales(self) -> dict[str, torch.Tensor | None]:
        from mpdit.parallel import backend

        return {name: backend.scales(self.ctx, layer) for name, layer in self.layers().items()}

    def save(self) -> str | None:
        from mpdit.train import saver
        from mpdit.train.checkpoint import Position

        writer = saver.Saver(self.folder, lambda _: None)
        writer.begin(self.run, self.config, Position(step=1, plan_hash="p", tokenizer_sha256="t"))
        error = writer.wait().error
        writer.close()
        return error

    def load(self) -> str:
        """The word on scales."""
        from mpdit.train import checkpoint

        path = self.folder / "checkpoints" / "step_1"
        with stub.building():
            checkpoint.load(self.run, path, 1)
        return checkpoint.scales_note(path, self.config)


def written(rank: int, world: int, config: Config) -> tuple[str | None, list[bool]]:
    from mpdit.parallel import backend, groups

    bench = Bench(config)
    before = [value is None for value in bench.scales().values()]
    for name, layer in bench.layers().items():
        with stub.building():
            backend.set_scales(bench.ctx, layer, of_layer(name))
    error = bench.save()
    groups.stop()
    return error, before


def read(rank: int, world: int, config: Config) -> tuple[str, dict[str, torch.Tensor | None]]:
    from mpdit.parallel import groups

    bench = Bench(config)
    found = bench.load(), bench.scales()
    groups.stop()
    return found


def of(folder: Path, **parallel: Any) -> Config:
    return tiny.with_run_dir(config("dit", **parallel), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor ranks."""
    folder = tmp_path_factory.mktemp("run")
    for error, unseen in ranks.run(2, written, config=of(folder, **DELAYED, tp=2)):
        assert error is None
        assert unseen == [True] * LAYERS, "before the first pass there is nothing to keep"
    return folder


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "layout"),
    [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2}), (2, {"distributed_optimizer": True})],
    ids=["one rank", "TP2 + SP", "PP2", "DP2"],
)
def test_scales_are_read_into_any_layout(world: int, layout: dict[str, Any], folder: Path) -> None:
    found = ranks.run(world, read, config=of(folder, **DELAYED, **layout))
    assert {note for note, _ in found} == {""}
    every = {name: scales for _, of_rank in found for name, scales in of_rank.items()}
    assert len(every) == LAYERS
    for name, scales in every.items():
        assert scales is not None
        assert torch.equal(scales, of_layer(name)), name


@pytest.mark.dist
@pytest.mark.parametrize("parallel", [BF16, FP8, {**BF16, "backend": "te"}], ids=["local", "tensorwise", "te bf16"])
def test_scales_of_another_recipe_are_left_out_with_a_word(parallel: dict[str, Any], folder: Path) -> None:
    note, scales = ranks.run(1, read, config=of(folder, **parallel))[0]
    assert note == f"{folder / 'checkpoints/step_1'}: its FP8 scales, of parallel.fp8_recipe delayed, are left out."
    assert scales == {}


@pytest.mark.dist
@pytest.mark.parametrize("parallel", [BF16, FP8], ids=["local", "tensorwise"])
def test_scales_that_are_not_there_start_anew_with_a_word(parallel: dict[str, Any], tmp_path: Path) -> None:
    assert ranks.run(1, written, config=of(tmp_path, **parallel)) == [(None, [])]
    note, scales = ranks.run(2, read, config=of(tmp_path, **DELAYED, tp=2))[0]
    assert note.endswith("step_1: holds no FP8 scales; those of parallel.fp8_recipe delayed start anew.")
    assert scales.keys() == {name for name in scales if scales[name] is None} != set()


@pytest.mark.dist
def test_a_checkpoint_holds_numbers_alone(folder: Path) -> None:
    """No pickle of TE's: every tensor is fp32, and every file reads as weights only."""
    from mpdit.parallel import sharded

    path = folder / "checkpoints" / "step_1"
    sharded.refuse_code(path / ".metadata")
    stored = sharded.Stored(path)
    scales = {key for key in stored.shapes if key.startswith("fp8_scales.")}
    assert len(scales) == LAYERS
    for key in scales:
        assert torch.equal(stored.read(key), of_layer(key.removeprefix("fp8_scales.")))


@pytest.mark.dist
def test_a_resharded_checkpoint_has_them_too(folder: Path, tmp_path: Path) -> None:
    from mpdit import config as configs
    from mpdit.parallel import sharded

    (folder / "config.yaml").write_text(configs.dump(of(folder, **DELAYED, tp=2)))
    out = tmp_path / "checkpoints" / "step_1"
    ranks.run(1, resharded, path=folder / "checkpoints" / "step_1", out=out)
    before, after = sharded.Stored(folder / "checkpoints" / "step_1"), sharded.Stored(out)
    assert after.shapes == before.shapes
    assert all(torch.equal(after.read(key), before.read(key)) for key in before.shapes)
    found = ranks.run(2, read, config=of(tmp_path, **DELAYED, pp=2))
    assert {note for note, _ in found} == {""}


def resharded(rank: int, world: int, path: Path, out: Path) -> None:
    import torch.distributed as dist

    from mpdit_tools.checkpoint.reshard import reshard

    dist.destroy_process_group()
    reshard(path, out, ("parallel.pp=2",))
