"""`mpdit transfer`: the 18B model's every parameter by arithmetic of its own, reports people can read, and refusals."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from transfers import SMALL, Transfers, merged, write

import commands
import ranks
from mpdit import config as configs
from mpdit.presets import PARAMETERS

GOLDENS = Path(__file__).with_name("goldens")


@pytest.fixture
def transfer(tmp_path: Path) -> Transfers:
    return Transfers(tmp_path)


# ---- the worked example: MMDiT, width 512 -> 5120 --------------------------------------------------------------------

LR, WD, EPS, BETA1, BETA2 = 3e-3, 0.02, 1e-8, 0.9, 0.99
BATCH, STEPS, DEPTH = 256, 30_000, 19
PROXY = {
    "model": {"preset": "mmdit-0.18b"},
    "mup": {"base_width": 512, "adaln_init": "hidden", "readout_init": "base"},
    "optim": {"lr": LR, "weight_decay": WD, "eps": EPS, "warmup_steps": 600, "schedule": "cosine"},
    "data": {"path": "data/of_the_paper"},
    "train": {"batch_size": BATCH, "steps": STEPS},
}
# name: (parametrization, batch size, steps, depth, r = m_B / m_D)
CASES: dict[str, tuple[str, int, int, int, float]] = {
    "mup": ("mup", BATCH, STEPS, DEPTH, 1),
    "mup-batch-x8": ("mup", 8 * BATCH, STEPS // 8, DEPTH, 8),  # as many images
    "mup-horizon-x4": ("mup", BATCH, 4 * STEPS, DEPTH, 1 / 4),
    "completep": ("completep", BATCH, STEPS, DEPTH, 1),
    "completep-batch-x8": ("completep", 8 * BATCH, STEPS // 8, DEPTH, 8),
    "completep-horizon-x4": ("completep", BATCH, 4 * STEPS, DEPTH, 1 / 4),
    "completep-depth-x2": ("completep", BATCH, STEPS, 2 * DEPTH, 1),
}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A launch folder of each case, all by one process."""
    folder = tmp_path_factory.mktemp("18b")
    argvs: list[list[object]] = []
    for name, (parametrization, batch, steps, depth, _) in CASES.items():
        proxy = write(folder / f"{parametrization}.yaml", merged(PROXY, mup={"parametrization": parametrization}))
        sizes = [f"train.batch_size={batch}", f"train.steps={steps}", f"model.depth={depth}"]
        layout = ["parallel.tp=8", "parallel.pp=1", "parallel.precision=bf16", "--gpus", "256"]
        out = ["--out", folder / name]
        argvs.append(["transfer", "--from", proxy, "--to", "mmdit-18b", *sizes, *layout, *out, "--trials", "80"])
    for code, _, error in ranks.run(1, commands.commands, argvs=argvs)[0]:
        assert code == 0, error
    return {name: folder / name for name in CASES}


INPUTS = {"embed.patch.linear": 16, "embed.text": 4096, "embed.pooled.linear_1": 4096, "embed.time.linear_1": 256}
M = 10


