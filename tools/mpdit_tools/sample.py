"""``mpdit sample RUN --prompts FILE``: pictures for prompts out of a run's checkpoint, in any layout."""

import dataclasses
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mpdit import config as configs
from mpdit.config import Config
from mpdit.data import text
from mpdit.errors import InputError
from mpdit.parallel import fp8_rules

if TYPE_CHECKING:
    from mpdit.train.checkpoint import Position


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Draw pictures for prompts out of a run's checkpoint: one PNG a prompt, and a labelled grid."""

    run: Annotated[Path, tyro.conf.arg(metavar="RUN"), tyro.conf.Positional]
    """The run folder."""
    prompts: Path
    """A text file (UTF-8) with a prompt a line."""
    out: Path | None = None
    """Where pictures go; RUN/samples/step_N-NAME by default."""
    checkpoint: Path | None = None
    """A folder RUN/checkpoints/step_N; the newest complete one by default."""
    steps: int | None = None
    """Steps of sample.sampler; the run's sample.steps by default."""
    guidance: float | None = None
    """Classifier-free guidance scale, 1 is off; the run's sample.guidance by default."""
    seed: int | None = None
    """Of the noise; the run's sample.seed by default."""
    size: Annotated[str | None, tyro.conf.arg(metavar="HxW")] = None
    """Pixels of a picture, for example 48x32 for tall ones; the run's sample.image_size by default."""
    weights: Path | None = None
    """A folder that mpdit ema made, to draw with in place of a checkpoint."""
    ema: bool = True
    """Draw with the averaged weights; --no-ema for the raw ones."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="section.key=value")] = ()
    """Layout to draw in, under torchrun, for example --set parallel.tp=2 parallel.pp=2. The default is one process."""


def main(argv: list[str]) -> int:
    """Exit code 0 when the pictures are written. Raises InputError for a bad run, checkpoint or prompts file."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit sample")
    prompts = read_prompts(arguments.prompts)
    config = sample_config(arguments)

    from mpdit.train.main import use_cores

    use_cores()
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.parallel import groups
    from mpdit.train import cached, preflight

    preflight.layout(config, groups.world_size())
    preflight.machine(config)
    groups.start(config.parallel, config.train.seed)
    path, at = groups.decided_by_rank_0(lambda: choose(arguments, config))
    tokenizer = text.of_run(config.data.text, arguments.run, at.tokenizer_sha256, config.data.text_model)
    if not tokenizer.text_dim:
        tokenizer.text(prompts, config.model.text_tokens)  # no class: told before weights are read
    if config.data.latents:
        cached.open_autoencoder(config).same_as_in(arguments.run)
    out = arguments.out or arguments.run / "samples" / f"{path.name}-{arguments.prompts.stem}"
    draw_to(config, tokenizer, path, prompts, out, ema=arguments.ema and arguments.weights is None)
    if groups.rank() == 0:
        print(f"{len(prompts)} pictures of step {at.step} in {out}, all of them in {out / 'grid.png'}")
    groups.stop()
    return 0


def choose(arguments: Arguments, config: Config) -> "tuple[Path, Position]":
    """The checkpoint to draw with, verified, and where it stands. Raises InputError if there is no good one."""
    from mpdit.train import checkpoint, checkpoints

    def warn(text: str) -> None:
        print(f"mpdit: {text}", file=sys.stderr)

    if arguments.checkpoint and arguments.weights:
        raise InputError("--checkpoint and --weights: each names what to draw with; give one.")
    path = arguments.checkpoint or arguments.weights or checkpoints.newest(arguments.run, warn)
    if path is None:
        raise InputError(f"{arguments.run}: has no checkpoint yet; train with train.save_every, or to the end.")
    if arguments.checkpoint or arguments.weights:
        checkpoints.verify(path)
    return path, checkpoint.position(path, config)


def sample_config(arguments: Arguments) -> Config:
    """The run's config in one process, or in the layout that --set says, with the command's sampling options."""
    path = arguments.run / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{arguments.run}: is no run folder, it has no config.yaml; give the run.dir of a training run."
        )
    tree = configs.to_dict(configs.load(path))
    tree["parallel"] = fp8_rules.anywhere(tree["parallel"])
    options = {"steps": arguments.steps, "guidance": arguments.guidance, "seed": arguments.seed}
    tree["sample"].update({key: value for key, value in options.items() if value is not None})
    if arguments.size is not None:
        tree["sample"]["image_size"] = _height_width(arguments.size)
    for override in arguments.overrides:
        configs.override(tree, override)
    return configs.from_dict(tree, str(path))


def _height_width(text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,6}x\d{1,6}", text):
        raise InputError(f"--size is {text!r}, but should be height x width in pixels, for example 48x32.")
    return [int(side) for side in text.split("x")]


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompts file that are not blank. Raises InputError if it is empty, missing or not UTF-8."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 (byte {error.start}); save the prompts as UTF-8 text.") from error
    except OSError as error:
        raise InputError(
            f"{path}: can't be read ({error.strerror}); it should be a text file, a prompt a line."
        ) from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise InputError(f"{path}: holds no prompt; write one a line.")
    return prompts


def draw_to(
    config: Config, tokenizer: text.Tokenizer, checkpoint_path: Path, prompts: list[str], out: Path, *, ema: bool
) -> None:
    """Load the weights, draw, and write ``NNN-words.png`` for each prompt and ``grid.png``; collective."""
    from mpdit.parallel import groups
    from mpdit.sample import grid
    from mpdit.train import checkpoint, session

    network = session.build_network(config)
    checkpoint.load_weights(network, checkpoint_path, ema=ema)
    note = checkpoint.note_on_scales(checkpoint_path, config)
    if note and groups.rank() == 0:
        print(f"mpdit: {note}", file=sys.stderr)
    images = session.draw(network, config, prompts, tokenizer)
    if groups.rank() == 0:
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
            grid.save(grid.to_image(image), out / f"{number:03d}-{words}.png")
        grid.save(grid.grid(images, prompts), out / "grid.png")
