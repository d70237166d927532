"""The scripts of a launch folder, by what really runs them: torchrun, Slurm, the Kubeflow operator's own models."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import launches
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from kubeflow.training import KubeflowOrgV1PyTorchJob
from kubeflow.training.api_client import ApiClient
from kubeflow.training.utils.utils import FakeResponse
from launches import ENVIRONMENT, wait

from mpdit.config import Parallel
from mpdit.errors import InputError
from mpdit_tools.transfer import launch
from mpdit_tools.transfer.launch import Machines

WHAT = "mmdit, width 16 -> 32, mup"
IMAGE = "registry.example#team/mpdit:0.1.0"
FOUR = {"NNODES": "1", "NPROC_PER_NODE": "4"}


# ---- how many machines -----------------------------------------------------------------------------------------------


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
def test_machines_are_all_gpus_or_a_sentence(gpus: int, per_node: int, tp: int, pp: int, cp: int) -> None:
    parallel = Parallel(tp=tp, pp=pp, cp=cp)
    fits = gpus % (tp * pp * cp) == 0 and (gpus < per_node or gpus % per_node == 0)
    if fits:
        found = launch.machines(gpus, per_node, parallel)
        assert found.ranks == gpus
        assert found.per_node <= per_node
    else:
        with pytest.raises(InputError, match=r"--gpus .* give a multiple of \d+.*\.$"):
            launch.machines(gpus, per_node, parallel)


def test_without_a_number_there_is_one_copy_of_the_model() -> None:
    assert launch.machines(None, 8, Parallel(tp=2, pp=2)) == Machines(nodes=1, per_node=4)
    assert launch.machines(None, 8, Parallel(tp=8, pp=4)) == Machines(nodes=4, per_node=8)


@given(st.text(st.characters(blacklist_characters="/\0"), max_size=60))
@example("NULL")
@example("on")
@example("1e3")
def test_a_jobs_name_is_one_that_kubernetes_takes(folder: str) -> None:
    text = launch.kubeflow(Machines(nodes=1, per_node=1), WHAT, Path("runs", folder), "image", "claim")
    name = yaml.safe_load(text)["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", name)


# ---- as text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["launch.sh", "launch.sbatch", "launch.sbatch in a container"])
@pytest.mark.parametrize("given_machines", [Machines(nodes=1, per_node=4), Machines(nodes=32, per_node=8)])
def test_scripts_are_as_shellcheck_wants_them(name: str, given_machines: Machines, tmp_path: Path) -> None:
    text = {
        "launch.sh": launch.torchrun(given_machines, WHAT),
        "launch.sbatch": launch.slurm(given_machines, WHAT, Path("launch")),
        "launch.sbatch in a container": launch.slurm(given_machines, WHAT, Path("launch"), IMAGE),
    }[name]
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["shellcheck", "--shell", "bash", tmp_path / name],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_slurm_is_asked_for_every_node_a_signal_and_another_try() -> None:
    text = launch.slurm(Machines(nodes=32, per_node=8), WHAT, Path("runs/My launch!"))
    asked = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {
        *("--job-name=my-launch", "--nodes=32", "--ntasks-per-node=1", "--gpus-per-node=8"),
        *("--signal=B:USR1@300", "--requeue", "--output=%x-%j.out"),
    } <= set(asked)
    first_command = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert all(not line.startswith("#SBATCH") for line in text.splitlines()[first_command:])  # Slurm would not read it


def srun(text: str, tmp_path: Path, **variables: str) -> list[str]:
    """What the batch script asks of srun. Scripts take its place, which writes its words down, and scontrol's."""
    folder, bin_folder, words = tmp_path / "launch folder", tmp_path / "bin", tmp_path / "words"
    folder.mkdir(), bin_folder.mkdir()
    (folder / "launch.sbatch").write_text(text)
    stand_ins = {
        "srun": f'printf "%s\\n" "$@" > "{words}"',
        "scontrol": f'[ "$2" = job ] && echo "   Command={folder}/launch.sbatch" || echo node1',
    }
    for name, body in stand_ins.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    path = {"PATH": f"{bin_folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(folder / "launch.sbatch"), "train.seed=1"],
        cwd=tmp_path,
        env={**ENVIRONMENT, **slurm, **path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return words.read_text().splitlines()


def test_slurm_starts_the_ranks_in_a_container_that_has_the_folders(tmp_path: Path) -> None:
    """By pyxis: the image, the folders at their own paths, the submit folder as the working one."""
    given, folder = Machines(nodes=2, per_node=8), tmp_path / "launch folder"
    text = launch.slurm(given, WHAT, Path("launch"), IMAGE)
    asked = srun(text, tmp_path)
    container = [
        f"--container-image={IMAGE}",
        f"--container-mounts={tmp_path}:{tmp_path},{folder}:{folder}",
        f"--container-workdir={tmp_path}",
    ]
    start = asked.index("torchrun")
    assert asked[:start] == ["--kill-on-bad-exit=1", "--cpu-bind=none", *container]
    assert asked[-2:] == [f"{folder}/config.yaml", "train.seed=1"]


def test_slurms_container_and_its_folders_can_be_others(tmp_path: Path) -> None:
    text = launch.slurm(Machines(nodes=2, per_node=8), WHAT, Path("launch"), IMAGE)
    asked = srun(text, tmp_path, CONTAINER_IMAGE="/images/mpdit.sqsh", CONTAINER_MOUNTS="/data:/data:ro")
    assert "--container-image=/images/mpdit.sqsh" in asked
    assert next(word for word in asked if word.startswith("--container-mounts")).endswith(",/data:/data:ro")


def test_without_an_image_slurm_starts_the_ranks_as_they_are(tmp_path: Path) -> None:
    text = launch.slurm(Machines(nodes=2, per_node=8), WHAT, Path("launch"))
    assert srun(text, tmp_path)[:3] == ["--kill-on-bad-exit=1", "--cpu-bind=none", "torchrun"]
    assert "container" not in text


@pytest.mark.parametrize("image", ['a"; rm -rf "$HOME', "two words", "$IMAGE", "a`id`", ""])
def test_an_image_that_is_no_name_is_refused(image: str) -> None:
    with pytest.raises(InputError, match=r"^--image is .*but should be a container image"):
        launch.slurm(Machines(nodes=1, per_node=8), WHAT, Path("launch"), image)


def test_several_nodes_have_to_be_told_where_to_meet(tmp_path: Path) -> None:
    (tmp_path / "launch.sh").write_text(launch.torchrun(Machines(nodes=2, per_node=8), WHAT))
    done = subprocess.run(["bash", tmp_path / "launch.sh"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "RDZV_ENDPOINT: is not set: give HOST:29400, the same on all 2 nodes" in done.stderr


@pytest.mark.parametrize("folder", [Path("launch/18b"), Path("/scratch/18b")])
def test_kubeflow_knows_every_key_of_the_manifest(folder: Path) -> None:
    """Read with the operator's own models and written again: what they do not know would be gone."""
    text = launch.kubeflow(Machines(nodes=32, per_node=8), WHAT, folder, "registry.example/mpdit:0.1", "work")
    manifest = yaml.safe_load(text)
    client = ApiClient()
    job = client.deserialize(FakeResponse(manifest), KubeflowOrgV1PyTorchJob)
    assert client.sanitize_for_serialization(job) == manifest
    worker = job.spec.pytorch_replica_specs["Worker"]
    (container,) = worker.template.spec.containers
    assert (job.spec.nproc_per_node, job.spec.elastic_policy.rdzv_backend) == ("8", "c10d")
    assert {worker.replicas, job.spec.elastic_policy.min_replicas, job.spec.elastic_policy.max_replicas} == {32}
    assert (container.name, container.resources.limits["nvidia.com/gpu"]) == ("pytorch", "8")
    assert container.command[0] == "torchrun"
    inside = "18b" if folder.is_absolute() else folder
    assert container.command[-2:] == [f"{inside}/config.yaml", f"run.dir={inside}/run"]


# ---- for real --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny_set: Path, tmp_path: Path) -> Path:
    return launches.folder(tiny_set, tmp_path)


@dataclasses.dataclass
class Job:
    """A started launch.sh, whose pid is torchrun's (exec). It writes to a file: a pipe may outlive it in a child."""

    process: subprocess.Popen[bytes]
    log: Path

    def said(self) -> str:
        """All that it said, once it has ended well."""
        assert self.process.wait(240) == 0, self.log.read_text()
        return self.log.read_text()


@contextlib.contextmanager
def started(folder: Path, *environments: dict[str, str]) -> Iterator[list[Job]]:
    """`launch.sh`, once in each environment; ended with all that it started."""
    jobs = []
    for number, environment in enumerate(environments):
        log = folder / f"log-{number}"
        with log.open("w") as out:
            argv = ["bash", str(folder / "launch.sh")]
            process = subprocess.Popen(argv, stdout=out, stderr=out, env={**ENVIRONMENT, **environment})
        jobs.append(Job(process=process, log=log))
    try:
        yield jobs
    finally:
        for job in jobs:
            job.process.terminate()  # torchrun ends its ranks
        for job in jobs:
            job.process.wait(60)


@pytest.mark.dist
def test_launch_sh_trains_on_four_ranks_of_a_cpu(folder: Path) -> None:
    with started(folder, FOUR) as (job,):
        assert "run folder" in job.said()
    launches.trained(folder)


@pytest.mark.dist
@pytest.mark.slow
def test_launch_sh_trains_on_two_nodes_that_meet(folder: Path) -> None:
    """Two nodes of two ranks, here on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    node = {"NNODES": "2", "NPROC_PER_NODE": "2", "RDZV_ENDPOINT": f"127.0.0.1:{port}"}
    with started(folder, node, node) as jobs:
        for job in jobs:
            job.said()
    launches.trained(folder)


@pytest.mark.dist
@pytest.mark.slow
def test_launch_sh_goes_on_when_the_first_rank_is_killed(folder: Path) -> None:
    """By the kernel, say, for want of memory: that process alone, which writes the run folder."""
    with started(folder, FOUR) as (job,):
        wait(lambda: (folder / "run" / "checkpoints" / "step_2").is_dir(), 240)
        pid = job.process.pid
        rank = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        os.kill(rank, signal.SIGKILL)
        try:
            assert "going on from" in job.said()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(rank, signal.SIGKILL)  # what it had started itself
    launches.trained(folder)
