"""`mpdit doctor`: real probes, and packages that are broken on purpose."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mpdit.errors import InputError
from mpdit.parallel.apex import find_apex, refuse_foreign_apex
from mpdit_tools import doctor, probes

ROOT = Path(__file__).parents[2]
DRIVERLESS = {"cuda": None, "driver": None, "devices": []}
H100 = {"name": "NVIDIA H100 80GB HBM3", "memory": 80 * 2**30, "capability": [9, 0]}
B200 = {"name": "NVIDIA B200", "memory": 180 * 2**30, "capability": [10, 0]}
T4 = {"name": "Tesla T4", "memory": 15 * 2**30, "capability": [7, 5]}


@pytest.fixture(scope="module")
def real():
    return doctor.examine()


def row(facts, name):
    return next(row for row in doctor.diagnose(facts) if row.name == name)


def package(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def doctor_process(arguments=(), flags=(), **variables):
    code = f"import sys; from mpdit_tools.doctor import main; sys.exit(main({list(arguments)!r}))"
    return subprocess.run(
        [sys.executable, *flags, "-c", code], env=os.environ | variables, capture_output=True, text=True, timeout=300
    )


def test_this_machine_can_train(real):
    rows = doctor.diagnose(real)
    assert [row.name for row in rows if row.verdict == "wrong"] == []
    assert doctor.verdict(rows, real).startswith("this machine can train: ")
    for name in ("torch", "megatron-core", "DALI", "triton", "numpy", "sentencepiece", "safetensors", "resvg"):
        assert re.match(r"\d+\.\d+", row(real, name).found), name


def test_broken_te_and_foreign_apex_and_no_npm_by_name(tmp_path):
    te = "raise RuntimeError('cudnn shared object not found.')"
    fakes = package(tmp_path, {"transformer_engine/__init__.py": te, "apex/__init__.py": "import pyramid"})
    path = os.pathsep.join(filter(None, [str(fakes), os.environ.get("PYTHONPATH")]))
    done = doctor_process(["--json"], PYTHONPATH=path, PATH="")
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    rows = {row["name"]: row for row in answer["rows"]}
    assert answer["can_train"] is False
    assert {name for name, row in rows.items() if row["verdict"] == "wrong"} == {
        "Transformer Engine", "apex", "megatron-core",
    }  # fmt: skip
    assert "cudnn shared object not found" in rows["Transformer Engine"]["found"]
    assert "half-installed" in rows["Transformer Engine"]["found"]
    assert "without its CUDA library" in rows["Transformer Engine"]["found"]
    assert "megatron.core" in rows["Transformer Engine"]["todo"]
    assert "take its folder off PYTHONPATH" in rows["Transformer Engine"]["todo"]
    assert "Transformer Engine" in rows["megatron-core"]["todo"]
    assert str(fakes / "apex") in rows["apex"]["found"]
    assert rows["npm"]["verdict"] == "limited"
    assert "in the way: megatron-core, Transformer Engine, apex" in answer["verdict"]


def test_answers_without_any_package():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tools"), str(ROOT / "kernels")])
    done = doctor_process(flags=["-S"], PYTHONPATH=paths)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for name in ("torch", "megatron-core", "DALI", "numpy", "PyYAML"):
        assert any(line.startswith(f"wrong    {name}: absent -> pip install") for line in lines), name
    assert any(line.startswith("limited  MLflow: absent") for line in lines)
    assert lines[-1].startswith("this machine cannot train yet; in the way: torch, ")


def test_table_and_exit_code(real, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: real)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1].startswith("this machine can train: ")
    assert "what to do" in text
    monkeypatch.setattr(doctor, "examine", lambda: real | {"numpy": None})
    assert doctor.main([]) == 1
    assert "pip install 'numpy>=2.0'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "verdict", "found"),
    [
        ({"version": "2.20.2"}, "ok", "2.20.2, imports"),
        (
            {"error": "RuntimeError", "text": "Found empty transformer-engine meta package", "guarded": False},
            "wrong",
            "half-installed",
        ),
        (
            {"error": "ModuleNotFoundError", "text": "No module named 'transformer_engine_torch'", "guarded": True},
            "limited",
            "half-installed",
        ),
        ({"error": "OSError", "text": "libnccl.so.2: cannot open", "guarded": False}, "wrong", "half-installed"),
        ({"error": "Timeout", "text": "no answer within 180 s"}, "wrong", "half-installed"),
    ],
)
def test_states_of_transformer_engine(real, answer, verdict, found):
    te = row(real | {"transformer_engine": answer}, "Transformer Engine")
    assert te.verdict == verdict
    assert te.found.startswith(found)


def test_cuda_machines(real, monkeypatch):
    def machine(*devices, **more):
        return real | {"torch": real["torch"] | {"cuda": "13.0", "driver": 13, "nccl": True, "devices": devices} | more}

    monkeypatch.setattr(doctor.switch, "has_compiler", lambda: True)
    eight = machine(*[H100] * 8)
    assert row(eight, "device").found == "8 x NVIDIA H100 80GB HBM3, 80 GiB, sm_90"
    assert row(eight, "FP8 hardware").found == "8 x tensorwise, delayed, blockwise (parallel.fp8_recipe)"
    assert row(machine(B200, cuda="12.8"), "FP8 hardware").found.startswith("1 x tensorwise, delayed, mxfp8 (")
    assert row(eight, "FP8 hardware").verdict == row(eight, "triton").verdict == row(eight, "DALI").verdict == "ok"
    assert "fp8 need it" in row(eight | {"transformer_engine": None}, "Transformer Engine").todo
    closing = doctor.verdict(doctor.diagnose(eight), eight)
    assert closing == "this machine can train: 8 x NVIDIA H100 80GB HBM3 (CUDA), fp32 and bf16."
    with_te = eight | {"transformer_engine": {"version": "2.20.2"}}
    assert doctor.verdict(doctor.diagnose(with_te), with_te).endswith("(CUDA), fp32, bf16 and fp8.")
    assert "parallel.kernels auto: triton" in row(eight, "triton").found
    assert "parallel.kernels auto: torch" in row(real | {"torch": real["torch"] | DRIVERLESS}, "triton").found
    old = machine(T4)
    assert "parallel.kernels auto: torch, as the GPU is sm_75" in row(old, "triton").found
    assert row(old, "FP8 hardware").verdict == "limited"
    assert doctor.verdict(doctor.diagnose(old), old).endswith("(CUDA), fp32.")
    assert row(machine(H100, driver=12), "DALI").verdict == "limited"
    monkeypatch.setattr(doctor.switch, "has_compiler", lambda: False)
    assert row(eight, "triton").todo == "install gcc or clang, or set CC"
    assert row(machine(H100, nccl=False), "backends").verdict == "wrong"
    unseen = real | {"torch": real["torch"] | DRIVERLESS | {"driver": 13}}
    assert row(unseen, "device").todo == "install a CUDA build of torch"


def test_versions_and_threads(real, monkeypatch):
    wrong = "0.19.2" if sys.version_info < (3, 12) else "0.16.1"
    assert row(real | {"megatron": {"version": wrong}}, "megatron-core").verdict == "limited"
    assert row(real | {"torch": real["torch"] | {"version": "2.9.1"}}, "torch").verdict == "limited"
    assert row(real | {"torch": real["torch"] | {"version": "2.11.0a0+b4e4"}}, "torch").verdict == "ok"
    monkeypatch.setattr(doctor, "cores", lambda: 2)
    assert "OMP_NUM_THREADS=2" in row(real | {"torch": real["torch"] | {"threads": 64}}, "cores").todo


def test_pip_advice_is_what_pyproject_asks_for(real):
    nothing = dict.fromkeys(real)
    advice = [line for line in doctor.diagnose(nothing) if "pip install" in line.todo]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {requirement.partition(";")[0].strip() for requirement in project["dependencies"]}
    named = {pip for line in advice for pip in re.findall(r"pip install '(.+?)'", line.todo)}
    assert len(named) >= 9
    assert named <= asked


def test_a_check_that_fails_is_a_row(real):
    lost = row({**real, "dali": {}}, "DALI")
    assert (lost.verdict, "KeyError" in lost.found) == ("limited", True)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("import time; time.sleep(60)", "Timeout"),
        ("import os; os._exit(11)", "Crash"),
        ("raise OSError('no such\\nlibrary')", "OSError"),
        ("import sys; sys.exit('gone')", "SystemExit"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
    ],
)
def test_probe_survives(code, error):
    answer = probes.probe(code, timeout=1.5 if error == "Timeout" else 60)
    assert answer["error"] == error
    assert "\n" not in answer["text"]
    assert answer.get("guarded", False) == (error == "ModuleNotFoundError")


def test_probe_reads_past_what_a_package_prints():
    assert probes.probe("print('Failed to load .so', end='')\nanswer = {'version': '1'}") == {"version": "1"}


def test_apex_of_nvidia_is_told_without_running_it(tmp_path, monkeypatch):
    files = {"apex/__init__.py": "raise SystemExit('apex was run')", "apex/multi_tensor_apply/__init__.py": ""}
    monkeypatch.syspath_prepend(package(tmp_path, files))
    assert find_apex() == ("nvidia", str(tmp_path / "apex"))
    refuse_foreign_apex()


@pytest.mark.parametrize("name", ["apex/__init__.py", "apex.py", "apex/notes.txt"])
def test_foreign_apex_is_refused(tmp_path, monkeypatch, name):
    site = tmp_path / "site-packages"
    monkeypatch.syspath_prepend(package(site, {name: "raise SystemExit('apex was run')"}))
    with pytest.raises(InputError, match=r"not NVIDIA's apex.*pip uninstall apex"):
        refuse_foreign_apex()
