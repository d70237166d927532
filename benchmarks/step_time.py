"""One training step on this machine: MMDiT and PixArt-alpha in several libraries, timed side by side.

    python benchmarks/step_time.py                                    # both, four shapes, two threads, eager
    python benchmarks/step_time.py --compile --arch mmdit --shapes 256/64+16/8       # width/image+text tokens/batch
    python benchmarks/step_time.py --optimizer foreach --json step_time.json
    OMP_WAIT_POLICY=passive python benchmarks/step_time.py --clock cpu     # on a machine that others use

A step is forward, loss, backward and AdamW in fp32. Contenders (contenders.py) get the same images, timesteps, threads,
optimizer implementation and compile setting, and take turns round by round, so that what else the machine does hits all
of them alike; the ratio is taken within each round. `GEMM` is the machine's own rate for these layers' matrix products
alone, timed in the same rounds with MKL (torch's own) and with oneDNN: a contender's share of the faster one is how
near the step comes to being nothing but its products. `overhead` is what mpdit takes over "plain, oneDNN": the plain
reference with mpdit's product. `--clock cpu` counts this process' CPU seconds: waiting for a core does not show, and
waiting threads must not spin.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from mpdit.parallel import accel

accel.enter()  # before anything imports megatron-core, which has much to say about what is not installed

from contenders import BASELINE, CONTENDERS, Case, Contender  # noqa: E402  (reads the repository's tests)

from mpdit_kernels.linear import linear  # noqa: E402

SHAPES = ("256/64+16/8", "512/64+32/4", "256/256+64/16", "512/256+64/4")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


# ---- measuring ------------------------------------------------------------------------------------------------------


def count_parameters(parameters: list[Tensor] | list[dict[str, Any]]) -> int:
    tensors = [p for g in parameters for p in (g["params"] if isinstance(g, dict) else [g])]
    return sum(p.numel() for p in tensors)


def count_flops(loss: Callable[[], Tensor]) -> int:
    """Of forward and backward. torch's counter knows no fused CPU attention, but the products it is made of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def stepper(contender: Contender, *, optimizer: str) -> Callable[[], None]:
    if contender.step is not None:
        return contender.step
    adamw = torch.optim.AdamW(contender.parameters, lr=1e-4, weight_decay=0.01, **{optimizer: True})

    def step() -> None:
        adamw.zero_grad(set_to_none=True)
        contender.loss().backward()
        adamw.step()

    return step


class Gemms:
    """The products of the blocks' linears and nothing else: y = x w', dx = dy w, dw = dy' x."""

    def __init__(self, case: Case, product: Callable[[Tensor, Tensor], Tensor]):
        self.product, self.depth, self.operands, self.flops = product, case.depth, [], 0
        image, text, d = case.image_tokens * case.batch, case.text_tokens * case.batch, case.width
        of_stream = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
        layers = [(image, *sizes) for sizes in of_stream]
        if case.arch == "mmdit":
            layers += [(text, *sizes) for sizes in of_stream]
        else:
            layers += [(image, d, d), (text, 2 * d, d), (image, d, d)]
        for tokens, fan_out, fan_in in layers:
            x, w = torch.randn(tokens, fan_in), torch.randn(fan_out, fan_in)
            self.operands.append((x, w, torch.randn(tokens, fan_out)))
            self.flops += case.depth * 3 * 2 * x.numel() * fan_out

    @torch.no_grad()
    def __call__(self) -> None:
        for x, w, dy in self.operands * self.depth:
            self.product(x, w)
            self.product(dy, w.T)
            self.product(dy.T, x.T)


