"""``mpdit mup-table CONFIG``: what muP gives each parameter of a configured model, beside its proxy's if asked."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from mpdit import config as configs
from mpdit.config import Config, Parallel
from mpdit.data import encoders, text
from mpdit.data.encoders import Encoder
from mpdit.data.shards import Shards
from mpdit.errors import InputError
from mpdit.mup import rules
from mpdit.mup.roles import Role, Tag
from mpdit.mup.rules import Rule
from mpdit.mup.table import Table, resolve
from mpdit.mup.table import rows as json_rows
from mpdit.mup.transferable import transfer_from


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Show what muP gives each parameter: initial values, learning rate, weight decay, eps, forward multiplier."""

    config: Annotated[Path, tyro.conf.arg(metavar="CONFIG"), tyro.conf.Positional]
    """A config (YAML), or a run folder, whose config.yaml is used. Nothing is allocated, no data are needed."""
    overrides: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[section.key=value ...]"), tyro.conf.Positional] = ()
    """Keys of the config to change, for example model.width=512."""
    base: Path | None = None
    """The config of a proxy: checked to be one, taken for mup.base_*, and its values shown beside the model's."""
    whole: bool = False
    """A row for each parameter, instead of one for all that get the same."""
    json: bool = False
    """The rows of mup_table.json; with --base, each with the proxy's values as its "base"."""


def main(argv: list[str]) -> int:
    """Exit code 0. Raises InputError for a bad config, and for a proxy that is none."""
    arguments = tyro.cli(Arguments, args=argv, prog="mpdit mup-table")
    asked, note = with_vocabulary(configs.load(arguments.config, arguments.overrides))
    base = with_vocabulary(configs.load(arguments.base))[0] if arguments.base else None
    config = transfer_from(base, asked) if base else asked
    given = [(arguments.config, config)]
    if arguments.base and base:
        given.append((arguments.base, base))
    table, *base_tables = tables(given)
    base_rules = rules_of(table, base_tables[0]) if base_tables else None
    if arguments.json:
        print(json.dumps(_as_json(table, base_rules), indent=1))
    else:
        print("\n".join([*header(config, table), *_to_train_so(asked, config)]), end="\n\n")
        show(*(whole_rows if arguments.whole else grouped_rows)(table, base_rules))
    if note:
        print(f"mpdit: {note}", file=sys.stderr)
    return 0


# ---- configs ---------------------------------------------------------------------------------------------------------


def with_vocabulary(config: Config) -> tuple[Config, str]:
    """`config` with a vocab_size or the text encoder's features, and a sentence if that is a guess.

    A vocabulary changes shapes, but no rule. Raises InputError if an encoder is not there to say its features.
    """
    model, folder = config.model, Path(config.data.path)
    if config.data.text in encoders.KINDS and model.arch != "dit":
        features = model.text_dim or Encoder.open(config.data.text, config.data.text_model).text_dim
        return dataclasses.replace(config, model=dataclasses.replace(model, text_dim=features)), ""
    if model.vocab_size or (model.text_dim and model.arch != "dit"):
        return config, ""
    size, note = 1, ""
    if (folder / "manifest.json").is_file():
        size = text.of_data_set(config.data.text, Shards.open(folder, "train")).vocab_size
    else:
        note = (
            f"model.vocab_size is 0, and {folder} is no data set that would say it: the text table is shown, and "
            "counted, with 1 row."
        )
    return dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=size)), note


def tables(given: Sequence[tuple[Path | str, Config]]) -> list[Table]:
    """The whole model's table of each config; the path is for messages. Raises InputError as training would."""
    from mpdit.parallel import accel

    accel.enter()
    from mpdit.models.outline import outline
    from mpdit.parallel import groups

    for path, config in given:
        check(config, path)
    groups.start(Parallel(), seed=0)
    try:
        return [resolve(outline(config), config) for _, config in given]
    finally:
        groups.stop()


