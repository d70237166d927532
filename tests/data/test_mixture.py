"""Several data sets as one: whose sample a number is, one set is itself, and what doesn't fit together is refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tiny
from data.make_shards import edit_manifest, make_shards, pixels, png
from mpdit.config import Data
from mpdit.data.loader import Loader
from mpdit.data.mixture import Mixture
from mpdit.data.shards import BadSample, Shards
from mpdit.errors import InputError

SHAPES = ((16, 16), (12, 24), (24, 12))


def picture(sample: int) -> np.ndarray:
    """One of three shapes."""
    height, width = SHAPES[sample % 3]
    return np.ascontiguousarray(pixels(sample, 24)[:height, :width])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("mixture")
    return [
        make_shards(folder / "a", counts=(5, 6), image=lambda sample: png(picture(sample))),
        make_shards(folder / "b", counts=(7,), image=lambda sample: png(picture(sample + 100))),
    ]


def data(folders: list[Path], **keys) -> Data:
    return Data(path=str(folders[0]), more=tuple(map(str, folders[1:])), **keys)


def test_samples_are_numbered_set_after_set(folders: list[Path]) -> None:
    mixture, sets = Mixture.open(data(folders), "train"), [Shards.open(folder, "train") for folder in folders]
    assert len(mixture) == 18
    for sample in range(18):
        part, own = (sets[0], sample) if sample < 11 else (sets[1], sample - 11)
        assert mixture.read(sample) == part.read(own)
        assert mixture.caption(sample) == part.caption(own)
        assert mixture.where(sample) == part.where(own)
        assert mixture.sizes[sample].tolist() == part.sizes[own].tolist()
    for bad in (-1, 18):
        with pytest.raises(IndexError):
            mixture.read(bad)


def test_the_fingerprint_is_the_sets_and_their_order(folders: list[Path]) -> None:
    one = Mixture.open(data(folders[:1]), "train")
    assert one.fingerprint == Shards.open(folders[0], "train").fingerprint
    both, other = (Mixture.open(data(order), "train").fingerprint for order in (folders, folders[::-1]))
    assert len({one.fingerprint, both, other}) == 3


def test_a_bad_sample_has_its_number_in_the_mixture(tmp_path: Path, folders: list[Path]) -> None:
    broken = make_shards(tmp_path / "broken", counts=(3,))
    tar = broken / "train-00000.tar"
    mixture = Mixture.open(data([folders[0], broken]), "train")
    tar.write_bytes(tar.read_bytes().replace(png(pixels(1)), bytes(len(png(pixels(1))))))
    with pytest.raises(BadSample) as caught:
        mixture.read(12)
    assert (caught.value.sample, caught.value.reason) == (12, "image damaged")
    assert caught.value.where == f"{tar}: 00000001.png"


def test_a_run_of_one_set_and_one_shape_keeps_its_plan(folders: list[Path]) -> None:
    """The hash and order that checkpoints of earlier versions hold."""
    config = dataclasses.replace(tiny.config(folders[0]), data=data(folders[:1]))
    mixture = Mixture.open(config.data, "train")
    mixture.fingerprint = "f"  # the tars' bytes are not the same under every version of zlib
    plan = mixture.plan(config)
    assert plan.hash[:16] == "e649195a19065bd0"
    assert plan.batch(1).sample_ids.tolist() == [4, 3, 0, 9, 7, 8, 3, 5]
    assert plan.batch(1).visits.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert plan.height_width(5) == (12, 12)


def test_mixed_batches_have_one_shape_and_their_own_pictures(folders: list[Path]) -> None:
    config = tiny.config(
        folders[0],
        data={"more": [str(folders[1])], "weights": [0.5, 0.5], "buckets": SHAPES},
        train={"batch_size": 4},
    )
    mixture = Mixture.open(config.data, "train")
    plan, seen, sets = mixture.plan(config), set(), []
    with Loader(mixture, plan, micro_batch=2) as loader:
        for _ in range(60):
            batch = loader.next()
            height, width = plan.height_width(batch.step)
            assert batch.images.shape == (2, 3, height, width)
            for image, sample in zip(batch.images, batch.sample_ids.tolist(), strict=True):
                original = picture(sample if sample < 11 else sample - 11 + 100)
                found = (image.double() * 127.5 + 127.5).round().byte().permute(1, 2, 0).numpy()
                assert np.array_equal(found, original)
                sets.append(int(sample >= 11))
            seen.add((height, width))
    assert seen == set(SHAPES)
    assert abs(sum(sets) - 60) <= 6  # 6 rows, each to within a batch's part


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ((1.0,), r"data.weights has 1 numbers, but should have 2, one for data.path"),
        ((1.0, 0.0), r"data.weights\[1\] is 0.0, but should be more than 0"),
        ((-1.0, 1.0), r"data.weights\[0\] is -1.0"),
        ((1.0, float("inf")), r"data.weights\[1\] is inf"),
    ],
)
def test_weights_that_fit_no_sets_are_refused(folders: list[Path], weights: tuple[float, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Mixture.open(data(folders, weights=weights), "train")


def test_sets_of_other_classes_are_refused(tmp_path: Path) -> None:
    folders = [make_shards(tmp_path / name) for name in "abc"]
    for folder, classes in zip(folders, (["x", "y"], ["y", "x"], ["x", "y"]), strict=True):
        edit_manifest(folder, lambda manifest, classes=classes: manifest.update(classes=classes))
    with pytest.raises(InputError, match=r"b has other classes than .*a"):
        Mixture.open(data(folders[:2], text="labels"), "train")
    assert len(Mixture.open(data([folders[0], folders[2]], text="labels"), "train")) == 18
    assert len(Mixture.open(data(folders[:2]), "train")) == 18
