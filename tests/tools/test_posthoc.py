"""Post-hoc EMA on real runs: what `mpdit ema` makes is the average that was kept, in any layout and after a resume."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import commands
import ranks
import tiny
from mpdit.config import Config

STEPS, EVERY = 40, 4
TP2_PP2 = {"tp": 2, "pp": 2}
DP2 = {"distributed_optimizer": True}
BOUND = 1e-5


def train(rank: int, world: int, config: Config) -> None:
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()


def run_config(data: Path, folder: Path, parallel: dict[str, Any], *widths: float, **more: Any) -> Config:
    kept = {"steps": STEPS, "posthoc_ema": widths, "posthoc_every": EVERY, "save_every": 20, "keep_last": 0, **more}
    return tiny.with_run_dir(tiny.config(data, parallel=parallel, train=kept), folder)


def read(rank: int, world: int, folder: str, prefix: str) -> dict[str, np.ndarray]:
    """name -> tensor, of the keys of a checkpoint's folder that begin with `prefix`."""
    from mpdit.parallel import sharded

    torch.distributed.destroy_process_group()
    stored = sharded.Stored(Path(folder))
    return {key.removeprefix(prefix): stored.read(key).numpy() for key in stored.shapes if key.startswith(prefix)}


def tensors(folder: Path, prefix: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = ranks.run(1, read, folder=str(folder), prefix=prefix)[0]
    assert found
    return found


def distance(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], scale: dict[str, np.ndarray]) -> float:
    """The norm of the difference of all tensors, in that of `scale`."""
    assert found.keys() == wanted.keys()
    norms = [
        np.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in values))
        for values in ([found[n] - wanted[n] for n in wanted], scale.values())
    ]
    return float(norms[0] / norms[1])


def ema(*calls: tuple[object, ...]) -> list[dict[str, Any]]:
    """What `mpdit ema` says of each call."""
    argvs = [["ema", *words, "--json"] for words in calls]
    done: list[commands.Done] = ranks.run(1, commands.commands, timeout_s=90, argvs=argvs)[0]
    assert [(code, error) for code, _, error in done] == [(0, "")] * len(calls)
    return [json.loads(out) for _, out, _ in done]


