"""Steps and validation over buckets, from the shards to the loss: a shape a step, and a mean over images, not lists."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ranks
import tiny
from mpdit.config import Config

BOUND = 1e-5  # relative, fp32
STEPS = 8
SHAPES = {tuple(size) for size in tiny.BUCKETS}


def config_of(data: Path, parallel: dict[str, Any], val_images: int = 13) -> Config:
    sections = {"data": {"path": str(data), "buckets": tiny.BUCKETS}, "train": {"steps": 20, "val_images": val_images}}
    return tiny.config(data, parallel=parallel, **sections)


# ---- training --------------------------------------------------------------------------------------------------------


def train(rank: int, world: int, config: Config, start: int) -> dict[str, Any]:
    """(height, width) that the batches of each step say and that their images have, and the losses."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), Sets.open(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, start)
    found: dict[str, Any] = {"said": [], "seen": [], "losses": []}
    for _ in range(start, STEPS):
        micro_batches = feed.next()
        found["said"].append({(m.height, m.width) for m in micro_batches})
        found["seen"].append({tuple(m.inputs.image_BCHW.shape[2:]) for m in micro_batches if m.inputs is not None})
        found["losses"].append(run.forward_backward(micro_batches))
        run.update()
    feed.close()
    groups.stop()
    return found


@pytest.fixture(scope="module")
def one_process(mixed_set: Path) -> dict[str, Any]:
    return ranks.run(1, train, config=config_of(mixed_set, {}), start=0)[0]


@pytest.mark.dist
def test_a_step_has_the_shape_of_its_bucket(one_process: dict[str, Any]) -> None:
    assert one_process["said"] == one_process["seen"]
    assert [len(shapes) for shapes in one_process["said"]] == [1] * STEPS
    assert set.union(*one_process["said"]) == SHAPES


@pytest.mark.dist
def test_stages_without_images_know_their_shape(mixed_set: Path, one_process: dict[str, Any]) -> None:
    """Those between the first and the last, of the plan alone."""
    for found in ranks.run(4, train, config=config_of(mixed_set, {"pp": 4, "micro_batch": 1}), start=0):
        assert found["said"] == one_process["said"]
        assert found["losses"] == pytest.approx(one_process["losses"], rel=BOUND)


@pytest.mark.dist
def test_a_later_start_has_the_shapes_of_its_steps(mixed_set: Path, one_process: dict[str, Any]) -> None:
    found = ranks.run(1, train, config=config_of(mixed_set, {}), start=3)[0]
    assert found["said"] == found["seen"] == one_process["said"][3:]


# ---- validation ------------------------------------------------------------------------------------------------------


def validate(rank: int, world: int, config: Config) -> tuple[float, list[tuple[int, int]]]:
    """The loss, and height and width of each list of micro-batches."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    network, sets = session.build_network(config), Sets.open(config)
    lists = batches.validation_batches(config, sets.val, sets.tokenizer)
    loss = network.validate(lists)
    groups.stop()
    return loss, [(micro_batches[0].height, micro_batches[0].width) for micro_batches in lists]


def by_hand(rank: int, world: int, config: Config) -> tuple[list[float], list[tuple[int, int]]]:
    """Each validation image alone: its loss and its bucket."""
    import torch

    from mpdit.data.decode import decode
    from mpdit.objective import draws
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    network, sets = session.build_network(config), Sets.open(config)
    (stage,), losses, sizes = network.chunks, [], []
    for sample in batches.validation_samples(sets.val, config.train.val_images):
        encoded, caption = sets.val.read(int(sample))
        height, width = sets.val.sizes[sample]
        sizes.append((18, 12) if height > width else (12, 18) if width > height else (12, 12))
        keys = np.array([sample]), np.array([draws.VALIDATION_VISIT])
        images = decode([encoded], *sizes[-1])
        batch = batches.batch_of(config, sets.tokenizer, images, [caption], *keys, drop_captions=False)
        with torch.no_grad():
            losses.append(network.loss(stage(batch.inputs), batch).item())
    groups.stop()
    return losses, sizes


@pytest.mark.dist
def test_the_validation_loss_is_the_mean_over_images(mixed_set: Path) -> None:
    """Buckets have other numbers of images, of tokens and of padding; no image weighs more for any of these."""
    losses, sizes = ranks.run(1, by_hand, config=config_of(mixed_set, {}))[0]
    counts = [sizes.count(shape) for shape in SHAPES]
    assert len(losses) == 13
    assert min(counts) > 0
    assert len(set(counts)) > 1, "or a mean over lists could pass for one over images"
    for world, parallel in (
        (1, {}),
        (2, {"micro_batch": 4}),
        (4, {"tp": 2, "sp": True, "pp": 2, "vpp": 2, "micro_batch": 2}),
        (4, {"cp": 2, "micro_batch": 1}),
    ):
        for loss, shapes in ranks.run(world, validate, config=config_of(mixed_set, parallel)):
            assert loss == pytest.approx(np.mean(losses), rel=BOUND)
            assert sorted(shapes) == sorted(SHAPES)


@pytest.mark.dist
def test_a_bucket_without_images_has_no_list(mixed_set: Path) -> None:
    loss, shapes = ranks.run(1, validate, config=config_of(mixed_set, {}, val_images=1))[0]
    assert len(shapes) == 1
    assert np.isfinite(loss)


# ---- ahead of the device ---------------------------------------------------------------------------------------------


def both_ways(rank: int, world: int, config: Config) -> dict[str, Any]:
    """Keys, shapes and bad samples of the first steps, made when asked for and ahead; and what ends a thread."""
    import threading

    from mpdit.parallel import groups
    from mpdit.train import batches, preflight
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    sets, found = Sets.open(config), {}
    for name, wrap in (("asked", lambda feed: feed), ("ahead", batches.Ahead)):
        feed = wrap(batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0))
        found[name], found[f"{name}, bad"] = [], []
        for _ in range(STEPS):
            step = feed.next()
            if name == "ahead":
                feed._coming.exception()  # until the next step is made too
            found[name].append([(m.sample_key, m.height, float(m.inputs.image_BCHW.sum())) for m in step])
            found[f"{name}, bad"].append([bad.sample for bad in feed.take_bad()])
        feed.close()
    found["threads"] = [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]

    feed = batches.Ahead(batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0))
    feed.next()
    feed._feed._micro_batch = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        [feed.next() for _ in range(3)]  # one may have been made already
    feed.close()
    groups.stop()
    return found


@pytest.mark.dist
def test_batches_made_ahead_are_the_same(mixed_set: Path, tmp_path: Path) -> None:
    """And the bad samples are told after the same step, though they are found during the one before."""
    data = shutil.copytree(mixed_set, tmp_path / "set")
    damaged = [damage(data, sample) for sample in (1, 7, 12)]
    found = ranks.run(1, both_ways, config=config_of(data, {"micro_batch": 4}))[0]
    assert found["ahead"] == found["asked"]
    assert len(found["ahead"][0]) == 2
    assert found["ahead, bad"] == found["asked, bad"]
    assert sorted(bad for step in found["ahead, bad"] for bad in step) == damaged
    assert found["threads"] == []


def damage(data: Path, sample: int) -> int:
    """Flip a bit of its picture."""
    from mpdit.data.shards import Shards

    shards = Shards.open(data, "train")
    tar, (image, _) = Path(shards.where(sample).split(": ")[0]), shards.read(sample)
    whole, middle = tar.read_bytes(), len(image) // 2
    assert whole.count(image) == 1
    tar.write_bytes(whole.replace(image, image[:middle] + bytes([image[middle] ^ 1]) + image[middle + 1 :]))
    return sample
