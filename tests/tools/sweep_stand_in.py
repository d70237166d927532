"""Stands in for `mpdit train` where a test is about processes: python sweep_stand_in.py CONFIG key=value ...

Writes the metrics.jsonl of a run whose loss is known, at once or a step every STAND_IN_STEP_S seconds. The real
one costs 15 s of imports a trial; test_sweep.py trains with it, too.
"""

import json
import math
import os
import random
import sys
import time
from pathlib import Path

import yaml

BEST_LOG2_LR = -6


def final_loss(log2_lr: float, seed: int, modulation: float = 1.0) -> float:
    """A bowl around 2^-6, modulation best at 1/2, with half a percent of noise that goes with the seed."""
    bowl = 0.4 + 0.02 * (log2_lr - BEST_LOG2_LR) ** 2
    return bowl * (1 + 0.03 * math.log2(2 * modulation) ** 2) * (1 + random.Random(f"{seed}").gauss(0, 0.005))


def main() -> None:
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    keys = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in sys.argv[2:])}
    folder, log2_lr = Path(keys["run.dir"]), math.log2(float(keys["optim.lr"]))
    with (folder / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if keys.get("optim.warmup_steps") == 7:
        raise RuntimeError("no space left on http://me:open-sesame@host/disk")
    modulation = float(keys.get("mup.lr_mult.modulation", 1.0))
    last = final_loss(log2_lr, keys["train.seed"], modulation)
    (folder / "checkpoints").mkdir(exist_ok=True)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps := config["train"]["steps"]):
            if log2_lr > 4 and step == 3:
                print("mpdit: step 3: the loss is inf, the run has diverged; lower optim.lr.", file=sys.stderr)
                sys.exit(1)
            row = {"step": step, "loss": last + (1.5 - last) * (1 - (step + 1) / steps), "images": 8 * (step + 1)}
            file.write(json.dumps(row | ({"val_loss": last} if step == steps - 1 else {})) + "\n")
            file.flush()
            time.sleep(float(os.environ.get("STAND_IN_STEP_S", "0")))
    with (folder / "ends").open("a") as file:
        file.write(f"{os.getpid()}\n")


if __name__ == "__main__":
    main()
