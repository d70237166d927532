"""Law 9: bad input gets a sentence that names key and value, on every rank, before any rank starts work."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ranks
import tiny
from data.make_shards import edit_manifest
from mpdit.config import Config
from mpdit.errors import InputError
from train.bad_input import BAD, FP8, UVIT


def check(data: Path, world: int, *overrides: str) -> Config:
    ranks.warm()
    from mpdit.train import preflight

    return preflight.check(tiny.config(data, *overrides), world)


def refusal(data: Path, world: int = 1, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        check(data, world, *overrides)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_told_with_key_and_value(what: str, tiny_set: Path) -> None:
    world, overrides, words = BAD[what]
    said = refusal(tiny_set, world, *overrides)
    assert [word for word in words if word not in said] == [], said


def test_the_unchanged_run_is_fine(tiny_set: Path) -> None:
    """Or every refusal above could have this one's reason."""
    for world in (1, 2, 4, 8):
        check(tiny_set, world)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.arch=pixart", "objective.kind=ddpm", "model.learn_sigma=true", "sample.sampler=ddim"],
        [*UVIT, "parallel.tp=2", "parallel.cp=2", "parallel.sp=true", "model.text_tokens=7"],
        [*UVIT, "parallel.pp=2", "parallel.pp_split=[2, 3]", "model.text_tokens=8"],  # 25 tokens, which nothing divides
        ["mup.base_batch_size=4", "mup.base_images=160"],
        ["data.buckets=[[18, 12], [12, 18], [6, 24]]", "parallel.tp=2", "parallel.cp=2", "parallel.sp=true"],
        ["data.buckets=[[15, 9]]", "sample.image_size=[9, 15]", "parallel.tp=2", "parallel.pp=2"],  # 15 tokens
        [*UVIT, "data.buckets=[[12, 12]]", "sample.image_size=[12, 12]"],
        [FP8, "parallel.tp=2", "parallel.pp=2", "parallel.sp=true", "parallel.micro_batch=2"],
        [FP8, "parallel.fp8_bf16_blocks=0", "parallel.fp8_recipe=mxfp8", "parallel.pp=4", "parallel.micro_batch=4"],
        ["parallel.precision=bf16", "parallel.fp8_bf16_blocks=2", "parallel.tp=4"],  # FP8's rules are FP8's alone
    ],
    ids=[
        *("pixart", "uvit over tp x cp", "uvit over pp", "half the batch"),
        *("buckets over tp x cp", "buckets over pp", "uvit's square", "fp8", "mxfp8 in all blocks", "no fp8"),
    ],
)
def test_what_fits_is_fine(overrides: list[str], tiny_set: Path) -> None:
    check(tiny_set, 4, *overrides)


def test_kernels_that_this_machine_cannot_run_are_told(tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not where the config is another machine's: `mpdit plan` and `transfer` prepare GPU runs on a laptop."""
    monkeypatch.setattr("mpdit_kernels.switch.lacking", lambda: "there is no CUDA device")
    said = refusal(tiny_set, 1, "parallel.kernels=triton")
    assert said.startswith("parallel.kernels is triton, but there is no CUDA device; set it to auto")
    check(tiny_set, 1, "parallel.kernels=auto")
    check(tiny_set, 1, "parallel.kernels=torch")

    from mpdit.train import preflight

    preflight.without_data(tiny.config(tiny_set, "parallel.kernels=triton"), 1)


# ---- what is not known before the data is ------------------------------------------------------------------------


def test_open_values_are_filled(tiny_set: Path) -> None:
    manifest = json.loads((tiny_set / "manifest.json").read_text())
    config = check(tiny_set, 1)
    assert config.model.vocab_size == manifest["tokenizer"]["vocab_size"] > 0
    assert check(tiny_set, 1, f"model.vocab_size={config.model.vocab_size}") == config


@pytest.mark.parametrize(
    ("world", "overrides", "micro_batch"),
    [
        (1, [], 8),
        (4, [], 2),
        (1, ["parallel.micro_batch=2"], 2),
        (2, ["parallel.tp=2"], 8),
        (2, ["parallel.cp=2"], 8),
        (2, ["parallel.pp=2"], 4),  # a micro-batch a stage, so that the pipeline is never less than full
        (4, ["parallel.pp=2"], 2),
        (4, ["parallel.pp=4"], 2),
        (2, ["parallel.pp=2", "train.batch_size=7"], 7),
        (2, ["parallel.pp=2", "parallel.micro_batch=1"], 1),
        (2, ["parallel.pp=2", "parallel.vpp=2"], 4),
    ],
)
def test_the_micro_batch_is_resolved(world: int, overrides: list[str], micro_batch: int, tiny_set: Path) -> None:
    assert check(tiny_set, world, *overrides).parallel.micro_batch == micro_batch


def test_nothing_else_is_changed_and_a_second_look_changes_nothing(tiny_set: Path) -> None:
    given, config = tiny.config(tiny_set), check(tiny_set, 2)
    open_again = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, vocab_size=0),
        parallel=dataclasses.replace(
            config.parallel, micro_batch=0, overlap_grad_reduce=None, overlap_param_gather=None
        ),
    )
    assert open_again == given

    from mpdit.train import preflight

    assert preflight.check(config, 2) == config


