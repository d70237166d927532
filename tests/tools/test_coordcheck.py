"""Guards ``mpdit coordcheck``: it passes muP in every layout alike, fails what is wrong, names the culprit, is told
early of what can't be. Real ranks; three seeds instead of eight keep it quick, so bounds are a little wider."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import commands
import ranks
from mpdit import config as configs
from mpdit.config import Config
from mpdit.errors import InputError
from mpdit_tools.coordcheck.main import Arguments

EXAMPLES = Path(__file__).parents[2] / "examples" / "coordcheck"
QUICK: dict[str, Any] = {"widths": (32, 64, 128, 256), "seeds": 3, "activation_bound": 0.2, "change_bound": 0.2}


def outcomes(rank: int, world: int, arguments: Arguments, change: Any = contextlib.nullcontext) -> Any:
    """(slopes by key, findings, culprits) of each layout, and the sentence on their disagreement."""
    from mpdit.parallel import groups
    from mpdit_tools.coordcheck import check, report

    config = configs.load(arguments.config, arguments.overrides)
    plan = check.plan(arguments, config, groups.world_size())
    with change():
        found = check.run(plan, lambda *_: None)
    rows = [(o.layout, o.slopes, o.findings, report.culprits(o), o.still) for o in found]
    return rows, check.disagreement(found)


def quick(arch: str, *overrides: str, **changed: Any) -> Arguments:
    return Arguments(config=EXAMPLES / f"{arch}.yaml", overrides=overrides, **{**QUICK, **changed})


def in_one(arguments: Arguments, change: Any = contextlib.nullcontext) -> Any:
    (row,), _ = ranks.run(1, outcomes, arguments=arguments, change=change)[0]
    return row


@pytest.mark.parametrize("arch", ["dit", "mmdit", "pixart", "uvit"])
def test_mup_passes(arch: str) -> None:
    """No slope is out of bounds, and everything but what can't have moved yet was judged."""
    _, slopes, findings, said, still = in_one(quick(arch, steps=(1, 2, 3)))
    assert not findings
    assert not said
    assert {key.step for key in slopes} == {0, 1, 2, 3}
    last_text_queries = "txt.qkv.q_layernorm.weight"  # of the pre-only block: nothing reads them
    assert [name for name in still if not name.endswith(last_text_queries)] == []


@pytest.mark.parametrize("arch", ["dit", "uvit"])  # all four: examples/ablations
def test_sp_fails_and_hidden_layers_are_named(arch: str) -> None:
    _, slopes, findings, said, _ = in_one(quick(arch, "mup.parametrization=sp", steps=(1, 2)))
    assert {f.key.statistic for f in findings} >= {"change", "update"}
    assert any(sentence.startswith("hidden: ") for sentence in said)
    assert any(sentence.startswith("output: ") for sentence in said)
    (readout,) = (s for key, s in slopes.items() if (key.statistic, key.step, key.name) == ("change", 1, "head.out"))
    assert 0.7 < readout < 1.2


@pytest.mark.dist
@pytest.mark.parametrize("arch", ["dit", "mmdit", "pixart", "uvit"])
def test_layouts_measure_the_same(arch: str) -> None:
    """TP2 x PP2 (uneven for U-ViT), TP2 x CP2 + SP and DP4: the same statistics, hence the same slopes."""
    split = ",pp_split=[2,3]" if arch == "uvit" else ""
    layouts = ("", f"tp=2,pp=2{split}", "tp=2,cp=2,sp=true")
    # 64 is the narrowest with enough heads of 16 for tp 2 x cp 2.
    arguments = quick(arch, widths=(64, 128, 256), seeds=1, steps=(1, 2), layouts=layouts)
    rows, disagreement = ranks.run(4, outcomes, arguments=arguments)[0]
    assert [row[0] for row in rows] == ["DP4", "TP2 x PP2", "TP2 x CP2 + SP"]
    assert disagreement == ""
    for _, slopes, _, _, _ in rows[1:]:
        for key, slope in rows[0][1].items():
            assert slopes[key] == pytest.approx(slope, abs=0.05), key


def _with_rules(change: Callable[[Any, Any], Any]) -> Any:
    @contextlib.contextmanager
    def changed() -> Any:
        from mpdit.train import session

        right = session.resolve

        def resolve(tags: Any, config: Config) -> Any:
            table = right(tags, config)
            return {n: dataclasses.replace(e, rule=change(n, e)) for n, e in table.items()}

        session.resolve = resolve
        yield
        session.resolve = right

    return changed