def expected(name: str, shape: list[int], r: float, m_L: float) -> dict[str, float]:
    """What a parameter of width 5120 over 512 gets, from its name and shape alone; facts of the papers, no code."""
    module, _, kind = name.rpartition(".")
    root, in_block = math.sqrt(r), name.startswith("blocks.")
    deep = m_L if in_block else 1
    rest = {"lr": LR * root, "weight_decay": WD * root, "eps": EPS / (M * deep * root), "multiplier": 1.0}
    if module.endswith("_layernorm"):  # QK-norm gains: one number for each of a head's 64
        assert shape == [64]
        return {**rest, "init_std": 0, "weight_decay": 0, "eps": EPS / (deep * root)}
    if name == "head.out.bias":
        assert shape == [16]
        return {**rest, "init_std": 0, "weight_decay": 0, "eps": EPS / root}
    if kind == "bias":
        assert shape[0] % 5120 == 0
        return {**rest, "init_std": 0, "weight_decay": 0}
    if module in INPUTS:
        assert shape == [5120, INPUTS[module]]
        return {**rest, "init_std": 1 / math.sqrt(INPUTS[module])}
    if name == "head.out.weight":  # 0.1 in the forward pass, the proxy's std
        assert shape == [16, 5120]
        return {**rest, "init_std": 1 / math.sqrt(512), "multiplier": 1 / M}
    assert (shape[0] % 5120, shape[1] % 5120) == (0, 0)
    std_of_proxy = 1 / math.sqrt(shape[1] / M)
    hidden = {"lr": LR * root / M, "weight_decay": WD * root * M, "init_std": std_of_proxy / math.sqrt(M)}
    return {**rest, **hidden}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_every_parameter_of_the_18b_model(case: str, launches: dict[str, Path]) -> None:
    *_, depth, r = CASES[case]
    rows = json.loads((launches[case] / "mup_table.json").read_text())
    if depth == DEPTH:
        assert sum(math.prod(row["shape"]) for row in rows) == PARAMETERS["mmdit-18b"]
    assert len({row["name"] for row in rows}) == len(rows) > 400
    for row in rows:
        wanted = expected(row["name"], row["shape"], r, depth / DEPTH)
        assert {key: row[key] for key in wanted} == pytest.approx(wanted, rel=1e-12), row["name"]


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
def test_the_report_reads_as_its_golden_file(case: str, launches: dict[str, Path]) -> None:
    """MPDIT_WRITE_GOLDENS=1 writes them anew: then read what changed before it is committed."""
    found = (launches[case] / "REPORT.md").read_text().replace(str(launches[case].parent), "FOLDER")
    golden = GOLDENS / f"mmdit-512-to-5120-{case}.md"
    if os.environ.get("MPDIT_WRITE_GOLDENS"):
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.dist
def test_betas_schedule_and_sizes_of_the_18b_config(launches: dict[str, Path]) -> None:
    for case, (parametrization, batch, steps, depth, r) in CASES.items():
        found = configs.load(launches[case])
        mup = found.mup
        assert (mup.base_width, mup.base_depth, mup.base_head_dim) == (512, DEPTH, 64)
        assert (mup.base_batch_size, mup.base_images, mup.parametrization) == (BATCH, BATCH * STEPS, parametrization)
        assert (found.model.width, found.model.depth, found.model.head_dim) == (5120, depth, 64)
        assert (found.train.batch_size, found.train.steps, found.data.path) == (batch, steps, "data/of_the_paper")
        assert (found.optim.lr, found.optim.beta1) == (LR, BETA1)  # base values
        assert found.optim.warmup_steps == 600 * steps // STEPS
        report = (launches[case] / "REPORT.md").read_text()
        if r != 1:
            for name, beta in (("beta1", BETA1), ("beta2", BETA2)):
                (row,) = (line for line in report.splitlines() if line.startswith(f"| {name} "))
                assert float(row.split("|")[4]) == pytest.approx(1 - (1 - beta) * r, rel=1e-5)
        assert f"r = m_B / m_D = {r:g}." in report


# ---- small transfers -------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_what_the_target_does_not_say_is_the_proxys(transfer: Transfers) -> None:
    found, report, _ = transfer()
    before = configs.load(transfer.proxy)
    assert (found.model.width, found.model.depth, found.model.patch) == (128, 3, 3)
    assert (found.optim, found.objective, found.data) == (before.optim, before.objective, before.data)
    assert found.mup.output_mult == 2
    assert (found.parallel.tp, found.parallel.precision) == (1, "bf16")  # the layout is the target's
    assert (found.run.dir, found.run.experiment) == (str(transfer.folder / "launch-0" / "run"), "mine")
    assert found.train.save_every == 2  # a fiftieth, for jobs that are killed
    assert "## Replaced" not in report


@pytest.mark.dist
def test_schedules_keep_their_share_of_the_run(transfer: Transfers) -> None:
    found, report, _ = transfer("train.steps=450")
    assert (found.optim.warmup_steps, found.optim.decay_steps) == (45, 90)
    assert "r = m_B / m_D = 0.222222" in report
    assert "`lr * sqrt(r) / m`" in report


@pytest.mark.dist
def test_without_completedp_batch_and_length_change_nothing(transfer: Transfers) -> None:
    found, report, _ = transfer("train.steps=450", "--no-completedp")
    assert (found.mup.base_batch_size, found.mup.base_images) == (None, None)
    assert "batch size and length have no rule" in report
    assert "sqrt(r)" not in report


