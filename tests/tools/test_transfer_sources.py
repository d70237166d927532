"""Where `mpdit transfer` takes a proxy from: searches and what they cost, MLflow, and what it refuses there."""

import dataclasses
import json
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transfers import SMALL, Transfers, merged, write

import commands
import ranks
from mpdit import config as configs
from mpdit.presets import PARAMETERS
from mpdit_tools.transfer import cost, trials
from mpdit_tools.transfer.trials import Trial


@pytest.fixture
def transfer(tmp_path: Path) -> Transfers:
    return Transfers(tmp_path)


# ---- the cost of the search ------------------------------------------------------------------------------------------


def test_the_papers_costs() -> None:
    """PixArt's 5.46 % with the paper's rounded sizes; 5.35 % with the counts; MMDiT's 80 trials."""
    pixart = cost.Cost(
        trials=5,
        searched_images=5 * 5,  # epochs
        searched_flops=None,
        proxy_parameters=PARAMETERS["pixart-0.04b"],
        target_parameters=PARAMETERS["pixart-0.61b"],
        target_images=30,
        target_flops=30,
    )
    assert pixart.printed_share == pytest.approx(5 * 0.04 * 5 / (0.61 * 30))
    assert pixart.share == pytest.approx(5 * 39_246_656 * 5 / (610_856_096 * 30))
    said = " ".join(cost.sentences(pixart, "pixart"))
    assert "**5.35 %**" in said
    assert "0.04B and 0.61B: **5.46 %**" in said
    assert "experts" not in said


@pytest.mark.dist
def test_the_cost_of_mmdits_80_trials_is_told_with_its_inputs(tmp_path: Path) -> None:
    tree = {"model": {"preset": "mmdit-0.18b"}, "mup": {"base_width": 512}, "optim": {"lr": 3e-3}}
    proxy = write(tmp_path / "proxy.yaml", {**tree, "train": {"batch_size": 256, "steps": 30_000}})
    target = ["--to", "mmdit-18b", "train.steps=200000", "--trials", 80, "--out", tmp_path / "launch"]
    code, _, error = commands.run("transfer", "--from", proxy, *target)
    assert code == 0, error
    report = (tmp_path / "launch" / "REPORT.md").read_text()
    assert "R = 80 trials of S = 181,584,656 parameters saw R B T = 614,400,000 images" in report
    assert "S = 17,741,050,640 parameters and is to see B T = 51,200,000" in report
    assert "**12.3 %** of the target's run" in report
    assert "0.18B and 18B: **12 %**" in report


@pytest.mark.parametrize(
    ("parameters", "billions"),
    [(39_246_656, 0.04), (610_856_096, 0.61), (181_584_656, 0.18), (17_741_050_640, 18), (2_849_690_384, 2.8), (1, 0)],
)
def test_sizes_are_rounded_as_papers_print_them(parameters: int, billions: float) -> None:
    assert cost.printed(parameters) == billions


# ---- a search's edges ------------------------------------------------------------------------------------------------


def trial(state: str = "complete", value: float | None = 1.0, images: int = 100, **params: Any) -> Trial:
    return Trial(
        state=state, value=value, params={key.replace("_", "."): v for key, v in params.items()}, images=images
    )


def at_edges(best: float, *tried: Trial) -> list[tuple[str, str]]:
    return [(edge.key, edge.side) for edge in trials.edges(tried, {"optim.lr": best})]


def test_an_edge_is_the_lowest_or_highest_that_was_tried() -> None:
    tried = [trial(optim_lr=lr) for lr in (1.0, 2.0, 4.0)]
    assert at_edges(1.0, *tried) == [("optim.lr", "lowest")]
    assert at_edges(2.0, *tried) == []
    assert at_edges(4.0, *tried) == [("optim.lr", "highest")]
    assert at_edges(4.0, *tried, trial("diverged", None, optim_lr=8.0)) == []  # beside the cliff
    assert at_edges(4.0, *tried, trial("failed", None, optim_lr=8.0)) == [("optim.lr", "highest")]
    assert at_edges(4.0, *[trial(optim_lr=4.0)] * 3) == []  # not searched
    assert at_edges(0.0, *tried, trial(optim_lr=0.0)) == []  # nothing below zero
    assert trials.edges([trial(a="x"), trial(a="y")], {"a": "x"}) == []


