"""`mpdit sample`: pictures out of a real run, in any layout, and one sentence for whatever can't be drawn."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import commands
import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError
from mpdit_tools import sample

PROMPTS = "a red square at 0 0\n\n  a Blue, square/at 3 4!  \ncafé\n"
NAMES = ["000-a-red-square-at-0-0.png", "001-a-blue-square-at-3-4.png", "002-caf.png", "grid.png"]


def train(rank: int, world: int, config: Config) -> None:
    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    loop.train(config)
    groups.stop()


def run(*argv: object, world: int = 1) -> commands.Done:
    return commands.run("sample", *argv, world=world)


@pytest.fixture(scope="module")
def trained(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps in TP2 x PP2, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("trained")
    config = tiny.config(
        tiny_set,
        parallel={"tp": 2, "pp": 2},
        train={"steps": 2, "save_every": 1, "keep_last": 0},
        optim={"warmup_steps": 1, "lr": 0.02},
        mup={"output_mult": 0.3},
    )
    ranks.run(4, train, timeout_s=120, config=tiny.with_run_dir(config, folder / "run"))
    return folder / "run"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def pictures(folder: Path) -> np.ndarray:
    """[N, H, W, C] of the single pictures."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]).astype(int)


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_picture_a_prompt_and_a_grid(trained: Path, prompts: Path) -> None:
    code, out, error = run(trained, "--prompts", prompts)
    assert (code, error) == (0, "")
    folder = trained / "samples" / "step_2-prompts"
    assert f"3 pictures of step 2 in {folder}" in out
    assert sorted(path.name for path in folder.iterdir()) == NAMES
    found = pictures(folder)
    assert found.shape == (3, 12, 12, 3)
    assert found.std() > 10
    with Image.open(folder / "grid.png") as grid:
        enlarged = np.asarray(grid)[6:126, 6:126]
    assert np.array_equal(enlarged[::10, ::10], found[0])


@pytest.mark.dist
def test_the_layout_it_is_drawn_in_does_not_matter(trained: Path, prompts: Path, tmp_path: Path) -> None:
    for name, world, layout in (("one", 1, []), ("tp", 2, ["parallel.tp=2"]), ("dp", 2, [])):
        options = ["--set", *layout] if layout else []
        code, out, _ = run(trained, "--prompts", prompts, "--out", tmp_path / name, *options, world=world)
        assert code == 0
        assert out.count("3 pictures of step 2") == 1
    for name in ("tp", "dp"):
        assert np.abs(pictures(tmp_path / name) - pictures(tmp_path / "one")).max() <= 1, name


@pytest.mark.dist
def test_options_change_what_they_name(trained: Path, prompts: Path, tmp_path: Path) -> None:
    options: dict[str, list[object]] = {
        "as trained": [],
        "the same": ["--checkpoint", trained / "checkpoints" / "step_2", "--seed", 0, "--steps", 2, "--guidance", 3],
        "step 1": ["--checkpoint", trained / "checkpoints" / "step_1"],
        "seed": ["--seed", 1],
        "steps": ["--steps", 5],
        "guidance": ["--guidance", 1],
        "raw weights": ["--no-ema"],
        "size": ["--size", "18x12"],
    }
    argvs = [[trained, "--prompts", prompts, "--out", tmp_path / name, *words] for name, words in options.items()]
    found = {}
    for name, (code, out, _) in zip(
        options,
        ranks.run(1, commands.commands, timeout_s=90, argvs=[["sample", *argv] for argv in argvs])[0],
        strict=True,
    ):
        assert code == 0
        assert ("of step 1 in" if name == "step 1" else "of step 2 in") in out
        found[name] = pictures(tmp_path / name)
    assert np.array_equal(found.pop("the same"), found["as trained"])
    assert found["size"].shape == (3, 18, 12, 3)
    different = {name for name in found if not np.array_equal(found[name], found["as trained"])}
    assert different == set(found) - {"as trained"}


@pytest.mark.dist
def test_the_newest_complete_checkpoint_is_taken(trained: Path, prompts: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "run")
    (copy / "checkpoints" / "step_2" / "manifest.json").unlink()
    code, out, error = run(copy, "--prompts", prompts, "--out", tmp_path / "out")
    assert code == 0
    assert "3 pictures of step 1" in out
    assert f"{copy / 'checkpoints' / 'step_2'}: is incomplete" in error


# ---- the prompts file ------------------------------------------------------------------------------------------------


def test_prompts_are_the_lines_that_are_not_blank(prompts: Path) -> None:
    wanted = ["a red square at 0 0", "a Blue, square/at 3 4!", "café"]
    assert sample.read_prompts(prompts) == wanted
    prompts.write_bytes(b"\xef\xbb\xbf" + PROMPTS.encode())
    assert sample.read_prompts(prompts) == wanted, "a byte order mark is no part of the first prompt"
    prompts.write_bytes(PROMPTS.replace("\n", "\r\n").encode())
    assert sample.read_prompts(prompts) == wanted


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no prompt"),
        (b"\n  \n\t\n", "holds no prompt"),
        (b"\xef\xbb\xbf", "holds no prompt"),
        (b"a cat\ncaf\xe9\n", "is not UTF-8 (byte 9)"),
        ("a cat".encode("utf-16"), "is not UTF-8 (byte 0)"),
        (None, "can't be read (No such file or directory)"),
    ],
    ids=["empty", "blank", "only a byte order mark", "latin-1", "utf-16", "missing"],
)
def test_a_prompts_file_without_prompts_is_refused_by_name(content: bytes | None, words: str, prompts: Path) -> None:
    prompts.unlink() if content is None else prompts.write_bytes(content)
    with pytest.raises(InputError) as caught:
        sample.main([str(prompts.parent), "--prompts", str(prompts)])
    assert str(caught.value).startswith(f"{prompts}: {words}")