@pytest.mark.dist
def test_a_targets_file_gives_way_to_what_was_tuned_and_the_report_says_so(transfer: Transfers) -> None:
    own = {"model": {"width": 128}, "optim": {"lr": 1e-4, "clip": 9.0}, "data": {"caption_drop": 0.2}}
    found, report, _ = transfer(to=write(transfer.folder / "own.yaml", own))
    assert (found.optim.lr, found.optim.clip) == (2e-3, 0.5)
    replaced = report.partition("## Replaced")[2].partition("##")[0]
    assert "| `optim.lr`   | 0.0001            | 0.002 |" in replaced
    assert "optim.clip" in replaced
    assert "caption_drop" not in replaced


@pytest.mark.dist
def test_what_theory_leaves_open_may_be_chosen_on_the_command_line(transfer: Transfers) -> None:
    found, report, _ = transfer("optim.clip=1.5", "data.path=elsewhere")
    assert found.optim.clip == 1.5
    (row,) = (line for line in report.splitlines() if line.startswith("| `optim.clip`"))
    assert row.split("|")[2:5] == [" 0.5      ", " 1.5      ", " you                          "]
    assert "data.path is elsewhere, but the proxy's is data/none" in report


@pytest.mark.dist
def test_base_values_alone_are_of_the_targets_network(transfer: Transfers) -> None:
    base = {"mup": {"base_width": 32}, "optim": {"lr": 5e-3}}
    target = write(transfer.folder / "target.yaml", merged(SMALL, model={"width": 96}, mup={"base_width": 96}))
    found, _, error = transfer(source=write(transfer.folder / "base.yaml", base), to=target)
    assert (found.optim.lr, found.optim.clip) == (5e-3, 1.0)
    assert (found.mup.base_width, found.mup.base_images) == (32, 1600)
    assert "does not say how long its values were tuned" in error
    longer = merged(base, mup={"base_batch_size": 8, "base_images": 800})
    found, _, error = transfer(source=write(transfer.folder / "base.yaml", longer), to=target)
    assert (found.mup.base_batch_size, found.mup.base_images) == (8, 800)
    assert "how long" not in error


@pytest.mark.dist
def test_a_run_folder_is_a_proxy_and_one_that_stopped_early_is_told(transfer: Transfers) -> None:
    run = transfer.folder / "run"
    write(run / "config.yaml", SMALL)
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1}\n{"step": 1, "loss": 1}\n')
    _, report, error = transfer(source=run)
    assert "has 2 of its 100 steps" in error
    assert "has 2 of its 100 steps" in report


@pytest.mark.dist
def test_another_head_dim_is_followed_and_told(transfer: Transfers) -> None:
    found, report, error = transfer("model.head_dim=32")
    assert found.mup.base_head_dim == 8
    assert "model.head_dim is 32, but the proxy's is 8" in error
    assert "| `sqrt(8) / head_dim` " in report


@pytest.mark.dist
def test_credentials_are_not_written_down(transfer: Transfers) -> None:
    uri = "https://user:hunter2@example.org/mlflow?token=abcdefgh"
    proxy = write(transfer.folder / "proxy.yaml", merged(SMALL, run={"mlflow_uri": uri}))
    found, _, error = transfer(source=proxy)
    assert found.run.mlflow_uri is None
    assert "holds credentials" in error
    written = "".join(path.read_text() for path in (transfer.folder / "launch-0").iterdir())
    assert not any(secret in written + error for secret in ("hunter2", "abcdefgh"))


