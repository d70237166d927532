"""What surrounds a run: its data, the disk for its checkpoints, the tracking server."""

import shutil
from pathlib import Path

import numpy as np

from mpdit.config import Config
from mpdit.data.decode import decode
from mpdit.data.mixture import Mixture
from mpdit.data.shards import BadSample
from mpdit.errors import CheckFailed, InputError
from mpdit.redact import redact_uri

_DECODED = 64  # samples, spread over the set
_TRACKING_S = 10


def data(config: Config) -> str:
    """Both splits open and every tar is there in its size. Raises InputError, CheckFailed."""
    train, val = Mixture.open(config.data, "train"), Mixture.open(config.data, "val")
    if config.train.batch_size > len(train):
        raise CheckFailed(
            f"train.batch_size {config.train.batch_size} is more than the {len(train):,} training samples of "
            f"{config.data.path}."
        )
    return f"{len(train):,} training and {len(val):,} validation samples in {config.data.path}"


def pictures(config: Config) -> str:
    """Samples all over the training set decode. Raises InputError for the first that does not."""
    import torch

    shards = Mixture.open(config.data, "train")
    ids = np.unique(np.linspace(0, len(shards) - 1, min(_DECODED, len(shards))).round().astype(np.int64))
    try:
        encoded, names = [shards.read(int(i))[0] for i in ids], [shards.where(int(i)) for i in ids]
    except BadSample as error:
        raise InputError(f"{error}; copy the tar again or build the data set again.") from error
    side, channels = config.model.image_size, config.model.channels
    decode(encoded, side, side, channels=channels, names=names, device=torch.device("cpu"))
    return f"{len(ids)} training samples from all over the set decode to {side} x {side}"


def disk(config: Config, parameters: int) -> str:
    """Room for all checkpoints that are kept, and the one being written. Raises CheckFailed."""
    folder = Path(config.run.dir).absolute()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    averages = parameters * 4 * len(config.train.posthoc_ema)
    each = parameters * 16 + averages  # fp32 weights, two moments, averaged weights
    if config.train.keep_last:
        kept, why = config.train.keep_last + 1, f"train.keep_last {config.train.keep_last} and the one being written"
    else:
        kept = -(-config.train.steps // (config.train.save_every or config.train.steps))
        why = "train.keep_last 0 keeps all"
    what = f"{kept} checkpoints of {each / 1e9:.3g} GB"
    needed, free = kept * each, shutil.disk_usage(there).free
    if averages:
        from mpdit.train import snapshots

        count = -(-config.train.steps // (snapshots.every(config) or config.train.steps))
        what += f" and {count} snapshots of train.posthoc_ema of {averages / 1e9:.3g} GB"
        needed += count * averages
    if needed > free:
        raise CheckFailed(
            f"run.dir {config.run.dir} has {free / 1e9:.3g} GB free, but {what} ({why}) need {needed / 1e9:.3g} GB; "
            "give a larger disk or keep fewer."
        )
    return f"{free / 1e9:.3g} GB free for {what} in {config.run.dir}"


def tracking(config: Config) -> str:
    """The store of run.mlflow_uri answers within seconds. Raises CheckFailed."""
    import os

    uri = config.run.mlflow_uri
    if uri is None:
        return "a local MLflow store, mlflow.db beside the run folder"
    os.environ.update(MLFLOW_HTTP_REQUEST_TIMEOUT=str(_TRACKING_S), MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    from mlflow.tracking import MlflowClient

    try:
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    except Exception as error:  # whatever a client for one of many stores raises
        first = redact_uri(str(error).strip().splitlines()[0])[:200] if str(error).strip() else type(error).__name__
        raise CheckFailed(
            f"run.mlflow_uri {redact_uri(uri)} does not answer ({first}); training would go on without it and write "
            "metrics.jsonl alone."
        ) from error
    return f"{redact_uri(uri)} answers"