def in_turns(
    tasks: dict[str, Callable[[], None]], *, rounds: int, warmup: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each task in each round, A B C A B C …; the warm-up rounds are thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(warmup + rounds):
        for name, task in tasks.items():
            start = clock()
            task()
            seconds[name].append(clock() - start)
    return {name: times[warmup:] for name, times in seconds.items()}


def measure(case: Case, names: Iterable[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a contender, and one for the machine's GEMMs."""
    eager = {name: CONTENDERS[name](case, False) for name in names}
    flops = {name: count_flops(c.loss) for name, c in eager.items()}
    contenders = {name: CONTENDERS[name](case, True) for name in names} if args.compile else eager
    gemms = {"MKL": Gemms(case, lambda x, w: x @ w.T), "oneDNN": Gemms(case, linear)}
    tasks: dict[str, Callable[[], None]] = {n: stepper(c, optimizer=args.optimizer) for n, c in contenders.items()}
    seconds = in_turns(tasks | gemms, rounds=args.rounds, warmup=args.warmup, clock=CLOCKS[args.clock])
    rates = {name: one.flops / statistics.median(seconds[name]) for name, one in gemms.items()}
    rows: list[dict[str, Any]] = [{"contender": "GEMM", "flops": gemms["MKL"].flops, "flops_per_s": rates}]
    for name, contender in contenders.items():
        median, rate = statistics.median(seconds[name]), flops[name] / statistics.median(seconds[name])
        row = {
            "contender": name,
            "parameters": count_parameters(contender.parameters),
            "flops": flops[name],
            "step_s": median,
            "rounds_s": seconds[name],
            "flops_per_s": rate,
            "share_of_gemm": rate / max(rates.values()),
        }
        if BASELINE in seconds:
            row |= _ratio("ratio", seconds[BASELINE], seconds[name])
        if name == "mpdit" and "plain, oneDNN" in seconds:
            row |= _ratio("overhead", seconds[name], seconds["plain, oneDNN"])
        rows.append(row)
    return rows


def _ratio(name: str, upper: list[float], lower: list[float]) -> dict[str, float]:
    ratios = sorted(a / b for a, b in zip(upper, lower, strict=True))
    return {name: statistics.median(ratios), f"{name}_low": ratios[0], f"{name}_high": ratios[-1]}


# ---- output ---------------------------------------------------------------------------------------------------------


def print_case(case: Case, rows: list[dict[str, Any]]) -> None:
    gemm, *steps = rows
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in gemm["flops_per_s"].items())
    print(
        f"\n{case.arch}, width {case.width}, depth {case.depth}, {case.image_tokens}+{case.text_tokens} tokens, batch "
        f"{case.batch}; GEMM in GFLOP/s: {rates}"
    )
    print(f"  {'':<18}{'parameters':>12}{'GFLOP':>9}{'step ms':>10}{'of GEMM':>9}   {BASELINE} / this (low … high)")
    for row in steps:
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} … {row['ratio_high']:.2f})" if "ratio" in row else "-"
        over = f"   overhead {100 * (row['overhead'] - 1):+.1f} %" if "overhead" in row else ""
        print(
            f"  {row['contender']:<18}{row['parameters']:>12,}{row['flops'] / 1e9:>9.1f}{row['step_s'] * 1e3:>10.0f}"
            f"{row['share_of_gemm']:>9.0%}   {ratio}{over}",
            flush=True,
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--arch", nargs="+", choices=("mmdit", "pixart"), default=["mmdit", "pixart"])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="W/I+T/B", help="default: %(default)s")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after the warm-up (default 7)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused", help="AdamW, for all contenders")
    parser.add_argument("--compile", action="store_true", help="torch.compile for every contender (default: eager)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if torch.cuda.is_available():
        raise SystemExit("this is a comparison of CPU steps; hide the GPUs from it: CUDA_VISIBLE_DEVICES= python ...")
    if "mpdit" in args.contenders and args.optimizer != "fused":
        args.contenders.remove("mpdit")
        print("mpdit left out: its AdamW is the fused one")
    cases = [Case.parse(arch, text, args.depth) for arch in args.arch for text in args.shapes]
    torch.set_num_threads(args.threads)
    setting = {
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "optimizer": f"AdamW {args.optimizer}",
        "compiled": args.compile,
        "rounds": args.rounds,
        "clock": args.clock,
        "load": round(os.getloadavg()[0], 1),
    }
    print(", ".join(f"{key} {value}" for key, value in setting.items()))
    results = []
    for case in cases:
        torch.compiler.reset()
        rows = measure(case, args.contenders, args)
        print_case(case, rows)
        shape = {key: getattr(case, key) for key in Case.__slots__}
        results.append({**shape, "rows": rows})
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
