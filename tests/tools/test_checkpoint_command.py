"""``mpdit checkpoint``: what there is, whether it is whole, and the same tensors in other files."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import checkpoint_folders as folders
import commands
import ranks
import tiny
from mpdit import config as configs
from mpdit.config import Config
from mpdit.train import checkpoints

LAYOUT = {"tp": 2, "distributed_optimizer": True}


def train(rank: int, world: int, config: Config) -> None:
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()


@pytest.fixture(scope="module")
def run_dir(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tensor ranks in two copies, checkpoints at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    sections: dict[str, Any] = {"train": {"steps": 4, "save_every": 2}, "optim": {"warmup_steps": 1}}
    ranks.run(4, train, config=tiny.with_run_dir(tiny.config(tiny_set, parallel=LAYOUT, **sections), folder))
    return folder


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "copy"))


def test_list_shows_steps_layouts_and_what_is_wrong(copy: Path) -> None:
    folders.damage(copy / "checkpoints/step_2/__0_0.distcp", "truncated")
    (copy / "checkpoints/step_6.partial-ab").mkdir()
    code, out, error = commands.run("checkpoint", "list", copy, "--json")
    assert (code, error) == (0, "")
    found = json.loads(out)
    assert [(e["step"], e["status"]) for e in found] == [(4, "complete"), (2, "damaged"), (6, "partial")]
    assert found[0]["format"] == checkpoints.FORMAT
    assert (found[0]["ranks"], found[0]["layout"]["tp"]) == (4, 2)
    assert found[0]["bytes"] > 3e6
    code, out, _ = commands.run("checkpoint", "list", copy)
    assert code == 0
    assert "4 ranks TP2 fp32" in out


def test_verify_reads_everything_and_names_the_files(copy: Path) -> None:
    assert commands.run("checkpoint", "verify", copy)[0] == 0
    newest = copy / "checkpoints/step_4"
    assert commands.run("checkpoint", "verify", newest)[0] == 0
    folders.damage(newest / "__0_0.distcp", "flipped", at=500_000)
    folders.damage(newest / "common.pt", "removed")
    code, out, error = commands.run("checkpoint", "verify", copy)
    assert code == 1
    assert "1 of 2 checkpoints can't be used" in error
    assert "__0_0.distcp: is damaged" in out
    assert "common.pt: is missing" in out
    assert "step_2: complete and undamaged" in out
    code, out, _ = commands.run("checkpoint", "verify", newest, "--json")
    assert code == 1
    assert [len(problems) for problems in json.loads(out).values()] == [2]


@pytest.mark.parametrize("words", [("list",), ("verify",)])
def test_a_folder_without_checkpoints_is_bad_input(words: tuple[str, ...], tmp_path: Path) -> None:
    code, _, error = commands.run("checkpoint", *words, tmp_path / "no run")
    assert code == 2, error
    assert "no run" in error


def tensors(path: Path) -> dict[str, Any]:
    from mpdit.parallel import sharded

    stored = sharded.Stored(path)
    return {key: stored.read(key) for key in stored.shapes}


def equal(rank: int, world: int, one: Path, other: Path) -> int:
    import torch

    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    return len(first)


@pytest.mark.dist
def test_reshard_there_and_back_is_the_same_byte_for_byte(run_dir: Path, tmp_path: Path) -> None:
    """One file set, then the four ranks' again: what training wrote in that layout is what comes out."""
    source, single, back = run_dir / "checkpoints/step_4", tmp_path / "single", tmp_path / "back"
    config = run_dir / "config.yaml"
    code, out, error = commands.run("checkpoint", "reshard", source, "--out", single)
    assert (code, error) == (0, "")
    assert "in 1 files" in out
    checkpoints.verify(single)
    assert [path.name for path in single.glob("*.distcp")] == ["__0_0.distcp"]
    assert ranks.run(1, equal, one=source, other=single)[0] > 100
    argv = ["checkpoint", "reshard", single, "--out", back, "--config", config, "--ranks", 4]
    argv += ["parallel.tp=2", "parallel.distributed_optimizer=true"]
    code, _, error = ranks.run(2, torchrun, argv=argv)[0]
    assert (code, error) == (0, "")
    checkpoints.verify(back)
    for name in checkpoints.files_of(source):
        if name.endswith(".distcp") or name == "state.json":
            assert (back / name).read_bytes() == (source / name).read_bytes(), name
    assert not list(tmp_path.glob("*.partial*"))


def torchrun(rank: int, world: int, argv: list[object]) -> tuple[int, str, str]:
    """The command on a rank as torchrun starts it: no world yet, but the way to one."""
    import os

    import torch.distributed as dist

    port = [None]
    if rank == 0:
        port = [free_port()]
    dist.broadcast_object_list(port, src=0)
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port[0]))
    return commands.commands(rank, world, [argv])[0]


def free_port() -> Any:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.dist
def test_a_resharded_checkpoint_goes_on(run_dir: Path, tiny_set: Path, tmp_path: Path) -> None:
    """In another run folder, as step 4 of the same data."""
    out = tmp_path / "run/checkpoints/step_4"
    out.parent.mkdir(parents=True)
    code, _, error = commands.run(
        "checkpoint", "reshard", run_dir / "checkpoints/step_4", "--out", out, "parallel.pp=2"
    )
    assert code == 0, error
    assert len(list(out.glob("*.distcp"))) == 2
    config = configs.load(run_dir, ["train.steps=5", f"run.dir={tmp_path / 'run'}"])
    ranks.run(1, train, config=configs.from_dict({**configs.to_dict(config), "parallel": {}}))
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [4]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["model.width=64"], "only the layout can change here"),
        (["parallel.tp=3"], "parallel.tp"),
        (["--ranks", "3", "parallel.tp=2"], "--ranks 3: should be a multiple"),
    ],
)
def test_reshard_refuses_what_can_t_be(more: list[str], why: str, run_dir: Path, tmp_path: Path) -> None:
    source = run_dir / "checkpoints/step_4"
    code, _, error = commands.run("checkpoint", "reshard", source, "--out", tmp_path / "out", *more)
    assert code == 2
    assert why in error
    assert not (tmp_path / "out").exists()


def test_reshard_refuses_a_damaged_one(copy: Path, tmp_path: Path) -> None:
    folders.damage(copy / "checkpoints/step_4/__1_0.distcp", "flipped")
    code, _, error = commands.run("checkpoint", "reshard", copy / "checkpoints/step_4", "--out", tmp_path / "out")
    assert code == 2
    assert "__1_0.distcp: is damaged" in error
    assert not list(tmp_path.glob("out*"))


def test_reshard_tells_of_an_out_that_cannot_be_written(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it reads the checkpoint, which is damaged here; and what a full disk leaves is removed."""
    from mpdit_tools.checkpoint import reshard

    source, file = copy / "checkpoints/step_4", tmp_path / "file"
    file.touch()
    with monkeypatch.context() as patch:
        patch.setattr(reshard.packed, "put", _full_disk)
        code, _, error = commands.run("checkpoint", "reshard", source, "--out", tmp_path / "out")
    assert code == 2
    assert f"--out {tmp_path / 'out'}: can't be written to (No space left on device); name another folder." in error
    assert not list(tmp_path.glob("out*"))
    folders.damage(source / "__1_0.distcp", "flipped")
    code, _, error = commands.run("checkpoint", "reshard", source, "--out", file / "out")
    assert code == 2
    assert f"--out {file / 'out'}: can't be written to (Not a directory); name another folder." in error


def _full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
