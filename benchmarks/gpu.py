"""All that a machine with a GPU is asked, one after another, within 25 minutes, with a table and a JSON at the end.

    python benchmarks/gpu.py --out runs/gpu
    python benchmarks/gpu.py --out runs/gpu --only kernels layouts
    python benchmarks/gpu.py --out runs/gpu --dry-run      # everything, tiny, on any machine; the numbers mean nothing

    tests    pytest -m gpu
    kernels  the fused kernels beside eager PyTorch, torch.compile and a copy (benchmarks/kernels.py)
    te       Transformer Engine's layers beside mpdit's own in bf16, and beside their emulation in FP8
    demo     the demo's target trained by one process in bf16
    layouts  its first steps in fp32 by one process, and by four with TP2 x PP2 on the one GPU: the same losses
    stage    two blocks of MMDiT-18B in bf16 and FP8: TFLOP/s, memory and its plan, loss gap (benchmarks/stage.py)

A part that fails or runs out of its time leaves the others alone; its output is in OUT/PART.log. The exit code is 1 if
any failed, or missed its bound.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
MINUTES = 25
BOUNDS = {"te": 1e-2, "layouts": 1e-4}
TINY = ("model.width=64", "model.image_size=12", "model.patch=3", "train.batch_size=8", "train.val_images=4")


class Failed(Exception):
    """Of a part, with a sentence."""


@dataclass(kw_only=True, slots=True)
class Part:
    """One part's folder, and what is left of its time."""

    name: str
    asked: argparse.Namespace
    ends: float
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return Path(self.asked.out)

    def run(self, *command: object, ranks: int = 1) -> str:
        """The output of a Python program of this repository, which also goes to the part's log. Raises Failed."""
        words = [sys.executable, *map(str, command)]
        if ranks > 1:
            words[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        left = self.ends - time.monotonic()
        with (self.out / f"{self.name}.log").open("a+") as log:
            began = log.tell()
            log.write(f"$ {' '.join(words)}\n")
            log.flush()
            try:
                code = subprocess.run(
                    words, cwd=ROOT, stdout=log, stderr=log, timeout=max(1, left), check=False
                ).returncode
            except subprocess.TimeoutExpired:
                raise Failed("ran out of time") from None
            log.seek(began)
            said = log.read()
        if code:
            raise Failed(f"exit code {code}: {said.strip().splitlines()[-1][:200]}")
        return said


def tests(part: Part) -> str:
    report = part.out.resolve() / "tests.xml"
    part.run("-m", "pytest", "-m", "gpu", "tests", "-q", "-p", "no:cacheprovider", f"--junitxml={report}")
    (suite,) = ElementTree.parse(report).getroot()
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    part.found |= counts
    return f"{counts['tests'] - counts['skipped']} passed, {counts['skipped']} skipped"


def kernels(part: Part) -> str:
    part.found = _benchmark(part, "kernels.py", [])
    rows = part.found["results"]
    ratios = {key: min(row[key][0] for row in rows) for key in ("over_torch", "over_compiled", "of_copy")}
    return (
        f"at least {ratios['over_torch']:.2f}x eager, {ratios['over_compiled']:.2f}x torch.compile, "
        f"{ratios['of_copy']:.0%} of a copy's speed"
    )


def te(part: Part) -> str:
    if part.asked.dry_run:
        return "needs a GPU; `make test-te` runs the same comparisons on a stand-in"
    program = ROOT / "tests" / "parallel" / "te_gpu_runs.py"
    state = part.run("-c", "from mpdit.parallel.te_install import find_te; print(find_te().state)").split()[-1]
    if state != "whole":
        return f"Transformer Engine is {state}"
    from mpdit.parallel import fp8_rules

    cases = [("block", arch) for arch in ("mmdit", "dit", "pixart", "uvit")]
    code = "import torch; print(*torch.cuda.get_device_capability(), *torch.version.cuda.split('.')[:2])"
    major, minor, *cuda = (int(number) for number in part.run("-c", code).split()[-4:])
    cases += [("linear", recipe) for recipe in fp8_rules.recipes((major, minor), tuple(cuda))]
    for what, of in cases:
        part.found[f"{what} {of}"] = json.loads(part.run(program, what, of).splitlines()[-1])
    worst = {what: max(max(v.values()) for k, v in part.found.items() if k.startswith(what)) for what, _ in cases}
    if worst["linear"] > BOUNDS["te"]:
        raise Failed(f"FP8 is {worst['linear']:.1e} from its emulation, above {BOUNDS['te']:.0e}")
    return f"FP8 within {worst['linear']:.1e} of its emulation, bf16 within {worst['block']:.1e} of mpdit's own layers"


def stage(part: Part) -> str:
    part.found = {"rows": _benchmark(part, "stage.py", [])}
    said = []
    for row in part.found["rows"]:
        parts = [f"{row['flops_s'] / 1e12:.3g} TFLOP/s"]
        parts += [f"gap {row['loss_gap']:+.0e}"] if row["variant"].startswith("fp8") else []
        parts += [f"{row['of_plan']:.2f} of the planned memory"] if "of_plan" in row else []
        said.append(f"{row['variant']}: {', '.join(parts)}")
    return "; ".join(said)


def demo(part: Part) -> str:
    rows = _trained(part, "demo", ["parallel.precision=bf16"])
    row = rows[-1]
    part.found = {"first": rows[0], "last": row}
    rates = [f"{row[key]:.4g} {unit}" for key, unit in (("images_per_s_per_gpu", "images/s"), ("memory_gb", "GB"))]
    rates += [f"MFU {row['mfu']:.1%}"] if "mfu" in row else []
    return f"loss {rows[0]['loss']:.3f} to {row['loss']:.3f} in {len(rows)} steps; {', '.join(rates)}"


def layouts(part: Part) -> str:
    steps = ["train.steps=10", "optim.warmup_steps=0"]
    one = [row["loss"] for row in _trained(part, "one", steps)]
    shared = [*steps, "parallel.tp=2", "parallel.pp=2", "parallel.share_gpu=true"]
    four = [row["loss"] for row in _trained(part, "four", shared, ranks=4)]
    worst = max(abs(a - b) / abs(a) for a, b in zip(one, four, strict=True))
    part.found = {"one": one, "four": four, "largest relative difference": worst}
    if worst > BOUNDS["layouts"]:
        raise Failed(f"losses differ by {worst:.1e}, above {BOUNDS['layouts']:.0e}")
    return f"{len(one)} losses within {worst:.1e}"


def _benchmark(part: Part, name: str, more: list[str]) -> Any:
    file = part.out.resolve() / f"{part.name}.json"
    part.run(ROOT / "benchmarks" / name, "--json", file, *more, *(["--dry-run"] if part.asked.dry_run else []))
    return json.loads(file.read_text())


def _trained(part: Part, name: str, overrides: list[str], ranks: int = 1) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl of the demo's target with the learning rate that its sweep.yaml starts from."""
    folder = part.out.resolve() / f"run_{name}"
    given = [f"data.path={_data(part)}", f"run.dir={folder}", "parallel.tp=1", "parallel.pp=1", "mup.base_width=64"]
    given += ["optim.lr=8e-3", "optim.clip=1.0", "optim.warmup_steps=10"]
    given += [*TINY, "train.steps=4", "optim.warmup_steps=0"] if part.asked.dry_run else []
    given += ["train.save_every=0", "train.sample_every=0", "train.val_every=0", *overrides]
    part.run("-m", "mpdit", "train", ROOT / "examples" / "icons_mmdit" / "target.yaml", *given, ranks=ranks)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _data(part: Part) -> Path:
    """`--data`, else what `make demo` trains on, built if it is not there."""
    if part.asked.data:
        return Path(part.asked.data).resolve()
    folder = ROOT / "data" / ("icons_tiny" if part.asked.dry_run else "icons_demo")
    if not folder.exists():
        size = "12" if part.asked.dry_run else "32"
        match = "subgroup:hearts,subgroup:shapes-colors,subgroup:smiling,subgroup:cat-faces"
        command = (
            "mpdit",
            "data",
            "build",
            "icons",
            "--out",
            folder,
            "--size",
            size,
            "--val",
            "0.15",
            "--match",
            match,
        )
        part.run("-m", *command)
    return folder


# Seconds that each may take; together more than there are, as none needs all of its own.
PARTS: dict[str, tuple[Callable[[Part], str], int]] = {
    "tests": (tests, 300),
    "kernels": (kernels, 420),
    "te": (te, 240),
    "demo": (demo, 240),
    "layouts": (layouts, 180),
    "stage": (stage, 600),
}


def setting() -> dict[str, Any]:
    import torch

    from mpdit.parallel.te_install import find_te

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"device": device, "torch": torch.__version__, "te": find_te().version, "commit": git.stdout.strip() or None}


