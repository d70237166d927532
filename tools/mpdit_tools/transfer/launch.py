"""The scripts of a launch folder: torchrun on any machines, the same under Slurm, and a job for Kubeflow.

They only start torchrun, which meets the other nodes, starts a process for each GPU, and all of them again when one
dies.
"""

import dataclasses
import json
import re
import string
from pathlib import Path

from mpdit.config import Parallel
from mpdit.errors import InputError

_RESTARTS = 3
_REQUEUES = 10
_PORT = 29400  # torchrun's own
_WARNING_S = 300  # before a job's end
_SAVING_S = 240  # that ranks have to save when a signal has come


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Machines:
    """`nodes` machines with `per_node` GPUs, or other ranks, each."""

    nodes: int
    per_node: int

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        def count(number: int, what: str) -> str:
            return f"{number} {what}{'s' if number > 1 else ''}"

        return f"{count(self.ranks, 'rank')} on {count(self.nodes, 'node')}"


def machines(gpus: int | None, per_node: int, parallel: Parallel) -> Machines:
    """How `gpus` (default: one copy of the model) come in nodes. Raises InputError where one does not divide."""
    copy = parallel.tp * parallel.pp * parallel.cp
    gpus = copy if gpus is None else gpus
    if gpus < 1 or per_node < 1:
        raise InputError(f"--gpus is {gpus} and --gpus-per-node {per_node}, but both should be at least 1.")
    if gpus % copy:
        raise InputError(
            f"--gpus {gpus} does not divide by parallel.tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = "
            f"{copy}; give a multiple of {copy}, or another layout."
        )
    if gpus > per_node and gpus % per_node:
        raise InputError(
            f"--gpus {gpus} does not fill nodes of --gpus-per-node {per_node}; give a multiple of {per_node}."
        )
    return Machines(nodes=max(1, gpus // per_node), per_node=min(gpus, per_node))


class _Script(string.Template):
    delimiter = "%"  # which bash needs least


def torchrun(given: Machines, what: str) -> str:
    """launch.sh."""
    return _fill(_TORCHRUN, given, what)


def slurm(given: Machines, what: str, folder: Path, image: str | None = None) -> str:
    """launch.sbatch; the job is named after `folder`. `image`: a container that pyxis starts the ranks in.

    Raises InputError for an image that is no name.
    """
    if image is not None and not re.fullmatch(r"[\w./:@#+~-]+", image):
        raise InputError(f"--image is {image!r}, but should be a container image, such as registry#name:tag or a path.")
    inside = _PYXIS.replace("%image", image) if image else ""
    srun = '"${container[@]}" "${command[@]}"' if image else '"${command[@]}"'
    return _fill(_SLURM, given, what, name=_job(folder.name), container=inside, srun=srun)


def kubeflow(given: Machines, what: str, folder: Path, image: str, claim: str) -> str:
    """launch.yaml: a PyTorchJob of Kubeflow's training operator; `folder` is as seen from the volume `claim`."""
    inside = folder.name if folder.is_absolute() else folder.as_posix()
    texts = {
        "name": _job(folder.name),
        "config": f"{inside}/config.yaml",
        "run_dir": f"run.dir={inside}/run",
        "image": image,
        "claim": claim,
    }
    return _fill(_KUBEFLOW, given, what, **{key: json.dumps(text) for key, text in texts.items()})


def _job(name: str) -> str:
    """A name that Slurm and Kubernetes take: small letters, digits and dashes, a letter first."""
    kept = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return kept if kept[:1].isalpha() else f"mpdit-{kept}".rstrip("-")


def _fill(template: str, given: Machines, what: str, **more: str) -> str:
    return _Script(template).substitute(
        what=f"{what}: {given}",
        nodes=str(given.nodes),
        per_node=str(given.per_node),
        restarts=str(_RESTARTS),
        port=str(_PORT),
        warning=str(_WARNING_S),
        saving=str(_SAVING_S),
        requeues=str(_REQUEUES),
        **more,
    )


_COMMAND = """\
# Ranks of a second try would meet by what the first one left in a store they share (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# torchrun passes these on to the ranks, which save and leave; it ends those that are not done after so many seconds.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export PET_SHUTDOWN_TIMEOUT=%saving
command=(
    torchrun
    --nnodes="$nodes"
    --nproc-per-node="${NPROC_PER_NODE:-%per_node}"
    --rdzv-backend=c10d
    --rdzv-endpoint="$endpoint"
    --rdzv-id="$id"
    --max-restarts="${MAX_RESTARTS:-%restarts}"
    -m mpdit train "$folder/config.yaml" "$@"
)
"""

_TORCHRUN = (
    """\
#!/usr/bin/env bash
# %what.
#
# One node:       bash launch.sh [section.key=value ...]
# Several nodes:  on each of them   RDZV_ENDPOINT=HOST:%port bash launch.sh   with the same HOST, one of the nodes
# A laptop:       NNODES=1 NPROC_PER_NODE=4 bash launch.sh                    (ranks that the layout divides)
#
# Start it in the folder that data.path and run.dir are relative to. Started again, it goes on from the newest
# checkpoint. SIGTERM or SIGUSR1 makes it save one and end.
set -euo pipefail

folder=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes=${NNODES:-%nodes}
if [ "$nodes" = 1 ]; then
    endpoint=${RDZV_ENDPOINT:-localhost:0} # port 0: any that is free
else
    endpoint=${RDZV_ENDPOINT:?is not set: give HOST:%port, the same on all $nodes nodes}
fi
id=${RDZV_ID:-mpdit}

"""
    + _COMMAND
    + """\
exec "${command[@]}"
"""
)

_PYXIS = """\
# In a container, by pyxis (srun --help has its options where Slurm has it). The folders keep their paths in there.
# CONTAINER_IMAGE=... sbatch takes another image, CONTAINER_MOUNTS=/data:/data,... sbatch more folders.
container=(
    --container-image="${CONTAINER_IMAGE:-%image}"
    --container-mounts="$PWD:$PWD,$folder:$folder${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    --container-workdir="$PWD"
)
"""

_SLURM = (
    """\
#!/usr/bin/env bash
# %what.
#
# sbatch --time=24:00:00 --partition=... --account=... launch.sbatch [section.key=value ...]
#
# Submit it in the folder that data.path and run.dir are relative to. A job that nears its end saves; that one, or one
# that fails (a node breaks down; %requeues times at most), is put into the queue again and goes on.
#SBATCH --job-name=%name
#SBATCH --nodes=%nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=%per_node
#SBATCH --exclusive
#SBATCH --signal=B:USR1@%warning
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%%x-%%j.out
set -euo pipefail

# Slurm runs a copy of this file; its own folder is where the job was submitted from.
script=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
folder=$(cd "$(dirname "${script%%%%.sbatch*}")" && pwd)
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
nodes=$SLURM_JOB_NUM_NODES
endpoint=${RDZV_ENDPOINT:-$host:$((20000 + SLURM_JOB_ID %% 10000))}
id=$SLURM_JOB_ID

again() {
    echo "launch.sbatch: $1, job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit
}
notice=
srun=
# At the notice, the first one, the ranks save and leave, and then srun does.
trap 'trap "" USR1; notice=1; [ -z "$srun" ] || kill -USR1 "$srun"' USR1

"""
    + _COMMAND
    + """\
%{container}srun --kill-on-bad-exit=1 --cpu-bind=none %srun & # in the background, so that the signal is heard at once
srun=$!
code=0
wait "$srun" || code=$?
if [ -n "$notice" ]; then
    wait "$srun" || true # the first one ended with the signal
    again "the time is nearly up"
fi
if [ "$code" -ne 0 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt %requeues ]; then
    again "srun ended with $code"
fi
exit "$code"
"""
)

_KUBEFLOW = """\
# %what.
#
# kubectl apply -f launch.yaml
#
# The image has mpdit and its environment. The volume claim holds what this folder, data.path and run.dir lie in.
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: %name
spec:
  nprocPerNode: "%per_node"
  elasticPolicy: # of a fixed size: the layout says how many ranks there are
    rdzvBackend: c10d
    minReplicas: %nodes
    maxReplicas: %nodes
    maxRestarts: %restarts
  runPolicy:
    backoffLimit: %restarts
    cleanPodPolicy: Running # what has ended stays, with its log
  pytorchReplicaSpecs:
    Worker:
      replicas: %nodes
      restartPolicy: OnFailure
      template:
        spec:
          terminationGracePeriodSeconds: %warning # between SIGTERM, at which the ranks save, and SIGKILL
          containers:
            - name: pytorch # the operator looks for this name, and gives torchrun its nodes in PET_* variables
              image: %image
              workingDir: /mpdit
              command: [torchrun, -m, mpdit, train, %config, %run_dir]
              env: # ranks of a second try would meet by what the first one left in a store they share
                - {name: TORCH_DISABLE_SHARE_RDZV_TCP_STORE, value: "1"}
                - {name: PET_SHUTDOWN_TIMEOUT, value: "%saving"} # seconds that torchrun gives them to save
              resources:
                limits:
                  nvidia.com/gpu: "%per_node"
              volumeMounts:
                - {name: work, mountPath: /mpdit}
                - {name: shm, mountPath: /dev/shm}
          volumes:
            - name: work
              persistentVolumeClaim: {claimName: %claim}
            - name: shm # NCCL and DALI need more than a container's 64 MiB
              emptyDir: {medium: Memory}
"""
