"""Runs a sweep's trials side by side: takes one for every free slot, watches it, prunes it, keeps how it ended."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from mpdit.errors import CheckFailed, InputError
from mpdit_tools.sweep import trial
from mpdit_tools.sweep.folder import PROXY
from mpdit_tools.sweep.results import Record
from mpdit_tools.sweep.spec import Spec
from mpdit_tools.sweep.study import Claim, Ledger, Outcome
from mpdit_tools.sweep.trial import Child, Looks, Slot

_POLL_S = 0.2
_ASK_AGAIN_S = 1.0  # while other processes run what the next decision waits for
_IN_A_ROW = 3  # failed trials after which something is wrong with all of them


@dataclasses.dataclass(kw_only=True, slots=True)
class _Running:
    claim: Claim
    child: Child
    slot: Slot
    looks: Looks | None


class Drive:
    """`finished` is called after each trial with all records; `tracking` are config keys that all trials share."""

    def __init__(
        self,
        spec: Spec,
        folder: Path,
        ledger: Ledger,
        slots: Sequence[Slot],
        tracking: dict[str, Any],
        finished: Callable[[Record, list[Record]], None],
    ) -> None:
        self._spec, self._folder, self._ledger = spec, folder, ledger
        self._free, self._tracking, self._finished = list(slots), tracking, finished
        self._running: list[_Running] = []
        self._failures = 0

    def run(self) -> None:
        """Until the sweep is done. Whatever ends it early, the trials that run are ended and will be run again.

        Raises InputError if the runs know no ``spec.metric``, CheckFailed if one trial after another fails.
        """
        try:
            answer, asked = self._fill(), time.monotonic()
            while self._running or answer != "done":
                time.sleep(_POLL_S)
                over = [one for one in list(self._running) if self._attend(one)]
                if over or (self._free and time.monotonic() - asked > _ASK_AGAIN_S):
                    answer, asked = self._fill(), time.monotonic()
        finally:
            trial.stop([one.child for one in self._running])
            for one in self._running:
                self._ledger.let_go(one.claim)

    @property
    def cut_short(self) -> list[int]:
        """Trials that :meth:`run` had to end."""
        return [one.claim.number for one in self._running]

    def _fill(self) -> Literal["wait", "done", "full"]:
        while self._free:
            claim = self._ledger.claim()
            if isinstance(claim, str):
                return claim
            self._start(claim)
        return "full"

    def _start(self, claim: Claim) -> None:
        spec, slot = self._spec, self._free.pop()
        keys = {"train.seed": claim.seed, **self._tracking}
        child = Child(self._folder / PROXY, claim.folder, claim.params, keys, spec.ranks, slot)
        # Losses of another seed are another curve, and what is to be confirmed is not to be given up.
        comparable = claim.kind == "search" and claim.seed == spec.seeds[0]
        looks = Looks(spec.prune) if spec.prune and comparable else None
        self._running.append(_Running(claim=claim, child=child, slot=slot, looks=looks))

    def _attend(self, one: _Running) -> bool:
        """Look at a running trial; True if it is over."""
        ended = one.child.code is not None
        if not ended and not self._hopeless(one):
            return False
        if not ended:
            trial.stop([one.child])
            self._close(one, one.child.given_up("pruned"))
            return True
        try:
            outcome = one.child.outcome(self._spec)
        except InputError as error:
            self._close(one, dataclasses.replace(one.child.given_up("failed"), error=str(error)))
            raise
        self._close(one, outcome)
        self._failures = self._failures + 1 if outcome.state == "failed" else 0
        if self._failures == _IN_A_ROW:
            raise CheckFailed(
                f"{_IN_A_ROW} trials in a row failed, the last one, {one.claim.folder}, with: {outcome.error}"
            )
        return True

    def _hopeless(self, one: _Running) -> bool:
        if one.looks is None:
            return False
        steps = self._spec.proxy.train.steps
        return any(
            self._ledger.look(one.claim, done, value)
            for done, value in one.looks.of(one.child.new_rows())
            if done < steps
        )

    def _close(self, one: _Running, outcome: Outcome) -> None:
        self._ledger.finish(one.claim, outcome)
        self._running.remove(one)
        self._free.append(one.slot)
        if not self._spec.keep_checkpoints:
            trial.drop_checkpoints(one.claim.folder)
        records = self._ledger.records()
        self._finished(next(record for record in records if record.number == one.claim.number), records)
