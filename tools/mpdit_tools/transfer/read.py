"""``--from``: where the proxy's values come from: a YAML, a run folder, a sweep folder, MLflow."""

from pathlib import Path

from mpdit.errors import InputError
from mpdit.train.metrics import read_metrics
from mpdit_tools.transfer import trials
from mpdit_tools.transfer.source import Source, Tree, tree_of


def read(source: str, tracking_uri: str | None) -> Source:
    """Read `source`. Raises InputError if it can't be read, holds no finished result or no learning rate."""
    experiment, run = source.removeprefix("mlflow-experiment:"), source.removeprefix("mlflow:").removeprefix("runs:/")
    if experiment != source or run != source:
        from mpdit_tools.transfer import tracked  # MLflow takes seconds to import

        found = tracked.experiment(experiment, tracking_uri) if experiment != source else tracked.run(run, tracking_uri)
    else:
        path = Path(source)
        found = _sweep(path) if _is_sweep(path) else _config(path)
    if (found.tree.get("optim") or {}).get("lr") is None:
        raise InputError(
            f"--from {found.name}: optim.lr is missing, and the learning rate is what transfers; write down the one "
            "that was tuned."
        )
    return found


def _is_sweep(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in ("trials.jsonl", "best.yaml"))


def _sweep(path: Path) -> Source:
    tried = trials.read(path / "trials.jsonl")
    if not any(trial.state == trials.COMPLETE for trial in tried):
        raise InputError(
            f"{path}: no trial has an end to go by ({trials.counted(tried)}); search again, at lower learning rates if "
            "they diverged."
        )
    best = path / "best.yaml"
    if not best.is_file():
        raise InputError(f"{path}: has trials, but no best.yaml; run the sweep to its end.")
    over = (path / "REPORT.md").is_file()  # a sweep's last act
    return Source(
        name=str(path),
        said=f"the best of a sweep ({trials.counted(tried)})",
        tree=tree_of(best),
        trials=tried,
        warnings=() if over else (f"{path}: the sweep is not over, so that its best may still change.",),
    )


def _config(path: Path) -> Source:
    tree = tree_of(path)
    if not path.is_dir():
        said = "the config of a proxy" if tree.get("model") else "base values"
        return Source(name=str(path), said=said, tree=tree)
    return Source(name=str(path), said="the run folder of a proxy", tree=tree, warnings=_unfinished(path, tree))


def _unfinished(run: Path, tree: Tree) -> tuple[str, ...]:
    """A sentence if the run has fewer steps than it was to have: it may have diverged."""
    wanted = (tree.get("train") or {}).get("steps")
    if not (run / "metrics.jsonl").is_file() or wanted is None:
        return ()
    done = max((row["step"] + 1 for row in read_metrics(run / "metrics.jsonl")), default=0)
    if done >= wanted:
        return ()
    return (f"{run}: has {done} of its {wanted} steps, so that its values were not tried to the end.",)