@pytest.mark.dist
def test_json_holds_the_reports_tables(transfer: Transfers) -> None:
    argv = ["transfer", "--from", transfer.proxy, "--to", transfer.wide, "--out", transfer.folder / "out"]
    code, out, error = commands.run(*argv, "--json", "--trials", 3)
    assert code == 0, error
    found = json.loads(out)
    lines = {line["name"]: line for line in found["hyperparameters"]}
    assert lines["learning rate, hidden matrices"]["target"] == "0.0005"
    assert lines["learning rate, hidden matrices"]["source"] == "muP"
    assert found["cost"]["trials"] == 3
    assert {row["name"] for row in found["not_carried_over"]} >= {"`optim.clip`", "depth"}


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "another architecture": (["model.arch=pixart"], ["model.arch is pixart", "base's is mmdit"]),
    "another patch": (["model.patch=4"], ["model.patch is 4", "base's is 3"]),
    "another task": (["objective.kind=ddpm"], ["objective.kind is ddpm", "base's is flow"]),
    "narrower": (["model.width=16"], ["model.width of the target is 16, less than the proxy's 32"]),
    "depth under mup": (["model.depth=6"], ["model.depth is 6", "mup.parametrization to completep"]),
    "a base value": (["optim.lr=1e-4"], ["optim.lr is 0.0001", "base's is 0.002", "transfer as they are"]),
    "a size of the proxy": (["mup.base_width=64"], ["mup.base_width: is a size of the proxy"]),
    "layout": (["parallel.tp=4", "--gpus", "6"], ["--gpus 6", "tp 4", "multiple of 4"]),
    "nodes": (["--gpus", "12"], ["--gpus 12", "--gpus-per-node 8", "multiple of 8"]),
    "batch": (["--gpus", "32"], ["train.batch_size 16", "32 data-parallel ranks"]),
    "no gpus": (["--gpus", "0"], ["--gpus is 0"]),
    "heads": (["parallel.tp=32"], ["model.width 128", "parallel.tp 32"]),
    "unknown key": (["model.widht=3"], ["unknown key model.widht", "'width'"]),
    "betas below zero": (["train.steps=9"], ["beta1 and beta2", "below 0"]),
    "trials": (["--trials", "0"], ["--trials is 0"]),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_transfer_is_refused_in_a_sentence(case: str, transfer: Transfers) -> None:
    argv, words = REFUSED[case]
    said = transfer.refused(*argv)
    assert all(word in said for word in words), said


PROXIES: dict[str, tuple[dict[str, Any], str]] = {
    "no learning rate": ({**SMALL, "optim": {}}, "optim.lr is missing"),
    "not finite": (merged(SMALL, optim={"lr": math.nan}), "optim.lr is nan"),
    "no steps": (merged(SMALL, train={"steps": 0}), "train.steps is 0, but should be at least 1"),
    "infinite": (merged(SMALL, optim={"weight_decay": math.inf}), "optim.weight_decay is inf"),
    "sp": (merged(SMALL, mup={"parametrization": "sp"}), "mup.parametrization of the base is sp"),
    "a proxy of its own": (merged(SMALL, mup={"base_width": 16}), "mup.base_width of the base is 16"),
    "no width": ({"optim": {"lr": 1e-3}}, "says neither model nor mup.base_width"),
    "no YAML of ours": ({"learning_rate": 1e-3}, "unknown key learning_rate"),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", PROXIES)
def test_a_proxy_whose_values_say_nothing_is_refused(case: str, transfer: Transfers) -> None:
    tree, words = PROXIES[case]
    assert words in transfer.refused(source=write(transfer.folder / "other.yaml", tree))


@pytest.mark.dist
def test_folders_and_files_in_the_way(transfer: Transfers) -> None:
    taken = transfer.folder / "taken"
    taken.mkdir()
    empty = ["transfer", "--from", transfer.proxy, "--to", transfer.wide, "--out", taken]
    assert commands.run(*empty)[0] == 0  # an empty one is as good as none
    assert "is there already" in transfer.refused("--out", taken)
    assert "is there already" in transfer.refused("--out", transfer.proxy)
    assert "can't be written to" in transfer.refused("--out", transfer.proxy / "below")
    assert "none.yaml: can't be read" in transfer.refused(source="none.yaml")
    assert "is neither a file nor a preset" in transfer.refused(to="mmdit-19b")


@pytest.mark.dist
@pytest.mark.parametrize(
    ("scheduler", "scripts"),
    [
        ("torchrun", ["launch.sh"]),
        ("slurm", ["launch.sbatch", "launch.sh"]),
        ("kubeflow", ["launch.sbatch", "launch.sh", "launch.yaml"]),
    ],
)
def test_each_scheduler_gets_its_scripts(scheduler: str, scripts: list[str], transfer: Transfers) -> None:
    transfer("--scheduler", scheduler)
    names = sorted(path.name for path in (transfer.folder / "launch-0").iterdir())
    assert names == ["REPORT.md", "config.yaml", *scripts, "mup_table.json", "plan.json"]


def test_a_folder_that_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    from mpdit_tools.new_folder import new_folder

    def interrupted() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "config.yaml").write_text("half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
