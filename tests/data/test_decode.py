import io
import multiprocessing
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.make_shards import caption, make_shards, pixels, png
from mpdit.data.decode import Loader, MicroBatch, decode
from mpdit.data.plan import Plan
from mpdit.data.shards import Shards
from mpdit.errors import InputError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards.open(make_shards(tmp_path_factory.mktemp("decode") / "set", counts=(7, 4)), "train")


def plan_of(shards: Shards, batch_size: int = 4) -> Plan:
    return Plan(samples=len(shards), batch_size=batch_size, seed=3, fingerprint=shards.fingerprint)


def take(shards: Shards, micro_batches: int, batch_size: int = 4, **settings) -> list[MicroBatch]:
    settings = {"micro_batch": batch_size, "image_size": 16} | settings
    with Loader(shards, plan_of(shards, batch_size), **settings) as loader:
        return [loader.next() for _ in range(micro_batches)]


def as_bytes(images_BCHW: torch.Tensor) -> np.ndarray:
    """uint8 (B, H, W, C); off by a rounding error at most, or the test fails."""
    scaled = images_BCHW.double() * 127.5 + 127.5
    assert (scaled - scaled.round()).abs().max() < 1e-3
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def half_mirrored(sample_ids: np.ndarray, visits: np.ndarray) -> np.ndarray:
    return (sample_ids + visits) % 2 == 1


def encode(image: np.ndarray, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **settings)
    return buffer.getvalue()


def test_pictures_captions_and_ids_belong_together(shards: Shards) -> None:
    plan = plan_of(shards)
    for step, batch in enumerate(take(shards, 6)):
        assert batch.step == step
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (4, 3, 16, 16)
        assert batch.sample_ids.tolist() == plan.batch(step).sample_ids.tolist()
        assert batch.visits.tolist() == plan.batch(step).visits.tolist()
        assert batch.captions == [caption(sample) for sample in batch.sample_ids.tolist()]
        assert np.array_equal(as_bytes(batch.images), [pixels(sample) for sample in batch.sample_ids.tolist()])


def test_a_micro_batch_stays_as_it_is_while_others_are_decoded(shards: Shards) -> None:
    with Loader(shards, plan_of(shards), micro_batch=4, image_size=16) as loader:
        first = loader.next().images
        copy = first.clone()
        for _ in range(8):
            loader.next()
        assert torch.equal(first, copy)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("dp_size", "micro_batch"), [(1, 12), (1, 3), (3, 4), (2, 2)])
def test_same_bits_in_every_layout(shards: Shards, workers: int, dp_size: int, micro_batch: int) -> None:
    """At a size that makes the resize work, two steps of a batch of 12 across the end of the epoch."""
    wanted = torch.cat([batch.images for batch in take(shards, 2, 12, image_size=(10, 12), mirror=half_mirrored)])
    micros = 12 // dp_size // micro_batch
    ranks = [
        take(
            shards,
            2 * micros,
            12,
            image_size=(10, 12),
            mirror=half_mirrored,
            workers=workers,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch=micro_batch,
        )
        for rank in range(dp_size)
    ]
    found = [micro.images for step in range(2) for rank in ranks for micro in rank[step * micros : (step + 1) * micros]]
    assert torch.equal(torch.cat(found), wanted)


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_resume_needs_the_step_alone(shards: Shards, micro_batch: int) -> None:
    micros = 4 // micro_batch
    whole = take(shards, 9 * micros, micro_batch=micro_batch, mirror=half_mirrored)
    resumed = take(shards, 4 * micros, micro_batch=micro_batch, mirror=half_mirrored, start_step=5)
    for one, two in zip(whole[5 * micros :], resumed, strict=True):
        assert one.step == two.step
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.sample_ids, two.sample_ids)
        assert torch.equal(one.visits, two.visits)


def test_mirror(shards: Shards) -> None:
    flips = 0
    for plain, batch in zip(take(shards, 6), take(shards, 6, mirror=half_mirrored), strict=True):
        flags = half_mirrored(batch.sample_ids.numpy(), batch.visits.numpy())
        for image, original, flag in zip(batch.images, plain.images, flags, strict=True):
            assert torch.equal(image, original.flip(-1) if flag else original)
        flips += int(flags.sum())
    assert 0 < flips < 24


@pytest.mark.parametrize(("kind", "settings"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"lossless": True})])
def test_decodes_as_pillow_does(kind: str, settings: dict) -> None:
    smooth = np.add.outer(np.arange(24) * 5, np.arange(24) * 3)[..., None] + np.array([0, 30, 60])
    data = encode(smooth.astype(np.uint8), kind, **settings)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    found = as_bytes(decode([data], 24, 24))[0]
    assert np.abs(found.astype(int) - wanted).max() <= 1


def test_values_span_minus_one_to_one() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[:, 2:] = 255
    images = decode([png(image)], 4, 4)
    assert images.min() == -1
    assert images.max() == 1


def test_other_aspect_ratios_lose_their_edges_evenly() -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = pixels(0, 8)
    tall = wide.transpose(1, 0, 2)
    images = as_bytes(decode([png(wide), png(np.ascontiguousarray(tall))], 8, 8))
    assert np.array_equal(images[0], pixels(0, 8))
    assert np.array_equal(images[1], pixels(0, 8).transpose(1, 0, 2))


