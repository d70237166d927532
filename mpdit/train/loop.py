"""The loop: batch, forward and backward through the pipeline, step, average, record; and now and then look and save."""

import contextlib
import dataclasses
import fcntl
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from mpdit.config import Config, dump, to_dict
from mpdit.data import text
from mpdit.data.latents import Autoencoder
from mpdit.data.plan import Plan
from mpdit.data.shards import Shards
from mpdit.errors import CheckFailed, InputError
from mpdit.mup.table import rows
from mpdit.parallel import groups
from mpdit.sample import grid
from mpdit.train import batches, cached, checkpoint, session
from mpdit.train.checkpoint import Position
from mpdit.train.console import Reporter
from mpdit.train.environment import environment
from mpdit.train.metrics import Metrics
from mpdit.train.session import Session
from mpdit.train.tracking import Tracker, redact_uri

_LETTING_GO_S = 5.0  # a job that was just killed may take a moment to let go of its run folder
_GRID_PROMPTS = 16  # validation captions drawn when sample.prompts is empty


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sets:
    """The data of a run, opened and checked."""

    train: Shards
    val: Shards
    tokenizer: text.Tokenizer
    plan: Plan
    autoencoder: Autoencoder | None  # None: pixels

    @classmethod
    def open(cls, config: Config) -> "Sets":
        train, val = Shards.open(config.data.path, "train"), Shards.open(config.data.path, "val")
        plan = Plan(
            samples=len(train),
            batch_size=config.train.batch_size,
            seed=config.train.seed,
            fingerprint=train.fingerprint,
        )
        return cls(
            train=train,
            val=val,
            tokenizer=cached.tokenizer(config, train, val),
            plan=plan,
            autoencoder=cached.autoencoder(config, train),
        )


def find_start(config: Config, sets: Sets, warn: Any) -> tuple[Path | None, int]:
    """(checkpoint, step) to go on from, (None, 0) for a new run. Raises InputError for another model or data."""
    path = checkpoint.newest(Path(config.run.dir), warn)
    if path is None:
        return None, 0
    at = checkpoint.position(path, config)
    checkpoint.same_tokenizer(path, at, sets.tokenizer)
    if sets.autoencoder is not None:
        sets.autoencoder.same_as_in(Path(config.run.dir))
    if at.plan_hash != sets.plan.hash:
        raise InputError(
            f"{path}: was trained with other data, train.batch_size or train.seed than the config has; set them back, "
            "or give another run.dir."
        )
    return path, at.step


def train(config: Config, asked: Config | None = None) -> None:
    """Train to ``train.steps``, from the newest checkpoint if the run folder has one. Collective; groups are up.

    `asked` is the config before preflight resolved it: its open values are written down as open, so that the run
    folder's config.yaml can be started in another layout. A run that has its steps is left as it is.

    Raises InputError for a run folder of another model or that another job writes, CheckFailed when the run diverges.
    """
    sets = Sets.open(config)
    with contextlib.ExitStack() as held:
        groups.decided_by_rank_0(lambda: held.enter_context(_only_writer(Path(config.run.dir))))
        _train(config, asked or config, sets)


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Holds the run folder for this job, until its process ends. Raises InputError if another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        deadline = time.monotonic() + _LETTING_GO_S
        while not _locked(file):
            if time.monotonic() > deadline:
                raise InputError(f"run.dir {folder}: another job is training there; stop it, or give another.")
            time.sleep(0.1)
        yield


def _locked(file: IO[str]) -> bool:
    # Of the process alone: megatron-core forks a server for its checkpoints' queue off rank 0, which would inherit a
    # flock and, outliving a rank 0 that was killed, keep the restarted one out.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _train(config: Config, asked: Config, sets: Sets) -> None:
    path, start = groups.decided_by_rank_0(lambda: find_start(config, sets, _warn))
    if start >= config.train.steps:
        if groups.rank() == 0:
            _warn(f"{path}: the run has its {config.train.steps} steps; raise train.steps to go on.")
        return
    run = session.build(config)
    if path is not None:
        checkpoint.load(run, path, start)
    with _Recorder(config, asked, sets, run, start) as recorder:
        if path is not None:
            recorder.report.say(f"going on from {path} at step {start}")
        for note in filter(None, [run.network.note, *cached.notes(sets.autoencoder, sets.tokenizer)]):
            recorder.report.say(note)
        try:
            _Run(config, sets, run, recorder).from_step(start)
        except InputError as error:
            error.any_rank = True
            raise


def _warn(text: str) -> None:
    print(f"mpdit: {text}", flush=True)


class _Recorder:
    """The run folder and what stands behind it. Only the first rank writes; the others' calls do nothing."""

    def __init__(self, config: Config, asked: Config, sets: Sets, run: Session, start: int) -> None:
        self.dir = Path(config.run.dir)
        self.first = groups.rank() == 0
        self._open = contextlib.ExitStack()
        self.metrics: Metrics | None = None
        self.tracker: Tracker | None = None
        if self.first:
            open_values = dataclasses.replace(config, parallel=asked.parallel)
            (self.dir / "config.yaml").write_text(redact_uri(dump(open_values)), encoding="utf-8")
            sets.tokenizer.save(self.dir)  # pictures need no data set
            if sets.autoencoder is not None:
                sets.autoencoder.save(self.dir)
            _write_json(self.dir / "mup_table.json", rows(run.network.table))
            _write_json(self.dir / "environment.json", environment())
            self.metrics = self._open.enter_context(Metrics(self.dir / "metrics.jsonl", start))
            self.tracker = self._open.enter_context(
                Tracker(self.dir, uri=config.run.mlflow_uri, experiment=config.run.experiment, params=to_dict(config))
            )
            self.tracker.log_file(self.dir / "mup_table.json")
        self.report = self._open.enter_context(
            Reporter(start, config.train.steps, config.train.log_every, quiet=not self.first)
        )

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def log(self, row: dict[str, Any]) -> None:
        if self.metrics and self.tracker:
            self.metrics.log(row)
            self.tracker.log(row)

    def picture(self, path: Path) -> None:
        if self.tracker:
            self.tracker.log_file(path, "samples")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


