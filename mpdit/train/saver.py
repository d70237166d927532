"""Checkpoints written beside the training: the ranks copy their state and go on, others bring it to the disk.

    begin   every rank copies its share into memory and plans together with the others; nothing touches the storage
    write   each rank's own process (disk.py) writes, hashes and syncs its files into ``step_N.partial-TOKEN``
    complete   when all are done, rank 0's writes the manifest, renames the folder and removes old checkpoints

Trouble with memory or storage on any rank gives the save up on all of them, and the training goes on.
"""

import dataclasses
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mpdit.config import Config
from mpdit.errors import CheckFailed
from mpdit.parallel import accel, groups, packed
from mpdit.train import checkpoint, checkpoints, disk, environment
from mpdit.train.checkpoint import Position
from mpdit.train.session import Session
from mpdit.train.writer import Writer

_PATIENCE_S = 300.0  # without a byte written, after which the storage counts as gone
_BESIDE = 0.04  # of a machine whose cores all train, for the writers of its ranks together


def _share(size: int) -> float:
    """Of a core, what this rank's writer may take: little where every core trains, and steps wait for the slowest."""
    ranks, cores = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), environment.cores()
    if size <= disk.SMALL or accel.is_cuda() or cores > ranks * torch.get_num_threads():
        return 1.0
    return _BESIDE * cores / ranks


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """How a save ended, on every rank alike. `bytes`: all ranks' together."""

    step: int
    path: Path
    error: str | None
    bytes: int
    blocked_s: float  # that the training stood still for it
    seconds: float  # from begin to the end


@dataclasses.dataclass(kw_only=True, slots=True)
class _Save:
    """One under way."""

    step: int
    folder: Path
    config: Config
    began: float
    blocked_s: float = 0.0
    bytes: int = 0
    marking: bool = False  # all files are written, rank 0 marks them complete
    answer: dict[str, Any] | None = None  # of this rank's writer


