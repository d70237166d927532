"""Guards ``mpdit fp8check``: the same weights and batches under every arithmetic, numbers and verdicts as they are
defined, bounds that can be crossed, bad input told before anything runs."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import commands
import ranks
from mpdit import config as configs
from mpdit.errors import InputError
from mpdit_tools.fp8check.arguments import Arguments, Bounds

ranks.warm()  # the rest imports megatron-core
from mpdit.parallel.fp8_statistics import Tally  # noqa: E402
from mpdit_tools.fp8check import check, report  # noqa: E402
from mpdit_tools.fp8check.check import Run, Seen  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
DIT = EXAMPLES / "coordcheck" / "dit.yaml"
QUICK: dict[str, Any] = {"widths": (32, 64), "steps": 4, "seeds": 1, "looks": 1, "batch_size": 8}


# ---- the runs --------------------------------------------------------------------------------------------------------


def trained(rank: int, world: int, arguments: Arguments) -> list[Seen]:
    from mpdit.parallel import accel

    accel.enter()
    config = configs.load(arguments.config, arguments.overrides)
    return list(check.run(arguments, check.plan(arguments, config), lambda *_: None))


def test_every_arithmetic_starts_from_the_same_weights_and_batches() -> None:
    """The readout starts at zero, so the first loss is that of the targets alone: the same to the bit in all but the
    types. Of tensors, those of the FP8 linears are looked at, and no others."""
    arguments = Arguments(config=DIT, **{**QUICK, "widths": (64,)})
    seen = {one.run.arithmetic: one for one in ranks.run(1, trained, arguments=arguments)[0]}
    assert list(seen) == ["bf16", "fp32", "tensorwise", "delayed", "blockwise", "mxfp8"]
    assert len({one.losses[0] for one in seen.values()}) == 1
    assert len({one.losses[-1] for one in seen.values()}) == len(seen)
    assert all(len(one.losses) == 4 and one.losses[-1] < one.losses[0] for one in seen.values())
    linears = {f"blocks.{i}.{name}" for i in (1, 2) for name in ("attn.qkv.linear", "attn.proj", "mlp.fc1", "mlp.fc2")}
    for arithmetic, one in seen.items():
        assert {linear for linear, _ in one.tallies} == (set() if arithmetic in ("bf16", "fp32") else linears)
    # A gradient's mantissa has two bits where it has the range of e5m2, and three elsewhere.
    errors = {a: sum((t for (_, n), t in seen[a].tallies.items() if n == "dy"), Tally()).error for a in list(seen)[2:]}
    assert errors["tensorwise"] == pytest.approx(0.053, rel=0.1)
    assert errors["blockwise"] == pytest.approx(0.0265, rel=0.1)
    assert errors["mxfp8"] == pytest.approx(0.0265, rel=0.1)


def test_the_users_own_settings_hold() -> None:
    overrides = ("optim.lr=3e-3", "optim.clip=0.5", "optim.weight_decay=0.1", "optim.schedule=cosine")
    more = ("parallel.tp=4", "parallel.fp8_bf16_blocks=0", "mup.parametrization=sp", "optim.warmup_steps=500")
    arguments = Arguments(config=DIT, **QUICK)
    runs = check.plan(arguments, configs.load(DIT, (*overrides, *more)))
    assert len(runs) == 2 * 6
    optim, parallel = runs[2].config.optim, runs[2].config.parallel
    assert (optim.lr, optim.clip, optim.weight_decay, optim.schedule, optim.warmup_steps) == (
        3e-3,
        0.5,
        0.1,
        "constant",
        1,
    )
    assert (parallel.tp, parallel.precision, parallel.fp8_recipe) == (1, "fp8_emulated", "tensorwise")
    assert parallel.fp8_bf16_blocks == 0
    assert runs[0].config.mup.parametrization == "sp"
    assert [run.config.parallel.precision for run in runs[:2]] == ["bf16", "fp32"]


# ---- the numbers -----------------------------------------------------------------------------------------------------


def seen(width: int, seed: int, arithmetic: str, losses: list[float], **underflow: float) -> Seen:
    run = Run(width=width, seed=seed, arithmetic=arithmetic, config=configs.load(DIT))
    tallies = {
        (f"blocks.1.{linear}", "x"): Tally(nonzero=1000, underflowed=1000 * share, squares=1.0, squared_errors=0.01)
        for linear, share in underflow.items()
    }
    return Seen(run=run, losses=losses, tallies=tallies)


def outcome(gap: float = 0.0, last: float = 0.004, **bounds: float) -> report.Outcome:
    """Two widths, two seeds, four steps; a tensor whose underflow doubles with the width, and one without."""
    runs = []
    for width, share in ((64, last / 2), (128, last)):
        for seed, off in ((0, 0.0), (1, 0.002)):
            runs.append(seen(width, seed, "bf16", [2.0, 2.0, 1.0, 1.0]))
            runs.append(seen(width, seed, "fp32", [2.0, 2.0, 1.0, 1.0]))
            late = 1.0 + gap + off
            runs.append(seen(width, seed, "mxfp8", [9.0, 9.0, late, late], fc1=share, fc2=0.0))
    return report.Outcome(bounds=Bounds(**{"gap_bound": 0.01, **bounds}), seen=runs)


def test_gaps_slopes_and_worst_tensors() -> None:
    found = outcome(gap=0.005)
    gap = found.gaps[128, "mxfp8"]
    assert gap.mean == pytest.approx(0.006)  # of the second half of the steps
    assert gap.noise == pytest.approx(0.001)  # standard error of 0.005 and 0.007
    assert gap.curve == pytest.approx([3.5, 3.5, 0.006, 0.006])
    assert (gap.loss, found.gaps[64, "fp32"].mean) == (1.0, 0.0)
    assert found.share(128, "mxfp8", "x", "underflow") == pytest.approx(0.002)  # of both tensors together
    assert found.slope("mxfp8", "x", "underflow") == pytest.approx(1.0)
    assert found.slope("mxfp8", "x", "error") == pytest.approx(0.0)
    assert found.slope("mxfp8", "dy", "underflow") is None
    assert found.worst(128, "mxfp8", "underflow") == [(("blocks.1.fc1", "x"), pytest.approx(0.004))]
    assert found.passed
    assert json.loads(json.dumps(report.as_json(found), allow_nan=False))["passed"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"gap": 0.02},
            ["mxfp8, width 64: the loss is 2.10% (noise 0.10%) above bf16's, more than 1.00%.", "width 128"],
        ),
        ({"gap": 0.01}, []),  # 1.1 % less twice the noise
        ({"gap": 0.005, "gap_bound": 0.003}, ["more than 0.30%", "width 128"]),
        ({"gap": -0.5}, []),
        ({"gap": math.nan}, ["width 64: the loss is no number.", "width 128"]),
        ({"last": 0.02}, ["width 128: underflow of x of blocks.1.fc1 is 2.00%, more than 1.00%."]),
        ({"last": 0.002, "underflow_bound": 0.0015}, ["width 128: underflow of x of blocks.1.fc1 is 0.20%"]),
    ],
)
def test_bounds(changed: dict[str, float], said: list[str]) -> None:
    found = outcome(**changed)
    assert len(found.findings) == len(said)
    assert all(words in sentence for words, sentence in zip(said, found.findings, strict=True))
    assert found.passed == (not said)
    verdicts = [row[-1] for row in report.gap_rows(found)]
    assert verdicts.count("OUT") == len({f.split(":")[0] for f in found.findings})
    json.dumps(report.as_json(found), allow_nan=False)


def test_a_single_seed_has_its_noise_from_the_steps() -> None:
    runs = [
        seen(64, 0, "bf16", [1.0] * 6),
        seen(64, 0, "fp32", [1.0] * 6),
        seen(64, 0, "delayed", [1, 1, 1, 1.0, 1.01, 1.02]),
    ]
    gap = report.Outcome(bounds=Bounds(), seen=runs).gaps[64, "delayed"]
    assert (gap.mean, gap.noise) == (pytest.approx(0.01), pytest.approx(0.01 / math.sqrt(3)))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_tables_figure_and_json(tmp_path: Path) -> None:
    """A bound that can't be held: exit code 1, the tensor is named, figure and JSON are written."""
    argv = [DIT, "--widths", "32", "64", "--steps", "4", "--seeds", "1", "--batch-size", "8", "--recipes", "tensorwise"]
    code, printed, error = commands.run("fp8check", *argv, "--underflow-bound", "0", "--out", tmp_path)
    assert code == 1
    assert "FAIL: 6 runs" in printed
    assert "underflow of" in printed
    assert "tensorwise" in printed
    assert "run 6 of 6: width 64, seed 0, tensorwise" in error
    assert (tmp_path / "fp8check.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "fp8check.json").read_text())
    assert written["passed"] is False
    assert written["widths"] == [32, 64]
    assert {row["tensor"] for row in written["tensors"]} == {"x", "w", "dy"}


def test_json_alone_is_printed() -> None:
    argv = [DIT, "--widths", "32", "--steps", "4", "--seeds", "1", "--batch-size", "8", "--recipes", "mxfp8", "--json"]
    code, printed, error = commands.run("fp8check", *argv)
    assert (code, error) == (0, "")
    assert json.loads(printed)["recipes"] == ["mxfp8"]


def test_help_is_quick() -> None:
    began = time.monotonic()
    code = "import sys; from mpdit.cli import main; main(['fp8check', '--help'])"
    check = (
        "import sys; sys.argv[0] = 'mpdit'\ntry:\n    {}\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check.format(code)], check=True, capture_output=True)
    assert time.monotonic() - began < 5  # on a machine with other things to do


@pytest.mark.parametrize(
    ("changed", "overrides", "said"),
    [
        ({"widths": (32, 40)}, (), "--widths: 40 does not fit: model.width 40 does not divide by head_dim 16"),
        ({"steps": 1}, (), "--steps 1 should be at least 4"),
        ({"batch_size": 0}, (), "--batch-size 0 should be at least 1"),
        ({"recipes": ()}, (), "--recipes: give at least one"),
        ({}, ("parallel.fp8_bf16_blocks=2",), "leaves none of model.depth 4 blocks in FP8"),
        ({"batch_size": 1, "recipes": ("mxfp8",)}, (), "x parallel.micro_batch 1 = 16 rows are no multiple of 32"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    changed: dict[str, Any], overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(InputError) as error:
        check.plan(Arguments(config=DIT, **{**QUICK, **changed}), configs.load(DIT, overrides))
    assert said in str(error.value)


def test_the_example_is_planned_as_its_readme_says() -> None:
    folder = EXAMPLES / "fp8"
    runs = check.plan(
        Arguments(config=folder / "pixart.yaml", widths=(256, 512, 1024, 2048), steps=12),
        configs.load(folder / "pixart.yaml"),
    )
    assert len(runs) == 4 * 2 * 6
    written = json.loads((folder / "fp8check.json").read_text())
    assert written["widths"] == [256, 512, 1024, 2048]
    text = (folder / "README.md").read_text()
    for row in written["gaps"]:
        assert f"{row['mean']:+.3%}" in text, row


def test_an_out_that_cannot_be_is_said_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, printed, error = commands.run("fp8check", DIT, "--widths", "32", "--out", str(tmp_path / "file"))
    assert (code, printed) == (2, "")
    assert f"--out {tmp_path / 'file'}: File exists; give a folder" in error
