"""Snapshots of the power-function averages, RUN/ema/step_N: what ``mpdit ema`` makes an average of any width of.

They are written as checkpoints are, beside the training, hold nothing but the averages, and are all kept. One that
can't be written is told and costs the averages made later some accuracy, the run nothing: checkpoints hold them too.
"""

from mpdit.config import Config
from mpdit.train import checkpoint
from mpdit.train.saver import Saver

PLACE = "ema"


class Snapshots(Saver):
    """As :class:`Saver` has it."""

    place, what = PLACE, "snapshot of averages"
    keyed = staticmethod(checkpoint.keyed_averages)

    def at_risk(self, step: int) -> str:
        return "mpdit ema goes without it."

    def finish(self) -> None:
        self.wait()


def every(config: Config) -> int:
    """Steps between two; 0: at the end only."""
    return config.train.posthoc_every or config.train.save_every
