"""What the image is made of: printed, and asserted while it is built. Standard library and packaging alone.

python versions.py keep            the base's own torch, triton and Transformer Engine, as constraints for pip
python versions.py check FILE      they are still these, and all is in the ranges that mpdit is tested with
"""

import importlib.metadata
import platform
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
KEPT = ("torch", "triton", "transformer-engine")
ASKED = ("torch", "triton", "megatron-core")  # of pyproject.toml's dependencies


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def keep() -> str:
    """A line a package that the base brought."""
    return "".join(f"{name}=={version}\n" for name in KEPT if (version := installed(name)))


def asked() -> dict[str, Requirement]:
    """What pyproject.toml says of the packages, for this Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = map(Requirement, project["dependencies"])
    return {one.name: one for one in requirements if one.name in ASKED and (not one.marker or one.marker.evaluate())}


def problems(kept: str) -> list[str]:
    """A sentence for each version that is not as it should be; `kept` is what :func:`keep` gave before."""
    found = []
    for line in kept.splitlines():
        name, _, version = line.partition("==")
        if installed(name) != version:
            found.append(f"{name} was {version} in the base and is {installed(name)} now.")
    if "torch==" not in kept:
        found.append("the base has no torch.")
    for name, requirement in asked().items():
        version = installed(name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{name} is {version}, but pyproject.toml asks for {requirement}.")
    return [*found, *_shared()]


def _shared() -> list[str]:
    """Of packages that Megatron-core takes for others, or for whole. They are not imported: that may need a driver."""
    from mpdit.errors import InputError
    from mpdit.parallel import apex, te_install

    found = []
    for check in (apex.refuse_foreign_apex, te_install.check_te):
        try:
            check()
        except InputError as error:
            found.append(str(error))
    return found


def shown() -> str:
    """A line a package, for the build's log."""
    from mpdit.parallel.apex import find_apex

    names = ("torch", "triton", "transformer-engine", "megatron-core", "mpdit", "nvidia-dali-cuda130")
    lines = {"python": platform.python_version(), **{name: installed(name) or "absent" for name in names}}
    lines["apex"] = f"{find_apex()[0]} {installed('apex') or ''}".strip()
    return "\n".join(f"{name:<20} {version}" for name, version in lines.items())


def main(argv: list[str]) -> int:
    """0; 1 if a version is wrong."""
    if argv == ["keep"]:
        print(keep(), end="")
        return 0
    if len(argv) != 2 or argv[0] != "check":
        print(__doc__, file=sys.stderr)
        return 2
    print(shown())
    found = problems(Path(argv[1]).read_text(encoding="utf-8"))
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
