"""The ledger of a sweep: Optuna's study in SWEEP/optuna.db, from which any process takes the next trial.

Who takes a trial holds the lock of its folder until it is over. A trial that the study calls running while nobody
holds its lock was cut short, by Ctrl-C, SIGKILL or a power cut: it is run again, in the same folder.
"""

import dataclasses
import fcntl
import math
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from mpdit.errors import InputError
from mpdit_tools.sweep import plan
from mpdit_tools.sweep.folder import TRIALS, Checked, locked
from mpdit_tools.sweep.plan import DONE, WAIT, Wish
from mpdit_tools.sweep.results import Record, State, key, settings
from mpdit_tools.sweep.space import Axis, Factors, Params, Range, of
from mpdit_tools.sweep.spec import Spec, fingerprint

optuna.logging.set_verbosity(optuna.logging.WARNING)
_OVER: dict[State, TrialState] = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "diverged": TrialState.COMPLETE,  # with an infinite value: the sampler learns from it, as from a bad one
    "failed": TrialState.FAIL,
}
_HUGE = 2**53


@dataclasses.dataclass(kw_only=True, slots=True)
class Claim:
    """A trial that this process runs; `lock` is its folder's."""

    number: int
    params: Params
    seed: int
    kind: str
    folder: Path
    trial: optuna.trial.Trial
    lock: IO[str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a trial ended; the fields are those of ``results.Record``."""

    state: State
    value: float | None
    images: int
    wall_s: float
    error: str = ""


class Ledger:
    """Trials of the sweep in `folder`, which exists."""

    def __init__(self, folder: Path, spec: Spec, retry_failed: bool = False) -> None:
        self._folder, self._spec, self._lock = folder, spec, folder / ".lock"  # of decisions: one process at a time
        with locked(self._lock):
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{folder.absolute() / 'optuna.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            self._study = optuna.create_study(
                study_name="sweep", storage=storage, load_if_exists=True, pruner=_pruner(spec)
            )
            known = self._study.user_attrs.get("fingerprint")
            if known is None:
                self._study.set_user_attr("fingerprint", fingerprint(spec))
            elif known != fingerprint(spec):
                raise InputError(f"{folder}: spec.yaml was edited since its trials were run; give another --out.")
        latest = [record for s in settings(self.records()).values() for record in s.by_seed.values()]
        self._again = [record for record in latest if record.state == "failed"] if retry_failed else []

    def same_data(self, checked: Checked) -> None:
        """Keep what is known of data and work. Raises InputError if earlier trials had other data."""
        with locked(self._lock):
            known = self._study.user_attrs.get("data", checked.data)
            if known != checked.data:
                raise InputError(
                    f"{self._folder}: its trials were trained on other data than data.path holds now; give the same "
                    "data, or another --out."
                )
            self._study.set_user_attr("data", checked.data)
            self._study.set_user_attr("flops_per_image", checked.flops_per_image)

    @property
    def study(self) -> optuna.Study:
        return self._study

    def records(self) -> list[Record]:
        """All trials that were started, by number."""
        flops = self._study.user_attrs.get("flops_per_image")
        trials = self._study.get_trials(deepcopy=False)
        return [_record(trial, flops) for trial in trials if _whole(trial)]

    # ---- taking a trial ----

    def claim(self) -> Claim | Literal["wait", "done"]:
        """The next trial for this process; "wait" while it depends on ones that run, "done" when there is none."""
        with locked(self._lock):
            return self._cut_short() or self._next()

    def _cut_short(self) -> Claim | None:
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):  # wished for, not yet taken
            self._study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self._take(trial.number)
            if lock is None:
                continue
            if _whole(trial) and len(trial.params) == len(self._spec.axes):
                return self._claimed(optuna.trial.Trial(self._study, trial._trial_id), lock)
            self._study.tell(trial.number, state=TrialState.FAIL)  # the process ended while the values were chosen
            lock.close()
        return None

    def _next(self) -> Claim | Literal["wait", "done"]:
        records = self.records()
        wish: Any = self._retried(records) or plan.following(self._spec, records)
        if wish in (WAIT, DONE):
            return wish
        self._study.sampler = _sampler(self._spec, len(self._study.get_trials(deepcopy=False)))
        attributes = {"seed": wish.seed, "kind": wish.kind}
        if wish.params is not None:
            self._study.enqueue_trial(wish.params, user_attrs=attributes)
        trial = self._study.ask({axis.key: distribution(axis, self._spec) for axis in self._spec.axes})
        for name, value in attributes.items():
            if name not in trial.user_attrs:
                trial.set_user_attr(name, value)
        lock = self._take(trial.number)
        assert lock is not None
        return self._claimed(trial, lock)

    def _retried(self, records: list[Record]) -> Wish | None:
        there = settings(records)
        while self._again:
            failed = self._again.pop(0)
            if there[key(failed.params)].by_seed[failed.seed].number == failed.number:  # no other process was quicker
                return Wish(seed=failed.seed, params=failed.params, kind=failed.kind)
        return None

    def _take(self, number: int) -> IO[str] | None:
        folder = self._folder / TRIALS / f"{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".sweep.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        return lock

    def _claimed(self, trial: optuna.trial.Trial, lock: IO[str]) -> Claim:
        attributes = trial.user_attrs
        return Claim(
            number=trial.number,
            params=dict(trial.params),
            seed=attributes["seed"],
            kind=attributes["kind"],
            folder=Path(lock.name).parent,
            trial=trial,
            lock=lock,
        )

    # ---- on the way, and the end ----

    def look(self, claim: Claim, step: int, value: float) -> bool:
        """Tell the pruner what a run has come to at `step`; True if the trial is hopeless."""
        claim.trial.report(value, step)
        return claim.trial.should_prune()

    def finish(self, claim: Claim, outcome: Outcome) -> None:
        for name in ("state", "images", "wall_s", "error"):
            claim.trial.set_user_attr(name, getattr(outcome, name))
        value = {"complete": outcome.value, "diverged": math.inf}.get(outcome.state)
        self._study.tell(claim.trial, value, state=_OVER[outcome.state])
        self.let_go(claim)

    def let_go(self, claim: Claim) -> None:
        """An unfinished trial that is let go is taken again by whoever asks next."""
        claim.lock.close()


def _whole(trial: FrozenTrial) -> bool:
    """Whether it was claimed to the end: a process that is killed while it claims leaves a part of a trial."""
    told = trial.user_attrs
    ended = "state" in told or not trial.state.is_finished()
    return trial.state != TrialState.WAITING and {"seed", "kind"} <= told.keys() and ended


def _record(trial: FrozenTrial, flops_per_image: int | None) -> Record:
    told = trial.user_attrs
    images = told.get("images", 0)
    state: State = told["state"] if trial.state.is_finished() else "running"
    return Record(
        number=trial.number,
        kind=told["kind"],
        state=state,
        params=dict(trial.params),
        seed=told["seed"],
        value=trial.value if state == "complete" else None,
        images=images,
        flops=flops_per_image and images * flops_per_image,
        wall_s=told.get("wall_s", 0.0),
        error=told.get("error", ""),
        looks=trial.intermediate_values,
    )


# ---- Optuna's parts --------------------------------------------------------------------------------------------------


def _sampler(spec: Spec, number: int) -> optuna.samplers.BaseSampler:
    """One whose draws depend on the trial's number alone: a resumed sweep does not repeat its first draws, and two
    workers do not draw the same."""
    seed = int(np.random.SeedSequence([spec.sampler_seed, number]).generate_state(1)[0])
    if spec.mode == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(spec: Spec) -> optuna.pruners.BasePruner:
    prune = spec.prune
    if prune is None:
        return optuna.pruners.NopPruner()
    if prune.kind == "median":
        return optuna.pruners.PercentilePruner(
            100 * prune.keep, n_startup_trials=prune.startup_trials, n_warmup_steps=prune.warmup_steps
        )
    return optuna.pruners.SuccessiveHalvingPruner(
        min_resource=prune.warmup_steps, reduction_factor=prune.reduction, min_early_stopping_rate=0
    )


def distribution(axis: Axis, spec: Spec) -> BaseDistribution:
    if isinstance(axis, Range):
        if axis.whole:
            return IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        return FloatDistribution(axis.low, axis.high, log=axis.log)
    if spec.mode == "coordinate":  # its grid may grow, and factors lead anywhere
        whole = isinstance(of(spec.proxy, axis.key), int)
        return IntDistribution(0, _HUGE) if whole else FloatDistribution(-1e300, 1e300)
    assert not isinstance(axis, Factors)
    return CategoricalDistribution(axis.values)
