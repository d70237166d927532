"""One training step on this machine: the same MMDiT in several libraries, timed side by side.

    python benchmarks/step_time.py                                    # four shapes, two threads, eager, fused AdamW
    python benchmarks/step_time.py --compile --shapes 256/64+16/8     # width / image + text tokens / batch
    python benchmarks/step_time.py --optimizer foreach --json step_time.json
    OMP_WAIT_POLICY=passive python benchmarks/step_time.py --clock cpu     # on a machine that others use

A step is forward, loss, backward and AdamW in fp32. Contenders get the same images, timesteps, threads, optimizer
implementation and compile setting, and take turns round by round, so that what else the machine does hits all of them
alike; the ratio is taken within each round. `GEMM` is the machine's own rate for these layers' matrix products alone,
timed in the same rounds: a contender's share of it is how near the step comes to being nothing but its products.
`--clock cpu` counts this process' CPU seconds: waiting for a core does not show, and waiting threads must not spin.

What is not alike: diffusers takes text states where the others look up a token table. Its text projection reads
TEXT_STATES numbers a token, as many as the others' table has rows, so the parameters differ by one bias.

A contender is a function from Case to Contender in CONTENDERS.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference import plain_mmdit as plain  # the repository's tests folder is no package of mpdit

HEAD_DIM, PATCH, CHANNELS, TEXT_STATES = 64, 2, 4, 64
SHAPES = ("256/64+16/8", "512/64+32/4", "256/256+64/16", "512/256+64/4")
BASELINE = "diffusers"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape of the table. The image is a square of latents whose patches are the image tokens."""

    width: int
    image_tokens: int
    text_tokens: int
    batch: int
    depth: int

    @classmethod
    def parse(cls, text: str, depth: int) -> "Case":
        try:
            width, tokens, batch = text.split("/")
            image_tokens, text_tokens = tokens.split("+")
            case = cls(
                width=int(width),
                image_tokens=int(image_tokens),
                text_tokens=int(text_tokens),
                batch=int(batch),
                depth=depth,
            )
        except ValueError:
            raise SystemExit(f"--shapes {text}: expected WIDTH/IMAGE+TEXT/BATCH, as in {SHAPES[0]}") from None
        if case.side**2 != case.image_tokens or case.width % HEAD_DIM:
            raise SystemExit(f"--shapes {text}: image tokens must be a square, the width a multiple of {HEAD_DIM}")
        return case

    @property
    def side(self) -> int:
        """Patches along one edge of the image."""
        return round(self.image_tokens**0.5)

    def data(self) -> plain.Batch:
        g = torch.Generator().manual_seed(0)
        size = (self.batch, CHANNELS, self.side * PATCH, self.side * PATCH)
        return plain.Batch(
            image_BCYX=torch.randn(size, generator=g),
            noise_BCYX=torch.randn(size, generator=g),
            t_B=torch.rand(self.batch, generator=g),
            ids_BL=torch.randint(1, TEXT_STATES, (self.batch, self.text_tokens), generator=g),
        )


@dataclass(kw_only=True, slots=True)
class Contender:
    """A model on one case. Both are handed over before any compiling; `parameters` may be optimizer groups."""

    loss: Callable[[], Tensor]  # one forward pass on the case's data, () in fp32
    parameters: list[Tensor] | list[dict[str, Any]]
    step: Callable[[], None] | None = None  # the contender's own training step; None: loss, backward, torch's AdamW


# ---- the contenders -------------------------------------------------------------------------------------------------


