"""The files of a sweep: trials.jsonl, best.yaml, REPORT.md with its figures; and the same as JSON."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpdit import config as configs
from mpdit.config import Config
from mpdit_tools.sweep import folder, plan, space
from mpdit_tools.sweep.results import Record
from mpdit_tools.sweep.space import Params
from mpdit_tools.sweep.spec import Spec, advice, fingerprint
from mpdit_tools.sweep.summary import Summary


def write_results(where: Path, spec: Spec, records: Sequence[Record]) -> list[Path]:
    """trials.jsonl and, where there is a best setting, best.yaml, as they stand after every trial; the files."""
    lines = "".join(json.dumps(line(record)) + "\n" for record in records if record.state != "running")
    files = [folder.write(where / "trials.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))]
    found = plan.winner(spec, records)
    if found is not None:
        text = configs.dump(best_config(spec, found.params))
        files.append(folder.write(where / "best.yaml", lambda path: path.write_text(text, encoding="utf-8")))
    return files


def write_report(where: Path, summary: Summary) -> list[Path]:
    """REPORT.md and its figures; the files."""
    from mpdit_tools.sweep import figure, text

    figures = figure.save(summary, where)
    report = text.markdown(summary, [path.name for path in figures])
    return [folder.write(where / "REPORT.md", lambda path: path.write_text(report, encoding="utf-8")), *figures]


def line(record: Record) -> dict[str, Any]:
    """Of trials.jsonl."""
    told: dict[str, Any] = {
        "number": record.number,
        "state": record.state,
        "value": record.value,
        "params": record.params,
        "images": record.images,
        "flops": record.flops,
        "seed": record.seed,
    }
    return {**told, "error": record.error} if record.error else told


def best_config(spec: Spec, params: Params) -> Config:
    """The proxy with these values."""
    return space.filled(spec.proxy, params, "best")


def as_json(summary: Summary) -> dict[str, Any]:
    found, seeds = summary.best, summary.best.seeds if summary.best else []
    best = found and {
        "params": found.params,
        "value": found.mean(seeds),
        "by_seed": {seed: found.by_seed[seed].value for seed in seeds},
        "trials": [found.by_seed[seed].number for seed in seeds],
    }
    return {
        "sweep": summary.name,
        "fingerprint": fingerprint(summary.spec),
        "metric": summary.spec.metric,
        "best": best,
        "states": summary.counts,
        "images": summary.images,
        "flops": summary.flops,
        "noise": summary.noise and dataclasses.asdict(summary.noise),
        "widen": summary.narrow,
        "importance": summary.importance,
        "advice": advice(summary.spec),
        "trials": [line(record) for record in summary.over],
    }
