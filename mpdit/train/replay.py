"""``mpdit replay RUN/bad_steps/step_N.json``: a step that a run has skipped, run again without touching the run."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpdit import config as configs
from mpdit.config import Config
from mpdit.data.mixture import Mixture
from mpdit.data.shards import BadSample
from mpdit.errors import InputError
from mpdit.parallel import fp8_rules, groups
from mpdit.train import batches, checkpoint, checkpoints, session
from mpdit.train.checkpoint import Position
from mpdit.train.guards import BadStep
from mpdit.train.metrics import read_metrics
from mpdit.train.sets import Sets, same_run

_LARGEST = 3  # samples named when all losses are finite


def config_of(path: Path, bad: BadStep, overrides: list[str], world: int) -> Config:
    """The run's config, wherever its folder is now; in one process without its layout. Raises InputError."""
    beside = Path(os.path.normpath(path.parent / bad.config))
    tree = configs.read(beside)
    if world == 1:
        given = tree.get("parallel") or {}
        kept = {key: given[key] for key in ("recompute", "kernels") if key in given}
        tree["parallel"] = {**fp8_rules.arithmetic(given), **kept, "micro_batch": bad.micro_batch}
    for assignment in overrides:
        configs.override(tree, assignment)
    config = configs.from_dict(tree, str(beside))
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(beside.parent)))


def replay(config: Config, path: Path, bad: BadStep) -> int:
    """Exit code; the first rank prints. Collective; groups are up, `config` is checked. Raises InputError."""
    sets = Sets.open(config)
    if (bad.plan_hash, bad.seed) != (sets.plan.hash, config.train.seed):
        raise InputError(f"{path}: is of other data, train.batch_size or train.seed than the config's; set them back.")
    rows = groups.decided_by_rank_0(lambda: rows_before(config, bad.step))
    start, at = groups.decided_by_rank_0(lambda: find_start(config, sets, rows, bad.step, _say))
    run = session.build(config)
    if start is not None:
        checkpoint.load(run, start, at.step, at.skipped)
    _say(f"{start or 'the initial weights'} at step {at.step}, {bad.step - at.step} steps before step {bad.step}")
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, at.step)
    worst = 0.0
    for step in range(at.step, bad.step):
        loss = run.forward_backward(feed.next())
        norm = run.gradient_norm()
        if "skipped" in rows[step]:
            run.skip()
            continue
        worst = max(worst, abs(loss - rows[step]["loss"]) / abs(rows[step]["loss"]))
        run.update(norm)
    if bad.step > at.step:
        _say(f"the losses of these steps are the run's to {worst:.1e}")
    loss, norm = run.forward_backward(feed.next()), float(run.gradient_norm())
    feed.close()
    verdict = bad.limits.verdict(loss, norm)
    _say(f"step {bad.step}: loss {loss:.6g}, gradient norm {norm:.6g}; recorded: {bad.reason}")
    run.skip()  # with FP8's scales as they were before it
    _name_samples(bad, sets.train, _losses_alone(config, sets, run, bad.step))
    if verdict is bad.verdict:
        _say("reproduced")
        return 0
    _say(f"not reproduced: {bad.limits.reason(verdict, loss, norm) if verdict else 'the step is good'}")
    return 1


def rows_before(config: Config, step: int) -> dict[int, dict[str, Any]]:
    """The run's lines of the steps before, by step. Raises InputError if there are none."""
    path = Path(config.run.dir) / "metrics.jsonl"
    try:
        return {row["step"]: row for row in read_metrics(path) if row["step"] < step}
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error}); it says which steps the run has skipped.") from error


def find_start(
    config: Config, sets: Sets, rows: Mapping[int, dict[str, Any]], step: int, warn: Any
) -> tuple[Path | None, Position]:
    """(checkpoint, position to load it at) that leads to `step` as the run went. Raises InputError where none does."""
    folder = Path(config.run.dir)
    rolled_back = max((at for at, row in rows.items() if "rolled_back_to" in row), default=None)
    path = checkpoints.newest(folder, warn, candidates=[path for at, path in checkpoints.steps(folder) if at <= step])
    at = sets.start()
    if path is not None:
        at = same_run(path, config, sets)
    if rolled_back is not None and at.step <= rolled_back:  # the run went on with older weights from there
        path = checkpoints.folder_of(folder) / f"step_{rows[rolled_back]['rolled_back_to']}"
        checkpoints.verify(path)
        at = same_run(path, config, sets)
        done = rolled_back + 1
        at = dataclasses.replace(at, step=done, skipped=done - (at.step - at.skipped))
    missing = [number for number in range(at.step, step) if number not in rows]
    if missing:
        raise InputError(f"{folder / 'metrics.jsonl'}: lacks step {missing[0]} on the way to step {step}; put it back.")
    return path, at


def _losses_alone(config: Config, sets: Sets, run: session.Session, step: int) -> list[tuple[float, int]]:
    """Each place's own loss, and the sample that was read for it, in the order of the global batch; collective.

    Only ranks that read samples themselves, the first among them, know which.
    """
    alone = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, micro_batch=1))
    feed = batches.TrainFeed(alone, sets.train, sets.plan, sets.tokenizer, step)
    micro_batches = feed.next()
    with run.settled():
        losses = run.network.each_loss(micro_batches)
    feed.close()
    every = groups.gather_objects_over_data([sample for batch in micro_batches for sample in batch.read_ids])
    read_ids = [sample for of_rank in every for sample in of_rank]
    return list(zip(losses.flatten().tolist(), read_ids, strict=groups.rank() == 0))


def _name_samples(bad: BadStep, train: Mixture, found: list[tuple[float, int]]) -> None:
    if groups.rank():
        return
    places = [(*own, *key) for own, key in zip(found, zip(bad.sample_ids, bad.visits, strict=True), strict=True)]
    broken = [place for place in places if not math.isfinite(place[0])]
    largest = sorted(places, reverse=True)[:_LARGEST]
    _say(f"samples whose own loss is not finite: {len(broken)} of {len(places)}")
    for loss, read, planned, visit in broken or largest:
        instead = "" if read == planned else f", in the place of sample {planned}, which is damaged"
        named = f"sample {read}, visit {visit}, {train.where(read)}, caption {_caption(train, read)}"
        _say(f"  loss {loss:.6g}: {named}{instead}")


def _caption(train: Mixture, sample: int) -> str:
    try:
        return json.dumps(train.caption(sample), ensure_ascii=False)
    except BadSample as error:  # damaged since the step read it
        return f"unreadable ({error.reason})"


def _say(text: str) -> None:
    if groups.rank() == 0:
        print(text, flush=True)
