"""Half a Transformer Engine breaks every import of megatron.core: it is named before that, from planted remains."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpdit.errors import InputError
from mpdit.parallel import te_install

INIT = "raise RuntimeError('transformer_engine was run')"
META, TORCH, CORE = "transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"
CORE_LIBRARY = "transformer_engine/wheel_lib/libtransformer_engine.so"
TORCH_LIBRARY = "transformer_engine/wheel_lib/transformer_engine_torch.cpython-311-x86_64-linux-gnu.so"
FILES = {"transformer_engine/__init__.py": INIT}
WHOLE = FILES | {CORE_LIBRARY: "", TORCH_LIBRARY: ""}
PARTS = {META: "2.20.2", CORE: "2.20.2", TORCH: "2.20.2"}


def plant(site: Path, files: dict[str, str], parts: dict[str, str], *, requires: str = "torch>=2.1") -> Path:
    """Files and distributions' metadata, as pip would leave them."""
    for name, version in parts.items():
        folder = f"{name.replace('-', '_')}-{version}.dist-info"
        needs = f"Requires-Dist: {requires}\n" if name == TORCH else ""
        files = files | {f"{folder}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"}
    for name, text in files.items():
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return site


def torch_for(site: Path, cuda: str | None) -> None:
    """A torch that is built for a CUDA version, as far as its files say."""
    value = f"'{cuda}'" if cuda else "None"
    plant(site, {"torch/__init__.py": "", "torch/version.py": f"cuda: Optional[str] = {value}\n"}, {"torch": "2.13.0"})


def found(site: Path, monkeypatch: pytest.MonkeyPatch) -> te_install.Found:
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)  # or its spec would be the real one's
    return te_install.find_te()


HALVES: dict[str, tuple[dict[str, str], dict[str, str], str | None, list[str]]] = {
    "the meta package alone": (FILES, {META: "2.20.2"}, "13.0", ["without its CUDA library", "the meta package alone"]),
    "no half for torch": (
        FILES | {CORE_LIBRARY: ""}, {META: "2.20.2", CORE: "2.20.2"}, "13.0",
        ["without its half for torch (transformer-engine-torch)"],
    ),
    "parts of two releases": (
        WHOLE, {**PARTS, CORE: "2.19.0"}, "13.0",
        ["different releases", "transformer-engine 2.20.2", "transformer-engine-cu13 2.19.0"],
    ),
    "a torch without CUDA": (WHOLE, PARTS, None, ["built for CUDA, but torch 2.13.0 is built without"]),
    "another CUDA": (WHOLE, PARTS, "12.9", ["built for CUDA 13 (transformer-engine-cu13)", "2.13.0 for CUDA 12.9"]),
    "what an uninstall left": (
        {CORE_LIBRARY: "", TORCH_LIBRARY: ""}, {CORE: "2.20.2"}, "13.0", ["without Python files", "transformer_engine"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("half", HALVES)
def test_half_of_it_is_told_with_what_to_do(half: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, parts, cuda, words = HALVES[half]
    plant(tmp_path, files, parts)
    torch_for(tmp_path, cuda)
    te = found(tmp_path, monkeypatch)
    assert te.state == "harmful"
    assert [word for word in words if word not in te.why] == [], te.why
    assert f"pip uninstall {' '.join(sorted(parts, key=te_install._DISTRIBUTIONS.index))}" in te.remedy
    core = "core_cu12" if half == "another CUDA" else "core_cu13"  # torch's, not what is there
    assert f"'transformer-engine[pytorch,{core}]=={te_install.VERSION}'" in te.remedy
    with pytest.raises(InputError, match=r"^Transformer Engine: .*and Megatron-core fails on that: run pip uninstall"):
        te_install.refuse_half_te()
    with pytest.raises(
        InputError, match=r"^parallel\.backend te needs Transformer Engine, but .* parallel\.backend=loc"
    ):
        te_install.check_te()


@pytest.mark.parametrize("requires", ["torch==2.11.0", "torch <2.13"])
def test_bindings_to_another_torch_are_told(requires: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, WHOLE, PARTS, requires=requires)
    torch_for(tmp_path, "13.0")
    te = found(tmp_path, monkeypatch)
    assert te.state == "harmful"
    assert f"its half for torch is built for {requires}, but torch 2.13.0 is installed" in te.why


WHOLES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "wheels": (WHOLE, PARTS),
    "a build from source": (
        FILES | {"transformer_engine/libtransformer_engine.so": "", "transformer_engine_torch.cpython-312.so": ""},
        {META: "2.17.1+4329ff84"},
    ),
}


@pytest.mark.parametrize("kind", WHOLES)
def test_a_whole_one_is_told_without_running_it(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, parts = WHOLES[kind]
    plant(tmp_path, files, parts)
    torch_for(tmp_path, "13.0")
    te = found(tmp_path, monkeypatch)
    assert (te.state, te.version, te.why) == ("whole", parts[META], "")
    te_install.refuse_half_te()
    te_install.check_te()


def test_one_that_is_too_old_for_the_backend_is_no_harm_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path, WHOLE, dict.fromkeys(PARTS, "2.9.0"))
    torch_for(tmp_path, "13.0")
    assert found(tmp_path, monkeypatch).state == "whole"
    te_install.refuse_half_te()
    with pytest.raises(InputError, match=r"Transformer Engine 2\.14 or newer, but 2\.9\.0 is installed: pip install"):
        te_install.check_te()


def test_metadata_without_files_is_an_import_error_and_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, {}, {META: "2.20.2"})
    te = found(tmp_path, monkeypatch)
    assert (te.state, te.why) == ("useless", "pip knows of transformer-engine, but the Python files are gone")
    te_install.refuse_half_te()


def test_none_at_all_is_fine_but_for_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(te_install, "_spec", lambda module: None)
    monkeypatch.setattr(te_install, "_version", lambda distribution: None)
    monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
    monkeypatch.delitem(sys.modules, "transformer_engine.pytorch", raising=False)
    assert te_install.find_te().state == "absent"
    te_install.refuse_half_te()
    with pytest.raises(InputError, match=r"which is not installed: pip install .*, or set parallel\.backend=local\.$"):
        te_install.check_te()


# ---- for real: a process that has it on its path ---------------------------------------------------------------------


def mpdit(site: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "mpdit", *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=300
    )


def test_a_run_ends_with_a_sentence_and_no_traceback(tmp_path: Path) -> None:
    site = plant(tmp_path / "site", FILES, {META: "2.20.2"})
    (tmp_path / "run.yaml").write_text("train: {steps: 1}")
    done = mpdit(site, "train", tmp_path / "run.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("mpdit: Transformer Engine: the package at ")
    assert "pip uninstall transformer-engine" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_a_whole_one_on_a_machine_without_a_gpu_is_kept_away_from_megatron(tmp_path: Path) -> None:
    """Its import would ask for a driver. Here it would raise."""
    site = plant(tmp_path / "site", WHOLE, PARTS)
    torch_of = "import mpdit.parallel.te_install as t; t._torch = lambda there: ''\n"  # this torch is one without CUDA
    code = (
        torch_of + "from mpdit.parallel import accel; accel.enter()\n"
        "from megatron.core.extensions import transformer_engine as te; assert not te.HAVE_TE\n"
        "from megatron.core import optimizer; assert t.find_te().state == 'absent'"
    )
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
