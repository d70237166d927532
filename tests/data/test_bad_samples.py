"""Bad samples: whatever is wrong with one, its batch comes whole, with the same stand-in in every layout and resume."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from data.make_shards import make_shards, pixels, png, reseal
from mpdit.config import Config
from mpdit.data import decode
from mpdit.data.loader import Loader, MicroBatch, fixed
from mpdit.data.mixture import Mixture
from mpdit.errors import InputError

SAMPLES, STEPS, BATCH = 24, 6, 12
SHAPES = ((16, 16), (12, 24))


def picture(sample: int) -> bytes:
    """Even samples are of the first shape, odd ones of the second."""
    height, width = SHAPES[sample % 2]
    return png(np.ascontiguousarray(pixels(sample, 24)[:height, :width]))


def bomb(sample: int) -> bytes:
    """A good PNG of more pixels than memory should hold at once; a few bytes long."""
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    return buffer.getvalue()


BUILT = {  # damage that the checksums know nothing of, as if it had been built so
    3: (lambda sample: picture(sample)[:300], "image can't be decoded"),
    4: (lambda sample: picture(sample).replace(b"IDAT", b"IDAT\xff"), "image can't be decoded"),
    7: (lambda sample: b"", "no image"),
    10: (lambda sample: b"no image at all", "no image"),
    12: (bomb, "image too large"),
}
LATER = {5: "image damaged", 18: "image damaged", 8: "caption damaged"}  # after the checksums were taken
SEALED = {15: "caption not UTF-8", 20: "image of another size"}
REASONS = {sample: reason for sample, (_, reason) in BUILT.items()} | LATER | SEALED


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = make_shards(tmp_path_factory.mktemp("whole") / "set", counts=(10, 14), image=picture)
    return tiny.config(folder, data={"buckets": SHAPES}, train={"batch_size": BATCH})


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """The same set, of which ten samples are bad, each in another way."""
    folder = tmp_path_factory.mktemp("damaged") / "set"
    make_shards(folder, counts=(10, 14), image=lambda s: BUILT[s][0](s) if s in BUILT else picture(s))
    replace(folder, "café number 15\n".encode(), "caf\xe9! number 15\n".encode("latin-1"))
    for number, first in enumerate((0, 10)):
        table = np.load(folder / f"train-{number:05d}.npy")
        table[:, :2] = [(99, 99) if first + row == 20 else SHAPES[row % 2] for row in range(len(table))]
        np.save(folder / f"train-{number:05d}.npy", table)
    reseal(folder)
    replace(folder, picture(5), flipped(picture(5)))
    replace(folder, picture(18), bytes(len(picture(18))))
    replace(folder, "café number 8\n".encode(), b"cafe! number 8\n")
    return opened(folder)


def opened(folder: Path) -> Mixture:
    return Mixture.open(tiny.config(folder).data, "train")


def flipped(image: bytes) -> bytes:
    middle = len(image) // 2
    return image[:middle] + bytes([image[middle] ^ 4]) + image[middle + 1 :]


def replace(folder: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    (tar,) = (tar for tar in folder.glob("*.tar") if old in tar.read_bytes())
    tar.write_bytes(tar.read_bytes().replace(old, new))


def take(
    config: Config, mixture: Mixture, *, dp_size: int = 1, micro_batch: int = BATCH, start_step: int = 0
) -> tuple[list[MicroBatch], dict[int, str]]:
    """Micro-batches of steps up to STEPS in the order of the global batch, and what was said to be bad."""
    found: list[list[MicroBatch]] = [[] for _ in range(STEPS)]
    reasons: dict[int, str] = {}
    for rank in range(dp_size):
        settings = {"micro_batch": micro_batch, "dp_size": dp_size, "dp_rank": rank, "start_step": start_step}
        with Loader(mixture, mixture.plan(config), **settings) as loader:
            for step in range(start_step, STEPS):
                found[step] += [loader.next() for _ in range(BATCH // dp_size // micro_batch)]
            told = loader.take_bad()
            assert loader.take_bad() == []
        assert len({bad.sample for bad in told}) == len(told)
        assert all(f"{bad.sample:08d}." in bad.where for bad in told)
        reasons |= {bad.sample: bad.reason for bad in told}
    return [micro for step in found for micro in step], reasons


def joined(micros: list[MicroBatch]) -> dict[int, tuple[torch.Tensor, list[str], list[int], list[int], list[int]]]:
    """Step: images, captions, sample ids, visits, ids read."""
    steps = sorted({micro.step for micro in micros})
    parts = {step: [micro for micro in micros if micro.step == step] for step in steps}
    return {
        step: (
            torch.cat([micro.images for micro in own]),
            [caption for micro in own for caption in micro.captions],
            *(torch.cat([getattr(m, key) for m in own]).tolist() for key in ("sample_ids", "visits", "read_ids")),
        )
        for step, own in parts.items()
    }


@pytest.fixture(scope="module")
def wanted(config: Config, damaged: Mixture) -> dict:
    micros, reasons = take(config, damaged)
    assert reasons == REASONS
    return joined(micros)


def test_the_good_keep_their_bits_and_the_bad_their_places(config: Config, damaged: Mixture, wanted: dict) -> None:
    whole = opened(Path(config.data.path))
    plan, replaced = damaged.plan(config), 0
    for step, (images, captions, ids, visits, read) in joined(take(config, whole)[0]).items():
        found_images, found_captions, found_ids, found_visits, found_read = wanted[step]
        assert read == ids == found_ids == plan.batch(step).sample_ids.tolist()
        assert visits == found_visits
        for place, sample in enumerate(ids):
            if sample not in REASONS:
                assert found_read[place] == sample
                assert torch.equal(found_images[place], images[place])
                assert found_captions[place] == captions[place]
                continue
            replaced += 1
            other = found_read[place]
            assert other not in REASONS
            assert other % 2 == sample % 2  # of the same bucket
            assert found_captions[place] == damaged.caption(other)
            assert torch.equal(found_images[place], decode.decode([picture(other)], *plan.height_width(step))[0])
    assert replaced >= STEPS * BATCH / SAMPLES * len(REASONS) - BATCH


@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 4), (2, 6), (2, 1), (4, 3)])
def test_the_same_in_every_layout(
    config: Config, damaged: Mixture, wanted: dict, dp_size: int, micro_batch: int
) -> None:
    micros, reasons = take(config, damaged, dp_size=dp_size, micro_batch=micro_batch)
    assert reasons == REASONS
    same(joined(micros), wanted)


@pytest.mark.parametrize("start_step", [1, 4])
def test_the_same_after_a_resume(config: Config, damaged: Mixture, wanted: dict, start_step: int) -> None:
    """Though a new process has not seen what the old one had found out."""
    found = joined(take(config, damaged, dp_size=2, micro_batch=3, start_step=start_step)[0])
    same(found, {step: wanted[step] for step in range(start_step, STEPS)})


def same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for step in wanted:
        assert torch.equal(found[step][0], wanted[step][0])
        assert found[step][1:] == wanted[step][1:]


def test_a_good_set_has_no_bad_samples(config: Config) -> None:
    assert take(config, opened(Path(config.data.path)))[1] == {}


def test_fixed_samples_give_their_place_to_the_next_good_one(damaged: Mixture) -> None:
    """3 to 5 are bad, 7 and 8, and 20."""
    found = fixed(damaged, [0, 6, 7, 20, 3], (8, 8))
    images, captions, bad = found.images, found.captions, found.bad
    read = [0, 6, 9, 21, 6]
    assert captions == [damaged.caption(sample) for sample in read]
    assert torch.equal(images, decode.decode([picture(sample) for sample in read], 8, 8))
    assert {one.sample: one.reason for one in bad} == {sample: REASONS[sample] for sample in (3, 4, 5, 7, 8, 20)}


def test_a_row_that_is_all_bad_takes_from_the_others(tmp_path: Path, config: Config) -> None:
    """Of the wide shape there is one sample, and it is junk."""
    folder = make_shards(tmp_path / "set", counts=(9,), image=lambda sample: picture(2 * sample))
    table = np.load(folder / "train-00000.npy")
    table[4, :2] = 12, 24
    np.save(folder / "train-00000.npy", table)
    reseal(folder)
    mixture = opened(folder)
    with Loader(mixture, mixture.plan(config), micro_batch=BATCH) as loader:
        batch = next(batch for batch in loader if batch.images.shape[2:] == (12, 24))
        assert set(batch.sample_ids.tolist()) == {4}
        assert 4 not in batch.read_ids.tolist()
        assert len(set(batch.read_ids.tolist())) > 3
        assert [bad.sample for bad in loader.take_bad()] == [4]


@pytest.mark.parametrize("junk", [b"junk", picture(2)[:300]])
def test_a_set_that_is_all_bad_ends_in_a_sentence(tmp_path: Path, config: Config, junk: bytes) -> None:
    mixture = opened(make_shards(tmp_path / "set", counts=(4,), image=lambda sample: junk))
    with (
        pytest.raises(InputError, match=r"tar: 0000000\d.png: sample \d can't be used .* 4 bad samples were met"),
        Loader(mixture, mixture.plan(config), micro_batch=BATCH) as loader,
    ):
        loader.next()


def test_what_is_no_sample_s_fault_is_not_held_against_one(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = opened(Path(config.data.path))
    with Loader(mixture, mixture.plan(config), micro_batch=BATCH) as loader:
        loader.next()
        monkeypatch.setattr(loader._decoder, "run", lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
        with pytest.raises(RuntimeError, match="out of memory"):
            loader.next()
        assert loader.take_bad() == []


@pytest.mark.parametrize("channels", [1, 3])
def test_a_decoder_that_decodes_nothing_accuses_no_sample(
    config: Config, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    """As a GPU without memory: each picture fails, also alone, and the real error has to come out."""
    mixture = opened(Path(config.data.path))
    assert decode.damaged([picture(0), b"junk", picture(2)], channels) == [1]

    def run(_: decode.Decoder) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory")

    with Loader(mixture, mixture.plan(config), micro_batch=BATCH, channels=channels) as loader:
        loader.next()
        monkeypatch.setattr(decode.Decoder, "run", run)
        with pytest.raises(RuntimeError, match="CUDA out of memory"):
            loader.next()
        assert loader.take_bad() == []
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        fixed(mixture, [0, 2], (8, 8), channels=channels)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        decode.decode([picture(0)], 8, 8, channels=channels)