@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=8, unique=True), st.data())
def test_a_value_between_two_others_is_at_no_edge(values: list[float], data: st.DataObject) -> None:
    best = data.draw(st.sampled_from(values))
    inside = min(values) < best < max(values)
    assert at_edges(best, *(trial(optim_lr=value) for value in values)) == (
        [] if inside else [("optim.lr", "lowest" if best == min(values) else "highest")]
    )


# ---- sweeps ----------------------------------------------------------------------------------------------------------


def sweep(folder: Path, *tried: Trial, best: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    rows = [
        {
            "number": number,
            "state": t.state,
            "value": t.value,
            "params": dict(t.params),
            "images": t.images,
            "flops": 10**6 * t.images,
            "seed": 0,
        }
        for number, t in enumerate(tried)
    ]
    (folder / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if best is not None:
        write(folder / "best.yaml", merged(SMALL, **best))
    return folder


GRID = [trial(value=v, optim_lr=lr, optim_clip=0.5) for v, lr in ((3.0, 1e-3), (1.0, 2e-3), (2.0, 4e-3))]
BEST = {"optim": {"lr": 2e-3}}


@pytest.mark.dist
def test_a_sweep_gives_its_best_and_what_it_cost(transfer: Transfers) -> None:
    tried = [
        *GRID,
        trial("diverged", None, 40, optim_lr=8e-3, optim_clip=0.5),
        trial("pruned", None, 30, optim_lr=5e-4),
    ]
    found, report, _ = transfer(source=sweep(transfer.folder / "sweep", *tried, best=BEST))
    assert found.optim.lr == 2e-3
    assert "the best of a sweep (5 trials: 3 complete, 1 pruned, 1 diverged)" in report
    assert "saw R B T = 370 images" in report
    plan = json.loads((transfer.folder / "launch-0" / "plan.json").read_text())
    whole = plan["model_flops_per_image"] * 1600
    assert f"Counted out: 3.7e+08 FLOPs of the target's {whole:.3g}, **{100 * 3.7e8 / whole:.3g} %**." in report
    assert "Searched: `optim.lr` = 0.002, `optim.clip` = 0.5." in report


@pytest.mark.dist
def test_a_sweep_that_is_not_over_is_told(transfer: Transfers) -> None:
    """Its REPORT.md comes last."""
    folder = sweep(transfer.folder / "sweep", *GRID, best=BEST)
    _, report, error = transfer(source=folder)
    assert "the sweep is not over" in error
    assert "the sweep is not over" in report
    (folder / "REPORT.md").touch()
    _, report, error = transfer(source=folder)
    assert "not over" not in error + report


@pytest.mark.dist
def test_a_learning_rate_at_an_edge_is_refused_and_may_be_allowed(transfer: Transfers) -> None:
    tried = sweep(transfer.folder / "sweep", *GRID, best={"optim": {"lr": 4e-3}})
    said = transfer.refused(source=tried)
    assert "optim.lr of the best trial is 0.004, the highest tried (0.001 to 0.004)" in said
    assert "--allow-edge" in said
    _, report, error = transfer("--allow-edge", source=tried)
    assert "0.004, the highest tried" in error
    assert "0.004, the highest tried" in report


@pytest.mark.dist
def test_another_value_at_an_edge_is_told(transfer: Transfers) -> None:
    tried = sweep(transfer.folder / "sweep", *GRID, trial(value=4.0, optim_lr=2e-3, optim_clip=2.0), best=BEST)
    _, report, error = transfer(source=tried)
    assert "optim.clip of the best trial is 0.5, the lowest tried (0.5 to 2)" in error
    assert "optim.clip of the best trial" in report


SWEEPS: dict[str, tuple[list[Trial], bool, str]] = {
    "empty": ([], True, "trials.jsonl: holds no trial"),
    "all diverged": ([trial("diverged", None)] * 3, False, "no trial has an end to go by (3 trials: 3 diverged)"),
    "no finite loss": ([trial(value=math.nan)] * 2, False, "(2 trials: 2 diverged)"),
    "no best.yaml": (GRID, False, "has trials, but no best.yaml"),
    "unknown state": ([trial("lost")], True, "line 1: state is 'lost'"),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", SWEEPS)
def test_a_sweep_without_a_result_is_refused(case: str, transfer: Transfers) -> None:
    tried, has_best, words = SWEEPS[case]
    folder = sweep(transfer.folder / "sweep", *tried, best=BEST if has_best else None)
    assert words in transfer.refused(source=folder)


@pytest.mark.dist
def test_a_torn_line_is_named(transfer: Transfers) -> None:
    folder = sweep(transfer.folder / "sweep", *GRID, best=BEST)
    with (folder / "trials.jsonl").open("a") as file:
        file.write('{"number": 3, "sta')
    assert "trials.jsonl, line 4: is no trial" in transfer.refused(source=folder)


# ---- MLflow ----------------------------------------------------------------------------------------------------------


def track(folder: Path) -> dict[str, str]:
    """A real store with runs as training logs them; run ids by name."""
    from mpdit.train.tracking import Tracker

    runs: dict[str, tuple[float, float | None, Any, int]] = {  # name: (lr, final val_loss, status, width)
        "low": (1e-3, 0.5, "FINISHED", 32),
        "best": (2e-3, 0.4, "FINISHED", 32),
        "high": (4e-3, 0.6, "FINISHED", 32),
        "broken": (8e-3, 0.1, "FAILED", 32),
        "unvalidated": (9e-3, None, "FINISHED", 32),
        "lowest": (5e-4, 0.9, "FINISHED", 16),
        "lower": (6e-4, 0.6, "FINISHED", 16),
        "diverged": (7e-4, None, "FAILED", 16),
        "other": (2e-3, 0.7, "FINISHED", 64),
    }
    store, ids = f"sqlite:///{folder / 'mlflow.db'}", {}
    for name, (lr, loss, status, width) in runs.items():
        tree = merged(SMALL, optim={"lr": lr}, model={"width": width}, mup={"base_width": width})
        (folder / name).mkdir(parents=True)
        own, experiment = configs.to_dict(configs.from_dict(tree)), "cliff" if width == 16 else "mine"
        tracker = Tracker(folder / name, uri=store, experiment=experiment, params=own)
        for step, value in ((50, 0.8 - (loss or 0)), (100, loss)):
            told = {"loss": 9.0} if loss is None else {"loss": 1.0, "val_loss": value}
            tracker.log({"step": step, "images": step * 16, **told})
        tracker.close(status, timeout=60)
        assert tracker.lost == 0
        ids[name] = str(tracker.run_id)
    again = merged(SMALL, optim={"lr": 4e-3, "clip": 0.25})  # goes on with another clip
    Tracker(folder / "high", uri=store, experiment="mine", params=configs.to_dict(configs.from_dict(again))).close()
    return ids


def transfers_of_runs(rank: int, world: int, folder: Path) -> tuple[dict[str, str], dict[str, commands.Done]]:
    """The store's run ids, and what each source out of it gave; in one process, for MLflow's import takes seconds."""
    ids = track(folder)
    wide = write(folder / "wide.yaml", {"model": {"width": 128}})
    sources = {name: f"mlflow:{ids.get(name, name)}" for name in ("best", "broken", "nobody")}
    sources |= {"high": f"runs:/{ids['high']}"}
    sources |= {name: f"mlflow-experiment:{name}" for name in ("mine", "cliff", "none")}
    where = ["--to", wide, "--tracking-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    argvs: list[list[object]] = [
        ["transfer", "--from", source, *where, "--out", folder / "launch" / name] for name, source in sources.items()
    ]
    return ids, dict(zip(sources, commands.commands(rank, world, argvs), strict=True))


@dataclasses.dataclass
class Tracked:
    folder: Path
    ids: dict[str, str]
    done: dict[str, commands.Done]

    def config(self, name: str) -> configs.Config:
        assert self.done[name][0] == 0, self.done[name]
        return configs.load(self.folder / "launch" / name)

    def report(self, name: str) -> str:
        return (self.folder / "launch" / name / "REPORT.md").read_text()

    def refusal(self, name: str) -> str:
        code, _, error = self.done[name]
        assert code == 2
        assert not (self.folder / "launch" / name).exists()
        return error


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    folder = tmp_path_factory.mktemp("mlflow")
    ids, done = ranks.run(1, transfers_of_runs, folder=folder)[0]
    return Tracked(folder=folder, ids=ids, done=done)


@pytest.mark.dist
def test_a_run_of_mlflow(tracked: Tracked) -> None:
    before = configs.from_dict(SMALL)
    found = tracked.config("best")
    assert (found.optim, found.data, found.objective) == (before.optim, before.data, before.objective)
    assert (found.mup.base_width, found.mup.base_images) == (32, 1600)
    assert f"MLflow run {tracked.ids['best']}" in tracked.report("best")


@pytest.mark.dist
def test_a_run_that_went_on_with_another_value_counts_with_that(tracked: Tracked) -> None:
    found = tracked.config("high").optim
    assert (found.lr, found.clip) == (4e-3, 0.25)


@pytest.mark.dist
def test_a_run_without_an_end_or_a_name_is_refused(tracked: Tracked) -> None:
    assert "its status is FAILED" in tracked.refusal("broken")
    assert "does not know it" in tracked.refusal("nobody")
    assert "has no experiment of that name" in tracked.refusal("none")


@pytest.mark.dist
def test_the_best_finished_run_of_an_experiment(tracked: Tracked) -> None:
    """By the last val_loss: "high" had 0.2 halfway, the broken run 0.1."""
    assert tracked.config("mine").optim.lr == 2e-3
    best = f"run {tracked.ids['best']} (best), val_loss 0.4, the best of 4 finished runs among 6"
    assert best in tracked.report("mine")
    assert "1 of its 6 runs are of another model" in tracked.done["mine"][2]
    assert "R = 5 trials" in tracked.report("mine")


@pytest.mark.dist
def test_an_optimum_beside_what_diverged_is_none_at_an_edge(tracked: Tracked) -> None:
    assert tracked.config("cliff").optim.lr == 6e-4
    assert "R = 3 trials" in tracked.report("cliff")


def test_stores_that_are_no_files_are_asked_as_they_are() -> None:
    from mpdit_tools.transfer import tracked

    for uri in ("mysql+pymysql://me:pw@host/db", "postgresql+psycopg2://host/db", "http://host:5000", "databricks"):
        assert tracked._uri(uri) == uri


@pytest.mark.dist
def test_a_store_that_is_not_there_is_not_made(transfer: Transfers) -> None:
    said = transfer.refused("--tracking-uri", f"sqlite:///{transfer.folder / 'no.db'}", source="mlflow:x")
    assert "no.db is not there" in said


@pytest.mark.dist
@pytest.mark.parametrize("silent", [False, True])
def test_a_server_that_does_not_answer_is_a_sentence_within_seconds(silent: bool, transfer: Transfers) -> None:
    """Nobody there, or somebody who takes the call and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if not silent:
            server.close()  # else the kernel takes calls, and nobody reads them
        began = time.monotonic()
        said = transfer.refused("--tracking-uri", f"http://user:hunter2@127.0.0.1:{port}", source="mlflow:x")
        assert time.monotonic() - began < 30  # five for the answer, MLflow's import, and a busy machine
        assert f"the MLflow store http://***@127.0.0.1:{port} does not answer" in said
        assert "hunter2" not in said
