"""The loader: pictures, captions and ids belong together, the same bits in every layout and after every resume."""

import multiprocessing
import os
import threading
import time

import numpy as np
import pytest
import torch

from data.make_shards import caption, make_shards, pixels
from mpdit.data.loader import Loader, MicroBatch
from mpdit.data.plan import Plan, rows
from mpdit.data.shards import Shards
from mpdit.errors import InputError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return Shards.open(make_shards(tmp_path_factory.mktemp("decode") / "set", counts=(7, 4)), "train")


def plan_of(shards: Shards, batch_size: int = 4, image_size: tuple[int, int] = (16, 16)) -> Plan:
    """Of one bucket."""
    parts = rows(np.zeros(len(shards), np.int64), [len(shards)])
    return Plan(shapes=[image_size], rows=parts, batch_size=batch_size, seed=3, fingerprint=shards.fingerprint)


def take(shards: Shards, micro_batches: int, batch_size: int = 4, image_size=(16, 16), **settings) -> list[MicroBatch]:
    settings = {"micro_batch": batch_size} | settings
    with Loader(shards, plan_of(shards, batch_size, image_size), **settings) as loader:
        return [loader.next() for _ in range(micro_batches)]


def as_bytes(images_BCHW: torch.Tensor) -> np.ndarray:
    """uint8 (B, H, W, C); off by a rounding error at most, or the test fails."""
    scaled = images_BCHW.double() * 127.5 + 127.5
    assert (scaled - scaled.round()).abs().max() < 1e-3
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def half_mirrored(sample_ids: np.ndarray, visits: np.ndarray) -> np.ndarray:
    return (sample_ids + visits) % 2 == 1


def test_pictures_captions_and_ids_belong_together(shards: Shards) -> None:
    plan = plan_of(shards)
    for step, batch in enumerate(take(shards, 6)):
        assert batch.step == step
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (4, 3, 16, 16)
        assert batch.sample_ids.tolist() == plan.batch(step).sample_ids.tolist()
        assert batch.visits.tolist() == plan.batch(step).visits.tolist()
        assert batch.read_ids.tolist() == batch.sample_ids.tolist()
        assert batch.captions == [caption(sample) for sample in batch.sample_ids.tolist()]
        assert np.array_equal(as_bytes(batch.images), [pixels(sample) for sample in batch.sample_ids.tolist()])


def test_a_micro_batch_stays_as_it_is_while_others_are_decoded(shards: Shards) -> None:
    with Loader(shards, plan_of(shards), micro_batch=4) as loader:
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


def test_plan_of_other_shards_is_refused(shards: Shards) -> None:
    parts = rows(np.zeros(len(shards), np.int64), [len(shards)])
    plan = Plan(shapes=[(16, 16)], rows=parts, batch_size=4, seed=0, fingerprint="other")
    with pytest.raises(ValueError, match="other shards"):
        Loader(shards, plan, micro_batch=4)


def test_uneven_micro_batch_is_refused_before_a_thread_starts(shards: Shards) -> None:
    with pytest.raises(InputError, match=r"parallel.micro_batch"):
        Loader(shards, plan_of(shards), micro_batch=3)


def test_close_ends_every_thread(shards: Shards) -> None:
    before, python_threads = len(os.listdir("/proc/self/task")), threading.active_count()
    loader = Loader(shards, plan_of(shards), micro_batch=4, workers=3)
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
    with Loader(shards, plan_of(shards), micro_batch=4) as loader:
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
