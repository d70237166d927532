"""From shards to batches: the trainer's loader against a PyTorch DataLoader with PIL, and what caches cost a step.

    python benchmarks/data.py                               # JPEGs of smooth noise, about 60 kB each
    python benchmarks/data.py --images FOLDER               # crops of your own photographs
    python benchmarks/data.py --cores 1 --json data.json

Images: both read the same members of the same tars, decode, resize with a triangle filter that is wide enough not to
alias, cut out the middle and scale to [-1, 1]. They have equal cores (DALI threads, DataLoader workers) and take turns
round by round after one that does not count; what counts is images per CPU-second, of the process and all its workers,
since waiting for a core that others use is not work. The largest difference between their pixels is printed: they do
the same.

Caches: PixArt-alpha of 0.04B with REPA trains on latents, text states and teacher's features of the sizes that
256 x 256 pictures and T5-XXL have (of small models with random weights), read by memory map. Printed are the share of a
step that its data takes, and images per CPU-second, for whoever has another step.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "data"))
from make_shards import make_shards

import pretrained  # the repository's tests folder is no package of mpdit
from mpdit import config
from mpdit.config import Config
from mpdit.data.loader import Loader
from mpdit.data.plan import Plan, rows
from mpdit.data.shards import Shards
from mpdit.parallel import accel, groups
from mpdit.train import preflight, session
from mpdit.train.batches import TrainFeed
from mpdit.train.sets import Sets
from mpdit_tools.data.main import main as data_main

Batches = Generator[torch.Tensor, None, None]


def noise(number: int, side: int) -> Image.Image:
    """Noise in colour that falls with the frequency as a smooth photograph does, so that its JPEG is as large."""
    rng = np.random.default_rng(number)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    spectrum = np.fft.rfft2(rng.standard_normal((3, side, side))) / np.maximum(frequency, 1 / side) ** 1.5
    pixels = np.fft.irfft2(spectrum, (side, side))
    scaled = 128 + 48 * pixels / pixels.std()
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def crops(folder: Path, side: int) -> list[Image.Image]:
    """Up to 16 crops of each picture in `folder`, in turns."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")):
        image = Image.open(path).convert("RGB")
        image.thumbnail((8 * side, 8 * side))
        spots = itertools.product(range(0, image.height - side + 1, side), range(0, image.width - side + 1, side))
        found += [image.crop((x, y, x + side, y + side)) for y, x in itertools.islice(spots, 16)]
    if not found:
        raise SystemExit(f"--images {folder}: holds no picture of at least {side} x {side} pixels")
    return found


def data_set(folder: Path, images: Path | None, count: int, side: int) -> Shards:
    pictures = crops(images, side) if images else [noise(number, side) for number in range(64)]

    def jpeg(number: int) -> bytes:
        buffer = io.BytesIO()
        pictures[number % len(pictures)].save(buffer, "JPEG", quality=90)
        return buffer.getvalue()

    return Shards.open(make_shards(folder, counts=(count,), image=jpeg), "train")


# ---- the contenders --------------------------------------------------------------------------------------------------


def plan_of(shards: Shards, size: int, batch: int) -> Plan:
    one_row = rows(np.zeros(len(shards), np.int64), [len(shards)])
    return Plan(shapes=[(size, size)], rows=one_row, batch_size=batch, seed=0, fingerprint=shards.fingerprint)


def dali(shards: Shards, size: int, batch: int, cores: int) -> Batches:
    with Loader(shards, plan_of(shards, size, batch), micro_batch=batch, workers=cores) as loader:
        for micro_batch in loader:
            yield micro_batch.images


class _Pictures(Dataset[torch.Tensor]):
    def __init__(self, shards: Shards, size: int, order: list[int]) -> None:
        self.shards, self.size, self.order = shards, size, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> torch.Tensor:
        encoded, _ = self.shards.read(self.order[place])
        image, size = Image.open(io.BytesIO(encoded)).convert("RGB"), self.size
        scale = size / min(image.size)
        wide, high = max(size, round(image.width * scale)), max(size, round(image.height * scale))
        small = image.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = (wide - size) // 2, (high - size) // 2
        pixels = np.array(small.crop((left, top, left + size, top + size)))
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div_(127.5).sub_(1)


