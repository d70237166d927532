"""What ranks decide together: flags that any rank may raise, and that all of them see at the same step."""

from collections.abc import Callable, Mapping

from mpdit.parallel import groups


class Control:
    """Named whole numbers of each rank; one small all-reduce a step makes them everybody's.

    Whoever has something to ask or to tell adds a flag when the run starts: every rank the same, in the same order.
    """

    def __init__(self) -> None:
        self._flags: dict[str, Callable[[], int]] = {}

    def add(self, name: str, read: Callable[[], int]) -> None:
        """`read()` is this rank's number, asked for in each step. Raises ValueError for a name that is taken."""
        if name in self._flags:
            raise ValueError(f"the flag {name!r} is there already")
        self._flags[name] = read

    def agree(self) -> Mapping[str, int]:
        """The largest number of all ranks by name, the same on every rank; collective."""
        return dict(zip(self._flags, groups.agree([read() for read in self._flags.values()]), strict=True))
