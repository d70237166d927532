"""Runs of latents and text encoders: layouts and caches change nothing, pictures come out, misfits are refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import commands
import pretrained
import ranks
import tiny
from mpdit.config import Config
from mpdit.errors import InputError

STEPS = 3
# 6 x 6 latents of 12 x 12 pictures; 4 tokens.
LATENT = {"image_size": 6, "patch": 3, "channels": 4}
REPA = {"repa_weight": 0.5, "repa_block": 2}  # on the first of two stages


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """What the ranks, forked from here, would each import; and a narrow projector."""
    ranks.warm()
    import diffusers
    import transformers

    assert [diffusers.AutoencoderKL, transformers.T5EncoderModel, transformers.CLIPTextModel]
    from mpdit.models import repa

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repa, "HIDDEN", 64)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved in a child: the parent stays without threads."""
    folder = tmp_path_factory.mktemp("models")

    def save(rank: int, world: int) -> None:
        pretrained.save_vae(folder / "vae", shift_factor=0.1)
        pretrained.save_t5(folder / "t5")
        pretrained.save_clip(folder / "clip")

    ranks.run(1, save)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders, and one tracking store for all of them: making it takes seconds."""
    return tmp_path_factory.mktemp("runs")


def run_config(data: Path, models: Path, text: str, *overrides: str, **sections: Any) -> Config:
    of_text = {"text": text, "text_model": str(models / text), "latents": str(models / "vae"), "mirror": True}
    pooled = {"pooled_dim": 20} if text == "clip" else {}
    sections = {"optim": {"warmup_steps": 1, "schedule": "constant"}, **sections}
    config = tiny.config(data, *overrides, model={**LATENT, **pooled}, train={"steps": STEPS}, **sections)
    return config_with(config, **of_text)


def config_with(config: Config, **data: Any) -> Config:
    import dataclasses

    return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


def train(rank: int, world: int, config: Config) -> dict[str, Any]:
    """Losses, gradient norms, REPA's losses, the validation loss, pictures, and which weights were loaded."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), Sets.open(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    found: dict[str, Any] = {"losses": [], "norms": [], "repa": []}
    for _ in range(config.train.steps):
        found["losses"].append(run.forward_backward(feed.next()))
        found["repa"].append(run.repa_loss())
        found["norms"].append(run.update())
    feed.close()
    found["val"] = [run.network.validate(batches.validation_batches(config, sets.val, sets.tokenizer))]
    found["loaded"] = "_loaded" in vars(sets.autoencoder) if sets.autoencoder else None
    found["pictures"] = session.draw(run.network, config, ["a red square at 0 0", "blue"], sets.tokenizer)
    groups.stop()
    return found


def apart(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    pairs = ((a, b) for key in ("losses", "norms", "repa", "val") for a, b in zip(found[key], wanted[key], strict=True))
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


@pytest.fixture(scope="module")
def one_process(tiny_set: Path, models: Path) -> dict[str, dict[str, Any]]:
    return {
        "t5": ranks.run(1, train, config=run_config(tiny_set, models, "t5", objective=REPA))[0],
        "clip": ranks.run(1, train, config=run_config(tiny_set, models, "clip"))[0],
    }


@pytest.mark.dist
@pytest.mark.parametrize(
    ("text", "parallel"),
    [
        ("t5", {"tp": 2, "pp": 2, "sp": True}),
        ("t5", {"pp": 4}),  # REPA teaches a stage that sees neither noise nor text
        ("clip", {"tp": 2, "pp": 2, "sp": True}),
    ],
    ids=["t5 and REPA, TP2 x PP2", "t5 and REPA, PP4", "clip, pooled, TP2 x PP2"],
)
def test_layouts_are_one_process(
    text: str, parallel: dict[str, Any], tiny_set: Path, models: Path, one_process: dict[str, dict[str, Any]]
) -> None:
    objective = REPA if text == "t5" else {}
    config = run_config(tiny_set, models, text, objective=objective, parallel=parallel)
    found, wanted = ranks.run(4, train, config=config), one_process[text]
    print(f"\n{text}: {apart(found[0], wanted):.1e}")
    assert apart(found[0], wanted) <= 1e-5
    assert found[0]["pictures"].shape == (2, 3, 12, 12)
    assert (found[0]["pictures"] - wanted["pictures"]).abs().max() < 1e-3


@pytest.mark.dist
def test_the_network_reads_states_and_pooled_vector(tiny_set: Path, models: Path) -> None:
    """Or the layouts above could agree on ignoring them."""

    def changes(rank: int, world: int, config: Config) -> dict[str, float]:
        import dataclasses

        import torch

        from mpdit.parallel import groups
        from mpdit.train import batches, preflight, session
        from mpdit.train.sets import Sets

        config = preflight.check(config, world)
        groups.start(config.parallel, config.train.seed)
        network, sets = session.build_network(config), Sets.open(config)
        (batch,) = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0).next()
        (whole,) = network.predict([batch])
        found = {}
        for name in ("text_BL", "pooled_BP"):
            nothing = torch.zeros_like(getattr(batch.inputs, name))
            other = dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, **{name: nothing}))
            found[name] = (network.predict([other])[0] - whole).abs().max().item()
        groups.stop()
        return found

    found = ranks.run(1, changes, config=run_config(tiny_set, models, "clip"))[0]
    assert min(found.values()) > 1e-3, found


