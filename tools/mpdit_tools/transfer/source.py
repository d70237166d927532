"""What ``--from`` came to: the settings that it names, and the search that they won."""

import dataclasses
from pathlib import Path
from typing import Any

from mpdit import config as configs
from mpdit_tools.transfer.trials import Trial

Tree = dict[str, Any]  # sections of a config, as YAML has them


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What was found: the settings that the source itself names, and the search that they won, if it tells."""

    name: str  # without credentials
    said: str  # what it is, in a few words
    tree: Tree
    trials: tuple[Trial, ...] = ()
    warnings: tuple[str, ...] = ()


def tree_of(path: Path) -> Tree:
    """The sections and keys that a config (YAML) or run folder names. Raises InputError as mpdit.config.load does."""
    tree = configs.read(path)
    configs.from_dict(tree, str(path))
    return {section: values or {} for section, values in tree.items()}