def test_a_folder_as_prompts_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be read") as caught:
        sample.read_prompts(tmp_path)
    assert str(tmp_path) in str(caught.value)


# ---- the run and the checkpoint --------------------------------------------------------------------------------------


def refused(*argv: object) -> str:
    code, out, error = run(*argv)
    assert (code, out) == (2, "")
    assert error.startswith("mpdit: ")
    assert error.count("\n") == 1
    return error


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path: Path, prompts: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"is no run folder, it has no config\.yaml") as caught:
            sample.main([str(folder), "--prompts", str(prompts)])
        assert str(caught.value).startswith(f"{folder}: ")


@pytest.mark.dist
def test_a_run_without_checkpoints_is_refused_by_name(trained: Path, tmp_path: Path, prompts: Path) -> None:
    shutil.copy(trained / "config.yaml", tmp_path)
    assert f"{tmp_path}: has no checkpoint yet" in refused(tmp_path, "--prompts", prompts)


@pytest.mark.dist
def test_a_run_on_labels_draws_its_classes_without_the_data_set(labelled_set: Path, tmp_path: Path) -> None:
    """The run folder holds the names; another name is told, and so is a list of other names."""
    data = Path(shutil.copytree(labelled_set, tmp_path / "set"))
    config = tiny.config(
        data, "data.text=labels", model={"text_tokens": 1}, train={"steps": 2}, optim={"warmup_steps": 1}
    )
    ranks.run(1, train, timeout_s=120, config=tiny.with_run_dir(config, tmp_path / "run"))
    shutil.rmtree(data)
    classes = tmp_path / "run" / "classes.json"
    assert json.loads(classes.read_text()) == sorted(tiny.COLOURS)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red\nblue\nred\n")
    code, _, error = run(tmp_path / "run", "--prompts", prompts, "--out", tmp_path / "out")
    assert (code, error) == (0, "")
    assert len(pictures(tmp_path / "out")) == 3
    prompts.write_text("red\nbleu\n")
    assert "the caption 'bleu' is no class of the data set; did you mean 'blue'?" in refused(
        tmp_path / "run", "--prompts", prompts
    )
    classes.write_text(json.dumps(sorted(tiny.COLOURS)[::-1]))
    assert f"{classes}: is a list of class names with another hash" in refused(tmp_path / "run", "--prompts", prompts)


def spoil(folder: Path, what: str) -> Path:
    """The file that the refusal should name."""
    manifest = folder / "manifest.json"
    if what == "missing":
        shutil.rmtree(folder)
        return folder
    if what == "incomplete":
        manifest.unlink()
        return folder
    if what == "a tensor file is cut short":
        path = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
        path.write_bytes(path.read_bytes()[:-100])
        return path
    if what == "a tensor file is gone":
        path = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
        path.unlink()
        return path
    tree: dict[str, Any] = json.loads(manifest.read_text())
    if what == "the manifest lists nothing":
        manifest.write_text("{}")
    elif what == "the manifest is no JSON":
        manifest.write_text(manifest.read_text()[:-5])
    elif what == "the manifest leaves a hash out":
        del tree["files"]["state.json"]["sha256"]
        manifest.write_text(json.dumps(tree))
    elif what == "the manifest leads outside":
        tree["files"]["../../config.yaml"] = tree["files"]["state.json"]
        manifest.write_text(json.dumps(tree))
    return manifest


@pytest.mark.dist
@pytest.mark.parametrize(
    "what",
    [
        "missing",
        "incomplete",
        "a tensor file is cut short",
        "a tensor file is gone",
        "the manifest lists nothing",
        "the manifest is no JSON",
        "the manifest leaves a hash out",
        "the manifest leads outside",
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_by_name(
    what: str, trained: Path, tmp_path: Path, prompts: Path
) -> None:
    checkpoint = shutil.copytree(trained / "checkpoints" / "step_2", tmp_path / "step_2")
    named = spoil(checkpoint, what)
    assert f"{named}: " in refused(trained, "--prompts", prompts, "--checkpoint", checkpoint)


@pytest.mark.dist
def test_a_checkpoint_of_another_model_is_refused(trained: Path, tmp_path: Path, prompts: Path) -> None:
    config = (trained / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("width: 32", "width: 64", 1))
    checkpoint = trained / "checkpoints" / "step_2"
    said = refused(tmp_path, "--prompts", prompts, "--checkpoint", checkpoint)
    assert f"{checkpoint}: is of another model, with model.width 32 where the config has 64" in said


@pytest.mark.dist
def test_a_size_that_is_none_is_refused(trained: Path, prompts: Path) -> None:
    for size, said in {
        "18": "--size is '18', but should be height x width in pixels",
        "-3x12": "--size is '-3x12'",
        "0x12": "sample.image_size is [0, 12], but should be [height, width]",
        "18x13": "sample.image_size is [18, 13], but height and width should both be multiples of model.patch 3",
    }.items():
        assert said in refused(trained, "--prompts", prompts, f"--size={size}")


@pytest.mark.dist
def test_a_layout_that_does_not_fit_is_refused(trained: Path, prompts: Path) -> None:
    assert "tp 2 x pp 1 x cp 1 = 2" in refused(trained, "--prompts", prompts, "--set", "parallel.tp=2")
