"""The roof: one table of commands. A command's module is imported when it is called, so that --help stays quick."""

import importlib
import os
import signal
import sys

from mpdit.errors import CheckFailed, InputError
from mpdit.redact import redact_uri

# command: (module:function, what it does). function(argv) -> exit code.
COMMANDS = {
    "doctor": ("mpdit_tools.doctor:main", "what this machine can run, and what to do about the rest"),
    "data":   ("mpdit_tools.data.main:main", "build image-text shards, and caches of latents and text states"),
    "coordcheck": ("mpdit_tools.coordcheck.main:main", "does muP hold? slopes over widths, in any layout"),
    "fp8check": ("mpdit_tools.fp8check.main:main", "what does FP8 do to this model? bf16 beside it, over widths"),
    "sweep":  ("mpdit_tools.sweep.main:main", "tune base hyperparameters on the proxy; killed searches go on"),
    "transfer": ("mpdit_tools.transfer.main:main", "a tuned proxy's values -> a launch folder for a large model"),
    "plan":   ("mpdit_tools.plan.main:main", "memory, work, bubble and time of a run on GPUs; needs none"),
    "rehearse": ("mpdit_tools.rehearse.main:main", "go or no-go for a launch, on this machine's CPU"),
    "train":  ("mpdit.train.main:main", "train, in one process or under torchrun, with the same YAML"),
    "replay": ("mpdit.train.main:replay", "run a step again that a run has skipped, and name the samples to blame"),
    "sample": ("mpdit_tools.sample:main", "pictures for prompts out of a run's checkpoint"),
    "checkpoint": ("mpdit_tools.checkpoint.main:main", "list, verify or reshard the checkpoints of a run"),
    "track":  ("mpdit_tools.track:main", "sync: bring a run's MLflow up to its metrics.jsonl"),
    "ema":    ("mpdit_tools.ema:main", "the average of a run's weights of any width, after the training"),
    "mup-table": ("mpdit_tools.mup_table:main", "what muP gives each parameter of a model, and gave its proxy"),
}  # fmt: skip


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mpdit COMMAND [ARGUMENTS]    (mpdit COMMAND --help tells more)",
            "",
            "Model-parallel pretraining of text-to-image diffusion transformers under muP.",
            "",
            *lines,
            "",
            "exit codes: 0 done, 1 the check failed, 2 the input was wrong",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    try:
        try:
            return _main(sys.argv[1:] if argv is None else argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read, such as head, has seen enough: end as a shell's own tools do
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from mpdit import __version__

        print(f"mpdit {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise InputError(f"mpdit: no command {argv[0]!r}; the commands are {', '.join(COMMANDS)}.")
        module, function = COMMANDS[argv[0]][0].split(":")
        return int(getattr(importlib.import_module(module), function)(argv[1:]) or 0)
    except (InputError, CheckFailed) as error:
        rank, alone = os.environ.get("RANK", "0"), getattr(error, "any_rank", False)
        if alone or os.environ.get("LOCAL_RANK", rank) == "0":  # once a node: nodes may see different files
            said = redact_uri(str(error))  # it may repeat a value or a command line
            print(f"mpdit: {f'rank {rank}: ' if rank != '0' else ''}{said}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
