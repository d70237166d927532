"""``mpdit`` commands for tests, each in a process that does nothing else."""

import contextlib
import io

import torch.distributed as dist

import ranks
from mpdit import cli

Done = tuple[int, str, str]  # exit code, stdout, stderr


def commands(rank: int, world: int, argvs: list[list[object]]) -> list[Done]:
    """``mpdit ARGV`` for each, one after another, for ranks.run; a single process is no rank, as on a terminal."""
    if world == 1:
        dist.destroy_process_group()
    done = []
    for argv in argvs:
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = cli.main([str(word) for word in argv])
        done.append((code, out.getvalue(), error.getvalue()))
    return done


def run(*argv: object, world: int = 1) -> Done:
    """One command on `world` ranks; what the first says."""
    return ranks.run(world, commands, timeout_s=90, argvs=[list(argv)])[0][0]
