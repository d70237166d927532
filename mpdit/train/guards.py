"""Steps that must not reach the weights: which they are, what is written down of them, and when it is enough."""

import collections
import dataclasses
import enum
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from mpdit import files
from mpdit.config import Guard
from mpdit.errors import InputError
from mpdit.train.metrics import read_metrics

FORMAT = "mpdit-bad-step/1"


class Verdict(enum.IntEnum):
    """On a step. Ranks may differ in the last bit of a norm: the largest verdict of any rank holds for all."""

    GOOD = 0
    NORM_SPIKE = 1
    LOSS_SPIKE = 2
    NORM_NOT_FINITE = 3
    LOSS_NOT_FINITE = 4


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a good step's loss and gradient norm do not exceed."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def verdict(self, loss: float, norm: float) -> Verdict:
        if not math.isfinite(loss):
            return Verdict.LOSS_NOT_FINITE
        if not math.isfinite(norm):
            return Verdict.NORM_NOT_FINITE
        return Verdict.LOSS_SPIKE if loss > self.loss else Verdict(int(norm > self.grad_norm))

    def reason(self, verdict: Verdict, loss: float, norm: float) -> str:
        """In words, such as "the loss is nan"."""
        of_loss = verdict in (Verdict.LOSS_SPIKE, Verdict.LOSS_NOT_FINITE)
        what, value, limit = ("loss", loss, self.loss) if of_loss else ("gradient norm", norm, self.grad_norm)
        above = f", above {limit:.4g}" if verdict in (Verdict.LOSS_SPIKE, Verdict.NORM_SPIKE) else ""
        return f"the {what} is {value:.6g}{above}"


class Judge:
    """Goes through the steps of a run. Its state is a function of the lines of metrics.jsonl, so a run that goes on
    judges as the unbroken one does: those lines are on disk before a checkpoint is complete."""

    def __init__(self, settings: Guard) -> None:
        self.settings = settings
        self.verdict = Verdict.GOOD  # this rank's, on the step at hand
        self.in_a_row: list[int] = []  # steps skipped since the last good one or rollback
        self.rollbacks = 0
        self.before: int | None = None  # checkpoints before this step are from before the trouble; None: no trouble
        self._losses: collections.deque[float] = collections.deque(maxlen=settings.window)
        self._norms: collections.deque[float] = collections.deque(maxlen=settings.window)

    @classmethod
    def after(cls, settings: Guard, metrics: Path, start: int) -> Self:
        """As it stands before step `start` of a run with this metrics.jsonl, or none."""
        judge = cls(settings)
        for row in read_metrics(metrics) if metrics.exists() else ():
            if row["step"] < start:
                judge.note(row)
        return judge

    @property
    def limits(self) -> Limits:
        factor = self.settings.spike_factor
        if not factor or len(self._losses) < self.settings.window:
            return Limits()
        return Limits(
            loss=factor * statistics.median(self._losses),
            grad_norm=factor * statistics.median(self._norms),
        )

    @property
    def out_of_patience(self) -> bool:
        return len(self.in_a_row) >= self.settings.max_skipped

    def weigh(self, loss: float, norm: float) -> None:
        self.verdict = self.limits.verdict(loss, norm)

    def note(self, row: Mapping[str, Any]) -> None:
        """A finished step's line."""
        if "skipped" not in row:
            self._losses.append(row["loss"])
            self._norms.append(row["grad_norm"])
            self.in_a_row, self.before = [], None
            return
        self.in_a_row.append(row["step"])
        if self.before is None:
            self.before = row["step"] + 1
        if "rolled_back_to" in row:
            self.rollbacks += 1
            # Should it not help, the next one goes back further.
            self.in_a_row, self.before = [], row["rolled_back_to"]


# ---- RUN/bad_steps/step_N.json ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BadStep:
    """All that it takes to run a skipped step again, beside the run folder that it lies in."""

    step: int
    reason: str
    verdict: Verdict
    loss: float
    grad_norm: float
    limits: Limits
    sample_ids: list[int]  # of the global batch
    visits: list[int]
    seed: int
    plan_hash: str
    micro_batch: int
    config: str = "../config.yaml"  # from where this file lies


def path_of(run_dir: Path, step: int) -> Path:
    return run_dir / "bad_steps" / f"step_{step}.json"


def write(run_dir: Path, bad: BadStep) -> Path:
    """On disk when it returns."""
    path = path_of(run_dir, bad.step)
    path.parent.mkdir(exist_ok=True)
    values = dataclasses.asdict(bad) | {"verdict": bad.verdict.name}
    files.replace(path, json.dumps({"format": FORMAT, **_texts(values)}, indent=1, allow_nan=False) + "\n")
    return path


def _texts(value: Any) -> Any:
    """JSON has neither nan nor inf."""
    if isinstance(value, dict):
        return {key: _texts(item) for key, item in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> BadStep:
    """Raises InputError for a file that is not there or that :func:`write` has not written."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: can't be read ({error}); it should be a RUN/bad_steps/step_N.json.") from error
    if not isinstance(tree, dict) or tree.pop("format", None) != FORMAT:
        raise InputError(f"{path}: is no record of a skipped step, which has the format {FORMAT!r}.")
    try:
        limits = Limits(**{key: float(value) for key, value in tree.pop("limits").items()})
        kinds = {"step": int, "loss": float, "grad_norm": float, "seed": int, "micro_batch": int}
        values = {key: kinds.get(key, lambda as_it_is: as_it_is)(value) for key, value in tree.items()}
        return BadStep(**values | {"verdict": Verdict[tree["verdict"]], "limits": limits})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error}); the run folder's metrics.jsonl names its step.") from error
