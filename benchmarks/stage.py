"""A stage of a wide MMDiT on this device: its speed in bf16 and FP8, its memory beside the plan, FP8's loss gap.

    python benchmarks/stage.py                        # two blocks of MMDiT-18B, for a GPU with 80 GB
    python benchmarks/stage.py --depth 4 --micro-batch 2 --json stage.json                      # 141 GB
    python benchmarks/stage.py --steps 0              # the loss gap alone
    python benchmarks/stage.py --loss-steps 0         # speed and memory alone
    python benchmarks/stage.py --dry-run              # everything, tiny, on any machine

Variants are the project's own layers in bf16, Transformer Engine's in bf16, and each FP8 recipe that the GPU has; each
runs in a process of its own, twice, in turns. A step is `--micro-batches` forward and backward passes and the update.
FLOPs are the network's own (`mpdit plan`), nothing computed twice; the share is of the GPU's bf16 peak, in FP8 too. The
loss gap is of the mean over the last fifth of `--loss-steps` steps on made-up pictures, from the same weights.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mpdit import gpus

TINY = ["model.width=64", "model.head_dim=32", "model.image_size=8", "model.text_dim=16", "model.text_tokens=16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    name: str
    overrides: tuple[str, ...]


def variants(dry_run: bool) -> list[Variant]:
    """What this machine can run. In a dry run: bf16, and FP8 emulated."""

    def local(precision: str) -> Variant:
        return Variant(name=f"{precision}, local", overrides=(f"parallel.precision={precision}",))

    if dry_run:
        return [local("bf16"), local("fp8_emulated")]
    from mpdit.parallel import accel, fp8_rules
    from mpdit.parallel.te_install import find_te

    found, gpu = [local("bf16")], accel.gpu()
    if find_te().state == "whole" and gpu is not None:
        found.append(Variant(name="bf16, te", overrides=("parallel.precision=bf16", "parallel.backend=te")))
        found += [
            Variant(
                name=f"fp8 {recipe}, te",
                overrides=("parallel.precision=fp8", "parallel.backend=te", f"parallel.fp8_recipe={recipe}"),
            )
            for recipe in fp8_rules.recipes(*gpu[1:])
        ]
    return found


def overrides_of(variant: Variant, arguments: argparse.Namespace) -> list[str]:
    """Of preset mmdit-18b."""
    images = arguments.micro_batch * arguments.micro_batches
    given = [f"model.depth={arguments.depth}", f"train.batch_size={images}", "mup.base_width=512", "optim.lr=1e-3"]
    given += [f"parallel.micro_batch={arguments.micro_batch}", "parallel.fp8_bf16_blocks=0", "train.steps=10000"]
    given += ["model.image_size=64", *(TINY if arguments.dry_run else [])]  # latents of 512 x 512 pixels
    return [*given, *variant.overrides, *arguments.overrides]


# ---- in a process of its own -----------------------------------------------------------------------------------------


def run(variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, peak memory, and the losses of the first `--loss-steps` steps."""
    import torch

    from mpdit.parallel import accel

    accel.enter()
    from mpdit.parallel import groups
    from mpdit.train import session
    from mpdit_tools.coordcheck.batch import fixed_batch
    from mpdit_tools.plan import resolve

    config = resolve.resolve(resolve.load("mmdit-18b", tuple(overrides_of(variant, arguments))), gpus=1)
    groups.start(config.parallel, config.train.seed)
    built = session.build(config)

    def step(number: int) -> float:
        loss = built.forward_backward(fixed_batch(config, from_data=False, step=number % 64))
        built.update()
        return loss

    losses = [step(number) for number in range(arguments.loss_steps)]
    batch, seconds = fixed_batch(config, from_data=False), []
    for number in range(arguments.warm_up + arguments.steps):
        began = time.perf_counter()
        built.forward_backward(batch)  # which ends with the loss on the host
        float(built.update())
        if accel.is_cuda():
            torch.cuda.synchronize()
        if number >= arguments.warm_up:
            seconds.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() if accel.is_cuda() else None
    groups.stop()
    return {"seconds": seconds, "losses": losses, "memory_bytes": memory}


# ---- all of them -----------------------------------------------------------------------------------------------------


