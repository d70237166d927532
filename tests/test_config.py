"""Configs: what is read is what was written, and whatever can't be right is refused in one sentence with its key."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mpdit import config as configs
from mpdit.config import Config
from mpdit.errors import InputError
from mpdit.presets import PRESETS

# PyYAML itself turns this one control character into a space.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=20)


def strategy(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type, as a config may hold them."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        fields = {name: strategy(field) for name, field in hints.items()}
        return st.builds(hint, **fields | ({"preset": st.sampled_from([None, *PRESETS])} if "preset" in fields else {}))
    if origin in (typing.Union, types.UnionType):
        return st.one_of([st.none() if a is type(None) else strategy(a) for a in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(strategy(arguments[0]), max_size=3).map(tuple)
    return {int: st.integers(), float: st.floats(allow_nan=False), bool: st.booleans(), str: TEXT}[hint]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        configs.from_dict(tree, "run.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- there and back --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(config=strategy(Config))
def test_any_config_survives_dicts_yaml_and_a_file(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = configs.to_dict(config)
    assert json.loads(json.dumps(plain)) == plain, "dicts and lists, as JSON and MLflow want them"
    assert configs.from_dict(plain) == config
    assert configs.from_dict(yaml.safe_load(configs.dump(config))) == config
    assert configs.load(write(tmp_path_factory.getbasetemp(), configs.dump(config))) == config


@pytest.mark.parametrize("number", [1e-5, 1e-8, 1e20, 0.1 + 0.2, 3.0, float("inf")])
def test_floats_come_back_to_the_last_bit(number: float) -> None:
    config = Config(optim=configs.Optim(eps=number))
    assert configs.from_dict(yaml.safe_load(configs.dump(config))).optim.eps == number


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError, match=r"config\.yaml: is empty; it should hold sections"):
        configs.load(path)


def test_empty_sections_are_the_defaults(tmp_path: Path) -> None:
    assert configs.load(write(tmp_path, "{}")) == Config()
    assert configs.load(write(tmp_path, "# nothing yet\nmodel:\nmup:\n  lr_mult:\n")) == Config()


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert configs.load(write(tmp_path, b"\xef\xbb\xbftrain:\n  seed: 5\n")).train.seed == 5


# ---- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "key", "nearest"),
    [
        ({"model": {"widht": 64}}, "model.widht", "width"),
        ({"optim": {"weight_decya": 0.1}}, "optim.weight_decya", "weight_decay"),
        ({"mup": {"lr_mult": {"hiden": 2.0}}}, "mup.lr_mult.hiden", "hidden"),
        ({"modle": {"width": 64}}, "modle", "model"),
        ({"model": {"preset": "mmdit-17b"}}, "model.preset", "mmdit-18b"),
        ({"model": {"arch": "mmdt"}}, "model.arch", "mmdit"),
        ({"optim": {"schedule": "cosin"}}, "optim.schedule", "cosine"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(tree: dict[str, Any], key: str, nearest: str) -> None:
    said = refusal(tree)
    assert said.startswith("run.yaml: ")
    assert key in said
    assert f"did you mean {nearest!r}?" in said


def test_a_name_near_nothing_lists_what_there_is() -> None:
    assert "known are model, mup, optim" in refusal({"zzz": {}})
    assert "known are constant, linear, cosine, wsd" in refusal({"optim": {"schedule": "qqqqqq"}})
    assert "unknown key 7" in refusal({7: 7})


def test_a_section_that_is_a_value_is_refused() -> None:
    for value in (3, "mmdit", [1], True):
        assert f"model should be a section with keys, but is {value!r}" in refusal({"model": value})
    assert "mup.lr_mult should be a section with keys, but is 2.0" in refusal({"mup": {"lr_mult": 2.0}})


# ---- values ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, tuple[Any, ...]]] = {  # key: (what it should be, what it can't be)
    "model.width": ("a whole number", (True, 64.0, "64", None, [64], {"a": 1})),
    "model.qk_norm": ("true or false", (1, 0, "yes", None, [])),
    "optim.lr": ("a number", (True, "fast", None, [1e-3], {})),
    "mup.lr_mult.table": ("a number", (False, "x", None)),
    "mup.base_head_dim": ("a whole number", (True, 8.0, "8", [])),
    "data.path": ("a text", (3, 2.5, True, None, ["a"])),
    "run.mlflow_uri": ("a text", (3, False, ["a"])),
    "parallel.pp_split": ("a list", (4, "1, 3", True, {"a": 1})),
    "sample.prompts": ("a list", ("a red heart", None, 1)),
}


def nested(key: str, value: Any) -> dict[str, Any]:
    *sections, last = key.split(".")
    tree: dict[str, Any] = {last: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_the_wrong_type_names_key_value_and_type(key: str) -> None:
    wanted, values = WRONG[key]
    for value in values:
        assert f"{key} is {value!r}, but should be {wanted}." in refusal(nested(key, value))


def test_items_of_lists_are_checked_one_by_one() -> None:
    assert "parallel.pp_split[1] is '3', but should be a whole number" in refusal({"parallel": {"pp_split": [1, "3"]}})
    assert "parallel.pp_split[0] is True" in refusal({"parallel": {"pp_split": [True, 3]}})
    assert "sample.prompts[0] is 7, but should be a text" in refusal({"sample": {"prompts": [7]}})


def test_choices_are_not_guessed_from_other_types() -> None:
    for key in ("parallel.precision", "model.arch", "mup.wd_rule"):
        for value in (True, 0, None, ["fp32"], {}):
            assert f"{key} is {value!r}" in refusal(nested(key, value))


def test_a_preset_of_another_type_is_refused() -> None:
    for value in (7, True, ["mmdit-demo"], {"a": 1}):
        assert "model.preset is " in refusal({"model": {"preset": value}})


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("8E-3", 8e-3), ("1", 1.0), (".5", 0.5), ("2e4", 2e4)])
def test_every_way_to_write_a_number_is_a_float(text: str, number: float, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as a string and 1 as an int."""
    found = configs.load(write(tmp_path, f"optim:\n  lr: {text}\n")).optim.lr
    assert type(found) is float
    assert found == number


