"""``mpdit doctor``: what this machine can run, and what to do about the rest.

Whatever can fail, hang or crash at import is imported in a process of its own, several at a time; this one needs
nothing but the standard library, so that it also answers where half of the packages are missing.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from mpdit.parallel.apex import apex_remedy, find_apex
from mpdit.parallel.te_install import find_te, install
from mpdit.train.environment import cores, cpu_model, memory
from mpdit_kernels import switch
from mpdit_tools.probes import PLAIN, Facts, examine, installed

Verdict = Literal["ok", "limited", "wrong"]

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table. "limited" costs a feature or speed; "wrong" keeps training from running."""

    name: str
    found: str
    verdict: Verdict = "ok"
    todo: str = ""


# ---- rows ------------------------------------------------------------------------------------------------------------


def _package(name: str, answer: Facts | None, todo: str, missing: Verdict = "wrong") -> Row:
    if answer is None:
        return Row(name=name, found="absent", verdict=missing, todo=todo)
    if "error" in answer:
        return Row(name=name, found=f"does not import: {answer['error']}: {answer['text']}", verdict="wrong", todo=todo)
    return Row(name=name, found=answer["version"] or _version(name) or "here")


def _packages(facts: Facts) -> list[Row]:
    return [_package(pip.partition(">")[0], facts[module], f"pip install '{pip}'") for module, pip in PLAIN.items()]


def _torch(facts: Facts) -> list[Row]:
    todo = "pip install 'torch>=2.11,<=2.13.0'"
    torch = _package("torch", facts["torch"], todo)
    if torch.verdict == "wrong":
        return [torch]
    answer = facts["torch"]
    number = re.match(r"2\.(\d+)", answer["version"])
    if not number or not 11 <= int(number[1]) <= 13:
        torch = dataclasses.replace(torch, verdict="limited", todo=f"only 2.11 to 2.13 are tested: {todo}")
    return [torch, _device(answer), _distributed(answer)]


def _device(answer: Facts) -> Row:
    kinds: dict[str, int] = {}
    for device in answer["devices"]:
        major, minor = device["capability"]
        text = f"{device['name']}, {device['memory'] / _GIB:.0f} GiB, sm_{major}{minor}"
        kinds[text] = kinds.get(text, 0) + 1
    if kinds:
        return Row(name="device", found="; ".join(f"{count} x {kind}" for kind, count in kinds.items()))
    if answer["driver"] is None:
        return Row(name="device", found=f"CPU ({cpu_model() or platform.machine()})")
    why = f"torch is built for CUDA {answer['cuda']}" if answer["cuda"] else "torch is built without CUDA"
    todo = "update the driver, or look at CUDA_VISIBLE_DEVICES" if answer["cuda"] else "install a CUDA build of torch"
    found = f"CPU; an NVIDIA driver for CUDA {answer['driver']} is here, but {why} and sees no GPU"
    return Row(name="device", found=found, verdict="limited", todo=todo)


def _distributed(answer: Facts) -> Row:
    found = ", ".join(name for name in ("gloo", "nccl") if answer[name]) or "none"
    if not answer["gloo"] or (answer["devices"] and not answer["nccl"]):
        return Row(name="backends", found=found, verdict="wrong", todo="install a torch with gloo, and NCCL for GPUs")
    return Row(name="backends", found=found)


def _rendezvous() -> Row:
    try:
        with socket.create_server(("localhost", 0)) as server:
            socket.create_connection(server.getsockname()[:2], timeout=5).close()
    except OSError as error:
        todo = "ranks meet on localhost: let it resolve to 127.0.0.1 (/etc/hosts) and the loopback interface be up"
        return Row(name="rendezvous", found=f"localhost can't be bound: {error}", verdict="wrong", todo=todo)
    return Row(name="rendezvous", found="localhost binds and answers")