# ---- caches ----------------------------------------------------------------------------------------------------------


def build_cache(config: Config, folder: Path, *arguments: str) -> dict[str, Any]:
    from mpdit import config as configs

    path = folder / "cached.yaml"
    path.write_text(configs.dump(config))
    code, out, error = commands.run("data", "cache", path, "--json", "--workers", "1", *arguments)
    assert code == 0, error
    built: dict[str, Any] = json.loads(out)
    return built


@pytest.fixture(scope="module")
def cached(tiny_set: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run with T5 and REPA, and a cache of all that it needs."""
    folder = tmp_path_factory.mktemp("cached")
    config = config_with(run_config(tiny_set, models, "t5", objective=REPA), cache=str(folder / "cache"))
    built = build_cache(config, folder, "--per-part", "20")
    kinds = [f"{row['kind']} {row['split']}" for row in built["caches"]]
    assert kinds == ["latents train", "text train", "features train", "latents val", "text val"]
    assert all(row["built"] == row["parts"] > 0 for row in built["caches"])
    return config


@pytest.mark.dist
def test_a_run_with_caches_is_the_run_without(cached: Config, one_process: dict[str, dict[str, Any]]) -> None:
    """Up to the rounding of features to fp16, and of sums over another number of pictures at once."""
    found = ranks.run(1, train, config=cached)[0]
    print(f"\n{apart(found, one_process['t5']):.1e}")
    assert apart(found, one_process["t5"]) <= 1e-3
    assert found["losses"] == pytest.approx(one_process["t5"]["losses"], rel=1e-4)
    assert (found["loaded"], one_process["t5"]["loaded"]) == (False, True)


@pytest.mark.dist
def test_without_the_models_folders_the_caches_are_enough(cached: Config, runs: Path) -> None:
    gone, run = runs / "gone", runs / "cached"
    config = tiny.with_run_dir(config_with(cached, latents=str(gone), text_model=str(gone)), run)
    said = ranks.run(2, whole_run, config=config)[0]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    online = ranks.run(1, train, config=cached)[0]
    assert [row["loss"] for row in rows] == pytest.approx(online["losses"], rel=1e-5)
    assert rows[-1]["val_loss"] is not None
    assert f"data.latents {gone}: is not there; its cache is used." in said
    assert "no pictures: data.latents" in said
    assert not (run / "samples").exists()


def whole_run(rank: int, world: int, config: Config) -> str:
    import contextlib
    import io

    from mpdit.parallel import groups
    from mpdit.train import loop, preflight

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        config = preflight.check(config, world)
        groups.start(config.parallel, config.train.seed)
        loop.train(config)
    groups.stop()
    return out.getvalue()


@pytest.mark.dist
def test_no_picture_is_decoded_and_no_weight_read(cached: Config) -> None:
    def untouched(rank: int, world: int, config: Config) -> None:
        from mpdit.data import encoders, latents, loader
        from mpdit.objective import repa

        def never(*arguments: Any, **options: Any) -> None:
            raise AssertionError("not in the cache")

        loader.Loader.__init__ = never
        encoders.Encoder.text = latents.Autoencoder.moments = repa.Teacher.open = never
        from mpdit.parallel import groups
        from mpdit.train import batches, preflight
        from mpdit.train.sets import Sets

        config = preflight.check(config, world)
        groups.start(config.parallel, config.train.seed)
        sets = Sets.open(config)
        feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
        assert len(feed.next()) == 1
        batches.decode = never
        batches.validation_batches(config, sets.val, sets.tokenizer)
        groups.stop()

    ranks.run(1, untouched, config=cached)


@pytest.mark.dist
def test_a_cache_of_something_else_is_refused_before_any_rank_starts(cached: Config, models: Path) -> None:
    from mpdit.train import preflight

    def refusal(*overrides: str, **data: Any) -> str:
        from mpdit import config as configs

        tree = configs.to_dict(config_with(cached, **data))
        for override in overrides:
            configs.override(tree, override)
        with pytest.raises(InputError) as caught:
            preflight.check(configs.from_dict(tree), 1)
        return str(caught.value)

    preflight.check(cached, 1)
    assert "mirror is true, but the config's is false" in refusal(mirror=False)
    assert "sizes is [[6, 6]], but the config's is [[3, 3]]" in refusal("model.image_size=3")
    assert "text_tokens is 8, but the config's is 5" in refusal("model.text_tokens=5")
    assert "holds no latents of the train split" in refusal(cache=str(models))


# ---- pictures, resuming, and what does not fit -----------------------------------------------------------------------


@pytest.mark.dist
def test_pictures_of_a_run_folder_and_its_way_on(tiny_set: Path, models: Path, runs: Path, tmp_path: Path) -> None:
    own = shutil.copytree(models, tmp_path / "models")
    run = runs / "pictures"
    config = tiny.with_run_dir(run_config(tiny_set, own, "clip"), run)
    ranks.run(2, whole_run, config=config)
    assert [path.name for path in (run / "samples").iterdir()] == [f"step_{STEPS:07d}.png"]
    assert json.loads((run / "text_encoder.json").read_text())["folder"] == str(own / "clip")
    (tmp_path / "prompts.txt").write_text("a red square at 0 0\n")
    argv = ["sample", run, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out"]
    code, _, error = commands.run(*argv)
    assert (code, error) == (0, "")
    from PIL import Image

    (picture,) = (path for path in (tmp_path / "out").iterdir() if path.name != "grid.png")
    assert Image.open(picture).size == (12, 12), "pixels, not latents"

    def other_vae(rank: int, world: int) -> None:
        pretrained.save_vae(own / "vae", seed=1)

    ranks.run(1, other_vae)
    code, _, error = commands.run(*argv)
    assert code == 2
    assert "is another autoencoder than the run's" in error
    with pytest.raises(ranks.RankFailed, match="is another autoencoder than the run's"):
        ranks.run(1, whole_run, config=config)
    shutil.rmtree(own / "vae")
    code, _, error = commands.run(*argv)
    assert code == 2
    assert f"data.latents {own / 'vae'}: there is no such folder" in error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.channels=3"], ["model.channels is 3", "have 4; set it to 4"]),
        (["data.latents=null"], ["model.channels is 4", "data.latents is not given"]),
        (["data.latents=nowhere"], ["data.latents nowhere", "there is no such folder"]),
        (["model.text_dim=32"], ["model.text_dim is 32", "gives 20 features a token", "leave it out"]),
        (["model.pooled_dim=32"], ["model.pooled_dim is 32", "has 20 features; set it to 20, or to 0"]),
        (["model.pooled_dim=20", "model.arch=pixart"], ["model.pooled_dim is 20", "arch mmdit"]),
        (["model.text_tokens=80"], ["model.text_tokens is 80", "at most 77"]),
        (["data.text_model=null"], ["data.text is clip, but data.text_model is not given"]),
        (["data.text=t5"], ["has model_type 'clip_text_model', but data.text t5"]),
        (
            ["data.text=sentencepiece", "model.pooled_dim=0"],
            ["data.text is sentencepiece, which has no model"],
        ),
        (["data.text=sentencepiece"], ["model.pooled_dim is 20"]),
    ],
)
def test_what_does_not_fit_is_told(overrides: list[str], words: list[str], tiny_set: Path, models: Path) -> None:
    from mpdit import config as configs
    from mpdit.train import preflight

    tree = configs.to_dict(run_config(tiny_set, models, "clip"))
    for override in overrides:
        configs.override(tree, override)
    with pytest.raises(InputError) as caught:
        preflight.check(configs.from_dict(tree), 1)
    said = str(caught.value)
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said


def test_open_values_are_filled_by_the_encoder(tiny_set: Path, models: Path) -> None:
    from mpdit.train import preflight

    config = preflight.check(run_config(tiny_set, models, "t5"), 1)
    assert (config.model.text_dim, config.model.vocab_size, config.model.pooled_dim) == (24, 0, 0)
    assert preflight.check(config, 1) == config
