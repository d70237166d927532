"""mpdit train --profile: a trace that Perfetto reads and a page that adds up, of as many steps as were asked for."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import ranks
import tiny
from mpdit.config import Config
from mpdit.train import trace
from mpdit.train.trace import kind_of


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        ("aten::add", "norms and pointwise"),
        ("aten::native_layer_norm", "norms and pointwise"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("c10d::send", "communication"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::copy_", "copies"),
        ("aten::embedding", "other"),
    ],
)
def test_kinds(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


def traced(rank: int, world: int, config: Config, start: int) -> list[str]:
    """What is said by a run of `config` from `start` on."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets
    from mpdit.train.trace import Trace

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), Sets.open(config)
    feed, said = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, start), []
    trace = Trace(config, start, Path(config.run.dir), said.append)
    for _ in range(start, config.train.steps):
        with trace.step():
            with trace.phase("data"):
                micro_batches = feed.next()
            with trace.phase("passes"):
                run.forward_backward(micro_batches)
            with trace.phase("update"):
                run.update()
    feed.close()
    groups.stop()
    return said


def run_traced(
    tiny_set: Path, folder: Path, *, steps: int, profiled: int, start: int = 0, **parallel: Any
) -> list[str]:
    sections = {"train": {"steps": steps, "profile_steps": profiled}, "optim": {"warmup_steps": 1}}
    config = tiny.with_run_dir(tiny.config(tiny_set, **sections, parallel=parallel), folder)
    world = parallel.get("tp", 1) * parallel.get("dp", 1)
    return ranks.run(world, traced, config=config, start=start)[0]


@pytest.mark.dist
def test_files_of_two_steps(tiny_set: Path, tmp_path: Path) -> None:
    (said,) = run_traced(tiny_set, tmp_path, steps=9, profiled=2)
    assert said.startswith("2 steps were profiled: ")
    events = json.loads(gzip.decompress((tmp_path / "profile/rank_0.json.gz").read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "step" and event.get("ph") == "X" for event in events) == 2
    assert any(event.get("name") == "mkldnn::_linear_pointwise" for event in events)
    page = (tmp_path / "profile/rank_0.txt").read_text()
    assert page.startswith("2 steps of ")
    for phase in ("data", "passes", "update"):
        assert f"\n {phase} " in page
    kinds = page.split(" kind ")[1].split(" operator ")[0].splitlines()[1:]
    shares = [float(line.split()[-2]) for line in kinds if line.strip().endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert any(line.split()[:2] == ["matrix", "products"] for line in kinds)


@pytest.mark.dist
@pytest.mark.parametrize(("steps", "profiled", "start", "seen"), [(3, 2, 0, 2), (3, 9, 1, 2), (3, 0, 0, 0)])
def test_short_runs_are_profiled_as_far_as_they_go(
    steps: int, profiled: int, start: int, seen: int, tiny_set: Path, tmp_path: Path
) -> None:
    said = run_traced(tiny_set, tmp_path, steps=steps, profiled=profiled, start=start)
    assert [line.split()[0] for line in said] == [str(seen)] * bool(seen)
    assert (tmp_path / "profile").exists() is bool(seen)


def test_ranks_of_one_pid_write_a_trace_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in containers on two nodes: while one rank writes, another writes and is done."""
    writer = 0

    def written(rank: int, meanwhile: Callable[[], None]) -> None:
        def export(path: str) -> None:
            nonlocal writer
            Path(path).write_text(f"of rank {rank}")
            meanwhile()
            writer = rank

        nonlocal writer
        writer = rank
        profiled = SimpleNamespace(export_chrome_trace=export, key_averages=lambda: [])
        one = SimpleNamespace(_folder=tmp_path / "profile", _profile=profiled, _steps=1, _say=lambda _: None)
        trace.Trace._write(cast(Any, one))

    monkeypatch.setattr("mpdit.parallel.groups.rank", lambda: writer)
    monkeypatch.setattr(trace, "_page", lambda *_: [])
    written(0, meanwhile=lambda: written(1, meanwhile=lambda: None))
    traces = {path.name: path.read_text() for path in (tmp_path / "profile").glob("*.gz")}
    assert traces == {"rank_0.json.gz": "of rank 0", "rank_1.json.gz": "of rank 1"}


def test_a_gpus_kernels_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch gives an operator, a step and a phase twice, as on the host and as on the device."""
    from torch.autograd import DeviceType

    def event(key: str, on: DeviceType, *, host_us: float = 0, device_us: float = 0, annotation: bool = False) -> Any:
        return SimpleNamespace(
            key=key,
            device_type=on,
            is_user_annotation=annotation,
            count=4,
            cpu_time_total=host_us,
            self_cpu_time_total=host_us,
            self_device_time_total=device_us,
        )

    profiled = SimpleNamespace(
        key_averages=lambda: [
            event("step", DeviceType.CPU, host_us=4e6, annotation=True),
            event("aten::mm", DeviceType.CPU, host_us=1e3, device_us=2e6),
            event("nvjet_gemm", DeviceType.CUDA, device_us=2e6),
            event("phase: data", DeviceType.CPU, host_us=1e6, annotation=True),
            event("phase: data", DeviceType.CUDA, device_us=3e6, annotation=True),
            event("nccl:all_reduce", DeviceType.CUDA, device_us=1e6, annotation=True),
            event("ncclDevKernel_AllReduce", DeviceType.CUDA, device_us=1e6),
            event("step", DeviceType.CUDA, device_us=9e6, annotation=True),
        ]
    )
    monkeypatch.setattr(trace.accel, "is_cuda", lambda: True)
    monkeypatch.setattr(trace.torch.cuda, "get_device_name", lambda: "a GPU")
    head, phases, kinds, operators = trace._page(profiled, 2)
    assert head.startswith("2 steps of 2.000 s on a GPU")
    rows = {
        name: [list(column.cells) for column in table.columns]
        for name, table in (("phases", phases), ("kinds", kinds), ("operators", operators))
    }
    assert rows["phases"] == [["data"], ["0.5000"]]
    assert rows["kinds"][:2] == [["matrix products", "communication"], ["1.0000", "0.5000"]]
    assert rows["operators"][:3] == [["nvjet_gemm", "ncclDevKernel_AllReduce"], ["2", "2"], ["1.0000", "0.5000"]]


@pytest.mark.dist
def test_a_full_disk_costs_the_profile_alone(tiny_set: Path, tmp_path: Path) -> None:
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile/rank_0.txt").mkdir()  # a name that can't be written
    (said,) = run_traced(tiny_set, tmp_path, steps=9, profiled=2)
    assert said.startswith(f"{tmp_path / 'profile'}: the profile could not be written (")
    assert "Is a directory" in said