def _megatron(facts: Facts, te: Row) -> Row:
    wanted = "megatron-core==0.16.1" if sys.version_info < (3, 12) else "megatron-core>=0.19,<0.20"
    todo = f"pip install '{wanted}'"
    row = _package("megatron-core", facts["megatron"], todo)
    if row.verdict == "wrong":
        if facts["megatron"] is not None and te.verdict == "wrong":
            return dataclasses.replace(row, todo="see Transformer Engine, whose import fails inside it")
        return row
    right = row.found == "0.16.1" if sys.version_info < (3, 12) else row.found.startswith("0.19.")
    if not right:
        return dataclasses.replace(row, verdict="limited", todo=f"not tested on this Python: {todo}")
    return row


def _transformer_engine(facts: Facts) -> Row:
    name, answer, te = "Transformer Engine", facts["transformer_engine"], find_te()
    if answer is None and te.state == "absent":
        if _fp8_devices(facts):
            todo = f"parallel.backend te and fp8 need it; fp32 and bf16 do not: {install()}"
            return Row(name=name, found="absent", verdict="limited", todo=todo)
        return Row(name=name, found="absent (nothing here needs it)")
    if answer is not None and "error" not in answer:
        return Row(name=name, found=f"{answer['version'] or te.version or 'here'}, imports")
    answer = answer or {"error": "ModuleNotFoundError", "text": "its Python files are gone", "guarded": True}
    why = te.why or "it does not import"
    found = f"half-installed: {why} ({answer['error']}: {answer['text']})"
    remedy = te.remedy or f"run pip uninstall transformer-engine, or build it for this torch: {install()}"
    # A half that megatron-core would not notice is one that mpdit refuses all the same: it could crash at any import.
    if answer.get("guarded") and te.state != "harmful":
        return Row(name=name, found=found, verdict="limited", todo=f"of no use as it is: {remedy}")
    return Row(name=name, found=found, verdict="wrong", todo=f"it breaks every import of megatron.core: {remedy}")


def _fp8_devices(facts: Facts) -> list[dict[str, Any]]:
    return [device for device in (facts["torch"] or {}).get("devices", []) if _recipes(device)]


def _recipes(device: Facts, cuda: str | None = None) -> tuple[str, ...]:
    from mpdit.parallel import fp8_rules  # needs PyYAML, which is there where a GPU has been found

    version = tuple(map(int, cuda.split(".")[:2])) if cuda else None
    return fp8_rules.recipes(tuple(device["capability"]), version)


def _fp8(facts: Facts) -> Row:
    able: dict[str, int] = {}
    for device in _fp8_devices(facts):
        kinds = ", ".join(_recipes(device, facts["torch"]["cuda"]))
        able[kinds] = able.get(kinds, 0) + 1
    if able:
        said = "; ".join(f"{count} x {kinds}" for kinds, count in able.items())
        return Row(name="FP8 hardware", found=f"{said} (parallel.fp8_recipe)")
    todo = "train in bf16 or fp32; mpdit fp8check shows what FP8 would do"
    return Row(name="FP8 hardware", found="none (sm_89 has it)", verdict="limited", todo=todo)


def _apex() -> Row:
    kind, where = find_apex()
    if kind == "foreign":
        found = f"{_version('apex') or 'no version'} at {where}: another project, taken for NVIDIA's by Megatron-core"
        return Row(name="apex", found=found, verdict="wrong", todo=apex_remedy(where))
    return Row(name="apex", found="NVIDIA's" if kind == "nvidia" else "absent (nothing here needs it)")


def _triton(facts: Facts) -> Row:
    # megatron-core imports it, with or without a GPU.
    row = _package("triton", facts["triton"], "pip install 'triton>=3.6,<3.10'")
    if row.verdict == "wrong":
        return row
    devices = (facts["torch"] or {}).get("devices", [])
    capabilities = [device["capability"] for device in devices]
    reason = switch.what_lacks(triton=True, capabilities=capabilities, compiler=switch.has_compiler())
    if not reason:
        return dataclasses.replace(row, found=f"{row.found}; parallel.kernels auto: triton, compiled for the GPU")
    found = f"{row.found}; parallel.kernels auto: torch, as {reason}"
    todo = "install gcc or clang, or set CC" if capabilities and not switch.has_compiler() else ""
    return dataclasses.replace(row, found=found, verdict="limited", todo=todo)


