"""environment.json says what a run ran on, and nothing about whose machine it was."""

import getpass
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mpdit
from mpdit.train import environment as module
from mpdit.train.environment import checkout, cores, environment, memory


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [leaf for value in tree for leaf in leaves(value)] if isinstance(tree, list) else [tree]


def test_versions_and_hardware(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    told = json.loads(json.dumps(environment(), allow_nan=False))
    assert told["mpdit"]["version"] == mpdit.__version__
    assert told["python"] == platform.python_version()
    for name in ("torch", "megatron-core", "numpy", "triton"):
        assert told["packages"][name] == importlib.metadata.version(name)
    assert told["packages"]["dali"]
    assert told["packages"]["mlflow"]
    assert told["cpu"]["cores"] >= 1
    assert told["cpu"]["memory"] > 2**28
    assert (told["world_size"], told["local_world_size"]) == (8, None)
    assert told["variables"]["OMP_NUM_THREADS"] == "3"


def test_only_listed_variables_without_secrets_and_places(monkeypatch):
    for name, value in {
        "NCCL_DEBUG": "INFO",
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "MALLOC_CONF": "background_thread:true,dirty_decay_ms:10000",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    kept = environment()["variables"]
    assert {"NCCL_DEBUG", "NCCL_IB_HCA", "MALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"} <= set(kept)
    for name, value in {
        "NCCL_TOKEN": "sesame1",
        "NCCL_HOSTID": "sesame2",
        "NCCL_COMM_ID": "sesame3:99",
        "NCCL_TOPO_DUMP_FILE": "sesame4",
        "NCCL_CONF": "/home/sesame5/nccl.conf",
        "NCCL_NOTE": "sesame6@example.org",
        "NCCL_ODD": "sesame7" + "a1" * 12,
        "MALLOC_NOTE": "ask sesame8",
        "MLFLOW_TRACKING_PASSWORD": "sesame9",
        "HF_TOKEN": "sesame10",
        "XNCCL_DEBUG": "sesame11",
    }.items():
        monkeypatch.setenv(name, value)
    told = environment()
    assert "sesame" not in json.dumps(told)
    assert told["variables"] == kept


def test_no_user_host_or_folder():
    told = leaves(environment())
    assert not [leaf for leaf in told if isinstance(leaf, str) and leaf.startswith(("/", "~"))]
    assert not {socket.gethostname(), getpass.getuser(), str(Path.home())} & set(told)


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed: the commit of a run is read with it")
def test_commit_of_the_checkout(tmp_path, monkeypatch):
    root = tmp_path / "checkout"
    (root / "mpdit").mkdir(parents=True)
    source = root / "mpdit" / "__init__.py"
    source.write_text("")
    monkeypatch.setattr(mpdit, "__file__", str(source))

    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(root), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    nothing = {"commit": None, "dirty": None}
    assert checkout() == nothing
    git("init")
    assert checkout() == nothing
    git("add", "mpdit")
    git("commit", "-m", "one")
    head = git("rev-parse", "HEAD")
    assert checkout() == {"commit": head, "dirty": False}
    (root / "notes.txt").write_text("untracked")
    assert checkout() == {"commit": head, "dirty": False}
    source.write_text("x = 1\n")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    assert checkout() == {"commit": head, "dirty": True}
    # An installed copy in an environment inside somebody's repository is not that repository's commit.
    (root / "lib" / "mpdit").mkdir(parents=True)
    monkeypatch.setattr(mpdit, "__file__", str(root / "lib" / "mpdit" / "__init__.py"))
    assert checkout() == nothing


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can bind a process to cores")
def test_cores_follow_affinity_and_the_containers_share(monkeypatch):
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    limits = {"/sys/fs/cgroup/cpu.max": "max 100000\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(module, "_read", lambda path: limits.get(path, ""))
    total = memory()
    assert cores() == 64
    limits |= {"/sys/fs/cgroup/cpu.max": "350000 100000\n", "/sys/fs/cgroup/memory.max": "1048576\n"}
    assert cores() == 4
    assert memory() == 2**20 < total


def test_a_cpu_that_stands_in_for_cuda_is_no_gpu(monkeypatch):
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA; what is said of a CPU build is tested")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="", total_memory=0, major=9, minor=0)
    )
    assert environment()["cuda"] is None
