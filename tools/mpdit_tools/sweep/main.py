"""``mpdit sweep SPEC``: search base hyperparameters on the proxy; ``mpdit sweep report FOLDER``: what was found."""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mpdit.errors import CheckFailed, InputError
from mpdit_tools.sweep import folder, spec
from mpdit_tools.sweep.spec import Spec

if TYPE_CHECKING:
    from mpdit.train.tracking import Tracker
    from mpdit_tools.sweep.screen import Screen
    from mpdit_tools.sweep.trial import Slot

_MLFLOW_ANSWERS_S = 300.0  # a new store takes seconds, on a busy machine many


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Search base hyperparameters on the proxy: random, grid, TPE, or one group of multipliers after the other.

    Each trial is `mpdit train` in a process and a run folder of its own, under one MLflow run. Stop it at will and
    start the same command again: it goes on. Start it twice and both work on one sweep. OUT holds best.yaml (the
    proxy with the winning values), trials.jsonl, REPORT.md with its figures, and trials/. `mpdit sweep report OUT`
    writes the report again.
    """

    spec: Annotated[Path, tyro.conf.arg(metavar="SPEC"), tyro.conf.Positional]
    """The YAML file that says what to search; examples/sweep/README.md explains it."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[section.key=value ...]"), tyro.conf.Positional] = ()
    """Keys of the proxy's config to change, for example data.path=data/icons."""
    out: Path | None = None
    """The folder of the sweep; runs/sweep-NAME by default, after SPEC's file name."""
    workers: int = 1
    """Trials side by side; each gets its share of the cores, or GPUs of its own."""
    trials: int | None = None
    """Instead of the spec's: training runs of the search."""
    retry_failed: bool = False
    """Run trials again whose process crashed before."""
    json: bool = False
    """Print the result as JSON; progress goes to stderr."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ReportArguments:
    """Write REPORT.md, the figures, trials.jsonl and best.yaml of a sweep again, however far it is."""

    folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER"), tyro.conf.Positional]
    """The folder of the sweep."""
    json: bool = False
    """Print the result as JSON."""


def main(argv: list[str]) -> int:
    """0 when a best setting was found, 130 after Ctrl-C. Raises InputError for a bad spec or folder, CheckFailed
    if no trial came to a value or one after another failed."""
    if argv[:1] == ["report"]:
        return _report(tyro.cli(ReportArguments, args=argv[1:], prog="mpdit sweep report"))
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit sweep")
    given = spec.load(arguments.spec, arguments.overrides, arguments.trials)
    if arguments.workers < 1:
        raise InputError(f"--workers is {arguments.workers}, but should be at least 1.")
    where = arguments.out or Path("runs") / f"sweep-{arguments.spec.stem}"
    with _ending_in_order():
        try:
            checked = folder.check(given)
            folder.enter(where, given)
            return _sweep(arguments, given, where, checked)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


def _report(arguments: ReportArguments) -> int:
    from mpdit_tools.sweep.study import Ledger

    given = folder.open_spec(arguments.folder)
    _tell(arguments.folder, given, Ledger(arguments.folder, given).records(), arguments.json)
    return 0


def _sweep(arguments: Arguments, given: Spec, where: Path, checked: folder.Checked) -> int:
    from mpdit_tools.sweep import report
    from mpdit_tools.sweep.drive import Drive
    from mpdit_tools.sweep.screen import Screen
    from mpdit_tools.sweep.study import Ledger

    ledger = Ledger(where, given, arguments.retry_failed)
    ledger.same_data(checked)
    with Screen(given, to_stderr=arguments.json) as screen, _parent_run(given, where, screen) as (tracker, shared):
        for said in spec.advice(given):
            screen.say(f"warning: {said}")
        screen.begin(where, ledger.records())

        def finished(record: Any, records: list[Any]) -> None:
            report.write_results(where, given, records)
            tracker.log({"step": record.number, **screen.finished(record, records)})

        drive = Drive(given, where, ledger, _slots(arguments.workers, given.ranks), shared, finished)
        try:
            drive.run()
        except KeyboardInterrupt:
            again = ", ".join(map(str, drive.cut_short)) or "none"
            screen.say(f"stopped; trials that will be run again by the same command: {again}")
            raise
        screen.stop()
        for path in _tell(where, given, ledger.records(), arguments.json):
            tracker.log_file(path)
    if not (where / "best.yaml").exists():
        raise CheckFailed(f"no setting came to a {given.metric} with each of its seeds; {where / 'REPORT.md'} has why.")
    return 0


def _tell(where: Path, given: Spec, records: Sequence[Any], as_json: bool) -> list[Path]:
    """Write everything; say where it is and what won. The files."""
    from mpdit_tools.sweep import report, text
    from mpdit_tools.sweep.summary import summarize

    summary = summarize(where.name, given, records)
    files = [*report.write_results(where, given, records), *report.write_report(where, summary)]
    if as_json:
        print(json.dumps(report.as_json(summary)))
        return files
    if summary.best:
        print(f"best {given.metric} {text.value_of(summary.best)}")
        for key, value in summary.best.params.items():
            print(f"  {key} = {value!r}")
        for key, remedy in summary.narrow.items():
            print(f"  {key} lies at an end of what was searched: {remedy}")
    print(f"{where / 'REPORT.md'}{', ' + str(where / 'best.yaml') if summary.best else ''}")
    return files


# ---- what the trials share -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _parent_run(given: Spec, where: Path, screen: "Screen") -> Iterator[tuple["Tracker", dict[str, Any]]]:
    """The MLflow run that the trials' runs are children of, and the config keys that make them so."""
    from mpdit.train.tracking import Tracker

    uri = given.proxy.run.mlflow_uri or f"sqlite:///{where.absolute().parent / 'mlflow.db'}"
    off: list[str] = []

    def warn(said: str) -> None:
        off.append(said)
        screen.say(said)

    params = {key: str(value) for key, value in spec.fixed(given).items()}
    tags = {"mpdit.kind": "sweep", "mpdit.fingerprint": spec.fingerprint(given)}
    with folder.locked(where / ".mlflow.lock"):  # two workers, one parent
        tracker = Tracker(where, uri=uri, experiment=given.proxy.run.experiment, params=params, tags=tags, warn=warn)
        deadline = time.monotonic() + _MLFLOW_ANSWERS_S
        while tracker.run_id is None and not off and time.monotonic() < deadline:
            time.sleep(0.05)
    if tracker.run_id is None and not off:
        screen.say("MLflow does not answer: the trials' runs will stand beside the sweep's, not under it")
    parent = {"run.mlflow_parent": tracker.run_id} if tracker.run_id else {}
    with tracker:
        yield tracker, {"run.mlflow_uri": uri, **parent}


def _slots(workers: int, ranks: int) -> "list[Slot]":
    """Each worker's share of the cores; where there are GPUs, the next `ranks` of them."""
    from mpdit.train.environment import cores
    from mpdit_tools.sweep.trial import Slot, visible_devices

    threads, devices = max(1, cores() // workers), visible_devices()
    if devices and ranks > len(devices):
        there = "there is 1 GPU" if len(devices) == 1 else f"there are {len(devices)} GPUs"
        raise InputError(f"ranks is {ranks}, but {there}; give at most as many.")
    mine = [[devices[(w * ranks + k) % len(devices)] for k in range(ranks)] if devices else [] for w in range(workers)]
    return [Slot(threads=threads, devices=tuple(own) if workers > 1 else ()) for own in mine]


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does. A SIGINT that is ignored, as in the background of a script, is ignored
    by a function: so the trials, which are asked to end by it, do not inherit the ignoring."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGINT] is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