def measure(asked: argparse.Namespace) -> list[dict[str, Any]]:
    began, rows = time.monotonic(), []
    for name in asked.only:
        function, limit = PARTS[name]
        start = time.monotonic()
        part = Part(name=name, asked=asked, ends=min(start + limit, began + 60 * MINUTES))
        try:
            said, ok = function(part), True
        except Failed as failure:
            said, ok = f"FAILED: {failure}; see {part.out / name}.log", False
        rows.append({"part": name, "ok": ok, "seconds": time.monotonic() - start, "said": said, "found": part.found})
        print(f"{name:<9}{rows[-1]['seconds']:>6.0f} s   {said}", flush=True)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new one")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--data", metavar="FOLDER", help="a data set of 32 x 32 pixels (default: data/icons_demo)")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny, on any machine; its data set is of 12 x 12 pixels"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    asked = parse(argv)
    out = Path(asked.out)
    if out.exists() and any(out.iterdir()):
        print(f"{out}: is there already and not empty; name a new folder with --out.", file=sys.stderr)
        return 2
    about = setting()
    if about["device"] == "none" and not asked.dry_run:
        print("there is no CUDA device, so there is nothing to measure; --dry-run shows that this program runs.")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1" if about["device"] == "none" else "4")
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    rows = measure(asked)
    (out / "gpu.json").write_text(json.dumps({"setting": about, "parts": rows}, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
