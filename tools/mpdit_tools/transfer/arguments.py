"""The options of ``mpdit transfer``."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Carry what was tuned on a small proxy to a large model, and write a folder to launch it from.

    The folder holds config.yaml, which `mpdit train` takes as it is, mup_table.json (what each parameter gets),
    plan.json (what the run needs, as `mpdit plan` says it), REPORT.md (every value: the proxy's, the rule and its
    source, the target's, why), launch.sh (torchrun) and launch.sbatch (Slurm).
    """

    source: Annotated[str, tyro.conf.arg(name="from", metavar="PROXY")]
    """The tuned proxy: its config or base values (YAML), its run folder, a sweep's folder, mlflow:RUN_ID, or
    mlflow-experiment:NAME for the experiment's best finished run."""
    to: Annotated[str, tyro.conf.arg(metavar="TARGET")]
    """A preset, such as mmdit-18b, or a YAML. What it does not say is the proxy's."""
    out: Path
    """The folder to write; it must not exist, or be empty."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="section.key=value"), tyro.conf.Positional] = ()
    """Keys of the target's config, for example train.steps=200000 parallel.tp=8."""
    gpus: int | None = None
    """All GPUs of the job. Default: those of one copy of the model, tp x pp x cp."""
    gpu: Literal["a100", "h100", "h200", "b200"] = "h100"
    """What plan.json is for."""
    gpus_per_node: int = 8
    """Of which so many are in a node."""
    scheduler: Literal["torchrun", "slurm", "kubeflow"] = "slurm"
    """torchrun: launch.sh alone; slurm: launch.sbatch too; kubeflow: launch.yaml, a PyTorchJob, as well."""
    image: str | None = None
    """The container image. slurm: launch.sbatch starts it by pyxis; without one, the ranks run as they are. kubeflow:
    mpdit by default."""
    claim: str = "mpdit"
    """kubeflow: the persistent volume claim with the folder and the data."""
    trials: int | None = None
    """Runs of the proxy that the search took, where PROXY does not tell; for the report's cost."""
    completedp: bool = True
    """Follow batch size and length by Complete(d)P's rule; --no-completedp leaves base values as they are."""
    allow_edge: bool = False
    """Go on though the best learning rate is the lowest or highest that was tried."""
    tracking_uri: str | None = None
    """MLflow's store. Default: MLFLOW_TRACKING_URI, or sqlite:///runs/mlflow.db."""
    json: bool = False
    """Print the report's tables as JSON."""
