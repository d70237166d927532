"""Which `apex` is installed, told without importing it.

Megatron-core takes any importable `apex` for NVIDIA's and then fails deep inside the model. The `apex` on PyPI is a web
toolkit of the same name, and `pip install apex` is what people try first.
"""

import importlib.util
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Literal

from mpdit.errors import InputError


def find_apex() -> tuple[Literal["absent", "nvidia", "foreign"], str]:
    """The kind of `apex` that an import would find, and its folder or file ("" when absent)."""
    try:
        spec = importlib.util.find_spec("apex")
    except ValueError:  # a module object without a spec stands in sys.modules
        return "foreign", "sys.modules"
    if spec is None:
        return "absent", ""
    folders = list(spec.submodule_search_locations or [])
    where = folders[0] if folders else str(spec.origin)
    # Not find_spec("apex.multi_tensor_apply"): that would run apex/__init__.py.
    nvidia = bool(folders) and PathFinder.find_spec("apex.multi_tensor_apply", folders) is not None
    return ("nvidia" if nvidia else "foreign"), where


def apex_remedy(where: str) -> str:
    """What gets rid of the foreign apex at `where`."""
    if Path(where).parent.name in ("site-packages", "dist-packages"):
        return "run pip uninstall apex"
    return f"remove or rename {where}, or take its folder off PYTHONPATH"


def refuse_foreign_apex() -> None:
    """Raise InputError when the `apex` that Megatron-core would find is not NVIDIA's."""
    kind, where = find_apex()
    if kind == "foreign":
        raise InputError(
            f"apex: the package at {where} is not NVIDIA's apex (it has no apex.multi_tensor_apply), and Megatron-core "
            f"would take it for that: {apex_remedy(where)}."
        )