# ---- damaged data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny_set: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_set, tmp_path / "set"))


def first(folder: Path, pattern: str) -> Path:
    return min(folder.glob(pattern))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_shard_is_named(split: str, copy: Path) -> None:
    tar = first(copy, f"{split}*.tar")
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    said = refusal(copy)
    assert str(tar) in said
    assert f"is {len(whole) // 2} bytes long, but the manifest says {len(whole)}" in said


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_index_of_another_shard_is_named(split: str, copy: Path) -> None:
    index, other = (first(copy, f"{name}*.idx") for name in (split, {"train": "val", "val": "train"}[split]))
    index.write_bytes(other.read_bytes())
    said = refusal(copy)
    assert str(index) in said
    assert "SHA-256" in said


def test_an_index_whose_offsets_are_not_the_tars_is_named(copy: Path) -> None:
    """Even where the manifest has this index's hash: whoever edits one may edit the other."""
    import hashlib

    index = first(copy, "train*.idx")
    head, line, *rest = index.read_text().splitlines()
    extension, offset, *tail = line.split()
    shifted = " ".join([extension, str(int(offset) + 512), *tail])
    index.write_text("\n".join([head, shifted, *rest]) + "\n")
    digest = hashlib.sha256(index.read_bytes()).hexdigest()
    edit_manifest(copy, lambda m: m["splits"]["train"]["shards"][0].update(index_sha256=digest))
    said = refusal(copy)
    assert str(index) in said
    assert "don't belong together" in said


def test_a_folder_without_a_manifest_or_a_split_is_named(copy: Path) -> None:
    manifest = copy / "manifest.json"
    edit_manifest(copy, lambda m: m["splits"].pop("val"))
    assert f"{manifest}: has no split 'val'; it has train" in refusal(copy)
    manifest.unlink()
    assert f"{copy}: has no manifest.json, so it is not a data set" in refusal(copy)


def test_a_set_without_a_tokenizer_is_named(copy: Path) -> None:
    manifest = copy / "manifest.json"
    edit_manifest(copy, lambda m: m.update(tokenizer=None))
    assert f"{manifest} names no tokenizer" in refusal(copy)


LABELS = ("data.text=labels", "model.text_tokens=1")


def test_the_vocabulary_of_labels_is_the_classes_and_no_class(labelled_set: Path) -> None:
    """An embedding without a row for "no class" can't be guided; one with more has rows that nothing trains."""
    assert check(labelled_set, 1, *LABELS, "sample.prompts=[red, blue]").model.vocab_size == len(tiny.COLOURS) + 1
    assert "model.vocab_size is 4" in refusal(labelled_set, 1, *LABELS, "model.vocab_size=4")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.text=labels"], ["model.text_tokens is 8", "data.text labels", "should be 1"]),
        ([*LABELS, "sample.prompts=[red, bleu]"], ["'bleu' is no class", "did you mean 'blue'?"]),
    ],
)
def test_what_labels_cannot_say_is_told(overrides: list[str], words: list[str], labelled_set: Path) -> None:
    """Before training: a misspelt prompt would otherwise end a run at its first pictures."""
    said = refusal(labelled_set, 1, *overrides)
    assert [word for word in words if word not in said] == [], said


def test_labels_on_a_set_without_classes_are_refused(tiny_set: Path) -> None:
    """With what to do: the captions of this set are free text."""
    said = refusal(tiny_set, 1, *LABELS)
    assert str(tiny_set / "manifest.json") in said
    assert "folder --classes" in said