def _dali(facts: Facts) -> Row:
    row = _package("DALI", facts["dali"], "pip install 'nvidia-dali-cuda130==2.4.0'")
    torch = facts["torch"] or {}
    if row.verdict == "wrong":
        return row
    if not torch.get("devices"):
        return dataclasses.replace(row, found=f"{row.found}, decodes on the CPU")
    if _version("nvidia-dali-cuda130") and (torch["driver"] or 0) < 13:
        found = f"{row.found}, decodes on the CPU: it is built for CUDA 13, the driver is for {torch['driver']}"
        return dataclasses.replace(row, found=found, verdict="limited", todo="update the driver to 580 or newer")
    return dataclasses.replace(row, found=f"{row.found}, decodes on the CPU and the GPU")


def _mlflow() -> Row:
    version = _version("mlflow") or _version("mlflow-skinny")
    if version is None or not installed("mlflow"):
        todo = "metrics go to metrics.jsonl alone: pip install 'mlflow-skinny==3.17.2' sqlalchemy alembic psutil"
        return Row(name="MLflow", found="absent", verdict="limited", todo=todo)
    missing = [module for module in ("sqlalchemy", "alembic", "psutil") if not installed(module)]
    if missing:
        found = f"{version} without {', '.join(missing)}: no sqlite store, or no system metrics"
        return Row(name="MLflow", found=found, verdict="limited", todo=f"pip install {' '.join(missing)}")
    return Row(name="MLflow", found=f"{version}, sqlite store and system metrics")


def _icons(facts: Facts) -> list[Row]:
    todo = "mpdit data build icons draws with it: pip install 'resvg-py>=0.2'"
    resvg = _package("resvg", facts["resvg_py"], todo, "limited")
    if resvg.verdict == "wrong":
        resvg = dataclasses.replace(resvg, verdict="limited")
    if shutil.which("npm"):
        return [resvg, Row(name="npm", found="on PATH")]
    todo = "mpdit data build icons fetches with it: install Node.js, or build from a folder of your own"
    return [resvg, Row(name="npm", found="not on PATH", verdict="limited", todo=todo)]


def _pretrained() -> list[Row]:
    """The libraries that run pretrained models: REPA's DINOv2, text encoders, autoencoders."""
    uses = {
        "transformers": ("text encoders (data.text minilm, t5, clip) and DINOv2", "pip install 'mpdit[encoders]'"),
        "diffusers": ("autoencoders (data.latents)", "pip install 'mpdit[latents]'"),
    }
    rows = []
    for name, (use, todo) in uses.items():
        if installed(name):
            rows.append(Row(name=name, found=f"{_version(name) or 'here'}, runs {use}"))
        else:
            rows.append(Row(name=name, found="absent", verdict="limited", todo=f"{use} need it: {todo}"))
    return rows


def _threads(facts: Facts) -> Row:
    mine, given = cores(), os.environ.get("OMP_NUM_THREADS")
    threads = (facts["torch"] or {}).get("threads")
    found = f"{mine} cores; OMP_NUM_THREADS {'is unset' if given is None else '= ' + given}"
    if threads is None:
        return Row(name="cores", found=found)
    found += f", torch takes {threads} threads a process"
    if threads > mine:
        todo = f"more threads than cores slow every step: export OMP_NUM_THREADS={mine}"
        return Row(name="cores", found=found, verdict="limited", todo=todo)
    return Row(name="cores", found=found, todo=f"with N ranks here: OMP_NUM_THREADS = {mine} / N" if mine > 1 else "")