def check(config: Config, path: Path | str) -> None:
    """Refuse the numbers and shapes that training refuses; but neither autoencoder nor text encoder has to be there.

    Raises InputError with `path` in front.
    """
    from mpdit.train import preflight

    pixels = dataclasses.replace(config.model, channels=3, text_dim=0)
    try:
        preflight.layout(dataclasses.replace(config, model=pixels, parallel=Parallel()), world=1)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


# ---- what is said above the table ------------------------------------------------------------------------------------


def header(config: Config, table: Table) -> list[str]:
    """The ratios that the rules below come from, a line each."""
    model, mup, train = config.model, config.mup, config.train
    preset = f" (preset {model.preset})" if model.preset else ""
    count = sum(math.prod(entry.tag.shape) for entry in table.values())
    images = train.batch_size * train.steps
    beta1, beta2 = rules.betas(config)
    sp, completep = mup.parametrization == "sp", mup.parametrization == "completep"
    multiplier = f"residual branches x {_number(rules.residual_multiplier(config))}" if completep else "not used"
    lines = {
        "model": f"{model.arch}{preset}, width {model.width}, depth {model.depth}, head_dim {model.head_dim}: "
        f"{count:,} parameters in {len(table):,} tensors",
        "parametrization": f"{mup.parametrization}, weight decay {mup.wd_rule}, eps {mup.eps_rule}",
        "width ratio": f"m = {_ratio(model.width, mup.base_width)}{' (not used)' if sp else ''}",
        "depth ratio": f"m_L = {_ratio(model.depth, mup.base_depth)} ({multiplier})",
        "batch ratio": f"m_B = {_ratio(train.batch_size, mup.base_batch_size)}",
        "images ratio": f"m_D = {_ratio(images, mup.base_images)}",
        "betas": f"{_number(beta1)}, {_number(beta2)}",
        "softmax scale": _softmax(config),
    }
    return [f"{name + ':':<17}{line}" for name, line in lines.items()]


def _ratio(own: int, base: int | None) -> str:
    return f"{own} / {base or own} = {_number(own / (base or own))}"


def _softmax(config: Config) -> str:
    head_dim, base = config.model.head_dim, config.mup.base_head_dim
    scale = _number(rules.softmax_scale(head_dim, config.mup))
    if base in (None, head_dim) or config.mup.parametrization == "sp":
        return f"{scale} = 1 / sqrt({head_dim})"
    return (
        f"{scale} = sqrt({base}) / {head_dim}, since head_dim is not the proxy's {base}: the product of a query and "
        "a key that have learned to agree grows with head_dim, not with its root."
    )


def _to_train_so(asked: Config, config: Config) -> list[str]:
    """The overrides that make `mpdit train` give what is shown here."""
    before, after = configs.to_dict(asked.mup), configs.to_dict(config.mup)
    changed = [f"mup.{key}={value}" for key, value in after.items() if before[key] != value]
    return [f"{'to train so:':<17}{' '.join(changed)}"] if changed else []


# ---- the proxy's values ----------------------------------------------------------------------------------------------

BaseRules = Mapping[str, Rule | None] | None  # by the model's parameter; None: the proxy has none, or there is no proxy


def rules_of(table: Table, base: Table) -> dict[str, Rule | None]:
    """What each parameter gets in the proxy. A block that a shallower proxy lacks is compared with its like."""
    alike = {_starred(name): entry.rule for name, entry in base.items()}
    return {name: base[name].rule if name in base else alike.get(_starred(name)) for name in table}


def _as_json(table: Table, base_rules: BaseRules) -> list[dict[str, object]]:
    found = json_rows(table)
    if base_rules is None:
        return found
    given = {name: rule and dataclasses.asdict(rule) for name, rule in base_rules.items()}
    return [{**row, "base": given[row["name"]]} for row in found]


# ---- rows ------------------------------------------------------------------------------------------------------------

Cells = list[str]


def _number(value: float) -> str:
    return f"{value:.4g}"


def _init(tag: Tag, rule: Rule) -> str:
    return f"constant {_number(tag.fill)}" if tag.role is Role.VECTOR else _number(rule.init_std)


_VALUES = ["init std", "LR", "weight decay", "eps", "forward"]


