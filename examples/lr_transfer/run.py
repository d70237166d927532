"""Run what is missing of the learning-rate transfer experiment: python examples/lr_transfer/run.py [part ...]

Each run trains one small model on the project's own path and adds a line to results.jsonl beside this file. A run that
is there already is not run again, so it may be stopped and started at will. Parts are listed in plan.py; without
any, all are run. Two processes by default, one thread each.
"""

import argparse
import dataclasses
import fcntl
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from plan import PARTS, Point, Results  # noqa: E402


def train(point: Point, data: Path) -> dict[str, float]:
    """Final losses on the validation set, with fixed times and noise: of the weights and of their average."""
    import torch

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.parallel import groups
    from mpdit.train import batches, loop, preflight, session

    config = preflight.check(point.config(HERE / f"{point.arch}.yaml", data), 1)
    began = time.process_time()
    if not groups.started():
        groups.start(config.parallel, config.train.seed)
    sets, run = loop.Sets.open(config), session.build(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    val = batches.validation_batches(config, sets.val, sets.tokenizer)
    curve = {}
    for step in range(1, config.train.steps + 1):
        loss = run.forward_backward(feed.next())
        run.update()
        run.ema.update()
        if not loss < 10:
            break
        if step in point.looks:
            with run.ema.applied():
                curve[str(step)] = round(run.network.validate(val), 6)
    feed.close()
    raw = run.network.validate(val)
    with run.ema.applied():
        averaged = run.network.validate(val)
    curve = {"curve": curve} if curve else {}
    return {
        "loss": round(raw, 6),
        "ema_loss": round(averaged, 6),
        "cpu_s": round(time.process_time() - began, 1),
        **curve,
    }


def missing(parts: list[str], results: Path) -> list[Point]:
    """Points that no line has yet; a point of several parts once."""
    known = Results(results)
    wanted = {point.key: point for part in parts for point in PARTS[part](known)}
    return [point for key, point in wanted.items() if key not in known.rows]


def work(point: Point, data: Path, results: Path) -> str:
    outcome = train(point, data)
    line = json.dumps({"point": dataclasses.asdict(point), **outcome})
    with results.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    return f"{point} {outcome['loss']:.4f} {outcome['ema_loss']:.4f} {outcome['cpu_s']:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds digits16 and icons12")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    parts = arguments.parts or list(PARTS)
    context = multiprocessing.get_context("spawn")
    with context.Pool(arguments.workers) as pool:
        while points := missing(parts, arguments.results):  # what comes later may depend on what came out
            pending = [pool.apply_async(work, (point, arguments.data, arguments.results)) for point in points]
            for number, one in enumerate(pending, 1):
                print(f"{number}/{len(points)}  {one.get()}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
