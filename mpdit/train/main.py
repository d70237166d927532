"""``mpdit train`` and ``mpdit replay``, alone or under torchrun."""

import faulthandler
import os
import sys
import traceback
from pathlib import Path

from mpdit import config as configs
from mpdit.config import Config
from mpdit.errors import CheckFailed, InputError
from mpdit.train.launcher import tell_launcher

USAGE = """usage: mpdit train CONFIG [--profile] [section.key=value ...]
       torchrun --nproc-per-node N -m mpdit train CONFIG [--profile] [section.key=value ...]

Trains as CONFIG (YAML) says, with any of its keys overridden. CONFIG may be a run folder: its config.yaml is used. If
run.dir holds checkpoints, training goes on from the newest complete one, in this layout, whatever layout wrote it.
--profile: torch's profiler records some of the first steps (train.profile_steps=3); RUN/profile has a trace for
https://ui.perfetto.dev and a page to read.

keys and their defaults:
"""

REPLAY_USAGE = """usage: mpdit replay RUN/bad_steps/step_N.json [section.key=value ...]
       torchrun --nproc-per-node N -m mpdit replay RUN/bad_steps/step_N.json [section.key=value ...]

Loads the newest good checkpoint from before the step, trains through the steps in between as the run did, then runs the
skipped step and each of its samples alone. Names the samples whose loss is not finite, or else the largest ones. Writes
nothing. One process needs no layout; under torchrun it is that of the run's config.yaml.

Exit code 0 when the step is bad for the recorded reason again, 1 when it is not."""


def main(argv: list[str]) -> int:
    """Exit code 0 when the run is done. Raises InputError for bad input, before any rank starts; signals.Stop, which
    leaves with 128 + signal, when it was asked to stop and has saved."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        print(configs.describe())
        return 0 if argv else 2
    overrides = ["train.profile_steps=3" if argument == "--profile" else argument for argument in argv[1:]]
    config = configs.load(argv[0], overrides)
    use_cores()
    faulthandler.enable(2)  # a rank that crashes in native code says where
    try:
        _train(config)
    except (InputError, CheckFailed) as error:
        tell_launcher(str(error))
        raise
    except Exception:
        tell_launcher(traceback.format_exc())
        raise
    return 0


def _train(asked: Config) -> None:
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.parallel import groups
    from mpdit.train import loop, meters, preflight, signals, summary, watchdog

    config = preflight.check(asked, groups.world_size())
    flops = meters.flops_by_size(config) if int(os.environ.get("RANK", "0")) == 0 else {}
    groups.start(config.parallel, config.train.seed, watchdog.collective_timeout_s(config.guard))
    try:
        loop.train(config, asked, flops)
    except signals.Stop as stop:
        if groups.rank() == 0:
            print(f"mpdit: {stop.said}", flush=True)
        groups.barrier()  # one that left before the others are done would have its launcher end them
        groups.stop()
        raise
    if groups.rank() == 0:
        print(summary.of_run(config), flush=True)
    groups.stop()  # not after an error: the other ranks may be anywhere, and leaving the groups would wait for them


def replay(argv: list[str]) -> int:
    """Exit code. Raises InputError for a file that is no record of a step, or a run that can't be gone through."""
    if not argv or argv[0] in ("-h", "--help"):
        print(REPLAY_USAGE)
        return 0 if argv else 2
    use_cores()

    from mpdit.parallel import accel

    accel.enter()
    from mpdit.parallel import groups
    from mpdit.train import guards, preflight, replay, watchdog

    path = Path(argv[0])
    bad, world = guards.read(path), groups.world_size()
    config = preflight.without_run_dir(replay.config_of(path, bad, argv[1:], world), world)
    groups.start(config.parallel, config.train.seed, watchdog.collective_timeout_s(config.guard))
    code = replay.replay(config, path, bad)
    groups.stop()
    return code


def use_cores() -> None:
    """As many threads as the machine has cores for this rank; torchrun would give each rank one."""
    import torch

    from mpdit.train.environment import cores

    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asked = os.environ.get("OMP_NUM_THREADS") if ranks == 1 else None
    torch.set_num_threads(int(asked) if asked and asked.isdecimal() else max(1, cores() // ranks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
