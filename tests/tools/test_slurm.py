"""launch.sbatch on a real Slurm of two nodes: the losses of one process; signals and dead nodes cost a few steps.

`make test-slurm` runs it, as root, with Debian's slurmctld, slurmd and slurm-client.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import launches
import pytest
from launches import wait

STEPS = 24
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.slurm]

CONFIG = """\
ClusterName=local
SlurmctldHost=localhost
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdTimeout=10
ReturnToService=2
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
GresTypes=gpu
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=1 Gres=gpu:2 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """Two nodes on this machine; ``daemons`` by name."""

    def __init__(self, home: Path, controller: str, node: str) -> None:
        self.environment = {**launches.ENVIRONMENT, "SLURM_CONF": str(home / "slurm.conf")}
        self._log = (home / "log").open("w")
        self._node = node
        self.daemons = {"controller": self._start([controller, "-c", "-D"])}
        for name in ("n1", "n2"):
            self.boot(name)

    def _start(self, argv: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(argv, env=self.environment, stdout=self._log, stderr=self._log)

    def boot(self, name: str) -> None:
        self.daemons[name] = self._start([self._node, "-D", "-N", name])

    def kill(self, name: str) -> None:
        """As a power cut does: the node's daemon and all that it runs are gone at once."""
        tasks = _tasks_of(name)
        assert tasks
        for pid in [self.daemons[name].pid, *map(_parent, tasks), *tasks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[name].wait()

    def run(self, *argv: str) -> str:
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def submit(self, folder: Path) -> str:
        """Put launch.sbatch into the queue; the job's number."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.environment["RDZV_ENDPOINT"] = f"127.0.0.1:{port}"  # n1 and n2 are names of nobody
        job = self.run("sbatch", "--parsable", f"--output={folder / 'log'}", str(folder / "launch.sbatch"))
        assert job.isdigit()
        return job

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-j", job, "-o", "%T")

    def completed(self, job: str) -> bool:
        return "JobState=COMPLETED" in self.run("scontrol", "show", "job", job)

    def go_on(self, job: str) -> None:
        """A job that was put back waits for two minutes on its own, until all of its first try is gone for certain."""
        wait(lambda: "PENDING" in self.state(job), 120)
        wait(lambda: not _step_daemons(), 120)  # or Slurm 22.05 loses a node of the second try
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")
        wait(lambda: self.completed(job), 400)

    def close(self) -> None:
        self.run("scancel", "--user=root")
        for daemon in reversed(self.daemons.values()):  # a node that misses its controller would wait for it
            daemon.terminate()
            try:
                daemon.wait(30)
            except subprocess.TimeoutExpired:
                daemon.kill()
        self._log.close()


def _step_daemons() -> list[Path]:
    """What Slurm runs batch scripts and steps under."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "comm").read_text().strip() == "slurmstepd":
                found.append(path)
    return found


def _tasks_of(name: str) -> list[int]:
    """torchrun and its ranks on a node."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={name}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def _parent(pid: int) -> int:
    """Of torchrun: the node's slurmstepd, which outlives a killed slurmd."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    programs = [shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") for name in ("slurmctld", "slurmd")]
    if None in programs or os.geteuid():
        pytest.skip("needs root, and Slurm (apt-get install slurmctld slurmd slurm-client)")
    home = tmp_path / "slurm"
    for name in ("state", "spool-n1", "spool-n2"):
        (home / name).mkdir(parents=True)
    port = _three_free_ports()
    text = CONFIG.format(folder=home, user="root", controller=port, first=port + 1, second=port + 2)
    (home / "slurm.conf").write_text(text)
    (home / "gres.conf").write_text("Name=gpu File=/dev/tty[0-1]\n")  # any two devices will do
    found = Cluster(home, *map(str, programs))
    try:
        wait(lambda: found.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 60)
        yield found
    finally:
        found.close()


def _three_free_ports() -> int:
    for first in range(26_000, 27_000, 3):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + 3):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no three free ports in a row")


@pytest.fixture
def folder(tiny_set: Path, tmp_path: Path) -> Path:
    found = launches.folder(tiny_set, tmp_path / "with a space", STEPS)
    assert "#SBATCH --nodes=2" in (found / "launch.sbatch").read_text()
    return found


def saved(folder: Path, step: int) -> bool:
    return (folder / "run" / "checkpoints" / f"step_{step}").is_dir()


def test_two_nodes_train_to_the_losses_of_one_process(folder: Path, cluster: Cluster) -> None:
    job = cluster.submit(folder)
    wait(lambda: cluster.completed(job), 400)
    launches.trained(folder, STEPS)
    argv = [*launches.TRAIN, str(folder / "config.yaml"), "parallel.tp=1", "parallel.pp=1"]
    subprocess.run([*argv, f"run.dir={folder / 'alone'}"], env=launches.ENVIRONMENT, check=True, capture_output=True)
    together, alone = (
        [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "alone")
    )
    assert [row["loss"] for row in together] == pytest.approx([row["loss"] for row in alone], rel=1e-5)
    assert together[-1]["val_loss"] == pytest.approx(alone[-1]["val_loss"], rel=1e-5)


def test_a_signal_puts_the_job_back_and_no_step_is_lost(folder: Path, cluster: Cluster) -> None:
    """USR1 is what Slurm sends before the time is up."""
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("save_every: 2", "save_every: 0"))
    job = cluster.submit(folder)
    metrics = folder / "run" / "metrics.jsonl"
    wait(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 240)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait(lambda: "PENDING" in cluster.state(job), 120)
    done = metrics.read_text().count("\n")
    assert done < STEPS
    cluster.go_on(job)
    log = (folder / "log").read_text()
    assert f"asked to stop by SIGUSR1: saved at step {done}\n" in log
    assert "the time is nearly up, job" in log
    assert f"step_{done} at step {done}\n" in log.split("going on from")[1]
    launches.trained(folder, STEPS)


def test_a_node_that_dies_costs_what_was_not_saved(folder: Path, cluster: Cluster) -> None:
    """The one that does not run the batch script."""
    job = cluster.submit(folder)
    wait(lambda: saved(folder, 2), 240)
    cluster.kill("n2")
    wait(lambda: "PENDING" in cluster.state(job), 240)
    cluster.boot("n2")
    wait(lambda: cluster.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"], 120)
    cluster.go_on(job)
    assert "going on from" in (folder / "log").read_text()
    launches.trained(folder, STEPS)