class _Run:
    """The steps of one start."""

    def __init__(self, config: Config, sets: Sets, run: Session, recorder: _Recorder) -> None:
        self.config, self.sets, self.run, self.recorder = config, sets, run, recorder
        self._val: list[batches.Batch] | None = None
        self._ema_due = False

    def from_step(self, start: int) -> None:
        train = self.config.train
        feed = batches.TrainFeed(self.config, self.sets.train, self.sets.plan, self.sets.tokenizer, start)
        try:
            for step in range(start, train.steps):
                row, done = self._step(step, feed), step + 1
                with self._looking(done) as looking:
                    if looking and self._due(done, train.val_every):
                        row["val_loss"] = self._validate()
                    if looking and self._due(done, train.sample_every):
                        self._draw(done)
                self._record(row)
                if self._due(done, train.save_every):
                    self._save(done)
        finally:
            feed.close()

    def _due(self, done: int, every: int) -> bool:
        """Every so many steps, and at the end."""
        return done == self.config.train.steps or (every > 0 and done % every == 0)

    def _step(self, step: int, feed: batches.TrainFeed) -> dict[str, Any]:
        """One optimizer step; its line for metrics.jsonl."""
        began = time.monotonic()
        micro_batches = feed.next()
        data_s = time.monotonic() - began
        loss = self._finite(self.run.forward_backward(micro_batches), "loss", step)
        repa_loss = {"repa_loss": self.run.repa_loss()} if self.config.objective.repa_weight else {}
        self._average()  # of the step before: only now are its parameters everywhere (overlap_param_gather)
        lr = self.run.scheduler.get_lr({})  # the base value's; a group's own stands in the muP table
        norm = self._finite(self.run.update(), "gradient norm", step)
        self._ema_due = True
        step_s = time.monotonic() - began
        batch = self.config.train.batch_size
        return {
            "step": step,
            "loss": loss,
            **repa_loss,
            "lr": lr,
            "grad_norm": norm,
            "images": (step + 1) * batch,
            # What was really read, not what was planned: equal numbers, equal (sample id, visit) pairs.
            "samples": f"{groups.sum_over_data(sum(m.sample_key for m in micro_batches)) % 2**48:012x}",
            "epoch": round(self.sets.plan.epoch(step + 1), 4),
            "step_s": round(step_s, 6),
            "data_s": round(data_s, 6),
            "images_per_s": round(batch / step_s, 2),
        }

    def _finite(self, value: float, what: str, step: int) -> float:
        """Stops a diverged run before it averages or saves what it has become. The value is the same on every rank."""
        if not math.isfinite(value):
            raise CheckFailed(
                f"step {step}: the {what} is {value}, the run has diverged; lower optim.lr or raise "
                f"optim.warmup_steps. The checkpoints in {self.config.run.dir} are from before."
            )
        return value

    def _average(self) -> None:
        if self._ema_due:
            self.run.ema.update()
            self._ema_due = False

    @contextlib.contextmanager
    def _looking(self, done: int) -> Iterator[bool]:
        """Before a look or a save: parameters settled, average up to date. True if validation or pictures are due."""
        train = self.config.train
        look = self._due(done, train.val_every) or self._due(done, train.sample_every)
        if not (look or self._due(done, train.save_every)):
            yield False
            return
        with self.run.settled():
            self._average()
            if look:
                with self.run.ema.applied(), torch.no_grad():
                    yield True
            else:
                yield False

    def _validate(self) -> float:
        """Loss on unseen concepts of the averaged weights, with fixed noise and times."""
        if self._val is None:
            self._val = batches.validation_batches(self.config, self.sets.val, self.sets.tokenizer)
        return self.run.network.validate(self._val)

    def _draw(self, done: int) -> None:
        config = self.config
        prompts = list(config.sample.prompts) or [
            self.sets.val.caption(int(i)) for i in batches.validation_samples(self.sets.val, _GRID_PROMPTS)
        ]
        why_not = groups.decided_by_rank_0(
            lambda: cached.cannot_draw(self.sets.autoencoder, self.sets.tokenizer, prompts)
        )
        if why_not:
            self.recorder.report.say(f"step {done}  {why_not}")
            return
        images = session.draw(self.run.network, config, prompts, self.sets.tokenizer)
        if self.recorder.first:
            path = self.recorder.dir / "samples" / f"step_{done:07d}.png"
            self.recorder.picture(grid.save(grid.grid(images, prompts), path))

    def _record(self, row: dict[str, Any]) -> None:
        done = row["step"] + 1
        self.recorder.log(row)
        self.recorder.report.step(done, row["loss"], row["images_per_s"])
        if "val_loss" in row:
            self.recorder.report.say(f"step {done}  validation loss on unseen concepts {row['val_loss']:.4f}")

    def _save(self, done: int) -> None:
        if self.recorder.metrics:
            self.recorder.metrics.sync()
        sets = self.sets
        at = Position(step=done, plan_hash=sets.plan.hash, tokenizer_sha256=sets.tokenizer.sha256)
        checkpoint.save(self.run, self.config, at, self.recorder.dir)