def pil(shards: Shards, size: int, batch: int, cores: int) -> Batches:
    plan = plan_of(shards, size, batch)
    order = [int(i) for step in range(-(-20 * len(shards) // batch)) for i in plan.batch(step).sample_ids]
    yield from DataLoader(_Pictures(shards, size, order), batch_size=batch, num_workers=cores)


CONTENDERS: dict[str, Callable[[Shards, int, int, int], Batches]] = {"DALI": dali, "PIL": pil}


# ---- the clock -------------------------------------------------------------------------------------------------------


def cpu_s() -> float:
    """CPU seconds so far of this process and its children."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(t.user + t.system for t in (p.cpu_times() for p in family))


def timed(batches: Batches, rounds: int, batch: int) -> tuple[float, float]:
    """Images per CPU-second and per second of `rounds` batches."""
    cpu, wall = cpu_s(), time.monotonic()
    for _ in range(rounds):
        next(batches)
    return rounds * batch / (cpu_s() - cpu), rounds * batch / (time.monotonic() - wall)


def measure(shards: Shards, arguments: argparse.Namespace) -> dict[str, Any]:
    first: dict[str, torch.Tensor] = {}
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for counts in [False] + [True] * arguments.rounds:
        for name, make in CONTENDERS.items():  # one at a time: the other's workers would decode ahead meanwhile
            with contextlib.closing(make(shards, arguments.size, arguments.batch, arguments.cores)) as batches:
                first[name] = next(batches)
                timed(batches, 3, arguments.batch)
                rate = timed(batches, arguments.batches, arguments.batch)
                if counts:
                    rates[name].append(rate)
    difference = (first["DALI"] - first["PIL"]).abs().max().item() * 127.5
    ratios = [a[0] / b[0] for a, b in zip(rates["DALI"], rates["PIL"], strict=True)]
    return {
        "images_per_cpu_s": {name: statistics.median(r[0] for r in found) for name, found in rates.items()},
        "images_per_s": {name: statistics.median(r[1] for r in found) for name, found in rates.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest_difference": difference,
        "cores": arguments.cores,
        "image_bytes": int(np.mean([len(shards.read(i)[0]) for i in range(min(64, len(shards)))])),
    }


# ---- with caches -----------------------------------------------------------------------------------------------------


def cached_config(folder: Path, batch: int) -> Config:
    """A run whose caches are built, of pictures of smooth noise."""
    source = folder / "pictures"
    source.mkdir()
    for number in range(64):
        noise(number, 256).save(source / f"{number}.png")
        (source / f"{number}.txt").write_text(f"a red square at {number % 10} {number // 10}")
    data_main(["build", "folder", str(source), "--out", str(folder / "set"), "--size", "256", "--vocab-size", "300"])
    pretrained.save_vae(folder / "vae", factor=8)
    pretrained.save_t5(folder / "t5", features=4096)
    sections: dict[str, Any] = {
        "model": {"preset": "pixart-0.04b"},
        "mup": {"base_width": 288},
        "data": {"path": folder / "set", "text": "t5", "text_model": folder / "t5", "latents": folder / "vae"},
        "objective": {"kind": "ddpm", "repa_weight": 0.5},
        "train": {"batch_size": batch},
        "run": {"dir": folder / "run"},
    }
    sections["data"] |= {"mirror": True, "cache": folder / "cache"}
    (folder / "config.yaml").write_text(json.dumps(sections, default=str))  # JSON is YAML
    data_main(["cache", str(folder / "config.yaml")])
    return preflight.check(config.load(folder / "config.yaml"), 1)


def with_caches(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    settings = cached_config(folder, arguments.train_batch)
    accel.enter()
    groups.start(settings.parallel, settings.train.seed)
    sets, run = Sets.open(settings), session.build(settings)
    with contextlib.closing(TrainFeed(settings, sets.train, sets.plan, sets.tokenizer, 0)) as feed:

        def step() -> tuple[float, float]:
            """Seconds of the data, and of the whole step."""
            began = time.monotonic()
            batches = feed.next()
            had = time.monotonic()
            run.forward_backward(batches)
            run.update()
            run.ema.update()
            return had - began, time.monotonic() - began

        step()
        data_s, step_s = (sum(column) for column in zip(*(step() for _ in range(arguments.steps)), strict=True))
        cpu, rounds = cpu_s(), 50
        for _ in range(rounds):
            feed.next()
        rate = rounds * arguments.train_batch / (cpu_s() - cpu)
    groups.stop()
    return {"share": data_s / step_s, "step_s": step_s / arguments.steps, "cached_images_per_cpu_s": rate}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder of pictures; default: smooth noise")
    parser.add_argument("--side", type=int, default=512, help="pixels a side of the files (%(default)s)")
    parser.add_argument("--size", type=int, default=256, help="pixels a side of the tensors (%(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--batches", type=int, default=12, help="timed in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--train-batch", type=int, default=8, help="images a step with caches (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="timed with caches (%(default)s)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(data_set(Path(folder) / "set", arguments.images, 512, arguments.side), arguments)
    print(f"{arguments.side} px JPEG, {found['image_bytes']:,} bytes -> {arguments.size} px, {arguments.cores} cores")
    for name in CONTENDERS:
        per_cpu, wall = found["images_per_cpu_s"][name], found["images_per_s"][name]
        print(f"{name:<5} {per_cpu:8.1f} images/CPU-s   {wall:8.1f} images/s")
    print(f"ratio {found['ratio']:.2f}  (rounds: {', '.join(f'{r:.2f}' for r in found['ratios'])})")
    print(f"largest difference of a pixel: {found['largest_difference']:.0f} of 255")
    torch.set_num_threads(arguments.cores)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        found |= with_caches(Path(folder), arguments)
    print(
        f"with caches: {100 * found['share']:.2f} % of a step of {found['step_s']:.2f} s is data "
        f"(PixArt-alpha of 0.04B, REPA, batch {arguments.train_batch}); "
        f"{found['cached_images_per_cpu_s']:,.0f} images/CPU-s"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
