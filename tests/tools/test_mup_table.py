"""`mpdit mup-table`: the worked example at 18B, every parameter shown once, one sentence for what can't be shown."""

import itertools
import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import commands
import ranks
from mpdit.errors import InputError
from mpdit.presets import PARAMETERS
from mpdit_tools import mup_table

LR, WEIGHT_DECAY, EPS = 3e-3, 0.02, 1e-8


def run(*argv: object) -> str:
    """What it prints, when all is well."""
    code, out, _ = commands.run("mup-table", *argv)
    assert code == 0
    return out


def write(path: Path, **sections: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(sections))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A config without a data set: m = 4."""
    model = {"width": 64, "depth": 3, "head_dim": 16, "patch": 8}
    mup = {"base_width": 16, "adaln_init": "hidden", "readout_init": "base"}
    optim = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    return write(tmp_path / "small.yaml", model=model, mup=mup, optim=optim, data={"path": str(tmp_path / "none")})


# ---- the worked example: width 512 -> 5120 ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eighteen_billion(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of the 18B model over its 0.18B proxy, from a process that may take 12 GiB: its weights are 71 GB."""
    folder = tmp_path_factory.mktemp("18b")
    optim = {"lr": LR, "weight_decay": WEIGHT_DECAY, "eps": EPS}
    mup = {"base_width": 512, "adaln_init": "hidden", "readout_init": "base"}
    base = write(folder / "base.yaml", model={"preset": "mmdit-0.18b"}, mup=mup, optim=optim)
    config = write(folder / "config.yaml", model={"preset": "mmdit-18b"}, mup={**mup, "base_width": 128}, optim=optim)

    def limit() -> None:
        if not torch.cuda.is_available():  # CUDA reserves addresses by the hundred GiB
            resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))

    command = [sys.executable, "-m", "mpdit", "mup-table", str(config), "--base", str(base), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, preexec_fn=limit)
    assert (done.returncode, done.stderr) == (0, "")
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 30  # seconds of CPU
    return json.loads(done.stdout)


INPUTS = {
    "embed.patch.linear.weight": 16,  # fan-in: 2 x 2 latents of 4 channels
    "embed.text.weight": 4096,
    "embed.pooled.linear_1.weight": 4096,
    "embed.time.linear_1.weight": 256,
}
FINITE = ("q_layernorm.weight", "k_layernorm.weight", "head.out.bias")  # no width in their gradient: eps stays


def test_18b_has_every_parameter_once(eighteen_billion: list[dict[str, Any]]) -> None:
    assert sum(math.prod(row["shape"]) for row in eighteen_billion) == PARAMETERS["mmdit-18b"]
    assert len({row["name"] for row in eighteen_billion}) == len(eighteen_billion)


def test_18b_from_a_proxy_of_width_512(eighteen_billion: list[dict[str, Any]]) -> None:
    """The rules of a tenfold width, for each parameter, by what its name says that it is."""
    seen: set[str] = set()
    for row in eighteen_billion:
        name, base = row["name"], row["base"]
        assert (base["lr"], base["eps"], base["multiplier"]) == (LR, EPS, 1), name
        found = {key: row[key] for key in ("lr", "weight_decay", "eps", "multiplier")}
        rest = {"lr": LR, "weight_decay": WEIGHT_DECAY, "eps": EPS / 10, "multiplier": 1}
        std = base["init_std"]
        if name in INPUTS:
            kind, expected, std = "input", rest, INPUTS[name] ** -0.5
            assert base["init_std"] == pytest.approx(std), name
        elif name == "head.out.weight":
            kind, expected = "output", {**rest, "multiplier": 0.1}
        elif name.endswith(".bias") or name.endswith(FINITE):
            kind, expected = "vector", {**rest, "weight_decay": 0, "eps": EPS if name.endswith(FINITE) else EPS / 10}
        else:
            kind, expected = "hidden", {**rest, "lr": LR / 10, "weight_decay": WEIGHT_DECAY * 10}
            std = base["init_std"] / math.sqrt(10)
        assert row["role"] == kind, name
        assert found == pytest.approx(expected), name
        assert row["init_std"] == pytest.approx(std), name
        assert (std > 0) == (kind != "vector"), name
        seen.add(kind)
    assert seen == {"input", "hidden", "output", "vector"}


# ---- rows and groups -------------------------------------------------------------------------------------------------


def all_of(pattern: str) -> re.Pattern[str]:
    """What a pattern such as ``blocks.*.{img,txt}.bias`` stands for."""
    choices = [part.strip("{}").split(",") for part in pattern.split(".")]
    names = [".".join(parts) for parts in itertools.product(*choices)]
    return re.compile("|".join(re.escape(name).replace(r"\*", r"\d+") for name in names))