def diffusers_sd3(case: Case) -> Contender:
    """SD3Transformer2DModel with QK-norm, its text projections kept small (see above)."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=case.side * PATCH,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=case.depth,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=case.width // HEAD_DIM,
        joint_attention_dim=TEXT_STATES,
        caption_projection_dim=case.width,
        pooled_projection_dim=case.width,
        pos_embed_max_size=case.side,
        dual_attention_layers=(),
        qk_norm="rms_norm",
    ).train()
    batch = case.data()
    text_BLD = torch.randn(case.batch, case.text_tokens, TEXT_STATES)
    pooled_BD = torch.randn(case.batch, case.width)

    def loss() -> Tensor:
        out_BCYX = model(
            hidden_states=batch.noisy_BCYX(),
            encoder_hidden_states=text_BLD,
            pooled_projections=pooled_BD,
            timestep=1000 * batch.t_B,
            return_dict=False,
        )[0]
        return (out_BCYX - batch.target_BCYX()).pow(2).mean()

    return Contender(loss=loss, parameters=list(model.parameters()))


def plain_pytorch(case: Case) -> Contender:
    """The reference that the tests hold the parallel model against."""
    shape = plain.Shape(
        width=case.width, depth=case.depth, head_dim=HEAD_DIM, patch=PATCH, channels=CHANNELS, vocab=TEXT_STATES
    )
    weights = {n: w.requires_grad_() for n, w in plain.init(shape, seed=0).items()}
    batch = case.data()
    return Contender(loss=lambda: plain.loss_of(weights, shape, batch), parameters=list(weights.values()))


def mpdit_one_process(case: Case) -> Contender:
    """What `mpdit train` runs in one process: Megatron's schedule, gradient buffers and optimizer, muP groups.

    Without the gradient norm and clipping, which no contender has.
    """
    from mpdit import config as configs
    from mpdit.models.layers import Inputs, patchify
    from mpdit.parallel import accel, groups
    from mpdit.train import batches, session

    accel.enter()
    if not torch.distributed.is_initialized():
        groups.start(configs.Parallel(), seed=0)
    side = case.side * PATCH
    config = configs.from_dict(
        {
            "model": {
                **{"width": case.width, "depth": case.depth, "head_dim": HEAD_DIM, "patch": PATCH, "image_size": side},
                **{"channels": CHANNELS, "text_tokens": case.text_tokens, "vocab_size": TEXT_STATES},
            },
            "mup": {"base_width": case.width // 2, "adaln_init": "hidden", "readout_init": "base"},
            "optim": {"lr": 1e-4, "weight_decay": 0.01, "clip": 0.0},
        }
    )
    run, data = session.build(config), case.data()
    batch = batches.Batch(
        size=case.batch,
        height=side,
        width=side,
        inputs=Inputs(image_BCHW=data.noisy_BCYX(), time_B=data.t_B, text_BL=data.ids_BL),
        target_SBP={"velocity": patchify(data.target_BCYX(), PATCH)},
    )
    (stage,) = run.network.chunks

    def step() -> None:
        run.forward_backward([batch])
        run.optimizer.prepare_grads()
        run.optimizer.step_with_ready_grads()

    return Contender(
        loss=lambda: batches.loss(config, stage(batch.inputs), batch),
        parameters=list(stage.parameters()),
        step=step,
    )


CONTENDERS: dict[str, Callable[[Case], Contender]] = {
    BASELINE: diffusers_sd3,
    "plain": plain_pytorch,
    "mpdit": mpdit_one_process,
}


# ---- measuring ------------------------------------------------------------------------------------------------------


def count_parameters(parameters: list[Tensor] | list[dict[str, Any]]) -> int:
    tensors = [p for g in parameters for p in (g["params"] if isinstance(g, dict) else [g])]
    return sum(p.numel() for p in tensors)


def count_flops(loss: Callable[[], Tensor]) -> int:
    """Of forward and backward. torch's counter knows no fused CPU attention, but the products it is made of."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def stepper(contender: Contender, *, optimizer: str, compiled: bool) -> Callable[[], None]:
    if contender.step is not None:
        return contender.step
    adamw = torch.optim.AdamW(contender.parameters, lr=1e-4, weight_decay=0.01, **{optimizer: True})
    loss = torch.compile(contender.loss) if compiled else contender.loss

    def step() -> None:
        adamw.zero_grad(set_to_none=True)
        loss().backward()
        adamw.step()

    return step


