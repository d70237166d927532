"""``mpdit rehearse CONFIG``: a list of go and no-go."""

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mpdit import config as configs
from mpdit.config import Config
from mpdit.errors import CheckFailed, InputError


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Go or no-go, before a GPU hour is spent: the layout at full size without memory, the same layout narrow on this
    machine's CPU against one process, the data, the disk, the tracking server, the GPU's memory."""

    config: Annotated[Path, tyro.conf.arg(metavar="CONFIG"), tyro.conf.Positional]
    """A launch folder, or a config (YAML). plan.json beside it says how many GPUs of which kind."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[section.key=value ...]"), tyro.conf.Positional] = ()
    """Keys of the config to change."""
    gpus: int = 0
    """GPUs of the job; 0: those of plan.json, or as many as one copy of the model needs."""
    gpu: Literal["", "a100", "h100", "h200", "b200"] = ""
    """The kind; without it plan.json's, or h100."""
    without: tuple[Literal["disk", "data", "narrow-run", "tracking-server"], ...] = ()
    """Checks to leave out, for what is on the cluster and not on this machine."""
    json: bool = False
    """Print the findings as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    check: str
    go: bool
    said: str
    seconds: float


def main(argv: list[str]) -> int:
    """0 if all is go, 1 otherwise. Raises InputError for a config that can't be read."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit rehearse")
    config = configs.load(arguments.config, arguments.overrides)
    gpus, gpu = _asked(arguments, config)
    from mpdit.parallel import accel

    accel.enter_to_imagine()
    import torch

    torch.set_num_threads(1)  # ranks are forked from here: a pool of threads would not survive that
    findings = Rehearsal(config, gpus, gpu, without=arguments.without, quiet=arguments.json).findings()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(one) for one in findings], indent=1))
    against = [one.check for one in findings if not one.go]
    if not arguments.json:
        left_out = f", without {', '.join(arguments.without)}" if arguments.without else ""
        print(f"NO-GO: {', '.join(against)}." if against else f"GO: {len(findings)} checks{left_out}.")
    return 1 if against else 0


def _asked(arguments: Arguments, config: Config) -> tuple[int, str]:
    """GPUs and their kind: as given, else as planned, else one copy of the model on H100s."""
    beside = (arguments.config if arguments.config.is_dir() else arguments.config.parent) / "plan.json"
    planned: dict[str, Any] = {}
    if beside.is_file():
        try:
            planned = json.loads(beside.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{beside}: can't be read as JSON ({error}); write it again with mpdit plan.") from error
    parallel = config.parallel
    gpus = arguments.gpus or int(planned.get("gpus", 0)) or parallel.tp * parallel.cp * parallel.pp
    return gpus, arguments.gpu or str(planned.get("gpu", "h100"))


class Rehearsal:
    """The checks in order; what needs a check that failed is left out."""

    def __init__(self, config: Config, gpus: int, gpu: str, *, without: Sequence[str], quiet: bool) -> None:
        self.config, self.gpus, self.gpu, self.without, self.quiet = config, gpus, gpu, without, quiet
        self.found: list[Finding] = []
        self.parameters = 0

    def findings(self) -> list[Finding]:
        from mpdit_tools.rehearse import around, narrow

        config = self.config
        resolved: list[Config] = []
        if self._check("config", lambda: self._config(resolved)):
            self._check("stages", lambda: self._stages(resolved[0]))
            self._check("memory", lambda: self._memory(resolved[0]))
            self._check("disk", lambda: around.disk(config, self.parameters))
        has_data = self._check("data", lambda: around.data(config))
        if resolved and has_data:  # before anything that starts threads: its ranks are forked from here
            with tempfile.TemporaryDirectory(prefix="rehearsal_") as folder:
                thin = narrow.narrowed(resolved[0], self.data_ranks)
                self._check("narrow run", lambda: narrow.run(thin, Path(folder)))
        if has_data:
            self._check("pictures", lambda: around.pictures(config))
        self._check("tracking server", lambda: around.tracking(config))
        return self.found

    @property
    def data_ranks(self) -> int:
        parallel = self.config.parallel
        return self.gpus // (parallel.tp * parallel.cp * parallel.pp)

    def _check(self, name: str, run: Callable[[], str]) -> bool:
        """Whether it was made and is go."""
        if name.replace(" ", "-") in self.without:
            if not self.quiet:
                print(f"-      {name:<16} left out", flush=True)
            return False
        began = time.monotonic()
        try:
            go, said = True, run()
        except (InputError, CheckFailed) as error:
            go, said = False, str(error)
        except Exception as error:  # a network that can't even run is what this is for: the other checks go on
            go, said = False, f"ended in {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        finding = Finding(check=name, go=go, said=said, seconds=round(time.monotonic() - began, 2))
        self.found.append(finding)
        if not self.quiet:
            print(f"{'go   ' if go else 'NO-GO'}  {name:<16} {said}  ({finding.seconds:.1f} s)", flush=True)
        return go

    def _config(self, resolved: list[Config]) -> str:
        from mpdit.train import preflight

        config = preflight.without_data(self.config, self.gpus)
        resolved.append(config)
        parallel, count = config.parallel, config.train.batch_size // self.data_ranks
        return (
            f"{self.gpus} GPUs: tp {parallel.tp}, cp {parallel.cp}, pp {parallel.pp}, vpp {parallel.vpp}, "
            f"{self.data_ranks} data-parallel ranks, {count // parallel.micro_batch} micro-batches of "
            f"{parallel.micro_batch}"
        )

    def _stages(self, config: Config) -> str:
        from mpdit_tools.mup_table import with_vocabulary
        from mpdit_tools.rehearse import tiles

        known = with_vocabulary(config)[0]
        model = tiles.whole(known)
        self.parameters = sum(math.prod(tag.shape) for tag in model.values())
        return tiles.check(known, list(tiles.held(known)), model)

    def _memory(self, config: Config) -> str:
        from mpdit_tools.mup_table import with_vocabulary
        from mpdit_tools.plan import report
        from mpdit_tools.plan.gpus import Machine
        from mpdit_tools.plan.resolve import of

        machine = Machine.of(self.gpu, config)
        plan, _ = of(with_vocabulary(config)[0], self.gpus, machine)
        most, has = plan.memory[plan.fullest].peak / 1e9, machine.gpu.memory_bytes / 1e9
        said = f"stage {plan.fullest} needs {most:.1f} GB of an {self.gpu.upper()}'s {has:.0f}"
        if not report.fits(plan, machine):
            raise CheckFailed(f"{said}; see mpdit plan for what would fit.")
        return said