def tables(rank: int, world: int) -> dict[str, Any]:
    from mpdit.config import Parallel, from_dict
    from mpdit.models.outline import outline
    from mpdit.mup.table import resolve
    from mpdit.parallel import groups

    groups.start(Parallel(), seed=0)
    found = {}
    for arch in ("mmdit", "dit", "pixart", "uvit"):
        model = {"arch": arch, "width": 32, "depth": 5, "head_dim": 8, "vocab_size": 9}
        config = from_dict({"model": model, "mup": {"base_width": 16}, "optim": {"weight_decay": 0.1}})
        found[arch] = resolve(outline(config), config)
    groups.stop()
    return found


@pytest.fixture(scope="module")
def four() -> dict[str, Any]:
    return ranks.run(1, tables)[0]


@pytest.mark.dist
@pytest.mark.parametrize("arch", ["mmdit", "dit", "pixart", "uvit"])
def test_each_parameter_is_meant_by_its_own_group_and_no_other(arch: str, four: dict[str, Any]) -> None:
    table, left = four[arch], set(four[arch])
    groups = mup_table.grouped(table)
    for names in groups:
        shown = [all_of(pattern) for pattern in mup_table.patterns(names, table)]
        assert {name for name in table if any(pattern.fullmatch(name) for pattern in shown)} == set(names)
        assert len({(table[name].tag.role, table[name].tag.group, table[name].rule) for name in names}) == 1
        left -= set(names)
    assert not left
    assert len(groups) < 20


def test_names_that_differ_in_a_part_become_one() -> None:
    parts = itertools.product((0, 1), ("img", "txt"), ("ada", "proj"))
    names = [f"blocks.{i}.{stream}.{layer}.bias" for i, stream, layer in parts]
    assert mup_table.patterns(names, names) == ["blocks.*.{img,txt}.{ada,proj}.bias"]
    assert mup_table.patterns(["embed.ada.bias", "head.ada.bias"], []) == ["embed.ada.bias", "head.ada.bias"]


def test_a_star_is_not_written_where_only_some_blocks_are_meant() -> None:
    names = [f"blocks.{i}.proj.bias" for i in range(3)]
    assert mup_table.patterns(names[:2], names) == ["blocks.{0,1}.proj.bias"]


@pytest.mark.dist
def test_one_row_for_all_alike_or_one_for_each(small: Path) -> None:
    (_, short, _), (_, long, _), (_, as_json, _) = ranks.run(
        1, commands.commands, argvs=[["mup-table", small, *more] for more in ([], ["--whole"], ["--json"])]
    )[0]
    rows = json.loads(as_json)
    assert short.split("\n\n")[0] == long.split("\n\n")[0]
    assert "width ratio:     m = 64 / 16 = 4\n" in short
    assert f"{sum(math.prod(row['shape']) for row in rows):,} parameters in {len(rows)} tensors" in short
    head, *lines = long.split("\n\n")[1].splitlines()
    assert head.split("  ")[0] == "role"
    assert [line.split()[-1] for line in lines] == [row["name"] for row in rows]
    shown = [line for line in short.split("\n\n")[1].splitlines() if not line.startswith(" ")]
    assert 8 < len(shown) < 15
    (readout,) = (line for line in shown if line.endswith("  head.out.weight"))
    # tensors, parameters, std 1 / sqrt(base width), LR, weight decay, eps, a quarter in the forward pass
    assert readout.split()[2:-1] == ["1", "12,288", "0.25", "0.003", "0.02", "2.5e-09", "0.25"]


