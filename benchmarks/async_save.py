"""What a checkpoint costs the training beside it: step times during a save against those outside, in one run.

    python benchmarks/async_save.py                                   # an MMDiT with some hundred MB of state
    python benchmarks/async_save.py --width 768 --rounds 9 --json async_save.json
    OMP_WAIT_POLICY=passive python benchmarks/async_save.py --clock cpu     # on a machine that others use
    python benchmarks/async_save.py --paper                           # the 18B launch on paper alone; trains nothing

A round takes steps with no save under way, begins a save, and takes steps until it is on the disk; the ratio is that of
the two medians of a round, so that what else the machine does hits both. What the training stands still for, the copy
of the state at `begin`, is shown by itself, beside what it would stand still for with train.async_save=false.
`--clock cpu` counts the training process' CPU seconds: what the save costs it in caches and memory shows, waiting for
others does not; the CPU seconds of the process that writes, shown beside, are the most that it can take from it.

On paper: the shares of every distinct rank of the layout, found by building its stages on tensors without memory.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
import tiny  # the repository's tests folder is no package of mpdit

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GB_A_SECOND = 2.0  # of storage, a rank's share, for the plan on paper


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8, help="outside a save, in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; a temporary folder by default")
    parser.add_argument("--paper", action="store_true", help="the plan alone")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    from mpdit.parallel import accel

    accel.enter()
    results: dict[str, Any] = {"paper": paper()}
    if not args.paper:
        torch.set_num_threads(args.threads)
        results["measured"] = measured(args)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, saver, session
    from mpdit.train.checkpoint import Position
    from mpdit.train.loop import Sets

    with tempfile.TemporaryDirectory(prefix="async_save_", dir=args.folder) as folder:
        data = tiny.build_set(Path(folder) / "data")
        sections = {
            "model": {"width": args.width, "depth": args.depth, "head_dim": 64},
            "train": {"steps": 10**6, "keep_last": 1},
        }
        config = preflight.check(tiny.with_run_dir(tiny.config(data, **sections), Path(folder) / "run"), 1)
        groups.start(config.parallel, config.train.seed)
        sets, run = Sets.open(config), session.build(config)
        feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
        writes = saver.Saver(Path(config.run.dir), print)
        clock, done = CLOCKS[args.clock], 0

        def step() -> float:
            nonlocal done
            began = clock()
            run.forward_backward(feed.next())
            run.update()
            run.ema.update()
            writes.poll()
            done += 1
            return clock() - began

        def writer_cpu_s() -> float:
            assert writes._writer is not None
            times = psutil.Process(writes._writer.pid).cpu_times()
            return float(times.user + times.system)

        def begin() -> None:
            writes.begin(run, config, Position(step=done, plan_hash="", tokenizer_sha256=""))

        step()
        began = time.perf_counter()
        begin()  # takes the memory and starts the process, which later ones find there
        first_s = time.perf_counter() - began
        writes.wait()
        rounds = []
        for _ in range(args.rounds):
            outside, during = [step() for _ in range(args.steps)], []
            used_s = writer_cpu_s()
            begin()
            while writes.busy:
                during.append(step())
            saved = writes.news()
            after = [step() for _ in range(args.steps)]
            free = statistics.median(outside + after)
            rounds.append(
                {
                    "outside_s": free,
                    "during_s": statistics.median(during),
                    "ratio": statistics.median(during) / free,
                    "steps_during": len(during),
                    "blocked_s": saved["save_blocked_s"],
                    "save_s": saved["save_s"],
                    "writer_cpu_s": writer_cpu_s() - used_s,
                    "bytes": saved["save_bytes"],
                }
            )
        synchronous = []
        for _ in range(3):  # train.async_save=false: the same, waited for
            step()
            began = time.perf_counter()
            begin()
            writes.wait()
            synchronous.append(time.perf_counter() - began)
        writes.close()
        feed.close()
        groups.stop()
        shutil.rmtree(Path(folder) / "run")
    return report(args, rounds, first_s, statistics.median(synchronous))


def report(
    args: argparse.Namespace, rounds: list[dict[str, Any]], first_s: float, synchronous_s: float
) -> dict[str, Any]:
    size = rounds[0]["bytes"]
    ratios = sorted(one["ratio"] for one in rounds)
    found = {
        "state_bytes": size,
        "outside_s": statistics.median(one["outside_s"] for one in rounds),
        "during_s": statistics.median(one["during_s"] for one in rounds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "blocked_s": statistics.median(one["blocked_s"] for one in rounds),
        "first_blocked_s": first_s,
        "save_s": statistics.median(one["save_s"] for one in rounds),
        "synchronous_s": synchronous_s,
        "writer_cpu_s": statistics.median(one["writer_cpu_s"] for one in rounds),
        "clock": args.clock,
        "threads": args.threads,
        "load": round(os.getloadavg()[0], 1),
        "rounds": rounds,
    }
    print(
        f"\nMMDiT of width {args.width}, depth {args.depth}: {size / 1e6:,.0f} MB a checkpoint, "
        f"{args.threads} threads, load {found['load']}, medians of {len(rounds)} rounds"
    )
    for what, value in (
        ("step outside a save", f"{found['outside_s']:.3f} s of {args.clock}"),
        ("step during a save", f"{found['during_s']:.3f} s of {args.clock}"),
        ("during / outside", f"{found['ratio']:.3f}    (rounds: {', '.join(f'{r:.3f}' for r in ratios)})"),
        ("a save, begin to disk", f"{found['save_s']:.2f} s, in {rounds[0]['steps_during']} steps"),
        ("the writer's CPU", f"{found['writer_cpu_s']:.2f} s"),
        ("training stands still", f"{found['blocked_s']:.3f} s    (first save: {first_s:.3f} s)"),
        ("with async_save=false", f"{found['synchronous_s']:.3f} s"),
    ):
        print(f"  {what:<24}{value}")
    return found


# ---- on paper --------------------------------------------------------------------------------------------------------


def paper(gpus: int = 256) -> dict[str, Any]:
    """The 18B launch: bytes that each rank writes, and seconds at GB_A_SECOND."""
    from mpdit.parallel import packed
    from mpdit.train import checkpoint
    from mpdit_tools.mup_table import with_vocabulary
    from mpdit_tools.plan.resolve import load
    from mpdit_tools.rehearse import tiles

    layout = ["parallel.tp=8", "parallel.sp=true", "parallel.pp=4", "parallel.pp_split=[4, 5, 5, 5]"]
    layout += ["parallel.distributed_optimizer=true"]
    config, _ = with_vocabulary(load("mmdit-18b", layout))
    parallel = config.parallel
    replicas = gpus // (parallel.tp * parallel.pp)
    written, whole, parameters = [], [], 0
    for one in tiles.held(config):
        shares, held = packed.Shares(replicas), [0] * replicas
        for shard in one.shards.values():
            count = elements(shard.shape)
            if shard.dim is not None or one.tensor == 0:
                parameters += count
                for _ in checkpoint.KINDS:
                    held[shares.owner(4 * count)] += 4 * count
        written += held
        whole.append(sum(held))
    total = sum(written)
    found = {
        "parameters": parameters,
        "gpus": gpus,
        "layout": layout,
        "bytes": total,
        "bytes_a_rank": max(written),
        "seconds_a_rank": max(written) / GB_A_SECOND / 1e9,
        "bytes_if_one_replica_writes": max(whole),
        "seconds_if_one_replica_writes": max(whole) / GB_A_SECOND / 1e9,
    }
    print(
        f"on paper: {parameters / 1e9:.2f}B parameters, {total / 1e9:.1f} GB a checkpoint (fp32 weights, moments, "
        f"average) on {gpus} GPUs, TP{parallel.tp} x PP{parallel.pp} x DP{replicas}\n"
        f"  largest share of a rank   {max(written) / 1e9:.2f} GB, {found['seconds_a_rank']:.2f} s at {GB_A_SECOND:g} "
        f"GB/s; the mean is {total / gpus / 1e9:.2f} GB\n"
        f"  if one of the {replicas} replicas wrote alone   {max(whole) / 1e9:.2f} GB, "
        f"{found['seconds_if_one_replica_writes']:.2f} s"
    )
    return found


def elements(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


if __name__ == "__main__":
    main()
