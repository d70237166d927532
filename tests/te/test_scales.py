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
EMULATED = {"backend": "local", "precision": "fp8_emulated", "fp8_recipe": "delayed"}
BF16 = {"backend": "local", "precision": "bf16"}
LAYERS = 4 * 2  # of a DiT's block, in its two inner blocks


Kept = dict[str, dict[str, torch.Tensor]]


def drawn(kept: Kept) -> Kept:
    """Numbers of its own for each layer, other than any default."""

    def one(name: str, kind: str, shape: torch.Size) -> torch.Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{kind}.{name}".encode()))
        return torch.rand(shape, generator=draw) + 0.5

    return {name: {kind: one(name, kind, v.shape) for kind, v in kinds.items()} for name, kinds in kept.items()}


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

    def scales(self) -> Kept:
        from mpdit.parallel import backend

        with stub.building():
            return {
                name: {kind: value.clone() for kind, value in kinds.items()}
                for name, kinds in backend.scales(self.ctx, self.chunks).items()
            }

    def save(self) -> str | None:
        from mpdit.train import saver
        from mpdit.train.checkpoint import Position

        writer = saver.Saver(self.folder, lambda _: None)
        with stub.building():
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
        return checkpoint.note_on_scales(path, self.config)


def written(rank: int, world: int, config: Config) -> tuple[str | None, Kept]:
    """How the save ended, and what the scales were before they were drawn."""
    from mpdit.parallel import backend, groups

    bench = Bench(config)
    before = bench.scales()
    with stub.building():
        backend.set_scales(bench.ctx, bench.chunks, drawn(before))
    error = bench.save()
    groups.stop()
    return error, before


def read(rank: int, world: int, config: Config) -> tuple[str, Kept]:
    from mpdit.parallel import groups

    bench = Bench(config)
    found = bench.load(), bench.scales()
    groups.stop()
    return found


def of(folder: Path, **parallel: Any) -> Config:
    return tiny.with_run_dir(config("dit", **parallel), folder)


def same(one: Kept, other: Kept) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name][kind]) for name, kinds in one.items() for kind, value in kinds.items()
    )


def at_first(kept: Kept) -> bool:
    shapes = {"fp8_history": (1024, 3), "fp8_scale": (3,)}
    assert {name: {kind: tuple(v.shape) for kind, v in kinds.items()} for name, kinds in kept.items()} == dict.fromkeys(
        kept, shapes
    )
    return all(bool((kinds["fp8_scale"] == 1).all() and (kinds["fp8_history"] == 0).all()) for kinds in kept.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensor ranks."""
    folder = tmp_path_factory.mktemp("run")
    for error, before in ranks.run(2, written, config=of(folder, **DELAYED, tp=2)):
        assert error is None
        assert at_first(before)
        assert len(before) == LAYERS
    return folder


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (1, DELAYED),
        (2, {**DELAYED, "tp": 2, "sp": True}),
        (2, {**DELAYED, "pp": 2}),
        (2, {**DELAYED, "distributed_optimizer": True}),
        (1, EMULATED),
        (2, {**EMULATED, "tp": 2}),
    ],
    ids=["one rank", "TP2 + SP", "PP2", "DP2", "emulated", "emulated, TP2"],
)
def test_scales_are_read_into_any_layout_and_the_emulation(world: int, parallel: dict[str, Any], folder: Path) -> None:
    found = ranks.run(world, read, config=of(folder, **parallel))
    assert {note for note, _ in found} == {""}
    every = {name: kinds for _, of_rank in found for name, kinds in of_rank.items()}
    assert len(every) == LAYERS
    assert same(every, drawn(every))


@pytest.mark.dist
def test_scales_of_the_emulation_are_read_by_transformer_engine(tmp_path: Path) -> None:
    (error, before), *_ = ranks.run(1, written, config=of(tmp_path, **EMULATED))
    assert (error, at_first(before)) == (None, True)
    note, found = ranks.run(1, read, config=of(tmp_path, **DELAYED))[0]
    assert note == ""
    assert len(found) == LAYERS
    assert same(found, drawn(found))


@pytest.mark.dist
@pytest.mark.parametrize("parallel", [BF16, FP8, {**BF16, "backend": "te"}], ids=["local", "tensorwise", "te bf16"])
def test_scales_of_another_recipe_are_left_out_with_a_word(parallel: dict[str, Any], folder: Path) -> None:
    note, scales = ranks.run(1, read, config=of(folder, **parallel))[0]
    assert "is left out" in note
    assert "fp8_recipe delayed" in note
    assert scales == {}


@pytest.mark.dist
@pytest.mark.parametrize("parallel", [BF16, FP8], ids=["local", "tensorwise"])
def test_scales_that_are_not_there_start_anew_with_a_word(parallel: dict[str, Any], tmp_path: Path) -> None:
    assert ranks.run(1, written, config=of(tmp_path, **parallel)) == [(None, {})]
    note, scales = ranks.run(2, read, config=of(tmp_path, **DELAYED, tp=2))[0]
    assert "start at 1" in note
    assert at_first(scales)
    assert len(scales) == LAYERS


@pytest.mark.dist
def test_a_checkpoint_holds_numbers_alone(folder: Path) -> None:
    """No pickle of TE's: its metadata are metadata, and every tensor reads as weights only."""
    from mpdit.parallel import sharded

    path = folder / "checkpoints" / "step_1"
    sharded.refuse_code(path / ".metadata")
    stored = sharded.Stored(path)
    scales = [key for key in stored.shapes if key.startswith("fp8_")]
    assert len(scales) == 2 * LAYERS
    assert all(bool((stored.read(key) >= 0.5).all()) for key in scales)
    assert [key for key in stored.shapes if "extra_state" in key] == []


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


def skipped(rank: int, world: int, config: Config) -> tuple[Kept, Kept, Kept]:
    """Scales before a step, once TE has learnt of it by its own Python code, and when the step is skipped."""
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import quantization

    from mpdit.parallel import backend, groups

    bench = Bench(config)
    with stub.building():
        backend.set_scales(bench.ctx, bench.chunks, drawn(bench.scales()))
    before = bench.scales()
    bench.run.undo.mark()
    for module in (module for chunk in bench.chunks for module in chunk.modules()):
        for key in ("scaling_fwd", "scaling_bwd") if isinstance(module, te.Linear) and module.fp8_meta else ():
            state = module.fp8_meta.get(key)
            if state is not None:
                state.amax_history[0] = 1e5
                quantization._amax_and_scale_update(state.amax_history, state.scale, 448.0, state.recipe)
    learnt = bench.scales()
    bench.run.skip()
    found = before, learnt, bench.scales()
    groups.stop()
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"pp": 2})], ids=["one rank", "PP2"])
def test_a_skipped_step_is_not_remembered(world: int, parallel: dict[str, Any], tmp_path: Path) -> None:
    for before, learnt, after in ranks.run(world, skipped, config=of(tmp_path, **DELAYED, **parallel)):
        assert before
        for name, kinds in before.items():
            assert all(not torch.equal(value, learnt[name][kind]) for kind, value in kinds.items())
        assert same(after, before)


@pytest.mark.dist
def test_recipes_without_scales_have_nothing_to_undo(tmp_path: Path) -> None:
    assert ranks.run(1, undo_tensors, config=of(tmp_path, **FP8))[0] == 0
    assert ranks.run(1, undo_tensors, config=of(tmp_path, **DELAYED))[0] == 4 * LAYERS


def undo_tensors(rank: int, world: int, config: Config) -> int:
    from mpdit.parallel import groups

    found = len(Bench(config).run.undo._live)
    groups.stop()
    return found
