"""Guards `mpdit plan`: what it says before a run against what real ranks do, and against torch's own counters."""

import dataclasses
import itertools
import json
import math
import weakref
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import commands
import ranks
import tiny
from mpdit import config as configs
from mpdit.config import Config, Parallel
from mpdit.presets import PARAMETERS, PRESETS
from parallel.layouts import CASES
from reference import plain_common, plain_dit, plain_mmdit, plain_pixart, plain_uvit

# ---- work and parameters ---------------------------------------------------------------------------------------------

PLAIN = {"dit": plain_dit, "mmdit": plain_mmdit, "pixart": plain_pixart, "uvit": plain_uvit}
IMAGES = 2


def preset(name: str) -> Config:
    """With a learned text table, which the references have for every network."""
    model = {"preset": name} if PRESETS[name]["vocab_size"] else {"preset": name, "text_dim": 0, "vocab_size": 1000}
    kind = "ddpm" if PRESETS[name]["learn_sigma"] else "flow"
    return configs.from_dict({"model": model, "objective": {"kind": kind}, "parallel": {"micro_batch": IMAGES}})


def counted(rank: int, world: int) -> dict[str, tuple[int, int, int]]:
    """(parameters, FLOPs forward, FLOPs backward) of every preset by the plan."""
    import torch.distributed as dist

    from mpdit.train import pieces

    dist.destroy_process_group()
    found = {}
    for name in PRESETS:
        parts = pieces.measure_whole(preset(name))
        found[name] = (
            sum(sum(part.parameters.values()) for part in parts),
            sum(part.piece.forward.flops for part in parts),
            sum(part.piece.backward.flops for part in parts),
        )
    return found


@pytest.fixture(scope="module")
def of_presets() -> dict[str, tuple[int, int, int]]:
    return ranks.run(1, counted)[0]


@pytest.mark.dist
@pytest.mark.parametrize("name", PRESETS)
def test_work_is_what_torch_counts_in_a_plain_network(name: str, of_presets: dict[str, tuple[int, int, int]]) -> None:
    """Forward to the last FLOP. Backward too, where fused attention computes its scores once more than plain matrix
    products do: torch counts that where it meets the fused kernel. U-ViT's readout here reads time and text too, as
    under context parallelism no rank has the image alone."""
    model = preset(name).model
    plain = PLAIN[model.arch]
    grid = model.image_size // model.patch
    more = {"grid": (grid, grid), "text_tokens": model.text_tokens} if model.arch == "uvit" else {}
    shape = plain.Shape(
        **{key: getattr(model, key) for key in ("width", "depth", "head_dim", "patch", "channels", "learn_sigma")},
        **{"vocab": model.vocab_size, "qk_norm": model.qk_norm, **more},
    )
    size = (IMAGES, model.channels, model.image_size, model.image_size)
    with torch.device("meta"):
        weights = {n: torch.zeros(p.shape, requires_grad=True) for n, p in plain.parameters(shape).items()}
        batch = plain_common.Batch(
            image_BCYX=torch.zeros(size),
            noise_BCYX=torch.zeros(size),
            t_B=torch.zeros(IMAGES),
            ids_BL=torch.zeros(IMAGES, model.text_tokens, dtype=torch.long),
        )
        with FlopCounterMode(display=False) as forward:
            prediction = plain.forward(weights, shape, batch, 1.0)
        with FlopCounterMode(display=False) as backward:
            prediction.sum().backward()
    by_operator = forward.get_flop_counts()["Global"]
    scores = by_operator[torch.ops.aten.bmm] // 2
    others = 1 + model.text_tokens if model.arch == "uvit" else 0
    readout = 2 * IMAGES * others * model.width * model.patch**2 * model.channels
    _, forward_flops, backward_flops = of_presets[name]
    assert forward_flops == forward.get_total_flops() + readout
    assert backward_flops == backward.get_total_flops() + scores + 2 * readout


@pytest.mark.dist
def test_parameters_are_those_of_the_presets(of_presets: dict[str, tuple[int, int, int]]) -> None:
    for name, (parameters, _, _) in of_presets.items():
        model = preset(name).model
        if PRESETS[name]["vocab_size"]:
            assert parameters == PARAMETERS[name]
        else:
            assert abs(parameters - PARAMETERS[name]) <= (4097 + 1000) * model.width * 2  # text layers of another shape


# ---- the schedule ----------------------------------------------------------------------------------------------------