@pytest.fixture(scope="module")
def kept(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run twice: with the two usual widths in TP2 x PP2, and with three others on two data ranks."""
    folder = tmp_path_factory.mktemp("kept")
    ranks.run(4, train, config=run_config(tiny_set, folder / "two", TP2_PP2, 0.05, 0.1))
    ranks.run(2, train, config=run_config(tiny_set, folder / "direct", DP2, 0.075, 0.12))
    return folder


@pytest.mark.dist
def test_an_average_made_afterwards_is_the_one_that_was_kept(kept: Path, tmp_path: Path) -> None:
    """Against a run that kept that very width, in units of how far the weights are from their average."""
    half = STEPS // 2
    made = ema(
        (kept / "two", "--sigma-rel", 0.075, "--out", tmp_path / "short"),
        (kept / "two", "--sigma-rel", 0.12, "--out", tmp_path / "long"),
        (kept / "two", "--sigma-rel", 0.075, "--step", half, "--out", tmp_path / "early"),
    )
    assert [one["step"] for one in made] == [STEPS, STEPS, half]
    assert {one["averages"] for one in made} == {2 * STEPS // EVERY}
    direct = kept / "direct" / "checkpoints"
    cases = (("short", STEPS, "posthoc_0.075"), ("long", STEPS, "posthoc_0.12"), ("early", half, "posthoc_0.075"))
    for one, (name, step, kind) in zip(made, cases, strict=True):
        weights, average = (tensors(direct / f"step_{step}", f"{what}.") for what in ("param", kind))
        moved = {key: weights[key] - average[key] for key in average}
        found = distance(tensors(tmp_path / name, "param."), average, moved)
        print(f"\n{name}: profile within {one['error']:.1e}, weights within {found:.1e}")
        assert found < 0.03
        other = "posthoc_0.12." if kind == "posthoc_0.075" else "posthoc_0.075."
        assert distance(tensors(direct / f"step_{step}", other), average, moved) > 0.2, "another width would not pass"


@pytest.mark.dist
def test_averages_do_not_depend_on_the_layout_and_survive_a_kill(kept: Path, tiny_set: Path, tmp_path: Path) -> None:
    """A run that goes on from step 20 in other layouts, whose ranks keep parts of each average, has the same ones."""
    run = shutil.copytree(kept / "two", tmp_path / "run")
    (run / "checkpoints" / f"step_{STEPS}" / "manifest.json").unlink()
    stale = [path for path in (run / "ema").iterdir() if int(path.name.removeprefix("step_")) > 20]
    assert len(stale) == (STEPS - 20) // EVERY
    for path in stale:
        shutil.rmtree(path)
    ranks.run(2, train, config=run_config(tiny_set, run, DP2, 0.05, 0.1))
    assert sorted(path.name for path in (run / "ema").iterdir()) == sorted(
        path.name for path in (kept / "two" / "ema").iterdir()
    )
    for folder in ("ema/step_24", f"ema/step_{STEPS}", f"checkpoints/step_{STEPS}"):
        for width in (0.05, 0.1):
            wanted = tensors(kept / "two" / folder, f"posthoc_{width}.")
            assert distance(tensors(run / folder, f"posthoc_{width}."), wanted, wanted) < BOUND, (folder, width)


@pytest.mark.dist
def test_pictures_can_be_drawn_with_it(kept: Path, tmp_path: Path) -> None:
    """In the layout that is asked for; and they are not those of the plain average."""
    run, prompts = kept / "two", tmp_path / "prompts.txt"
    prompts.write_text("a red square at 0 0\n")
    (made,) = ema((run, "--sigma-rel", 0.06))
    assert made["out"] == str(run / "ema" / f"sigma_0.06-step_{STEPS}")
    words = ["sample", run, "--prompts", prompts, "--out"]
    weights = ["--weights", made["out"]]
    argvs = [[*words, tmp_path / "plain"], [*words, tmp_path / "posthoc", *weights]]
    done = ranks.run(1, commands.commands, timeout_s=90, argvs=argvs)[0]
    done.append(commands.run(*words, tmp_path / "two ranks", *weights, "--set", "parallel.tp=2", world=2))
    assert [(code, f"of step {STEPS} in" in said, error) for code, said, error in done] == [(0, True, "")] * 3
    names = ("plain", "posthoc", "two ranks")
    pictures = {name: np.asarray(Image.open(tmp_path / name / "grid.png")).astype(int) for name in names}
    assert np.abs(pictures["posthoc"] - pictures["two ranks"]).max() <= 1
    assert np.abs(pictures["posthoc"] - pictures["plain"]).max() > 1
    assert commands.run("ema", run, "--sigma-rel", 0.06)[0] == 2, "it is there already"


@pytest.mark.dist
def test_what_cannot_be_made_is_refused(kept: Path, tiny_set: Path, tmp_path: Path) -> None:
    run = shutil.copytree(kept / "two", tmp_path / "run")
    (tmp_path / "file").touch()
    damaged = next((run / "ema" / "step_12").glob("*.distcp"))
    argvs = [["ema", run, "--sigma-rel", *words] for words in ([0.25], [0.4], [0.1, "--step", 41], [0.1, "--out", run])]
    done = ranks.run(1, commands.commands, timeout_s=90, argvs=argvs)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done.append(commands.run("ema", run, "--sigma-rel", 0.1))
    done.append(commands.run("ema", run, "--sigma-rel", 0.1, "--out", tmp_path / "file" / "out"))
    assert not list((run / "ema").glob("*.partial-*"))
    shutil.rmtree(run / "ema")
    done.append(commands.run("ema", run, "--sigma-rel", 0.1))
    assert [(code, out) for code, out, _ in done] == [(1, ""), *[(2, "")] * 6]
    for (_, _, error), why in zip(
        done,
        (
            *("more than --max-error 0.05", "between 0.001 and 0.28", "between 1 and 40", "is there already"),
            *(f"{damaged}: is damaged", "file/out: can't be written to (Not a directory)", "has no snapshots"),
        ),
        strict=True,
    ):
        assert why in error
    with pytest.raises(ranks.RankFailed, match=r"InputError.*no average of train\.posthoc_ema 0\.07"):
        ranks.run(1, train, config=run_config(tiny_set, run, {}, 0.05, 0.07, steps=50))