def gpu_here() -> gpus.GPU | None:
    import torch

    return gpus.named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def plan(variant: Variant, arguments: argparse.Namespace) -> dict[str, Any]:
    """`mpdit plan` of this very process, for the kind of GPU that there is."""
    here = gpu_here()
    kind = next((kind for kind, gpu in gpus.GPUS.items() if gpu is here), "h100")
    command = ["-m", "mpdit", "plan", "mmdit-18b", "--gpus", "1", "--gpu", kind, "--json"]
    done = subprocess.run(
        [sys.executable, *command, *overrides_of(variant, arguments)], stdout=subprocess.PIPE, check=False
    )
    found: dict[str, Any] = json.loads(done.stdout)  # the exit code says whether it fits
    return found


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    chosen = variants(arguments.dry_run)
    plans = {variant.name: plan(variant, arguments) for variant in chosen}
    flops = plans[chosen[0].name]["model_flops_per_step"]
    seen: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in chosen}
    for turn in range(arguments.turns):
        for number, variant in enumerate(chosen):
            said = ["--loss-steps", "0"] if turn else []  # the losses are the same again
            seen[variant.name].append(_started(number, [*sys.argv[1:], *said]))
    rows: list[dict[str, Any]] = []
    for name, runs in seen.items():
        step_s = statistics.median(s for run in runs for s in run["seconds"]) if arguments.steps else None
        memory = _memory(runs[0]["memory_bytes"], plans[name]["memory_bytes"][0])
        rows.append({"variant": name, "flops": flops, "step_s": step_s, **memory, **_loss(runs[0]["losses"])})
    _compare(rows)
    return rows


def _started(number: int, argv: list[str]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, *argv, "--one", str(number), "--json", file.name]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads(Path(file.name).read_text())
    return found


def _memory(used: int | None, planned: dict[str, int]) -> dict[str, Any]:
    """Against the plan but for what torch's allocator does not see: CUDA's context, NCCL's and cuBLAS's buffers."""
    wanted = planned["peak"] - planned["other"]
    return {"planned_bytes": wanted} | ({"memory_bytes": used, "of_plan": used / wanted} if used else {})


def _loss(losses: list[float]) -> dict[str, Any]:
    last = losses[-max(1, len(losses) // 5) :]
    return {"loss": statistics.fmean(last)} if last else {}


def _compare(rows: list[dict[str, Any]]) -> None:
    """Speed against the fastest bf16, losses against the same backend's."""
    here = gpu_here()
    peak = here.flops_s("bf16") if here else None
    halves = [row for row in rows if row["variant"].startswith("bf16")]
    for row in rows:
        if row["step_s"]:
            row["flops_s"] = row["flops"] / row["step_s"]
            row["speedup"] = min(half["step_s"] for half in halves) / row["step_s"]
            row |= {"of_peak": row["flops_s"] / peak} if peak else {}
        if "loss" in row:
            backend = row["variant"].rsplit(", ")[-1]
            (half,) = (half for half in halves if half["variant"].endswith(backend))
            row["loss_gap"] = (row["loss"] - half["loss"]) / half["loss"]


def table(rows: list[dict[str, Any]]) -> str:
    columns = {
        "step_s": ("step s", "{:.3f}"),
        "flops_s": ("TFLOP/s", "{:.1f}"),
        "of_peak": ("of peak", "{:.1%}"),
        "speedup": ("x bf16", "{:.2f}"),
        "memory_bytes": ("GB", "{:.1f}"),
        "of_plan": ("of plan", "{:.3f}"),
        "loss": ("loss", "{:.5f}"),
        "loss_gap": ("gap", "{:+.1e}"),
    }
    scale = {"flops_s": 1e12, "memory_bytes": 1e9}
    lines = [f"{'':<22}" + "".join(f"{head:>10}" for head, _ in columns.values())]
    for row in rows:
        cells = [
            form.format(row[key] / scale.get(key, 1)) if row.get(key) is not None else "-"
            for key, (_, form) in columns.items()
        ]
        lines.append(f"{row['variant']:<22}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the config of every variant")
    parser.add_argument("--depth", type=int, default=2, help="blocks (%(default)s)")
    parser.add_argument("--micro-batch", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=4, help="a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="timed (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before (%(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--loss-steps", type=int, default=500, help="of the loss gap (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on any machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        arguments.depth, arguments.warm_up, arguments.turns = 2, 1, 1
        arguments.steps, arguments.loss_steps = min(arguments.steps, 2), min(arguments.loss_steps, 5)
        arguments.micro_batch, arguments.micro_batches = 4, 2
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    import torch

    if not torch.cuda.is_available() and not arguments.dry_run:
        print("there is no CUDA device, so there is nothing to measure; --dry-run shows that this program runs.")
        return 2
    if arguments.one is not None:
        found: Any = run(variants(arguments.dry_run)[arguments.one], arguments)
    else:
        found = measure(arguments)
        print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