class Saver:
    """Saves of one run, one at a time. Every method but :attr:`done` and :meth:`close` is collective.

    `say` is told on rank 0 what a person should know, `tick` is called while a save is waited for. After :meth:`begin`,
    call :meth:`poll` at every step.
    """

    place, what = "checkpoints", "checkpoint"
    keyed = staticmethod(checkpoint.keyed)

    def __init__(
        self,
        run_dir: Path,
        say: Callable[[str], None],
        tick: Callable[[], None] = lambda: None,
        patience_s: float = _PATIENCE_S,
    ) -> None:
        self.run_dir, self.say, self.tick, self.patience_s = run_dir, say, tick, patience_s
        self.newest: int | None = None  # step of the last checkpoint that this run wrote or went on from
        self.failed: Saved | None = None  # the last save, if it went wrong
        self._news: dict[str, Any] = {}
        self._image: packed.Image | None = None
        self._writer: Writer | None = None
        self._save: _Save | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on every rank."""
        return self._save is not None

    @property
    def done(self) -> bool:
        """Whether this rank's part of what is under way is done; True if nothing is."""
        save = self._save
        if save is None or save.answer is not None:
            return True
        assert self._writer
        save.answer = self._writer.poll()
        if save.answer is None and time.monotonic() - self._writer.heard > self.patience_s:
            self._writer.kill()
            save.answer = {"error": f"the storage took no byte for {self.patience_s:g} s"}
        if self._writer.ended:  # the next save has another
            self._writer.close()
            self._writer = None
        return save.answer is not None

    def begin(self, session: Session, config: Config, position: Position) -> None:
        """Copy the state of this moment and set the writers going. The one before must have ended (:meth:`wait`)."""
        assert not self.busy, "one save at a time"
        began = time.monotonic()
        folder = checkpoints.folder_of(self.run_dir, self.place)
        places = self._copy(session)
        token, trouble = groups.decided_together(places, lambda every: self._plan(every, config, position))
        self._save = save = _Save(
            step=position.step,
            folder=folder / f"step_{position.step}.partial-{token}",
            config=config,
            began=began,
        )
        if trouble:
            save.answer = {"error": trouble}
        else:
            assert self._image
            self._writer = self._writer or Writer(self._image.fd)
            files, first = self._image.files, groups.rank() == 0
            share = _share(sum(size for _, size in files.values()))
            self._writer.submit("write", folder=str(save.folder), files=files, first=first, share=share)
        save.blocked_s = time.monotonic() - began

    def _copy(self, session: Session) -> list[packed.Place] | str:
        """This rank's share of the state, into its image; or why not, empty if because of another rank. Collective,
        whatever happens to this rank."""
        try:
            self._image = self._image or packed.Image()
            trouble = None
        except OSError as error:
            trouble = error
        if groups.agree([trouble is not None]) != [0]:  # all ranks, as they make the state together
            return _no_memory(trouble) if trouble else ""
        assert self._image
        self._image.clear()
        try:
            with session.settled():
                return packed.pack(self.keyed(session), groups.rank(), self._image)
        except OSError as error:
            return _no_memory(error)

    def _plan(
        self, every: list[list[packed.Place] | str], config: Config, position: Position
    ) -> tuple[str, str | None]:
        """Of rank 0: adds to its image what describes the whole; (a name no other try has, what is in the way)."""
        token, places = secrets.token_hex(4), list[packed.Place]()
        refused = [f"rank {rank}: {found}" for rank, found in enumerate(every) if found and isinstance(found, str)]
        if refused:
            return token, refused[0]
        for found in every:
            assert not isinstance(found, str)
            places += found
        assert self._image
        try:
            for name, content in packed.index_files(places).items():
                self._image.add(name, content)
            self._image.add(checkpoints.STATE, checkpoint.state_text(config, position, groups.world_size()).encode())
        except OSError as error:
            return token, f"rank 0: {_no_memory(error)}"
        return token, None

    def poll(self, all_done: bool | None = None) -> Saved | None:
        """How the save under way ended, if it just has; does not wait for the storage.

        `all_done`: whether :attr:`done` holds on every rank, if the caller has found out already.
        """
        if self._save is None:
            return None
        if all_done is None:
            all_done = groups.agree([not self.done]) == [0]
        if not all_done:
            return None
        save = self._save
        size, trouble = groups.decided_together(save.answer or {}, self._next)
        if not trouble and not save.marking:
            save.marking, save.bytes = True, size
            save.answer = {} if groups.rank() else None  # the others have nothing more to do
            return None
        return self._end(trouble)

    def _next(self, answers: list[dict[str, Any]]) -> tuple[int, str | None]:
        """Of rank 0: what all ranks' writers said; (bytes, what went wrong)."""
        save, writer = self._save, self._writer
        assert save
        wrong = [f"rank {rank}: {answer['error']}" for rank, answer in enumerate(answers) if "error" in answer]
        if wrong:
            if writer:
                writer.submit("discard", folder=str(save.folder))
            return 0, wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
        if save.marking:
            for left in answers[0]["result"]:
                self.say(left)
            return 0, None
        files = {name: file for answer in answers for name, file in answer["result"].items()}
        train = save.config.train
        if writer is None:
            return 0, "rank 0: the process that writes it has ended"
        writer.submit(
            "complete",
            folder=str(save.folder),
            final=str(save.folder.with_name(f"step_{save.step}")),
            manifest=checkpoints.manifest(files),
            step=save.step,
            keep_last=train.keep_last if self.place == "checkpoints" else 0,
            keep_every=train.keep_every,
        )
        return sum(file["bytes"] for file in files.values()), None

    def _end(self, trouble: str | None) -> Saved:
        save, self._save = self._save, None
        assert save
        saved = Saved(
            step=save.step,
            path=save.folder.with_name(f"step_{save.step}"),
            error=trouble,
            bytes=save.bytes,
            blocked_s=round(save.blocked_s, 4),
            seconds=round(time.monotonic() - save.began, 3),
        )
        if trouble is None:
            self.newest, self.failed = save.step, None
            self._news |= {
                "saved": saved.step,
                "save_bytes": saved.bytes,
                "save_blocked_s": saved.blocked_s,
                "save_s": saved.seconds,
            }
        else:
            self._news |= {"save_failed": saved.step}
            self.failed = saved
            if groups.rank() == 0:
                self.say(f"{self.what} of step {save.step} could not be written ({trouble}); {self.at_risk(save.step)}")
        return saved

    def news(self) -> dict[str, Any]:
        """Keys for the next line of metrics.jsonl: which saves have ended since the last call, and how."""
        news, self._news = self._news, {}
        return news

    def at_risk(self, step: int) -> str:
        if self.newest is None:
            return f"there is no good one: all {step} steps are at risk."
        return f"the newest good one is step {self.newest}: {step - self.newest} steps are at risk."

    def wait(self) -> Saved | None:
        """Wait for the save under way; how it ended, None if there is none."""
        saved = None
        if self._save and self._writer:
            self._writer.hurry()
        while self.busy and saved is None:
            saved = self.poll()
            if saved is None:
                self.tick()
                time.sleep(0.01)
        return saved

    def finish(self) -> None:
        """Wait for the last save. Raises CheckFailed if it went wrong: what it would have held is then lost."""
        self.wait()
        if self.failed is not None:
            step, error = self.failed.step, self.failed.error
            raise CheckFailed(
                f"{self.run_dir}: the checkpoint of the last step, {step}, could not be written ({error}); "
                f"{self.at_risk(step).replace('at risk', 'lost')} Mend the storage and start the run again."
            )

    def close(self) -> None:
        """Of this rank alone: end its writer. What is under way is left unfinished."""
        if self._writer:
            self._writer.close()
        if self._image:
            self._image.close()
        self._writer = self._image = self._save = None


def _no_memory(error: OSError) -> str:
    return f"no memory for a copy of the state: {error.strerror}"


def save(session: Session, config: Config, position: Position, run_dir: Path) -> Path:
    """Write ``checkpoints/step_N`` and wait for it; collective. Raises CheckFailed when it can't be written."""
    saver = Saver(run_dir, say=lambda _: None)
    try:
        saver.begin(session, config, position)
        saver.finish()
    finally:
        saver.close()
    return checkpoints.folder_of(run_dir) / f"step_{position.step}"