def _space() -> list[Row]:
    total, free = memory(), shutil.disk_usage(Path.cwd()).free
    disk = Row(name="disk", found=f"{free / _GIB:.1f} GiB free here")
    if free < 5 * _GIB:
        disk = dataclasses.replace(disk, verdict="limited", todo="make room for checkpoints and shards, or set run.dir")
    if total is None:
        return [disk]
    ram = Row(name="memory", found=f"{total / _GIB:.1f} GiB")
    if total < 4 * _GIB:
        ram = dataclasses.replace(ram, verdict="limited", todo="enough for the smallest presets only")
    return [ram, disk]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def diagnose(facts: Facts) -> list[Row]:
    """The table's rows out of what :func:`examine` found. A check that fails itself becomes a row, not a traceback."""
    te = _isolated("Transformer Engine", lambda: [_transformer_engine(facts)])
    checks: list[tuple[str, Callable[[], list[Row]]]] = [
        ("Python", lambda: [Row(name="Python", found=platform.python_version())]),
        ("torch", lambda: _torch(facts)),
        ("rendezvous", lambda: [_rendezvous()]),
        ("megatron-core", lambda: [_megatron(facts, te[0])]),
        ("Transformer Engine", lambda: te),
        ("FP8 hardware", lambda: [_fp8(facts)]),
        ("apex", lambda: [_apex()]),
        ("Triton", lambda: [_triton(facts)]),
        ("DALI", lambda: [_dali(facts)]),
        ("MLflow", lambda: [_mlflow()]),
        ("packages", lambda: _packages(facts)),
        ("icons", lambda: _icons(facts)),
        ("pretrained models", _pretrained),
        ("cores", lambda: [_threads(facts)]),
        ("space", _space),
    ]
    return [row for name, check in checks for row in _isolated(name, check)]


def _isolated(name: str, check: Callable[[], list[Row]]) -> list[Row]:
    try:
        return check()
    except Exception as error:
        return [Row(name=name, found=f"can't be told: {type(error).__name__}: {error}", verdict="limited")]


def verdict(rows: list[Row], facts: Facts) -> str:
    """The closing sentence: what training can run on, or what is in its way."""
    wrong = ", ".join(row.name for row in rows if row.verdict == "wrong")
    if wrong:
        return f"this machine cannot train yet; in the way: {wrong}."
    devices = facts["torch"]["devices"]
    te = facts["transformer_engine"]
    bf16 = all(tuple(device["capability"]) >= (8, 0) for device in devices)
    fp8 = te is not None and "error" not in te and len(_fp8_devices(facts)) == len(devices) > 0
    names = ", ".join(sorted({device["name"] for device in devices}))
    where = f"{len(devices)} x {names} (CUDA)" if devices else "CPU"
    precision = "fp32, bf16 and fp8" if fp8 else "fp32 and bf16" if bf16 else "fp32"
    return f"this machine can train: {where}, {precision}."


def _print(rows: list[Row]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for row in rows:
            print(f"{row.verdict:<8} {row.name}: {row.found}{' -> ' + row.todo if row.todo else ''}")
        return
    table = Table("", "found", "verdict", "what to do")
    style = {"ok": "green", "limited": "yellow", "wrong": "bold red"}
    for row in rows:
        table.add_row(row.name, Text(row.found), Text(row.verdict, style[row.verdict]), Text(row.todo))
    console = Console()
    # Without a terminal rich assumes 80 columns and breaks every command to copy in two.
    Console(width=console.width if console.is_terminal else 160).print(table)


def main(argv: list[str]) -> int:
    """Exit code 0 when training can run, 1 when something is in its way."""
    parser = argparse.ArgumentParser(prog="mpdit doctor", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="the rows and the verdict as JSON")
    arguments = parser.parse_args(argv)
    facts = examine()
    rows = diagnose(facts)
    can_train = all(row.verdict != "wrong" for row in rows)
    if arguments.json:
        found = [dataclasses.asdict(row) for row in rows]
        print(json.dumps({"can_train": can_train, "verdict": verdict(rows, facts), "rows": found}, indent=1))
    else:
        _print(rows)
        print(verdict(rows, facts))
    return 0 if can_train else 1
