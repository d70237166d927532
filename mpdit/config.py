"""Every setting of a run, as frozen dataclasses: read from YAML, overridden with dotted keys, written back resolved.

All learning-rate-like values are *base* values: those of the proxy whose width is ``mup.base_width``. What a parameter
of this model really gets is in the run folder's ``mup_table.json``.
"""

import dataclasses
import difflib
import inspect
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from mpdit.errors import InputError
from mpdit.presets import PRESETS

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The network. ``preset`` fills what is not given here; see mpdit/presets.py."""

    arch: Literal["mmdit", "dit", "pixart", "uvit"] = "mmdit"
    preset: str | None = None
    width: int = 128
    depth: int = 4
    head_dim: int = 32
    mlp_ratio: int = 4
    patch: int = 4
    image_size: int = 32  # pixels (or latent pixels) a side
    channels: int = 3
    text_tokens: int = 16  # captions are padded or cut to this many tokens; class labels are one
    vocab_size: int = 0  # 0: that of the data set's tokenizer, or its classes and "no class"
    text_dim: int = 0  # features of a token that a text encoder gives; 0: the encoder's, or no encoder but a table
    pooled_dim: int = 0  # mmdit: features of the encoder's pooled vector (clip); 0: the mean of the tokens instead
    qk_norm: bool = True
    learn_sigma: bool = False  # objective ddpm: predict the variance too (twice the output channels)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LrMult:
    """Multipliers of the base learning rate by parameter group, tuned on the proxy and transferred as they are."""

    input: float = 1.0  # patch and text embedders, the timestep MLP's first linear
    table: float = 1.0  # embedding tables, PixArt's scale_shift tables
    hidden: float = 1.0  # width x width: attention, MLP
    modulation: float = 1.0  # adaLN linears
    output: float = 1.0  # the readout, the first layer of REPA's projector
    vector: float = 1.0  # biases, norms' gains


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mup:
    """The parametrization: how init, learning rate, weight decay and eps follow the width."""

    parametrization: Literal["sp", "mup", "completep"] = "mup"  # completep: mup that follows the depth too
    base_width: int = 128  # the proxy's width: there the model is the same under sp and mup
    base_depth: int | None = None  # completep: the proxy's depth; null: the model's own
    base_head_dim: int | None = None  # null: the model's own head_dim
    base_batch_size: int | None = None  # the proxy's; null: the run's own. With base_images: Complete(d)P's rule
    base_images: int | None = None  # images that the proxy was trained on (steps x batch); null: the run's own
    wd_rule: Literal["independent", "const", "sqrt"] = "independent"  # hidden weights' decay times m, 1, sqrt(m)
    eps_rule: Literal["scaled", "constant"] = "scaled"  # Adam's eps / m, or as it is; m: width / base_width
    wd_vector: bool = False  # the paper decays biases and gains too
    output_mult: float = 1.0  # times the readout's output, beside muP's 1 / m
    adaln_init: Literal["zero", "hidden"] = "zero"  # hidden: as any hidden weight
    readout_init: Literal["zero", "base"] = "zero"  # base: the proxy's std
    lr_mult: LrMult = LrMult()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    """AdamW and its schedule; base (proxy) values."""

    lr: float = 1e-3
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    clip: float = 1.0  # global gradient norm; 0: off
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    decay_steps: int = 0  # wsd: the length of its linear tail, in steps
    final_lr_ratio: float = 0.0  # learning rate at the last step / peak learning rate


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Parallel:
    """The layout. Data parallelism is what is left of the world: ranks / (tp * pp * cp)."""

    tp: int = 1
    sp: bool = False  # sequence parallelism (shards activations over the tensor-parallel ranks)
    pp: int = 1
    vpp: int = 1  # model chunks a pipeline rank holds (interleaved schedule)
    pp_split: tuple[int, ...] | None = None  # blocks of each stage, pp * vpp numbers; null: equal
    cp: int = 1  # context parallelism (Ulysses: heads <-> tokens)
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool | None = None  # reduce gradients during the backward pass; null: on GPUs, where it helps
    overlap_param_gather: bool | None = None  # and fetch weights in the forward one; null: with distributed_optimizer
    share_gpu: bool = False  # ranks may have one GPU together, by gloo: slow, to try a layout out
    recompute: Literal["none", "full"] = "none"
    compile: bool = False  # torch.compile for each block; the first step takes a minute
    micro_batch: int = 0  # images a rank runs at once; 0: its whole share of the batch (pp: a pp-th of it)
    backend: Literal["local", "te"] = "local"  # te: Transformer Engine's linears, norms and attention, on CUDA
    kernels: Literal["auto", "torch", "triton"] = "auto"  # norms, gates, residuals; auto: triton where a GPU can
    # fp8, fp8_emulated and the two keys after them act on the blocks' hidden linears; all else is as in bf16 then.
    precision: Literal["fp32", "bf16", "fp8", "fp8_emulated"] = "fp32"  # fp8: backend te; fp8_emulated: its rounding
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"  # which numbers share a scale
    fp8_bf16_blocks: int = 1  # blocks at each end that stay in bf16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Shards made by ``mpdit data build``."""

    path: str = "data/icons"
    more: tuple[str, ...] = ()  # folders of further data sets, trained on together with path's
    weights: tuple[float, ...] = ()  # each set's share of the batches, path's first; empty: as many as it has samples
    text: Literal["sentencepiece", "labels", "minilm", "t5", "clip"] = "sentencepiece"  # labels: names of classes
    text_model: str | None = None  # t5, clip: the local folder of a transformers model and its tokenizer
    latents: str | None = None  # the local folder of a diffusers AutoencoderKL; null: pixels
    cache: str | None = None  # a folder that `mpdit data cache` filled: latents, text states, teacher's features
    caption_drop: float = 0.1  # share of captions replaced by the empty one, for guidance
    mirror: bool = False  # flip half of the images left to right
    buckets: tuple[tuple[int, ...], ...] = ()  # [height, width], as model.image_size counts them; empty: its square
    workers: int = 1  # DALI threads a rank
    max_bad_fraction: float = 0.01  # the run stops when more of the training samples turn out to be damaged


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is learned: rectified flow (arXiv 2403.03206) or DDPM's noise (arXiv 2006.11239, 2102.09672), and REPA."""

    kind: Literal["flow", "ddpm"] = "flow"
    timesteps: Literal["logit_normal", "uniform"] = "logit_normal"  # flow's; ddpm's are uniform
    logit_mean: float = 0.0
    logit_std: float = 1.0
    repa_weight: float = 0.0  # of REPA's loss (arXiv 2410.06940): align a block's image tokens with a frozen teacher
    repa_block: int = 0  # the block after which; 0: a third of the depth
    repa_teacher: str = "efficientnet_lite0"  # or the local folder of a DINOv2 model for transformers


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    steps: int = 1000
    batch_size: int = 64  # global, in images
    seed: int = 0
    log_every: int = 10  # steps between the lines on the terminal; metrics.jsonl has every step
    save_every: int = 0  # steps; 0: at the end only
    keep_last: int = 3  # checkpoints kept; 0: all
    keep_every: int = 0  # steps; checkpoints at multiples of it are kept for ever; 0: none
    async_save: bool = True  # files are written beside the training, which stops only to copy its state
    val_every: int = 0  # steps between validation losses; 0: at the end only
    val_images: int = 256
    sample_every: int = 0  # steps between sample grids; 0: at the end only
    ema_decay: float = 0.999
    posthoc_ema: tuple[float, ...] = ()  # sigma_rel of averages for `mpdit ema`, as [0.05, 0.1]; 4 bytes a weight each
    posthoc_every: int = 0  # steps between their snapshots in RUN/ema, all kept; 0: with every checkpoint
    profile_steps: int = 0  # steps that torch's profiler records (`--profile`: 3); RUN/profile has traces and summaries


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guard:
    """What happens to steps and ranks that go wrong. A step whose loss or gradient is not finite is always skipped."""

    spike_factor: float = 0.0  # skip a step whose loss or gradient norm is above this x the window's median; 0: off
    window: int = 64  # good steps that the median is taken of; before there are so many, no step is a spike
    max_skipped: int = 3  # steps skipped in a row before the run stops or rolls back
    then: Literal["stop", "rollback"] = "stop"  # rollback: on from the last good checkpoint's weights, past the batches
    max_rollbacks: int = 3  # of a run, before it stops
    hang_timeout_s: float = 600.0  # without progress, then a rank ends the job; the first step has three times it


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """How pictures are drawn, during the run and by ``mpdit sample``."""

    prompts: tuple[str, ...] = ()  # empty: captions of the validation set
    sampler: Literal["auto", "euler", "heun", "ddim", "ddpm"] = "auto"  # auto: euler for flow, ddim for ddpm
    steps: int = 30  # of the sampler; a Heun step asks the network twice
    guidance: float = 3.0  # classifier-free guidance scale; 1: off
    image_size: tuple[int, ...] = ()  # [height, width], as model.image_size counts them; empty: its square
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    dir: str = "runs/default"
    mlflow_uri: str | None = None  # null: sqlite store mlflow.db beside the run folder
    experiment: str = "mpdit"
    mlflow_parent: str | None = None  # id of the MLflow run that this one is shown under, such as a sweep's


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    model: Model = Model()
    mup: Mup = Mup()
    optim: Optim = Optim()
    parallel: Parallel = Parallel()
    data: Data = Data()
    objective: Objective = Objective()
    train: Train = Train()
    guard: Guard = Guard()
    sample: Sample = Sample()
    run: Run = Run()


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a YAML file or a run folder, with dotted overrides, e.g. ``["parallel.tp=2", "optim.lr=1e-3"]``.

    Raises InputError for an unreadable file, an unknown key (with the nearest known one) or a value of the wrong type.
    """
    path, tree = _file(path), read(path)
    for text in overrides:
        override(tree, text)
    return from_dict(tree, str(path))


def read(path: str | Path) -> dict[str, Any]:
    """The sections and keys that a YAML file or a run folder names, as they stand. Raises InputError."""
    tree = read_yaml(_file(path), "a config")
    if tree is None:  # which training must not take for the defaults
        raise InputError(
            f"{_file(path)}: is empty; it should hold sections such as 'model:', or {{}} for the defaults."
        )
    if not isinstance(tree, dict):
        raise InputError(
            f"{_file(path)}: should hold sections such as 'model:' and 'train:', but is a {type(tree).__name__}."
        )
    return tree


def _file(path: str | Path) -> Path:
    return Path(path) / "config.yaml" if Path(path).is_dir() else Path(path)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds, which is to be `what`. Raises InputError for an unreadable one or a key twice."""
    try:
        return _Loader(path.read_text(encoding="utf-8")).get_single_data()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read as {what}: {error}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not YAML: {' '.join(str(error).split())}.") from error