def _values(tag: Tag, rule: Rule) -> Cells:
    return [_init(tag, rule), *map(_number, (rule.lr, rule.weight_decay, rule.eps, rule.multiplier))]


def _compared(name: str, table: Table, base_rules: BaseRules) -> Cells:
    """What a parameter gets; where the proxy's differs, "proxy -> model"."""
    tag = table[name].tag
    cells = _values(tag, table[name].rule)
    if base_rules is None:
        return cells
    base = base_rules[name]
    theirs = _values(tag, base) if base else ["none"] * len(cells)
    return [own if own == its else f"{its} -> {own}" for its, own in zip(theirs, cells, strict=True)]


def whole_rows(table: Table, base_rules: BaseRules) -> tuple[Cells, list[Cells]]:
    """Columns and rows, one for each parameter."""
    lines = []
    for name, entry in table.items():
        tag = entry.tag
        shape = " x ".join(map(str, tag.shape))
        lines.append([tag.role.value, tag.group.value, shape, *_compared(name, table, base_rules), name])
    return ["role", "group", "shape", *_VALUES, "parameter"], lines


def grouped_rows(table: Table, base_rules: BaseRules) -> tuple[Cells, list[Cells]]:
    """Columns and rows, one for all that get the same; the last cell has a line for each pattern of names."""
    lines = []
    for names in grouped(table, base_rules):
        tag, shown = table[names[0]].tag, "\n".join(patterns(names, table))
        count = sum(math.prod(table[name].tag.shape) for name in names)
        size = [f"{len(names):,}", f"{count:,}"]
        lines.append([tag.role.value, tag.group.value, *size, *_compared(names[0], table, base_rules), shown])
    return ["role", "group", "tensors", "parameters", *_VALUES, "names"], lines


def grouped(table: Table, base_rules: BaseRules = None) -> list[list[str]]:
    """Names of parameters that get the same, and in the proxy too; roles in their order."""
    groups: dict[object, list[str]] = {}
    for name, entry in table.items():
        tag = entry.tag
        key = (tag.role, tag.group, tag.fill, entry.rule, (base_rules or {}).get(name))
        groups.setdefault(key, []).append(name)
    return sorted(groups.values(), key=lambda names: list(Role).index(table[names[0]].tag.role))


def patterns(names: list[str], everywhere: Iterable[str]) -> list[str]:
    """`names` in few words: ``blocks.*.{img,txt}.proj.weight``. A star is every block that has one at all."""
    mine = set(names)
    split = {_starred(name) for name in everywhere if name not in mine}
    return _braced(dict.fromkeys(name if _starred(name) in split else _starred(name) for name in names))


def _starred(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _braced(names: Iterable[str]) -> list[str]:
    """Names that differ in one part become one, place by place; the first part stays as it is."""
    parts = [tuple(name.split(".")) for name in names]
    for place in range(1, max(map(len, parts))):
        choices: dict[tuple[str, ...], list[str]] = {}
        for part in parts:
            rest = (*part[:place], "", *part[place + 1 :]) if place < len(part) else part
            choices.setdefault(rest, []).append(part[place] if place < len(part) else "")
        parts = [
            (*rest[:place], f"{{{','.join(found)}}}" if len(found) > 1 else found[0], *rest[place + 1 :])
            if place < len(rest)
            else rest
            for rest, found in choices.items()
        ]
    return [".".join(part) for part in parts]


def show(columns: Cells, lines: list[Cells]) -> None:
    """A rich table on a terminal, else aligned text; the last column may have several lines."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console()
    if console.is_terminal:
        shown = RichTable(*columns)
        for line in lines:
            shown.add_row(*map(Text, line))
        console.print(shown)
        return
    widths = [max(len(line[i]) for line in (columns, *lines)) for i in range(len(columns) - 1)]
    for line in (columns, *lines):
        before = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False))
        first, *more = line[-1].split("\n")
        print(f"{before}  {first}")
        for pattern in more:
            print(f"{' ' * len(before)}  {pattern}")