@pytest.mark.dist
def test_on_a_terminal_it_is_a_table(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    assert "┃" in run(small)


# ---- a proxy beside it -----------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_the_proxy_stands_before_the_model_and_what_to_train_with_is_said(small: Path) -> None:
    base = small.with_name("base.yaml")
    base.write_text(small.read_text().replace("width: 64", "width: 32").replace("base_width: 16", "base_width: 32"))
    out = run(small, "train.steps=4000", "--base", base)
    assert "width ratio:     m = 64 / 32 = 2\n" in out
    assert "images ratio:    m_D = 256000 / 64000 = 4\n" in out
    assert "mup.base_width=32 mup.base_depth=3 mup.base_head_dim=16 mup.base_batch_size=64 mup.base_images=64000" in out
    (hidden,) = (line for line in out.splitlines() if line.endswith(".fc2.weight"))
    # r = 1/4 halves LR and decay, which m = 2 halves and doubles, and doubles eps, which m halves.
    assert "0.08839 -> 0.0625  0.003 -> 0.00075  0.02  1e-08  1  " in re.sub(" {2,}", "  ", hidden)
    assert "betas:           0.975, 0.9975\n" in out


@pytest.mark.dist
def test_blocks_that_a_shallower_proxy_lacks_are_compared_with_their_like(small: Path) -> None:
    completep, base = "mup.parametrization=completep", small.with_name("base.yaml")
    base.write_text(small.read_text().replace("base_width: 16", "base_width: 64\n  parametrization: completep"))
    rows = json.loads(run(small, completep, "model.depth=6", "--base", base, "--json"))
    assert all(row["base"] is not None for row in rows)
    (last,) = (row for row in rows if row["name"] == "blocks.5.img.proj.weight")
    assert last["base"]["eps"] / last["eps"] == pytest.approx(2)
    out = run(small, completep, "model.depth=6", "--base", base)
    assert "depth ratio:     m_L = 6 / 3 = 2 (residual branches x 0.5)" in out


@pytest.mark.dist
def test_a_parameter_that_the_proxy_has_not_is_shown_as_such(small: Path) -> None:
    uvit = ["model.arch=uvit", "mup.parametrization=completep", "mup.base_width=64"]
    base = small.with_name("base.yaml")
    tree = yaml.safe_load(small.read_text())
    tree["model"] |= {"arch": "uvit", "depth": 1}
    tree["mup"] |= {"parametrization": "completep", "base_width": 64}
    base.write_text(yaml.safe_dump(tree))
    out = run(small, *uvit, "--base", base)
    (skip,) = (line for line in out.splitlines() if line.endswith("blocks.*.skip.weight"))
    assert skip.count("none -> ") == 5


# ---- what the header says --------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_head_dim_unlike_the_proxys_gets_a_sentence(small: Path) -> None:
    other, same = run(small, "mup.base_head_dim=4"), run(small)
    assert "softmax scale:   0.125 = sqrt(4) / 16, since head_dim is not the proxy's 4" in other
    assert "softmax scale:   0.25 = 1 / sqrt(16)\n" in same


@pytest.mark.dist
def test_under_sp_no_ratio_is_used(small: Path) -> None:
    out = run(small, "mup.parametrization=sp")
    assert "m = 64 / 16 = 4 (not used)" in out
    assert "m_L = 3 / 3 = 1 (not used)" in out


@pytest.mark.dist
def test_a_vocabulary_comes_from_the_data_set_or_is_said_to_be_unknown(small: Path, tiny_set: Path) -> None:
    def text_rows(*overrides: str) -> tuple[int, str]:
        (_, out, error), *_ = [commands.run("mup-table", small, *overrides, "--json")]
        (row,) = (row for row in json.loads(out) if row["name"] == "embed.text.weight")
        return row["shape"][0], error

    rows, said = text_rows()
    assert rows == 1
    assert said.startswith("mpdit: model.vocab_size is 0, and ")
    assert said.endswith("counted, with 1 row.\n")
    pieces = json.loads((tiny_set / "manifest.json").read_text())["tokenizer"]["vocab_size"]
    assert pieces > 17
    assert text_rows(f"data.path={tiny_set}") == (pieces, "")
    assert text_rows("model.vocab_size=17") == (17, "")


@pytest.mark.dist
def test_a_run_folder_is_its_config(small: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    small.rename(tmp_path / "run" / "config.yaml")
    assert "width ratio:     m = 64 / 16 = 4\n" in run(tmp_path / "run")


@pytest.mark.dist
def test_latents_and_text_features_have_a_table_though_they_are_of_a_preset_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "config.yaml", model={"preset": "pixart-0.04b"}, objective={"kind": "ddpm"})
    assert f"{PARAMETERS['pixart-0.04b']:,} parameters" in run(path)


# ---- bad input -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown key": (["model.widht=3"], ["unknown key model.widht", "'width'"]),
    "no override": (["fast"], ["'fast'", "section.key=value"]),
    "heads are not whole": (["model.head_dim=24"], ["small.yaml: model.width 64", "head_dim 24"]),
    "depth of a uvit": (["model.arch=uvit", "model.depth=4"], ["small.yaml: model.depth 4", "odd for uvit"]),
    "number": (["optim.lr=-1"], ["optim.lr is -1.0", "at least 0"]),
    "base_width": (["mup.base_width=0"], ["mup.base_width is 0", "at least 1"]),
    "betas": (["mup.base_batch_size=1"], ["mup.base_batch_size 1", "below 0"]),
}


@pytest.mark.dist
@pytest.mark.parametrize("case", BAD)
def test_a_config_that_can_not_be_trained_has_no_table(case: str, small: Path) -> None:
    overrides, words = BAD[case]
    assert all(word in refused(small, *overrides) for word in words)


def refused(*argv: object) -> str:
    """The sentence, without another process where none is needed."""
    return ranks.run(1, _refused, argv=list(map(str, argv)))[0]


def _refused(rank: int, world: int, argv: list[str]) -> str:
    with pytest.raises(InputError) as caught:
        mup_table.main(argv)
    return str(caught.value)


@pytest.mark.dist
def test_a_proxy_that_is_none_is_refused_by_the_key_in_the_way(small: Path) -> None:
    assert "mup.base_width of the base is 16, but its own is 64" in refused(small, "--base", small)
    base = small.with_name("base.yaml")
    base.write_text(small.read_text().replace("base_width: 16", "base_width: 64").replace("patch: 8", "patch: 4"))
    assert "model.patch is 8, but the base's is 4" in refused(small, "--base", base)


@pytest.mark.dist
def test_a_file_that_is_not_there_is_told_in_a_sentence(tmp_path: Path) -> None:
    assert "none.yaml: can't be read" in refused(tmp_path / "none.yaml")