def test_another_tokenizer_is_named(copy: Path) -> None:
    check(copy, 1)
    manifest = json.loads((copy / "manifest.json").read_text())
    model = copy / manifest["tokenizer"]["file"]
    model.write_bytes(model.read_bytes() + b"\0")
    said = refusal(copy)
    assert str(model) in said
    assert "another hash" in said


def test_a_file_in_the_place_of_the_run_folder_is_named(tiny_set: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for folder in (file, file / "run"):
        said = refusal(tiny_set, 1, f"run.dir={folder}")
        assert f"run.dir {folder}" in said
        assert f"{file} is a file" in said
    check(tiny_set, 1, f"run.dir={tmp_path / 'new' / 'run'}")
    assert sorted(tmp_path.iterdir()) == [file], "preflight makes nothing"


# ---- on every rank, before anything is started -------------------------------------------------------------------


def preflight_rank(rank: int, world: int, config: Config) -> tuple[str, bool]:
    """As mpdit.train.main does it: what this rank says, and whether Megatron has groups by then."""
    from megatron.core import parallel_state

    from mpdit.parallel import groups
    from mpdit.train import preflight

    try:
        config = preflight.check(config, groups.world_size())
        groups.start(config.parallel, config.train.seed)
    except InputError as error:
        return str(error), parallel_state.model_parallel_is_initialized()
    started = parallel_state.model_parallel_is_initialized()
    groups.stop()
    return "", started


@pytest.mark.dist
@pytest.mark.parametrize("bad", ["parallel.pp=3", "train.batch_size=6", "data.path=nowhere"])
def test_every_rank_refuses_before_any_group_of_the_layout_exists(bad: str, tiny_set: Path) -> None:
    said = ranks.run(4, preflight_rank, timeout_s=60, config=tiny.config(tiny_set, bad))
    assert len(set(said)) == 1
    sentence, started = said[0]
    assert bad.split("=")[1] in sentence
    assert not started


@pytest.mark.dist
def test_good_input_starts_the_groups(tiny_set: Path) -> None:
    config = tiny.config(tiny_set, "parallel.tp=2", "parallel.pp=2")
    assert ranks.run(4, preflight_rank, timeout_s=60, config=config) == [("", True)] * 4


@pytest.mark.parametrize(
    ("parallel", "world", "on_gpus", "wanted"),
    [
        ({}, 2, True, (True, False)),
        ({}, 2, False, (False, False)),
        ({}, 1, True, (False, False)),
        ({"tp": 2}, 2, True, (False, False)),
        ({"cp": 2}, 2, True, (True, False)),
        ({"distributed_optimizer": True}, 2, True, (True, True)),
        ({"distributed_optimizer": True, "overlap_grad_reduce": False}, 2, True, (False, False)),
        ({"distributed_optimizer": True, "overlap_param_gather": False}, 2, True, (True, False)),
        ({"distributed_optimizer": True, "overlap_param_gather": True}, 2, False, (True, True)),
        ({"overlap_grad_reduce": True}, 2, False, (True, False)),
    ],
)
def test_gpus_overlap_what_is_left_open(
    parallel: dict[str, Any], world: int, on_gpus: bool, wanted: tuple[bool, bool]
) -> None:
    from mpdit.train import preflight

    checked = preflight.without_data(tiny.config(Path("nowhere"), parallel=parallel), world, on_gpus=on_gpus).parallel
    assert (checked.overlap_grad_reduce, checked.overlap_param_gather) == wanted


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpdit.train import preflight

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(preflight.accel, "gpus", lambda: 1)
    with pytest.raises(InputError, match=r"4 ranks were started on a machine with 1 GPU, .*parallel.share_gpu=true"):
        preflight.machine(tiny.config(Path("nowhere")))
    preflight.machine(tiny.config(Path("nowhere"), "parallel.share_gpu=true"))
    monkeypatch.setattr(preflight.accel, "gpus", lambda: 4)
    preflight.machine(tiny.config(Path("nowhere")))


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpdit.train import preflight

    config = tiny.config(Path("nowhere"), "parallel.compile=true")
    preflight.machine(config)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(InputError, match=r"parallel.compile needs a C\+\+ compiler.*install g\+\+.*compile=false"):
        preflight.machine(config)
