"""How long recorded work takes on a GPU: a roofline with stated efficiencies."""

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from mpdit.config import Config
from mpdit.errors import InputError
from mpdit.gpus import GPU, GPUS
from mpdit.parallel import fp8_rules
from mpdit.parallel.record import Op, Work


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """What of the peaks is reached, and what each start costs. Assumed; a measurement file replaces any of them."""

    gemm: float = 0.70
    attention: float = 0.45
    memory: float = 0.80
    node: float = 0.75
    network: float = 0.75
    operator_s: float = 3e-6  # the least that an operator takes
    collective_s: float = 15e-6  # the least that a collective takes


def calibrated(path: Path | None) -> Efficiency:
    """The efficiencies of a YAML file, the assumed ones where it is silent. Raises InputError for what can't be."""
    if path is None:
        return Efficiency()
    try:
        given: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: can't be read as YAML: {' '.join(str(error).split())}.") from error
    known = {field.name for field in dataclasses.fields(Efficiency)}
    if not isinstance(given, dict) or not given.keys() <= known:
        unknown = ", ".join(map(str, set(given) - known)) if isinstance(given, dict) else repr(given)
        raise InputError(f"{path}: {unknown} is no efficiency; there are {', '.join(sorted(known))}.")
    for name, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
            raise InputError(f"{path}: {name} is {value}, but should be a number above 0 and at most 1.")
    return Efficiency(**given)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A GPU with efficiencies, in nodes of `gpus_per_node`."""

    gpu: GPU
    efficiency: Efficiency
    gpus_per_node: int
    precision: str  # parallel.precision

    @classmethod
    def of(cls, gpu: str, config: Config, gpus_per_node: int = 8, calibration: Path | None = None) -> "Machine":
        """`gpu` is a name of GPUS. Raises InputError for a bad file of measured efficiencies, and for a GPU without the
        config's FP8."""
        if config.parallel.precision == "fp8":
            fp8_rules.check_gpu(config.parallel.fp8_recipe, gpu.upper(), GPUS[gpu].capability)
        return cls(
            gpu=GPUS[gpu],
            efficiency=calibrated(calibration),
            gpus_per_node=gpus_per_node,
            precision=config.parallel.precision,
        )

    @property
    def peak_flops_s(self) -> float:
        return self.gpu.flops_s(self.precision)

    def _flops_s(self, op: Op) -> float:
        return self.gpu.fp8_flops_s if op.name == "_scaled_mm" else self.peak_flops_s

    def link_bytes_s(self, *, span: int) -> float:
        """What a GPU sends within a group whose ranks lie `span` apart at most."""
        if span <= self.gpus_per_node:
            return self.gpu.node_bytes_s * self.efficiency.node
        return self.gpu.network_bytes_s * self.efficiency.network

    def seconds(self, work: Work, spans: dict[str, int]) -> float:
        """Operators one after another, each as its arithmetic or its memory allows; collectives do not overlap them.

        `spans`: by the kind of group, how far apart its ranks lie.
        """
        e = self.efficiency
        took = 0.0
        for op in work.ops:
            share = e.attention if "attention" in op.name else e.gemm
            took += max(
                op.flops / (self._flops_s(op) * share),
                op.bytes / (self.gpu.memory_bytes_s * e.memory),
                e.operator_s,
            )
        for one in work.collectives:
            took += e.collective_s + one.bytes / self.link_bytes_s(span=spans[one.group])
        return took

    def memory_seconds(self, size: float) -> float:
        """To read or write so many bytes of the GPU's memory."""
        return size / (self.gpu.memory_bytes_s * self.efficiency.memory)
