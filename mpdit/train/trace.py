"""``mpdit train --profile``: some steps under torch's profiler, as a trace for Perfetto and as a page to read."""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mpdit.config import Config
from mpdit.parallel import accel, groups

_WARM_UP = 5  # steps of a start that are not recorded, if there are so many: memory is found, kernels are chosen
_ROWS = 15  # operators on the page
_PHASE = "phase: "

# The first that an operator's name contains; what is left over is "other".
_KINDS = {
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "communication": ("nccl", "c10d", "gloo", "allreduce", "all_reduce", "allgather", "reduce_scatter", "send", "recv"),
    "matrix products": ("gemm", "matmul", "::mm", "::addmm", "::bmm", "product", "linear", "cutlass", "nvjet"),
    "optimizer": ("adam", "foreach", "multi_tensor", "lerp"),
    "copies": ("copy", "memcpy", "memset", "::cat", "fill_", "zero_"),
    "norms and pointwise": (
        "norm",
        "gelu",
        "silu",
        "::mul",
        "::add",
        "::sum",
        "::mean",
        "::pow",
        "triton",
        "elementwise",
    ),
}


class Trace:
    """Of one start of a run, on the ranks that hold the first copy of the model: one trace a rank.

    ``with trace.step():`` around each step. When ``train.profile_steps`` are recorded, RUN/profile has the files and
    `say` is told where.
    """

    def __init__(self, config: Config, start: int, run_dir: Path, say: Callable[[str], None]) -> None:
        left = config.train.steps - start
        self._steps, self._folder, self._say = min(config.train.profile_steps, left), run_dir / "profile", say
        self._done, self._first = 0, min(_WARM_UP, left - self._steps)
        self._profile: Any = None
        if self._steps and groups.data_rank() == 0:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if accel.is_cuda() else [])]
            self._profile = profile(activities=activities, acc_events=True)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        if self._profile is None:
            yield
            return
        if self._done == self._first:
            self._profile.start()
        with record_function("step"):
            yield
        self._done += 1
        if self._done == self._first + self._steps:
            self._profile.stop()
            try:
                self._write()
            except (OSError, RuntimeError) as error:  # torch's own writer has the second
                self._say(f"{self._folder}: the profile could not be written ({' '.join(str(error).split())})")
            self._profile = None

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """``with trace.phase("data"):`` a part of a step, under its name in the trace and on the page."""
        return contextlib.nullcontext() if self._profile is None else record_function(_PHASE + name)

    def _write(self) -> None:
        self._folder.mkdir(exist_ok=True)
        rank = groups.rank()
        trace, page = self._folder / f"rank_{rank}.json.gz", self._folder / f"rank_{rank}.txt"
        beside = trace.with_name(f".{trace.name}")  # not by pid: containers on other nodes have the same ones
        self._profile.export_chrome_trace(str(beside))
        beside.replace(trace)
        with page.open("w", encoding="utf-8") as file:
            Console(file=file, width=110).print(*_page(self._profile, self._steps), sep="\n\n")
        self._say(f"{self._steps} steps were profiled: {page}, and {trace} for https://ui.perfetto.dev")


def _page(profiled: Any, steps: int) -> list[Any]:
    """The page's parts: the step's phases, time by kind of operator, the operators that take most."""
    on_device = accel.is_cuda()
    operators: list[tuple[str, float, int]] = []
    phases: list[tuple[str, ...]] = []
    whole_s = 0.0
    for event in profiled.key_averages():
        # With a GPU each operator, step and phase comes twice, as on the host and as on the device, beside its kernels.
        kernel = event.device_type != DeviceType.CPU
        if kernel and (event.is_user_annotation or event.key == "step" or event.key.startswith(_PHASE)):
            continue
        if event.key == "step":
            whole_s = event.cpu_time_total / 1e6 / steps
            continue
        if event.key.startswith(_PHASE):
            phases.append((event.key.removeprefix(_PHASE), f"{event.cpu_time_total / 1e6 / steps:.4f}"))
            continue
        took_s = (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6 / steps
        if kernel == on_device and took_s > 0 and not event.key.startswith("ProfilerStep"):
            operators.append((event.key, took_s, round(event.count / steps)))
    operators.sort(key=lambda operator: -operator[1])
    return [
        f"{steps} steps of {whole_s:.3f} s on {torch.cuda.get_device_name() if on_device else 'the CPU'}; seconds a "
        "step, of an operator without those it calls",
        _table(["phase, on the host", "s"], phases),
        _table(["kind", "s", "of all"], _by_kind(operators)),
        _table(
            ["operator", "calls", "s", "of all"],
            [(_short(n), str(calls), f"{s:.4f}", _share(s, operators)) for n, s, calls in operators[:_ROWS]],
        ),
    ]


def _by_kind(operators: list[tuple[str, float, int]]) -> list[tuple[str, ...]]:
    seconds: dict[str, float] = defaultdict(float)
    for name, took_s, _ in operators:
        seconds[kind_of(name)] += took_s
    return [(kind, f"{s:.4f}", _share(s, operators)) for kind, s in sorted(seconds.items(), key=lambda kind: -kind[1])]


def kind_of(operator: str) -> str:
    name = operator.lower()
    return next((kind for kind, parts in _KINDS.items() if any(part in name for part in parts)), "other")


def _share(seconds: float, operators: list[tuple[str, float, int]]) -> str:
    return f"{100 * seconds / sum(took for _, took, _ in operators):.1f} %"


def _short(name: str) -> str:
    return name if len(name) <= 60 else f"{name[:57]}..."


def _table(columns: list[str], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table