def test_null_is_none_where_none_is_a_value_and_nowhere_else() -> None:
    tree = {"mup": {"base_head_dim": None}, "parallel": {"pp_split": None}, "run": {"mlflow_uri": None}}
    assert configs.from_dict(tree) == Config()
    assert "train.steps is None" in refusal({"train": {"steps": None}})


def test_lists_become_tuples() -> None:
    config = configs.from_dict({"parallel": {"pp_split": [1, 3]}, "sample": {"prompts": ["a", "b"]}})
    assert config.parallel.pp_split == (1, 3)
    assert config.sample.prompts == ("a", "b")


def test_a_config_cannot_be_changed_by_accident() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.width = 4  # type: ignore[misc]


# ---- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_what_is_not_given_and_nothing_else(name: str) -> None:
    filled = configs.from_dict({"model": {"preset": name}}).model
    assert {key: getattr(filled, key) for key in PRESETS[name]} == PRESETS[name]
    changed = configs.from_dict({"model": {"preset": name, "depth": 3, "text_tokens": 4}}).model
    assert changed == dataclasses.replace(filled, depth=3, text_tokens=4)


def test_a_preset_can_be_chosen_and_changed_on_the_command_line(tmp_path: Path) -> None:
    path = write(tmp_path, "model:\n  preset: mmdit-demo\n  depth: 2\n")
    model = configs.load(path, ["model.preset=mmdit-18b", "model.image_size=64"]).model
    assert (model.width, model.depth, model.head_dim, model.image_size) == (5120, 2, 64, 64)


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "section", "key", "value"),
    [
        ("parallel.tp=2", "parallel", "tp", 2),
        ("--parallel.tp=2", "parallel", "tp", 2),
        ("optim.lr=1e-3", "optim", "lr", 1e-3),
        ("parallel.sp=true", "parallel", "sp", True),
        ("parallel.pp_split=[1, 3]", "parallel", "pp_split", (1, 3)),
        ("run.mlflow_uri=sqlite:///a.db?x=1", "run", "mlflow_uri", "sqlite:///a.db?x=1"),
        ("run.mlflow_uri=null", "run", "mlflow_uri", None),
        ("sample.prompts=['a, b', c]", "sample", "prompts", ("a, b", "c")),
    ],
)
def test_an_override_is_read_as_yaml(assignment: str, section: str, key: str, value: Any, tmp_path: Path) -> None:
    config = configs.load(write(tmp_path, "optim:\n  lr: 5\nrun:\n  mlflow_uri: old\n"), [assignment])
    assert getattr(getattr(config, section), key) == value


def test_overrides_reach_deep_keys_and_the_last_one_wins(tmp_path: Path) -> None:
    config = configs.load(
        write(tmp_path, "mup:\n"), ["mup.lr_mult.table=2", "mup.lr_mult.input=3", "mup.lr_mult.table=4"]
    )
    assert config.mup.lr_mult == configs.LrMult(table=4.0, input=3.0)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("parallel.tp", ["'parallel.tp'", "section.key=value"]),
        ("=2", ["'=2'", "section.key=value"]),
        ("--help", ["'--help'", "section.key=value"]),
        ("", ["section.key=value"]),
        ("train.seed.deep=2", ["'train.seed.deep=2'", "seed is a value, not a section"]),
        ("parallel.pp_split=[1, 3", ["'parallel.pp_split=[1, 3'", "not YAML"]),
        ("parallel.tpp=2", ["unknown key parallel.tpp", "did you mean 'tp'?"]),
        ("paralel.tp=2", ["unknown key paralel", "did you mean 'parallel'?"]),
        ("parallel.tp=two", ["parallel.tp is 'two'", "a whole number"]),
        ("parallel.tp=", ["parallel.tp is None", "a whole number"]),
        ("parallel=2", ["parallel should be a section"]),
    ],
)
def test_a_bad_override_is_refused(assignment: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        configs.load(write(tmp_path, "train:\n  seed: 3\n"), [assignment])
    assert all(word in str(caught.value) for word in words), caught.value


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model:\n  arch: \xff\xfe\n", "can't be read as a config"),
        ("model: [1, 2", "is not YAML"),
        ("model:\n\twidth: 3\n", "is not YAML"),
        ("a: b: c", "is not YAML"),
        ("run:\n  dir: !!python/object/apply:os.getcwd []\n", "is not YAML"),
        ("- model\n- train\n", "but is a list"),
        ("just words\n", "but is a str"),
        ("17\n", "but is a int"),
        ("run:\n  experiment: 2024-13-45\n", "config.yaml"),
    ],
    ids=["not UTF-8", "unclosed", "tab", "two colons", "python object", "list", "words", "number", "no such day"],
)
def test_a_file_that_is_no_config_is_refused_by_name(content: str | bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        configs.load(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match="can't be read as a config") as caught:
            configs.load(path)
        assert str(path) in str(caught.value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'train' stands twice"):
        configs.load(write(tmp_path, "train:\n  steps: 5\ntrain:\n  batch_size: 8\n"))