class Gemms:
    """The products of the blocks' linears on both streams and nothing else: y = x w', dx = dy w, dw = dy' x."""

    def __init__(self, case: Case):
        self.depth, self.operands, self.flops = case.depth, [], 0
        for tokens in (case.image_tokens * case.batch, case.text_tokens * case.batch):
            for rows, fan_in in ((3, 1), (1, 1), (4, 1), (1, 4)):
                x, w = torch.randn(tokens, fan_in * case.width), torch.randn(rows * case.width, fan_in * case.width)
                y = x @ w.T
                self.operands.append((x, w, y, torch.empty_like(x), torch.empty_like(w)))
                self.flops += case.depth * 3 * 2 * x.numel() * w.shape[0]

    @torch.no_grad()
    def __call__(self) -> None:
        for x, w, y, dx, dw in self.operands * self.depth:
            torch.mm(x, w.T, out=y)
            torch.mm(y, w, out=dx)
            torch.mm(y.T, x, out=dw)


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
    contenders = {name: CONTENDERS[name](case) for name in names}
    flops = {name: count_flops(c.loss) for name, c in contenders.items()}
    gemms = Gemms(case)
    tasks: dict[str, Callable[[], None]] = {
        name: stepper(c, optimizer=args.optimizer, compiled=args.compile) for name, c in contenders.items()
    }
    seconds = in_turns(tasks | {"GEMM": gemms}, rounds=args.rounds, warmup=args.warmup, clock=CLOCKS[args.clock])
    gemm_rate = gemms.flops / statistics.median(seconds["GEMM"])
    rows: list[dict[str, Any]] = [{"contender": "GEMM", "flops": gemms.flops, "flops_per_s": gemm_rate}]
    for name, contender in contenders.items():
        median, rate = statistics.median(seconds[name]), flops[name] / statistics.median(seconds[name])
        row = {
            "contender": name,
            "parameters": count_parameters(contender.parameters),
            "flops": flops[name],
            "step_s": median,
            "rounds_s": seconds[name],
            "flops_per_s": rate,
            "share_of_gemm": rate / gemm_rate,
        }
        if BASELINE in seconds:
            ratios = sorted(b / s for b, s in zip(seconds[BASELINE], seconds[name], strict=True))
            row |= {"ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1]}
        rows.append(row)
    return rows


# ---- output ---------------------------------------------------------------------------------------------------------


def print_case(case: Case, rows: list[dict[str, Any]]) -> None:
    gemm, *steps = rows
    print(
        f"\nwidth {case.width}, depth {case.depth}, {case.image_tokens}+{case.text_tokens} tokens, batch {case.batch}; "
        f"GEMM {gemm['flops_per_s'] / 1e9:.0f} GFLOP/s"
    )
    print(f"  {'':<18}{'parameters':>12}{'GFLOP':>9}{'step ms':>10}{'of GEMM':>9}   {BASELINE} / this (low … high)")
    for row in steps:
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} … {row['ratio_high']:.2f})" if "ratio" in row else "-"
        print(
            f"  {row['contender']:<18}{row['parameters']:>12,}{row['flops'] / 1e9:>9.1f}{row['step_s'] * 1e3:>10.0f}"
            f"{row['share_of_gemm']:>9.0%}   {ratio}",
            flush=True,
        )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="W/I+T/B", help="default: %(default)s")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after the warm-up (default 7)")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused", help="AdamW, for all contenders")
    parser.add_argument("--compile", action="store_true", help="torch.compile every contender's loss (default: eager)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if "mpdit" in args.contenders and (args.compile or args.optimizer != "fused"):
        args.contenders.remove("mpdit")
        print("mpdit left out: its training step is eager with the fused AdamW")
    cases = [Case.parse(text, args.depth) for text in args.shapes]
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
        shape = {key: getattr(case, key) for key in ("width", "depth", "image_tokens", "text_tokens", "batch")}
        results.append({**shape, "rows": rows})
        gc.collect()
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
