"""Law 9: bad input gets a sentence that names key and value, on every rank, before any rank starts work."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError

# what is wrong: (ranks, overrides of the tiny run, words of the sentence)
BAD: dict[str, tuple[int, list[str], list[str]]] = {
    "unknown key": (1, ["model.widht=64"], ["unknown key model.widht", "'width'"]),
    "wrong type": (1, ["model.width=wide"], ["model.width is 'wide'", "a whole number"]),
    # ---- the model and the layout
    "heads are not whole": (1, ["model.head_dim=12"], ["model.width 32", "head_dim 12", "parallel.tp 1"]),
    "width over tp": (8, ["parallel.tp=8"], ["model.width 32", "head_dim 8", "parallel.tp 8 = 64"]),
    "heads over cp": (3, ["parallel.cp=3"], ["4 heads a tensor rank", "parallel.cp 3"]),
    "heads over tp x cp": (8, ["parallel.tp=2", "parallel.cp=4"], ["2 heads a tensor rank", "parallel.cp 4"]),
    "width of no positions": (1, ["model.width=30", "model.head_dim=6"], ["model.width 30", "multiple of 4"]),
    "image over patch": (1, ["model.patch=5"], ["model.image_size 12", "model.patch 5"]),
    "channels": (1, ["model.channels=4"], ["model.channels is 4", "3 (RGB) or 1 (gray)"]),
    "sp without tp": (1, ["parallel.sp=true"], ["parallel.sp", "parallel.tp of at least 2"]),
    "vpp without pp": (1, ["parallel.vpp=2"], ["parallel.vpp", "parallel.pp of at least 2"]),
    "overlap_param_gather alone": (
        2,
        ["parallel.overlap_param_gather=true"],
        ["parallel.overlap_param_gather", "parallel.distributed_optimizer", "parallel.overlap_grad_reduce"],
    ),
    "overlap_param_gather without reduce": (
        2,
        ["parallel.overlap_param_gather=true", "parallel.distributed_optimizer=true"],
        ["parallel.overlap_param_gather", "parallel.overlap_grad_reduce"],
    ),
    "depth over pp": (
        3,
        ["parallel.pp=3", "train.batch_size=9"],
        ["model.depth 4", "parallel.pp 3 x vpp 1 = 3", "parallel.pp_split, for example [1, 1, 2]"],
    ),
    "depth over pp x vpp": (
        2,
        ["parallel.pp=2", "parallel.vpp=2", "model.depth=6"],
        ["model.depth 6", "parallel.pp 2 x vpp 2 = 4", "for example [1, 1, 2, 2]"],
    ),
    "fewer blocks than stages": (
        8,
        ["parallel.pp=8"],
        ["model.depth 4", "parallel.pp 8 x vpp 1 = 8", "at least 8 blocks are needed"],
    ),
    "pp_split too short": (2, ["parallel.pp=2", "parallel.pp_split=[4]"], ["parallel.pp_split [4]", "2 numbers"]),
    "pp_split of another depth": (
        2,
        ["parallel.pp=2", "parallel.pp_split=[2, 3]"],
        ["parallel.pp_split [2, 3]", "add up to model.depth 4"],
    ),
    "pp_split with an empty stage": (
        2,
        ["parallel.pp=2", "parallel.pp_split=[0, 4]"],
        ["parallel.pp_split [0, 4]", "each at least 1"],
    ),
    "pp_split of nothing": (1, ["parallel.pp_split=[]"], ["parallel.pp_split []", "1 numbers"]),
    "text tokens under sp": (
        2,
        ["parallel.tp=2", "parallel.sp=true", "model.text_tokens=7"],
        ["model.text_tokens is 7 text tokens", "parallel.cp 1 x tp 2 under sp", "a multiple of 2"],
    ),
    "text tokens over cp": (2, ["parallel.cp=2", "model.text_tokens=9"], ["model.text_tokens is 9", "parallel.cp 2"]),
    "image tokens under sp": (
        2,
        ["parallel.tp=2", "parallel.sp=true", "model.image_size=9"],
        ["(model.image_size / model.patch)^2 is 9 image tokens", "a multiple of 2"],
    ),
    "image tokens over cp x tp": (
        4,
        ["parallel.cp=2", "parallel.tp=2", "parallel.sp=true", "model.image_size=9"],
        ["is 9 image tokens", "by 4 (parallel.cp 2 x tp 2 under sp)", "a multiple of 4"],
    ),
    "world of no layout": (
        4,
        ["parallel.tp=2", "parallel.pp=2", "parallel.cp=2"],
        ["tp 2 x pp 2 x cp 2 = 8", "the 4 that were started"],
    ),
    "world with a rest": (3, ["parallel.tp=2"], ["tp 2 x pp 1 x cp 1 = 2", "the 3 that were started"]),
    # ---- the batch
    "batch over data ranks": (3, [], ["train.batch_size 8", "3 data-parallel ranks", "a multiple of 3"]),
    "micro-batch": (1, ["parallel.micro_batch=3"], ["parallel.micro_batch 3", "8 images", "train.batch_size 8"]),
    "micro-batch of a rank's share": (2, ["parallel.micro_batch=8"], ["parallel.micro_batch 8", "4 images"]),
    "vpp with three micro-batches": (
        2,
        ["parallel.pp=2", "parallel.vpp=2", "train.batch_size=6", "parallel.micro_batch=2"],
        ["parallel.vpp", "multiples of parallel.pp 2", "micro-batches of 2 are 3"],
    ),
    "vpp with one micro-batch": (
        2,
        ["parallel.pp=2", "parallel.vpp=2", "train.batch_size=7"],
        ["parallel.vpp", "multiples of parallel.pp 2", "micro-batches of 7 are 1"],
    ),
    # ---- numbers
    "warm-up as long as the run": (1, ["optim.warmup_steps=20"], ["optim.warmup_steps 20", "train.steps 20"]),
    "wsd without decay_steps": (
        1,
        ["optim.schedule=wsd"],
        ["optim.schedule wsd", "optim.decay_steps, which is 0", "train.steps 20"],
    ),
    "wsd that decays for too long": (
        1,
        ["optim.schedule=wsd", "optim.decay_steps=21"],
        ["optim.decay_steps, which is 21", "train.steps 20"],
    ),
    "infinite lr": (1, ["optim.lr=.inf"], ["optim.lr is inf"]),
    "no number as lr": (1, ["optim.lr=.nan"], ["optim.lr is nan"]),
    "negative lr": (1, ["optim.lr=-1e-3"], ["optim.lr is -0.001"]),
    "negative weight decay": (1, ["optim.weight_decay=-0.1"], ["optim.weight_decay is -0.1"]),
    "no number as eps": (1, ["optim.eps=.nan"], ["optim.eps is nan"]),
    "beta2 above one": (1, ["optim.beta2=1.5"], ["optim.beta2 is 1.5", "between 0 and 1"]),
    "no number as beta1": (1, ["optim.beta1=.nan"], ["optim.beta1 is nan"]),
    "beta1 of one": (1, ["optim.beta1=1"], ["optim.beta1 is 1.0"]),
    "beta2 of one": (1, ["optim.beta2=1"], ["optim.beta2 is 1.0"]),
    "eps of zero": (1, ["optim.eps=0"], ["optim.eps is 0.0"]),
    "no number as output_mult": (1, ["mup.output_mult=.nan"], ["mup.output_mult is nan"]),
    "no number as lr_mult": (1, ["mup.lr_mult.table=.nan"], ["mup.lr_mult.table is nan"]),
    "negative lr_mult": (1, ["mup.lr_mult.hidden=-1"], ["mup.lr_mult.hidden is -1.0"]),
    "no number as logit_std": (1, ["objective.logit_std=.nan"], ["objective.logit_std is nan"]),
    "no number as guidance": (1, ["sample.guidance=.nan"], ["sample.guidance is nan"]),
    "negative base_head_dim": (1, ["mup.base_head_dim=-4"], ["mup.base_head_dim is -4"]),
    "no base_head_dim": (1, ["mup.base_head_dim=0"], ["mup.base_head_dim is 0"]),
    "a seed beyond 64 bits": (1, ["train.seed=18446744073709551616"], ["train.seed is 18446744073709551616"]),
    "ema_decay": (1, ["train.ema_decay=1.01"], ["train.ema_decay is 1.01", "between 0 and 1"]),
    "caption_drop": (1, ["data.caption_drop=-0.1"], ["data.caption_drop is -0.1", "between 0 and 1"]),
    "final_lr_ratio": (1, ["optim.final_lr_ratio=2"], ["optim.final_lr_ratio is 2"]),
    "no steps": (1, ["train.steps=0"], ["train.steps is 0", "at least 1"]),
    "no images": (1, ["train.batch_size=0"], ["train.batch_size is 0", "at least 1"]),
    "negative batch": (2, ["train.batch_size=-8"], ["train.batch_size is -8"]),
    "no tp": (1, ["parallel.tp=0"], ["parallel.tp is 0", "at least 1"]),
    "no cp": (1, ["parallel.cp=0"], ["parallel.cp is 0", "at least 1"]),
    "negative pp": (1, ["parallel.pp=-1"], ["parallel.pp is -1", "at least 1"]),
    "no vpp": (2, ["parallel.pp=2", "parallel.vpp=0"], ["parallel.vpp is 0", "at least 1"]),
    "negative micro-batch": (1, ["parallel.micro_batch=-2"], ["parallel.micro_batch is -2"]),
    "no width": (1, ["model.width=0"], ["model.width is 0"]),
    "no depth": (1, ["model.depth=0"], ["model.depth is 0"]),
    "no head_dim": (1, ["model.head_dim=0"], ["model.head_dim is 0"]),
    "no patch": (1, ["model.patch=0"], ["model.patch is 0"]),
    "no text tokens": (1, ["model.text_tokens=0"], ["model.text_tokens is 0"]),
    "no base width": (1, ["mup.base_width=0"], ["mup.base_width is 0"]),
    "negative seed": (1, ["train.seed=-1"], ["train.seed is -1"]),
    "negative save_every": (1, ["train.save_every=-5"], ["train.save_every is -5"]),
    "no sampling steps": (1, ["sample.steps=0"], ["sample.steps is 0"]),
    # ---- the data
    "another vocabulary": (1, ["model.vocab_size=17"], ["model.vocab_size is 17", "pieces; leave it out"]),
    "negative vocabulary": (1, ["model.vocab_size=-1"], ["model.vocab_size is -1"]),
    "no such folder": (1, ["data.path=nowhere/at/all"], ["nowhere/at/all: there is no such folder"]),
}


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
        parallel=dataclasses.replace(config.parallel, micro_batch=0),
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
    manifest = json.loads((copy / "manifest.json").read_text())
    for shard in manifest["splits"]["train"]["shards"]:
        if shard["index"] == index.name:
            shard["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    said = refusal(copy)
    assert str(index) in said
    assert "don't belong together" in said


def test_a_folder_without_a_manifest_or_a_split_is_named(copy: Path) -> None:
    manifest = copy / "manifest.json"
    tree = json.loads(manifest.read_text())
    del tree["splits"]["val"]
    manifest.write_text(json.dumps(tree))
    assert f"{manifest}: has no split 'val'; it has train" in refusal(copy)
    manifest.unlink()
    assert f"{copy}: has no manifest.json, so it is not a data set" in refusal(copy)


def test_a_set_without_a_tokenizer_is_named(copy: Path) -> None:
    manifest = copy / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "tokenizer": None}))
    assert f"{manifest} names no tokenizer" in refusal(copy)


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
