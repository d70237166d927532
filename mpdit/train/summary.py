"""What a finished run has to say, out of its own run folder."""

import statistics
from pathlib import Path
from typing import Any

from mpdit.config import Config
from mpdit.redact import redact_uri
from mpdit.train.metrics import read_metrics

_LAST_STEPS = 20  # the last loss is a mean: single steps are noisy


def of_run(config: Config) -> str:
    """The closing lines: losses, speed, and where pictures, tracking and run folder lie."""
    folder = Path(config.run.dir)
    every = read_metrics(folder / "metrics.jsonl")
    rows = [row for row in every if "skipped" not in row]
    if not rows:
        return f"every step was skipped, see {folder / 'bad_steps'}"
    last = statistics.mean(row["loss"] for row in rows[-_LAST_STEPS:])
    validated = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    images_per_s = config.train.batch_size * len(rows) / sum(row["step_s"] for row in rows)
    pictures = sorted((folder / "samples").glob("step_*.png"))
    store = redact_uri(config.run.mlflow_uri) if config.run.mlflow_uri else folder.parent / "mlflow.db"
    skipped = {"skipped": f"{len(every) - len(rows)} steps, see {folder / 'bad_steps'}"} if rows != every else {}
    lines = {
        "loss": f"{rows[0]['loss']:.4f} -> {last:.4f} (mean of the last {min(_LAST_STEPS, len(rows))} steps)",
        "validation": f"{validated[-1]:.4f} on unseen concepts" if validated else "none",
        "speed": _speed(rows, images_per_s),
        **skipped,
        "pictures": str(pictures[-1] if pictures else "none"),
        "MLflow store": str(store),
        "run folder": str(folder),
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _speed(rows: list[dict[str, Any]], images_per_s: float) -> str:
    said = [f"{images_per_s:.1f} images/s"]
    last = rows[-_LAST_STEPS:]
    if flops := [row["tflops_per_gpu"] for row in last if "tflops_per_gpu" in row]:
        said.append(f"{statistics.median(flops):.3g} TFLOP/s a rank")
    if mfu := [row["mfu"] for row in last if "mfu" in row]:
        said.append(f"MFU {100 * statistics.median(mfu):.1f} %")
    if memory := [row["memory_gb"] for row in last if "memory_gb" in row]:
        said.append(f"{max(memory):.1f} GB on the fullest rank")
    return ", ".join(said)