def test_one_wrong_tensor_is_named_alone() -> None:
    """The second timestep linear learns at the base rate: its own update shows it, and nobody else's does."""

    def wrong(name: str, entry: Any) -> Any:
        m = entry.tag.fan_in / entry.tag.base_fan_in
        factor = m if name == "embed.time.linear_2.weight" else 1.0
        return dataclasses.replace(entry.rule, lr=entry.rule.lr * factor)

    _, _, findings, said, _ = in_one(quick("dit", steps=(1, 2)), _with_rules(wrong))
    assert [f.key.name for f in findings if f.key.statistic == "update"] == ["embed.time.linear_2.weight"]
    assert said[0].startswith("hidden: 1 of 17 parameters move by themselves like width^(+")


def test_a_rule_that_depends_on_the_layout_is_seen_by_comparing_layouts() -> None:
    """Fan-in taken from a shard: slopes over the width are right, the sizes under tp 2 are not."""

    def wrong(name: str, entry: Any) -> Any:
        from megatron.core import parallel_state

        tp = parallel_state.get_tensor_model_parallel_world_size()
        row_parallel = name.endswith(("attn.proj.weight", "fc2.weight"))
        return dataclasses.replace(entry.rule, init_std=entry.rule.init_std * (tp**0.5 if row_parallel else 1.0))

    arguments = quick("dit", seeds=1, steps=(1,), layouts=("", "tp=2"))
    _, disagreement = ranks.run(2, outcomes, arguments=arguments, change=_with_rules(wrong))[0]
    assert disagreement.startswith("layouts disagree: activation of blocks.0.attn.proj at step 0")


def test_completep_is_flat_in_depth_and_mup_is_not() -> None:
    """The residual stream's change after two updates, over depths 2 ... 16."""
    slope = {}
    for parametrization in ("completep", "mup"):
        overrides = (f"mup.parametrization={parametrization}", "mup.base_depth=2")
        arguments = quick("dit", *overrides, widths=(), depths=(2, 4, 8, 16), seeds=1, steps=(2,))
        found = in_one(dataclasses.replace(arguments, change_bound=None, activation_bound=None))
        slope[parametrization] = {k.name: s for k, s in found[1].items() if (k.statistic, k.step) == ("change", 2)}
    assert abs(slope["completep"]["blocks.last.image"]) < 0.35
    assert slope["mup"]["blocks.last.image"] > 0.7


# ---- the command -----------------------------------------------------------------------------------------------------


def test_table_figure_and_json(tmp_path: Path) -> None:
    """A failing check: exit code 1, the table says OUT, the culprit is in words, figure and JSON are written."""
    argv = [str(EXAMPLES / "dit.yaml"), "mup.parametrization=sp", "--widths", "32", "64", "128"]
    more = ["--seeds", "1", "--steps", "1", "2", "--out", tmp_path]
    code, printed, _ = commands.run("coordcheck", *argv, *more)
    assert code == 1
    assert "OUT" in printed
    assert "culprit: hidden: " in printed
    assert "FAIL: 3 runs" in printed
    assert (tmp_path / "coordcheck.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "coordcheck.json").read_text())
    assert written["passed"] is False
    assert set(written["measured"]) == {"32", "64", "128"}


def test_gradients_are_held_against_the_eps_rule() -> None:
    argv = [str(EXAMPLES / "dit.yaml"), "--widths", "32", "64", "128", "--seeds", "1", "--steps", "2", "--gradients"]
    argv += ["--activation-bound", "1", "--change-bound", "1", "--update-bound", "1"]  # gradients are the matter here
    code, printed, _ = commands.run("coordcheck", *argv)
    (row,) = (line for line in printed.splitlines() if "blocks.0.mlp.fc1.weight" in line and "-1" in line)
    assert "ok" in row
    assert code == 0


@pytest.mark.parametrize(
    ("overrides", "changed", "said"),
    [
        ((), {"widths": (32, 64)}, "--widths 32 64: give at least three"),
        ((), {"widths": (32, 40, 64)}, "--widths: 40 does not fit: model.width 40 does not divide by head_dim 16"),
        ((), {"widths": (32, 64, 128), "depths": (2, 4, 8)}, "--widths and --depths: give one of them"),
        (("parallel.pp=2",), {}, "parallel: tp 1 x pp 2 x cp 1 = 2 ranks do not divide the 1"),
        ((), {"steps": (0,)}, "should be at least 1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    overrides: tuple[str, ...], changed: dict[str, Any], said: str
) -> None:
    from mpdit_tools.coordcheck import check

    arguments = quick("dit", *overrides, **changed)
    with pytest.raises(InputError) as error:
        check.plan(arguments, configs.load(arguments.config, arguments.overrides), 1)
    assert said in str(error.value)