def from_dict(tree: dict[str, Any], source: str = "config") -> Config:
    """Build a Config out of nested dicts; ``model.preset`` fills the model's keys that are not given.

    Raises InputError as :func:`load` does; `source` names the file in the sentence.
    """
    model = tree.get("model")
    if isinstance(model, dict) and model.get("preset") is not None:
        name = model["preset"]
        if not isinstance(name, str) or name not in PRESETS:
            raise InputError(f"{source}: model.preset is {name!r}{suggestion(str(name), PRESETS)}.")
        tree = {**tree, "model": {**PRESETS[name], **model}}
    return build(Config, tree, source)


def build(cls: type[T], tree: Any, source: str) -> T:
    """A frozen dataclass out of nested dicts, checked against its annotations. Raises InputError as :func:`load`."""
    built: T = _build(cls, tree, "", source)
    return built


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts and lists: what YAML and JSON can hold."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_dict(value) if dataclasses.is_dataclass(value) else value


def flat(config: Any) -> dict[str, Any]:
    """Dotted key: value, of every setting of a config, or of nested dicts."""
    return dict(_leaves(config if isinstance(config, dict) else to_dict(config), ""))


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def put(tree: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Set a dotted key of nested dicts in place. Raises InputError, `where` in front, if a section is a value."""
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise InputError(f"{where}: {section} is a value, not a section.")
    tree[last] = value


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts out of dotted keys, as :func:`flat` gives them."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        put(tree, key, value, key)
    return tree


def dump(config: Config) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def describe(config: Any = None, indent: str = "") -> str:
    """The sections, keys and defaults as YAML, each with the comment that stands beside it in this file."""
    config = Config() if config is None else config
    source, hints = inspect.getsource(type(config)), typing.get_type_hints(type(config))
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            said = " ".join((type(value).__doc__ or "").split("\n\n")[0].split())
            head = f"{indent}{field.name}:" + ("" if said.startswith(type(value).__name__) else f"  # {said}")
            lines += [head, describe(value, indent + "  ")]
        else:
            text = f"{field.name}: {json.dumps(value)}"
            comment = re.search(rf"^ +{field.name}: .*?  # (.*)$", source, re.MULTILINE)
            choices: Sequence[str] = ()
            if typing.get_origin(hints[field.name]) is Literal:
                choices = typing.get_args(hints[field.name])
            elif field.name == "preset":
                choices = list(PRESETS)
            said = "; ".join(filter(None, [" | ".join(choices), comment[1] if comment else ""]))
            lines.append(f"{indent}{text:<31}{f'  # {said}' if said else ''}".rstrip())
    return "\n".join(lines)


def override(tree: dict[str, Any], assignment: str) -> None:
    """Set a dotted key of nested dicts in place, e.g. ``parallel.tp=2``. Raises InputError for another form."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise InputError(f"{assignment!r}: an override looks like section.key=value, for example parallel.tp=2.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{assignment!r}: the value is not YAML.") from error
    put(tree, key.removeprefix("--"), value, repr(assignment))


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of a sentence on an unknown word: the nearest known one, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _build(cls: Any, tree: Any, path: str, source: str) -> Any:
    if not isinstance(tree, dict):
        raise InputError(f"{source}: {path.rstrip('.')} should be a section with keys, but is {tree!r}.")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise InputError(f"{source}: unknown key {path}{key}{suggestion(str(key), hints)}.")
        values[key] = _convert(hints[key], value, f"{path}{key}", source)
    return cls(**values)


def _convert(hint: Any, value: Any, key: str, source: str) -> Any:
    """`value` as the annotated type; YAML reads 1e-3 as a string and 1 as an int, both are fine floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, key, source)
    if dataclasses.is_dataclass(hint):
        return _build(hint, {} if value is None else value, f"{key}.", source)
    if origin is Literal:
        if value in arguments:
            return value
        raise InputError(f"{source}: {key} is {value!r}{suggestion(str(value), map(str, arguments))}.")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(arguments[0], item, f"{key}[{i}]", source) for i, item in enumerate(value))
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    elif hint in (int, bool, str) and type(value) is hint:
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(hint, "a list")
    raise InputError(f"{source}: {key} is {value!r}, but should be {wanted}.")
