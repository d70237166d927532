"""Which `apex` is installed: NVIDIA's is welcome, PyPI's is another project and breaks megatron-core."""

import importlib.util

from mpdit.errors import InputError


def refuse_foreign_apex() -> None:
    """Raises InputError if an `apex` is importable that is not NVIDIA's.

    megatron-core takes any importable `apex` for NVIDIA's and then fails to build its layers.
    """
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.multi_tensor_apply"):
        raise InputError(
            "apex: the installed package is PyPI's 'apex', another project, which breaks megatron-core; "
            "run 'pip uninstall apex' (NVIDIA's apex is optional)."
        )
