"""``mpdit data cache``: the same bytes however it was built, also when killed; what it says when it can't."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

import commands
import pretrained
import ranks
import tiny
from mpdit import config as configs

PIXELS = ["data.latents=null", "data.text=sentencepiece", "data.text_model=null", "model.channels=3"]
VAE = {"model": {"image_size": 6, "patch": 3, "channels": 4}}


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What the commands, forked from here, would each import."""
    ranks.warm()
    import diffusers
    import transformers

    assert [diffusers.AutoencoderKL, transformers.T5EncoderModel]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")

    def save(rank: int, world: int) -> None:
        pretrained.save_vae(folder / "vae")
        pretrained.save_t5(folder / "t5")

    ranks.run(1, save)
    return folder


def write_config(data: Path, models: Path, folder: Path, **changed: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tree = configs.to_dict(tiny.config(data, **VAE))
    given = {"text": "t5", "text_model": str(models / "t5"), "latents": str(models / "vae"), "mirror": True}
    tree["data"] |= {**given, "cache": str(folder / "cache"), **changed}
    path = folder / "run.yaml"
    path.write_text(configs.dump(configs.from_dict(tree)))
    return path


def argv(config: Path, *more: object) -> list[object]:
    return ["data", "cache", config, "--json", "--per-part", "2", *more]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def built(tiny_set: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a cache that one process built in one go."""
    config = write_config(tiny_set, models, tmp_path_factory.mktemp("built"))
    code, out, error = commands.run(*argv(config, "--workers", 1))
    assert code == 0, error
    assert {row["kind"] for row in json.loads(out)["caches"]} == {"latents", "text"}
    return config


@pytest.mark.dist
def test_killed_and_resumed_by_others_it_is_the_same_bytes(
    built: Path, tiny_set: Path, models: Path, tmp_path: Path
) -> None:
    config = write_config(tiny_set, models, tmp_path)
    world = ranks.start(1, commands.commands, argvs=[argv(config, "--workers", 1)])
    deadline = time.monotonic() + 90
    while len(parts := list((tmp_path / "cache").glob("latents-train-*.partial/*.rows.npy"))) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    world.close()  # SIGKILL
    assert not (list((tmp_path / "cache").glob("latents-train-*/manifest.json")))
    kept = {path.name: path.stat().st_mtime_ns for path in parts}
    code, out, error = ranks.run(1, commands.commands, argvs=[argv(config, "--workers", 2)])[0][0]
    assert code == 0, error
    (latents,) = (r for r in json.loads(out)["caches"] if (r["kind"], r["split"]) == ("latents", "train"))
    assert 0 < latents["built"] <= latents["parts"] - len(kept), "finished parts are kept"
    now = {path.name: path.stat().st_mtime_ns for path in Path(latents["folder"]).iterdir()}
    assert {name: now[name] for name in kept} == kept
    assert files(tmp_path / "cache") == files(built.parent / "cache")


@pytest.mark.dist
def test_what_is_there_is_found_and_verified(built: Path) -> None:
    before = files(built.parent / "cache")
    code, out, _ = commands.run(*argv(built))
    assert code == 0
    assert all(row["built"] == 0 < row["parts"] for row in json.loads(out)["caches"])
    code, out, _ = commands.run(*argv(built, "--verify"))
    assert code == 0
    found = json.loads(out)
    assert found["verified"]
    data = sum(len(content) for name, content in before.items() if not name.endswith("manifest.json"))
    assert sum(row["bytes"] for row in found["caches"]) == data
    code, out, _ = commands.run("data", "cache", built, "--verify")
    assert (code, "every byte is as it was written" in out) == (0, True)
    assert files(built.parent / "cache") == before


@pytest.mark.dist
def test_verify_finds_one_flipped_bit(built: Path) -> None:
    path = next((built.parent / "cache").glob("text-train-*/000003.npy"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        code, _, error = commands.run(*argv(built, "--verify"))
        assert code == 2
        assert f"{path}: is damaged" in error
    finally:
        path.write_bytes(whole)


@pytest.mark.dist
def test_another_models_cache_lies_beside(built: Path, tiny_set: Path, models: Path, tmp_path: Path) -> None:
    before = files(built.parent / "cache")
    other = {"latents": None, "cache": str(built.parent / "cache")}
    tree = configs.read(built)
    tree["data"] |= other
    tree["model"] |= {"image_size": 12, "channels": 3, "text_tokens": 5}
    path = tmp_path / "other.yaml"
    path.write_text(configs.dump(configs.from_dict(tree)))
    code, out, error = commands.run(*argv(path, "--workers", 1))
    assert code == 0, error
    assert [row["kind"] for row in json.loads(out)["caches"]] == ["text", "text"]
    after = files(built.parent / "cache")
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)


@pytest.mark.dist
def test_only_one_builds_at_a_time(tiny_set: Path, models: Path, tmp_path: Path) -> None:
    import fcntl

    config = write_config(tiny_set, models, tmp_path)
    world = ranks.start(1, commands.commands, argvs=[argv(config, "--workers", 1)])
    deadline = time.monotonic() + 90
    while not (locks := list((tmp_path / "cache").glob("latents-train-*.partial/*.rows.npy"))):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    world.close()
    with (locks[0].parent / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        code, _, error = commands.run(*argv(config, "--workers", 1))
    assert code == 2
    assert "another `mpdit data cache` is building it" in error


@pytest.mark.dist
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.cache=null"], "data.cache is not given"),
        (PIXELS, "nothing to cache"),
        (["data.latents=nowhere"], "there is no such folder"),
        (["--per-part", "0"], "--per-part 0: should be 1 or more"),
    ],
)
def test_what_it_needs_is_told(overrides: list[str], words: str, built: Path) -> None:
    options = overrides if overrides[0].startswith("--") else []
    code, out, error = commands.run("data", "cache", built, *([] if options else overrides), *options)
    assert (code, out) == (2, "")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.dist
def test_a_damaged_caption_is_told(tiny_set: Path, models: Path, tmp_path: Path) -> None:
    data = tmp_path / "set"
    shutil.copytree(tiny_set, data)
    tar = next(data.glob("train-*.tar"))
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(b"a red square", b"a bed square", 1))
    assert tar.read_bytes() != whole
    config = write_config(data, models, tmp_path, latents=None)
    tree = configs.read(config)
    tree["model"] |= {"image_size": 12, "channels": 3}
    config.write_text(configs.dump(configs.from_dict(tree)))
    code, out, error = commands.run(*argv(config, "--workers", 1))
    assert (code, out) == (2, "")
    assert f"{tar}: " in error
    assert "caption damaged; copy the tar again or build the data set again." in error
    assert error.count("\n") == 1
