"""The launch's layout, narrow, on this machine: real ranks, real data, a checkpoint, against one process."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mpdit.config import Config, Parallel
from mpdit.data import buckets
from mpdit.errors import CheckFailed

STEPS = 3
_SAVED = 2  # the step after which the checkpoint is written that another layout goes on from
_HEAD_DIM = 8
_LOSS_BOUND = 1e-5  # relative, fp32: as between any two layouts


def narrowed(config: Config, data_ranks: int) -> Config:
    """`config` with as few and as thin heads as its layout allows, one data-parallel rank, a few small steps in fp32.

    Kept: the depth and its split, the schedule, the number of micro-batches, and what the network is made of. Of
    several buckets the largest.
    """
    parallel, train = config.parallel, config.train
    heads = parallel.tp * parallel.cp
    micro_batches = train.batch_size // data_ranks // parallel.micro_batch
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, width=heads * _HEAD_DIM, head_dim=_HEAD_DIM, vocab_size=0),
        # Nothing starts at zero, so that every layer has its part in the first loss.
        mup=dataclasses.replace(
            config.mup,
            base_width=heads * _HEAD_DIM,
            base_head_dim=None,
            base_depth=None,
            base_batch_size=None,
            base_images=None,
            adaln_init="hidden",
            readout_init="base",
        ),
        data=dataclasses.replace(config.data, buckets=(buckets.largest(config),) if config.data.buckets else ()),
        optim=dataclasses.replace(config.optim, lr=1e-3, warmup_steps=0, schedule="constant"),
        parallel=dataclasses.replace(
            parallel,
            micro_batch=1,
            precision="fp32",
            backend="local",
            kernels="auto",
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        train=dataclasses.replace(train, steps=STEPS, batch_size=micro_batches, val_images=1),
    )


def run(config: Config, folder: Path) -> str:
    """Train `config` in its layout, then from its checkpoint in one process, and from the start in one; compare.

    `folder` takes the checkpoint. Raises CheckFailed where losses differ or a rank fails.
    """
    parallel = config.parallel
    world = parallel.tp * parallel.cp * parallel.pp
    alone = dataclasses.replace(
        config, parallel=Parallel(micro_batch=1), run=dataclasses.replace(config.run, dir=str(folder / "alone"))
    )
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder / "layout")))
    theirs = _ranks(world, config, save=True)
    own = _ranks(1, alone, save=False)
    again = _ranks(1, dataclasses.replace(alone, run=config.run), save=False)
    worst = max(_apart(theirs[step], loss) for step, loss in own.items())
    if worst > _LOSS_BOUND:
        raise CheckFailed(
            f"losses in the layout are {_shown(theirs)}, in one process {_shown(own)}: they differ by {worst:.1e}, "
            f"more than {_LOSS_BOUND:g}."
        )
    if set(again) != {STEPS - 1} or _apart(again[STEPS - 1], own[STEPS - 1]) > _LOSS_BOUND:
        raise CheckFailed(f"from the layout's checkpoint one process goes on to {_shown(again)}, but {_shown(own)}.")
    return (
        f"{world} ranks, width {config.model.width}, {config.train.batch_size} micro-batches, {STEPS} steps: losses as "
        f"in one process within {worst:.1e}; its checkpoint goes on in one process"
    )


def _apart(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def _shown(losses: dict[int, float]) -> str:
    return " ".join(f"{losses[step]:.6f}" for step in sorted(losses))


def _ranks(world: int, config: Config, *, save: bool) -> dict[int, float]:
    """Losses by step, of forked ranks on this machine. Raises CheckFailed for the first that fails."""
    from torch.multiprocessing.spawn import ProcessException, start_processes

    with tempfile.TemporaryDirectory(prefix="rehearse_") as meeting:
        try:
            start_processes(_rank, args=(world, config, meeting, save), nprocs=world, start_method="fork")
        except ProcessException as error:
            last = str(error).strip().splitlines()[-1]
            raise CheckFailed(f"a rank of the layout failed: {last}") from error
        losses = json.loads((Path(meeting) / "losses.json").read_text(encoding="utf-8"))
    return {int(step): loss for step, loss in losses.items()}


def _rank(rank: int, world: int, config: Config, meeting: str, save: bool) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=rank, world_size=world)
    from mpdit.parallel import groups
    from mpdit.train import batches, checkpoint, preflight, saver, session
    from mpdit.train.sets import Sets, find_start

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    sets, run = Sets.open(config), session.build(config)
    path, start = find_start(config, sets, print)
    if path is not None:
        checkpoint.load(run, path, start.step, start.skipped)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, start.step)
    losses: dict[int, Any] = {}
    for step in range(start.step, config.train.steps):
        losses[step] = run.forward_backward(feed.next())
        run.update()
        run.ema.update()
        if save and step + 1 == _SAVED:
            at = dataclasses.replace(sets.start(), step=step + 1)
            saver.save(run, config, at, Path(config.run.dir))
    feed.close()
    if rank == 0:
        (Path(meeting) / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    groups.stop()
