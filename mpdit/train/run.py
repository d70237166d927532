"""The steps of one start: batch, forward and backward, a judgement, update, average, record; and looks and saves."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from mpdit.config import Config
from mpdit.data.loader import Reader
from mpdit.data.quarantine import FILE, Bad, Quarantine
from mpdit.errors import CheckFailed
from mpdit.parallel import accel, groups
from mpdit.sample import grid
from mpdit.train import batches, cached, checkpoint, guards, session, signals, snapshots
from mpdit.train.checkpoint import Position
from mpdit.train.control import Control
from mpdit.train.guards import Judge, Verdict
from mpdit.train.meters import Meter
from mpdit.train.recorder import Recorder
from mpdit.train.saver import Saver
from mpdit.train.session import Session
from mpdit.train.sets import Sets
from mpdit.train.signals import Signals
from mpdit.train.snapshots import Snapshots
from mpdit.train.trace import Trace
from mpdit.train.watchdog import Watchdog

_GRID_PROMPTS = 16  # validation captions drawn when sample.prompts is empty


class Run:
    """A session that stands at a step, with `skipped` steps before it that are not in its weights, and its data."""

    def __init__(
        self,
        config: Config,
        sets: Sets,
        run: Session,
        recorder: Recorder,
        *,
        judge: Judge,
        skipped: int,
        caught: Signals,
        watch: Watchdog,
        meter: Meter,
    ) -> None:
        self.config, self.sets, self.run, self.recorder, self.meter = config, sets, run, recorder, meter
        self.judge, self.skipped, self.watch = judge, skipped, watch
        self.saver = Saver(recorder.dir, recorder.report.say, watch.alive)
        self.snapshots = Snapshots(recorder.dir, recorder.report.say, watch.alive)
        self.bad: list[Bad] = []  # samples that this rank has found and not told yet
        self.control = Control()
        self.control.add("verdict", lambda: judge.verdict)
        self.control.add("signal", lambda: caught.caught)
        self.control.add("saving", lambda: not self.saver.done)
        self.control.add("taking a snapshot", lambda: not self.snapshots.done)
        self.control.add("bad samples", lambda: len(self.bad))
        self._samples = 0  # of this step, of all data ranks; 0 on a stage that reads none
        self.control.add("samples", lambda: self._samples or -1)
        self.control.add("other samples", lambda: -self._samples or -(2**62))
        for name, read in meter.flags.items():
            self.control.add(name, read)
        self._quarantine: Quarantine | None = None
        if recorder.first:
            self._quarantine = Quarantine(recorder.dir / FILE, len(sets.train), config.data.max_bad_fraction)
        self._val: list[list[batches.Batch]] | None = None
        self._ema_due = self._save_due = False

    def from_step(self, start: int) -> None:
        """To the end. Raises CheckFailed when the run diverges; signals.Stop when, asked to stop, it has saved."""
        self.saver.newest = start or None
        self.trace = Trace(self.config, start, self.recorder.dir, self.recorder.report.say)
        self._set_aside(start)  # a run that was stopped for its bad samples does not go on
        made = batches.TrainFeed(self.config, self.sets.train, self.sets.plan, self.sets.tokenizer, start)
        # A CPU has no time that nobody uses.
        feed = batches.Ahead(made) if accel.is_cuda() else made
        try:
            for step in range(start, self.config.train.steps):
                self._whole_step(step, feed)
            self.snapshots.finish()
            self.saver.finish()
        except (CheckFailed, signals.Stop):  # the same on every rank
            self.snapshots.wait()
            self.saver.wait()
            raise
        finally:
            self.snapshots.close()
            self.saver.close()
            feed.close()

    def _whole_step(self, step: int, feed: batches.TrainFeed | batches.Ahead) -> None:
        """A step with what is due after it."""
        train, done = self.config.train, step + 1
        with self.trace.step():
            row, signal = self._step(step, feed)
        save, snapshot = self._to_save(done) or signal != 0, self._to_snapshot(done)
        with self._looking(done, save or snapshot) as looking:
            if looking and self._due(done, train.val_every):
                self.watch.at(step, "validation")
                row["val_loss"] = self._validate()
            if looking and self._due(done, train.sample_every):
                self.watch.at(step, "pictures")
                self._draw(done)
        self._record(row)
        if save or snapshot:
            self.watch.at(step, "save")
        if save:
            self._save(done, self.saver)
            self._save_due = False
        if snapshot:
            self._save(done, self.snapshots)
        if signal and done < train.steps:
            self.saver.wait()
            raise signals.Stop(signal, self.saver.newest)

    def _due(self, done: int, every: int) -> bool:
        """Every so many steps, and at the end."""
        return done == self.config.train.steps or (every > 0 and done % every == 0)

    def _step(self, step: int, feed: batches.TrainFeed | batches.Ahead) -> tuple[dict[str, Any], int]:
        """One step, skipped if it must not reach the weights: its line for metrics.jsonl, and the signal that some rank
        has got, or 0."""
        began = time.monotonic()
        with self._phase(step, "data"):
            micro_batches = feed.next()
        self.bad += feed.take_bad()
        data_s = time.monotonic() - began
        with self._phase(step, "forward and backward"):
            loss = self.run.forward_backward(micro_batches)
        repa_loss = {"repa_loss": _finite(self.run.repa_loss())} if self.config.objective.repa_weight else {}
        with self._phase(step, "average"):  # of the step before: only now are its parameters everywhere
            self._average()  # (overlap_param_gather)
        lr = self.run.scheduler.get_lr({})  # the base value's; a group's own stands in the muP table
        with self._phase(step, "gradient norm"):
            norm = self.run.gradient_norm()
        self.judge.weigh(loss, float(norm))
        self._samples = groups.sum_over_data(sum(m.sample_key for m in micro_batches)) % 2**48
        agreed = self.control.agree()
        self._same_samples(step, agreed)
        verdict = Verdict(agreed["verdict"])
        if verdict:
            self.run.skip()
        else:
            with self._phase(step, "update"):
                self.run.update(norm)
            self._ema_due = True
        step_s = time.monotonic() - began
        batch = self.config.train.batch_size
        row = {
            "step": step,
            "time": round(time.time(), 6),  # unix seconds: MLflow gets the step's own, however late it hears of it
            "loss": _finite(loss),
            **repa_loss,
            "lr": lr,
            "grad_norm": _finite(float(norm)),
            "images": (step + 1) * batch,
            # What was really read, not what was planned: equal numbers, equal (sample id, visit) pairs.
            "samples": f"{self._samples:012x}",
            "epoch": round(self.sets.plan.epoch(step + 1), 4),
            "step_s": round(step_s, 6),
            "data_s": round(data_s, 6),
            "images_per_s": round(batch / step_s, 2),
            **self.meter.row(step_s, micro_batches, agreed),
        }
        if verdict:
            self._skipped(row, verdict, loss, float(norm))
        self.judge.note(row)
        self.saver.poll(all_done=not agreed["saving"])
        self.snapshots.poll(all_done=not agreed["taking a snapshot"])
        row |= self.saver.news()
        if agreed["bad samples"]:
            row["bad_samples"] = self._set_aside(step)
        return row, agreed["signal"]

    def _phase(self, step: int, name: str) -> contextlib.AbstractContextManager[Any]:
        """Of a step, for the watchdog and the profiler."""
        self.watch.at(step, name)
        return self.trace.phase(name)

    def _same_samples(self, step: int, agreed: Mapping[str, int]) -> None:
        """Raises CheckFailed, on all ranks, if those of one copy of the model have not read the same: some have found
        a sample damaged that others could read."""
        if agreed["samples"] == -agreed["other samples"]:
            return
        self._set_aside(step)
        raise CheckFailed(
            f"step {step}: the ranks of one copy of the model have read different samples: {self.recorder.dir / FILE} "
            "has one that only some could use. If the nodes have copies of the data set, copy it again; else build it "
            "without that sample."
        )

    def _set_aside(self, step: int) -> int:
        """Write down the bad samples of all ranks; how many the run has met. Raises CheckFailed when too many."""
        # Ranks of one copy of the model have found the same ones.
        found = list({bad.sample: bad for part in groups.gather_objects(self.bad) for bad in part}.values())
        self.bad = []

        def write() -> int:
            assert self._quarantine
            self._quarantine.add(found, step)
            if trouble := self._quarantine.trouble:
                self.recorder.report.say(f"step {step}: {trouble}")
            return self._quarantine.count

        count: int = groups.decided_by_rank_0(write)
        if found:
            self.recorder.report.say(f"step {step}: {len(found)} damaged samples were met and replaced, {count} so far")
        return count

    # ---- steps that go wrong -----------------------------------------------------------------------------------------

    def _skipped(self, row: dict[str, Any], verdict: Verdict, loss: float, norm: float) -> None:
        """Write down what it takes to run the step again; when it is one too many, stop or roll back."""
        step, judge, settings = row["step"], self.judge, self.config.guard
        row["skipped"] = judge.limits.reason(verdict, loss, norm)
        self.skipped += 1
        if self.recorder.first:
            self._write_down(row, verdict, loss, norm)
        in_a_row = [*judge.in_a_row, step]
        if len(in_a_row) < settings.max_skipped:
            return
        if settings.then == "rollback" and judge.rollbacks < settings.max_rollbacks:
            self._roll_back(row)
            return
        self._record(row)
        files = " ".join(str(guards.path_of(self.recorder.dir, bad)) for bad in in_a_row)
        raise CheckFailed(
            f"step {step}: {row['skipped']}, {len(in_a_row)} such steps in a row were skipped"
            f"{f' after {judge.rollbacks} rollbacks' if judge.rollbacks else ''}: the run has diverged; lower optim.lr "
            f"or raise optim.warmup_steps, or see what is in these batches with `mpdit replay` of {files}. The "
            f"checkpoints in {self.recorder.dir} are from before."
        )

    def _write_down(self, row: dict[str, Any], verdict: Verdict, loss: float, norm: float) -> None:
        step, plan = row["step"], self.sets.plan
        batch = plan.batch(step)
        bad = guards.BadStep(
            step=step,
            reason=row["skipped"],
            verdict=verdict,
            loss=loss,
            grad_norm=norm,
            limits=self.judge.limits,
            sample_ids=batch.sample_ids.tolist(),
            visits=batch.visits.tolist(),
            seed=self.config.train.seed,
            plan_hash=plan.hash,
            micro_batch=self.config.parallel.micro_batch,
        )
        try:
            again = f"`mpdit replay {guards.write(self.recorder.dir, bad)}` runs it again"
        except OSError as error:
            again = f"what it takes to run it again could not be written ({error.strerror})"
        self.recorder.report.say(f"step {step} is skipped: {row['skipped']}; {again}")

    def _roll_back(self, row: dict[str, Any]) -> None:
        """Load the last checkpoint from before the trouble; step and data go on."""
        done, before = row["step"] + 1, self.judge.before
        self.watch.at(row["step"], "save")
        self.saver.wait()
        path = checkpoint.newest(self.recorder.dir, self.recorder.report.say, done if before is None else before)
        if path is None:
            raise CheckFailed(
                f"the run has diverged, guard.then is rollback, and there is no checkpoint from before step {before}; "
                "lower optim.lr or train.save_every."
            )
        self.watch.alive()  # every file was read
        at: Position = groups.decided_by_rank_0(lambda: checkpoint.position(path, self.config))
        self.skipped = done - (at.step - at.skipped)
        checkpoint.load(self.run, path, done, self.skipped)
        self._ema_due = False
        row["rolled_back_to"] = at.step
        self.recorder.report.say(f"step {row['step']}: rolled back to {path}; on with step {done} and its own batch")

    def _to_save(self, done: int) -> bool:
        """In trouble a save that is due waits: it would drive out the checkpoints from before."""
        train = self.config.train
        self._save_due |= self._due(done, train.save_every)
        return self._save_due and (not self.judge.in_a_row or done == train.steps)

    def _to_snapshot(self, done: int) -> bool:
        return bool(self.config.train.posthoc_ema) and self._due(done, snapshots.every(self.config))

    # ---- between steps -----------------------------------------------------------------------------------------------

    def _average(self) -> None:
        if self._ema_due:
            self.run.ema.update()
            self._ema_due = False

    @contextlib.contextmanager
    def _looking(self, done: int, save: bool) -> Iterator[bool]:
        """Before a look or a save: parameters settled, average up to date. True if validation or pictures are due."""
        train = self.config.train
        look = self._due(done, train.val_every) or self._due(done, train.sample_every)
        if not (look or save):
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
            Reader(self.sets.val).next_good(int(i))[2] for i in batches.validation_samples(self.sets.val, _GRID_PROMPTS)
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
            try:
                self.recorder.picture(grid.save(grid.grid(images, prompts), path))
            except OSError as error:
                self.recorder.report.say(f"step {done}  its pictures could not be written ({error.strerror})")

    def _record(self, row: dict[str, Any]) -> None:
        done = row["step"] + 1
        self.recorder.log(row)
        if row["loss"] is not None:
            self.recorder.report.step(done, row)
        if "val_loss" in row:
            self.recorder.report.say(f"step {done}  validation loss on unseen concepts {row['val_loss']:.4f}")

    def _save(self, done: int, saver: Saver) -> None:
        self.recorder.sync()
        if saver.busy:
            self.recorder.report.say(f"the {saver.what} before is still being written; the next one waits for it")
            saver.wait()
        saver.begin(self.run, self.config, dataclasses.replace(self.sets.start(), step=done, skipped=self.skipped))
        if not self.config.train.async_save:
            saver.wait()


def _finite(value: float) -> float | None:
    """JSON and MLflow have no other numbers."""
    return value if math.isfinite(value) else None