def executed(rank: int, world: int, config: Config) -> tuple[int, list[tuple[str, int, int]]]:
    """(pipeline rank, what it really does in a step): forward and backward passes as they begin."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    sets, run = Sets.open(config), session.build(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    done: list[tuple[str, int, int]] = []
    stage_rank = groups.parallel_state.get_pipeline_model_parallel_rank()

    def watch(index: int, chunk: Any) -> None:
        passes = {"forward": 0}

        def forward(module: Any, inputs: Any, output: torch.Tensor) -> None:
            number = passes["forward"]
            passes["forward"] += 1
            done.append(("forward", index, number))
            output.register_hook(lambda _: done.append(("backward", index, number)))

        chunk.module.register_forward_hook(forward)

    for v, chunk in enumerate(run.network.chunks):
        watch(v * config.parallel.pp + stage_rank, chunk)
    run.forward_backward(feed.next())
    feed.close()
    groups.stop()
    return stage_rank, done


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"pp": 2, "micro_batch": 1}),
        (4, {"pp": 4, "micro_batch": 2}),
        (2, {"pp": 2, "vpp": 2, "micro_batch": 1}),
        (4, {"pp": 4, "vpp": 1, "micro_batch": 8}),
    ],
    ids=["1F1B", "as many micro-batches as stages", "interleaved", "fewer micro-batches than stages"],
)
def test_ranks_work_in_the_order_that_is_planned(world: int, parallel: dict[str, Any], tiny_set: Path) -> None:
    from mpdit.parallel import schedule

    config = tiny.config(tiny_set, parallel=parallel)
    micro_batches = config.train.batch_size // config.parallel.micro_batch
    for stage, done in ranks.run(world, executed, config=config):
        assert [tuple(task) for task in schedule.order(config.parallel, stage, micro_batches)] == done


@settings(deadline=None)
@given(pp=st.integers(1, 8), vpp=st.integers(1, 4), rounds=st.integers(1, 6), ratio=st.floats(0.5, 3))
def test_the_bubble_of_equal_stages_is_the_known_one(pp: int, vpp: int, rounds: int, ratio: float) -> None:
    """(pp - 1) / (vpp m + pp - 1) for m micro-batches (Narayanan et al., arXiv 2104.04473, section 2.2)."""
    from mpdit_tools.plan import timeline

    vpp, micro_batches = (vpp if pp > 1 else 1), pp * rounds
    line = timeline.simulate(
        Parallel(pp=pp, vpp=vpp), micro_batches, lambda task: 1.0 if task.kind == "forward" else ratio
    )
    assert line.bubble == pytest.approx((pp - 1) / (vpp * micro_batches + pp - 1), abs=1e-9)


@settings(deadline=None)
@given(costs=st.lists(st.floats(0.1, 5), min_size=4, max_size=4), micro_batches=st.integers(1, 12))
def test_the_slowest_stage_bounds_the_step(costs: list[float], micro_batches: int) -> None:
    """No rank does two things at once, nothing starts before what it needs, and the slowest stage is never beaten."""
    from mpdit_tools.plan import timeline

    line = timeline.simulate(Parallel(pp=4), micro_batches, lambda task: costs[task.chunk], hop_s=0.25)
    ends = {span.task: span.end_s for spans in line.ranks for span in spans}
    for spans in line.ranks:
        assert all(a.end_s <= b.begin_s for a, b in itertools.pairwise(spans))
        for span in spans:
            needed = timeline._needed(span.task, 4)
            if needed is not None:
                assert span.begin_s >= ends[needed]
    assert line.seconds >= max(costs) * 2 * micro_batches * (1 - 1e-12)
    assert math.isclose(line.busy_s(0), costs[0] * 2 * micro_batches)


# ---- memory ----------------------------------------------------------------------------------------------------------

# Bytes that autograd keeps: planned on fake tensors, then counted by hooks in a real step of real ranks.
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("mmdit", 1, {"micro_batch": 2}),
    ("mmdit", 2, {"tp": 2}),
    ("mmdit", 4, {"tp": 2, "sp": True, "pp": 2, "micro_batch": 1}),
    ("mmdit", 2, {"pp": 2, "vpp": 2, "micro_batch": 1}),
    ("mmdit", 4, {"cp": 2, "pp": 2, "micro_batch": 2}),
    ("mmdit", 4, {"pp": 4, "micro_batch": 1, "precision": "bf16"}),
    ("mmdit", 2, {"tp": 2, "sp": True, "micro_batch": 4, "precision": "fp8_emulated"}),
    ("pixart", 2, {"pp": 2, "micro_batch": 4, "precision": "fp8_emulated", "fp8_recipe": "mxfp8"}),
    ("dit", 4, {"tp": 2, "pp": 2, "pp_split": [1, 3], "micro_batch": 1}),
    ("dit", 2, {"distributed_optimizer": True}),
    ("pixart", 4, {"tp": 2, "sp": True, "cp": 2}),
    ("pixart", 2, {"pp": 2, "pp_split": [3, 1], "micro_batch": 2}),
    ("uvit", 2, {"pp": 2, "pp_split": [3, 2], "micro_batch": 2}),
    ("uvit", 4, {"tp": 2, "pp": 2, "sp": True, "pp_split": [2, 3], "micro_batch": 2}),
]


RECOMPUTES: tuple[Literal["none", "full"], ...] = ("none", "full")


class Held:
    """What a saved tensor is held by: `most` counts the bytes of all held at once, each storage once."""

    now: ClassVar[int] = 0
    most: ClassVar[int] = 0
    weights: ClassVar[set[int]] = set()  # storages that are there anyway
    holders: ClassVar[dict[int, int]] = {}

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, storage = tensor, tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in Held.weights:
            Held.holders[key] = Held.holders.get(key, 0) + 1
            Held.now += size if Held.holders[key] == 1 else 0
            Held.most = max(Held.most, Held.now)
            weakref.finalize(self, Held.release, key, size)

    @staticmethod
    def release(key: int, size: int) -> None:
        Held.holders[key] -= 1
        Held.now -= 0 if Held.holders[key] else size


def saved_in_steps(rank: int, world: int, config: Config) -> tuple[int, list[int]]:
    """(pipeline rank, most bytes of saved tensors at once in a real step, without and with recompute)."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    sets, seen = Sets.open(config), []
    for recompute in RECOMPUTES:
        config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, recompute=recompute))
        run = session.build(config)
        feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
        chunks = [chunk.module for chunk in run.network.chunks]
        Held.now, Held.most, Held.holders = 0, 0, {}
        Held.weights = {id(t.untyped_storage()) for c in chunks for t in (*c.parameters(), *c.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            run.forward_backward(feed.next())
        feed.close()
        seen.append(Held.most)
    stage = groups.parallel_state.get_pipeline_model_parallel_rank()
    groups.stop()
    return stage, seen


def planned(rank: int, world: int, asked: list[tuple[int, Config]]) -> list[list[int]]:
    """For each (ranks, config), by pipeline rank: the same, before there are any ranks."""
    import torch.distributed as dist

    from mpdit.train import pieces, preflight
    from mpdit_tools.plan import memory

    dist.destroy_process_group()
    found = []
    for ranks_asked, open_config in asked:
        config = preflight.check(open_config, ranks_asked)
        chunks = pieces.on_stages(config, pieces.measure(config))
        parallel = config.parallel
        copies = ranks_asked // (parallel.tp * parallel.pp * parallel.cp)
        count = config.train.batch_size // copies // parallel.micro_batch
        found.append([memory.most_saved_bytes(config, chunks, stage, count) for stage in range(parallel.pp)])
    return found


@pytest.mark.dist
@pytest.mark.parametrize(("of", "world", "parallel"), LAYOUTS, ids=[f"{of} {p}" for of, _, p in LAYOUTS])
def test_activations_are_what_autograd_keeps(
    of: str, world: int, parallel: dict[str, Any], tiny_set: Path, labelled_set: Path
) -> None:
    """To the byte, on every pipeline rank, with recompute and without."""
    case = CASES[of]
    data = labelled_set if case.labels else tiny_set
    asked = [
        tiny.config(data, **{**case.sections, "parallel": {**parallel, "recompute": recompute}})
        for recompute in RECOMPUTES
    ]
    expected = ranks.run(1, planned, asked=[(world, config) for config in asked])[0]
    for stage, seen in ranks.run(world, saved_in_steps, config=asked[0]):
        assert [by_stage[stage] for by_stage in expected] == seen


# ---- the command -----------------------------------------------------------------------------------------------------

LAUNCH = [
    *("mmdit-18b", "--gpus", "256", "train.batch_size=1024", "parallel.precision=bf16", "parallel.tp=8"),
    *("parallel.sp=true", "parallel.pp=4", "parallel.vpp=2", "parallel.pp_split=[2,2,3,2,3,2,3,2]"),
    *("parallel.micro_batch=8", "parallel.distributed_optimizer=true"),
]


def work_of_an_image(rank: int, world: int, preset: str) -> int:
    import torch.distributed as dist

    from mpdit_tools import mup_table
    from mpdit_tools.plan import resolve

    dist.destroy_process_group()
    config, _ = mup_table.with_vocabulary(resolve.load(preset, ("train.batch_size=6",)))
    return resolve.flops_per_image(config)


@pytest.mark.dist
def test_an_image_is_the_same_work_in_every_layout() -> None:
    """What a sweep says that it cost is what a plan says of its proxy."""
    for gpus, layout in ((1, []), (12, ["parallel.tp=2", "parallel.pp=3"])):
        argv = ["dit-s-2", "--json", "--gpus", str(gpus), "train.batch_size=12", *layout]
        _, told, _ = commands.run("plan", *argv)
        expected = json.loads(told)["model_flops_per_image"]
        assert ranks.run(1, work_of_an_image, preset="dit-s-2")[0] == expected


def test_the_largest_bucket_is_planned_for() -> None:
    """Its memory and work are what the run has to be able to take; the work of the others is told beside."""

    def planned(*sizes: str) -> dict[str, Any]:
        buckets = [f"data.buckets=[{','.join(sizes)}]"] if sizes else []
        _, told, _ = commands.run("plan", "dit-s-2", "--json", "train.batch_size=4", *buckets)
        found: dict[str, Any] = json.loads(told)
        return found

    square, both, largest = planned(), planned("[32,32]", "[48,24]"), planned("[48,24]")
    assert both["buckets"] == [
        {"size": [32, 32], "model_flops_per_image": square["model_flops_per_image"]},
        {"size": [48, 24], "model_flops_per_image": largest["model_flops_per_image"]},
    ]
    assert square["buckets"] == []
    assert square["model_flops_per_image"] < both["model_flops_per_image"] == largest["model_flops_per_image"]
    assert square["memory_bytes"][0]["peak"] < both["memory_bytes"][0]["peak"]
    assert both["memory_bytes"] == largest["memory_bytes"]
    _, told, _ = commands.run("plan", "dit-s-2", "train.batch_size=4", "data.buckets=[[32,32],[48,24]]")
    assert "buckets      32 x 32: " in told
    assert "48 x 24: " in told


def test_18b_is_planned_on_a_laptop(tmp_path: Path) -> None:
    """Its parameters to the unit; tables, plan.json and pictures; a step that fits."""
    code, told, _ = commands.run("plan", *LAUNCH, "--out", tmp_path)
    _, as_json, _ = commands.run("plan", *LAUNCH, "--json")
    assert code == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert json.loads(as_json) == plan
    assert plan["parameters"] == PARAMETERS["mmdit-18b"]
    assert plan["data_ranks"] == 8
    assert len(plan["memory_bytes"]) == 4
    assert "17,741,050,640 parameters" in told
    assert "fits: " in told
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("memory.png", "timeline.png"))


def test_what_does_not_fit_is_said_and_is_exit_code_1() -> None:
    code, told, _ = commands.run("plan", "mmdit-18b", "train.batch_size=8")
    assert code == 1
    assert "does NOT fit" in told


def test_a_search_ranks_what_fits_and_says_why_the_rest_does_not() -> None:
    argv = ["pixart-0.61b", "--search", "--gpus", "4", "--gpus-per-node", "2", "train.batch_size=4", "--json"]
    code, told, _ = commands.run("plan", *argv)
    assert code == 0
    found = json.loads(told)
    fit = [one for one in found if one["fits"]]
    assert fit == sorted(fit, key=lambda one: one["step_s"])
    assert all(one["reason"] for one in found if not one["fits"])
    assert {one["parallel"]["tp"] for one in fit} <= {1, 2}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["mmdit-18b", "--gpus", "12", "parallel.tp=8"], ["tp 8", "do not divide the 12"]),
        (["mmdit-18b", "parallel.pp=4"], ["model.depth 19", "pp_split"]),
        (["mmdit-19b"], ["mmdit-19b"]),
        (["mmdit-18b", "--search"], ["--gpus is 0"]),
        (["mmdit-18b", "--search", "--gpus", "7", "train.batch_size=4"], ["no layout of 7 GPUs"]),
        (["mmdit-18b", "--calibration", "CALIBRATION"], ["gem", "is no efficiency", "gemm"]),
    ],
    ids=["GPUs", "depth", "name", "search of none", "no layout", "calibration"],
)
def test_what_cannot_be_planned_is_one_sentence(argv: list[str], words: list[str], tmp_path: Path) -> None:
    (tmp_path / "calibration.yaml").write_text("gem: 0.7\n")
    argv = [str(tmp_path / "calibration.yaml") if word == "CALIBRATION" else word for word in argv]
    code, told, error = commands.run("plan", *argv)
    assert (code, told) == (2, "")
    assert error.count("\n") == 1
    assert all(word in error for word in words)