def test_shrinking_is_smoothed() -> None:
    """A checkerboard must become grey, not keep every other square."""
    board = (np.indices((48, 48)).sum(0) % 2 * 255).astype(np.uint8)
    images = decode([png(np.stack([board] * 3, -1))], 16, 16)
    assert images.abs().max() < 0.05


def test_gray() -> None:
    gray = pixels(0)[..., 0]
    images = decode([png(gray), png(np.stack([gray] * 3, -1)), encode(gray, "JPEG")], 16, 16, channels=1)
    assert images.shape == (3, 1, 16, 16)
    assert np.array_equal(as_bytes(images[:2])[..., 0], [gray, gray])
    assert np.array_equal(as_bytes(decode([png(gray)], 16, 16))[0], np.stack([gray] * 3, -1))


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(InputError, match=r"model.channels is 4"):
        decode([png(pixels(0))], 16, 16, channels=4)


def test_decode_in_several_chunks() -> None:
    samples = range(70)
    images = decode([png(pixels(sample)) for sample in samples], 16, 16, mirrored=np.arange(70) % 2 == 1)
    wanted = [pixels(sample)[:, ::-1] if sample % 2 else pixels(sample) for sample in samples]
    assert np.array_equal(as_bytes(images), wanted)
    assert decode([], 16, 16).shape == (0, 3, 16, 16)


DAMAGE = {
    "junk": b"no image at all",
    "empty": b"",
    "cut": png(pixels(5))[:300],
    "flipped": png(pixels(5)).replace(b"IDAT", b"IDAT\xff"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_image_is_named(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture) -> None:
    folder = make_shards(tmp_path / "set", image=lambda sample: DAMAGE[kind] if sample == 5 else png(pixels(sample)))
    with pytest.raises(InputError, match=r"train-00001.tar: 00000005.png: the image of sample 5 is damaged"):
        take(Shards.open(folder, "train"), 3, batch_size=3)


def test_damaged_image_comes_after_the_good_batches(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "set", image=lambda sample: b"junk" if sample == 5 else png(pixels(sample)))
    shards = Shards.open(folder, "train")
    plan = plan_of(shards, 1)
    place = next(step for step in range(9) if plan.batch(step).sample_ids == [5])
    with Loader(shards, plan, micro_batch=1, image_size=16) as loader:
        for step in range(place):
            assert loader.next().step == step
        with pytest.raises(InputError, match="sample 5"):
            loader.next()


def test_decode_names_the_damaged_image() -> None:
    images = [png(pixels(0)), b"junk", png(pixels(1))]
    with pytest.raises(InputError, match="image 1 of 3: is damaged"):
        decode(images, 16, 16)
    with pytest.raises(InputError, match="b: is damaged"):
        decode(images, 16, 16, names=["a", "b", "c"])


def test_plan_of_other_shards_is_refused(shards: Shards) -> None:
    plan = Plan(samples=len(shards), batch_size=4, seed=0, fingerprint="other")
    with pytest.raises(ValueError, match="other shards"):
        Loader(shards, plan, micro_batch=4, image_size=16)


def test_uneven_micro_batch_is_refused_before_a_thread_starts(shards: Shards) -> None:
    with pytest.raises(InputError, match=r"parallel.micro_batch"):
        Loader(shards, plan_of(shards), micro_batch=3, image_size=16)


def test_close_ends_every_thread(shards: Shards) -> None:
    before, python_threads = len(os.listdir("/proc/self/task")), threading.active_count()
    loader = Loader(shards, plan_of(shards), micro_batch=4, image_size=16, workers=3)
    loader.next()
    assert len(os.listdir("/proc/self/task")) >= before + 3
    loader.close()
    loader.close()
    patience = time.monotonic() + 5  # a thread that was joined may stay listed for a moment
    while len(os.listdir("/proc/self/task")) > before and time.monotonic() < patience:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/task")) == before
    assert threading.active_count() == python_threads
    with pytest.raises(ValueError, match="closed"):
        loader.next()


def _in_child(shards: Shards, inherited: Loader, answers) -> None:
    with pytest.raises(RuntimeError, match="another process"):
        inherited.next()
    answers.put(take(shards, 1)[0].images.numpy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_loader_built_after_a_fork_works(shards: Shards) -> None:
    """Even when the parent has one of its own running."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with Loader(shards, plan_of(shards), micro_batch=4, image_size=16) as loader:
        wanted = loader.next().images
        child = context.Process(target=_in_child, args=(shards, loader, answers))
        child.start()
        try:
            found = answers.get(timeout=30)
            child.join(30)
        finally:
            child.kill()
        assert child.exitcode == 0
        assert np.array_equal(found, wanted.numpy())
        loader.next()


@pytest.mark.gpu
def test_gpu_decodes_nearly_the_same(shards: Shards) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, on which images would be decoded")
    for cpu, gpu in zip(take(shards, 4), take(shards, 4, device="cuda"), strict=True):
        assert gpu.images.is_cuda
        assert (gpu.images.cpu() - cpu.images).abs().max() <= 2 / 255
