"""Parity with Microsoft's mup package 1.0.0 for the paper's two released networks: init, LR, decay and training.

Theirs is plain PyTorch (reference/mup_models.py), `set_base_shapes` and `MuAdamW`; ours is the table, the parallel
model and Megatron's optimizer. `pytest tests/mup/test_mup_package.py -s` prints the tables side by side.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ranks
from mpdit.config import Config, Model, Mup, Optim, Parallel, Train
from mpdit.mup.table import Table

# By a module of its own: without the package, "mup" is this folder.
pytest.importorskip("mup.optim", reason="pip install --no-deps mup==1.0.0 (it imports torch and PyYAML only)")

import mup
from reference import mup_models

BASE, DELTA, WIDE = 288, 360, 1152  # 4, 5 and 16 heads of 72: the paper's base shapes and its largest
ARCHS = ("dit", "pixart")
LR, DECAY, EPS, BETAS = 2**-10, 0.03, 1e-8, (0.9, 0.999)
OUTPUT_MULT = 1.5
LIKE_THEIRS: dict[str, Any] = {"eps_rule": "constant", "wd_vector": True}  # wd_rule independent is the default
NOTHING_ZERO: dict[str, Any] = {"adaln_init": "hidden", "readout_init": "base"}
STEPS, BATCH, SIDE, TEXT_TOKENS = 20, 4, 8, 6
LOSS_BOUND = 1e-5  # relative, fp32
WEIGHT_BOUND = 1e-3  # distance between the final tensors, relative to what they moved


def config(arch: str, width: int, depth: int = 2, **keys: Any) -> Config:
    """A run of the network at `width`, with `keys` of the mup section."""
    text = {"text_tokens": TEXT_TOKENS, "text_dim": 64} if arch == "pixart" else {"text_tokens": 1}
    shape: dict[str, Any] = {"arch": arch, "width": width, "depth": depth, "vocab_size": 11, **text}
    return Config(
        model=Model(head_dim=72, patch=2, image_size=SIDE, channels=4, qk_norm=False, learn_sigma=True, **shape),
        mup=Mup(**{"base_width": BASE, "output_mult": OUTPUT_MULT, **keys}),
        optim=Optim(lr=LR, weight_decay=DECAY, eps=EPS, beta1=BETAS[0], beta2=BETAS[1], clip=0.0),
        parallel=Parallel(micro_batch=BATCH),
        train=Train(steps=STEPS, batch_size=BATCH, seed=1),
    )


def table_of(settings: Config) -> Table:
    from mpdit.models.outline import outline
    from mpdit.mup.table import resolve

    return resolve(outline(settings), settings)


def their_model(arch: str, width: int, depth: int = 2, device: str = "cpu") -> nn.Module:
    """With base shapes set; on the meta device a model has shapes and no numbers."""

    def build(width: int, device: str) -> nn.Module:
        with torch.device(device):
            return mup_models.MODELS[arch](
                mup_models.Shape(width=width, depth=depth, side=SIDE, output_mult=OUTPUT_MULT)
            )

    return mup.set_base_shapes(build(width, device), build(BASE, "meta"), delta=build(DELTA, "meta"))


def draw(arch: str, model: nn.Module, proxy: Table) -> None:
    """Initial weights by the package's function, told what the proxy draws."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        mup.init.normal_(p, std=proxy[mup_models.project_name(arch, name)].rule.init_std)


def their_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return mup.MuAdamW(model.parameters(), lr=LR, weight_decay=DECAY, eps=EPS, betas=BETAS)


# ---- the tables ------------------------------------------------------------------------------------------------------


def tables(rank: int, world: int, arch: str, width: int, **keys: Any) -> dict[str, dict[str, Any]]:
    """By our names: the parameter's role, and what it gets from our table and from the package's functions."""
    from mpdit.parallel import groups

    groups.start(Parallel(), seed=0)
    proxy, ours = table_of(config(arch, BASE, **keys)), table_of(config(arch, width, **keys))
    model = their_model(arch, width, device="meta")
    group_of = {id(p): group for group in their_optimizer(model).param_groups for p in group["params"]}
    readout, asked = model.final_layer.linear, []
    mup.init._no_grad_normal_ = lambda tensor, mean, std: asked.append(std)
    draw(arch, model, proxy)
    found = {}
    for (their_name, p), std in zip(model.named_parameters(), asked, strict=True):
        name, group = mup_models.project_name(arch, their_name), group_of[id(p)]
        multiplier = readout.output_mult / readout.width_mult() if p is readout.weight else 1.0
        theirs = {"init_std": std, "multiplier": multiplier, **{k: group[k] for k in ("lr", "weight_decay", "eps")}}
        found[name] = {
            "role": ours[name].tag.role.value,
            "theirs": theirs,
            "ours": {key: getattr(ours[name].rule, key) for key in theirs},
        }
    assert found.keys() == ours.keys()
    groups.stop()
    return found


def show(title: str, found: dict[str, dict[str, Any]]) -> None:
    """Print what differs by layer; block 0 stands for all, and one line for all biases, as they have one rule."""
    columns = ("init_std", "lr", "weight_decay")
    print(f"\n{title:40s} {'role':7s}" + "".join(f"{c.replace('_', ' ') + ': ours, theirs':>27s}" for c in columns))
    biases = {name for name in found if name.endswith(".bias")}
    assert len({str(found[name]["ours"]) for name in biases}) == 1
    rest = [name for name in found if name not in biases and not name.startswith("blocks.1.")]
    for name in [*rest, min(biases)]:
        row = found[name]
        pairs = "".join(f"{row['ours'][c]:14.4g}, {row['theirs'][c]:11.4g}" for c in columns)
        print(f"{f'all {len(biases)} biases' if name in biases else name:40s} {row['role']:7s}{pairs}")


@pytest.mark.dist
@pytest.mark.parametrize("width", [BASE, WIDE])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_gets_what_the_package_gives(arch: str, width: int) -> None:
    """Init std, LR, weight decay, eps and forward multiplier of every parameter, at the proxy and 4x as wide."""
    found = ranks.run(1, tables, arch=arch, width=width, **LIKE_THEIRS, **NOTHING_ZERO)[0]
    if (arch, width) == ("dit", WIDE):
        show(f"DiT, width {width}, proxy {BASE}", found)
    for name, row in found.items():
        assert row["ours"] == pytest.approx(row["theirs"], rel=1e-12), name
    lrs = {row["ours"]["lr"] for row in found.values()}
    assert lrs == ({2**-10} if width == BASE else {2**-10, 2**-12}), "as in the paper's runs"


@pytest.mark.dist
@pytest.mark.parametrize("arch", ARCHS)
def test_our_defaults_differ_from_the_package_in_two_rules(arch: str) -> None:
    """On purpose: eps follows the size of gradients that shrink with the width, and vectors are not decayed."""
    for name, row in ranks.run(1, tables, arch=arch, width=WIDE)[0].items():
        ours, theirs = row["ours"], row["theirs"]
        assert {k: ours[k] for k in ("lr", "init_std", "multiplier")} == pytest.approx(
            {k: theirs[k] for k in ("lr", "init_std", "multiplier")}, rel=1e-12
        )
        finite = name == "head.out.bias"  # no dimension of it grows, nor does its gradient shrink
        assert ours["eps"] == (EPS if finite else pytest.approx(EPS / 4)), name
        assert ours["weight_decay"] == (0.0 if row["role"] == "vector" else pytest.approx(theirs["weight_decay"])), name
        assert (theirs["eps"], theirs["weight_decay"] > 0) == (EPS, True)


# ---- initial weights -------------------------------------------------------------------------------------------------


def spreads(rank: int, world: int, arch: str) -> dict[str, dict[str, float]]:
    """By our names, at the large width: the rule's std, and the root mean squares of what is drawn for it."""
    from mpdit.parallel import groups, init

    def rms(value: Tensor) -> float:
        return value.detach().double().square().mean().sqrt().item()

    groups.start(Parallel(), seed=0)
    proxy, wide = (table_of(config(arch, width, **NOTHING_ZERO)) for width in (BASE, WIDE))
    model, found = their_model(arch, WIDE), {}
    draw(arch, model, proxy)
    for their_name, p in model.named_parameters():
        name = mup_models.project_name(arch, their_name)
        entry = wide[name]
        found[name] = {"rule": entry.rule.init_std, "numel": float(p.numel()), "theirs": rms(p)}
        found[name]["ours"] = rms(init.full_value(name, entry, seed=1))
        if entry.tag.gain == 1.0 and p.dim() > 1 and entry.tag.group != "table":
            mup.init.kaiming_normal_(p, nonlinearity="linear")  # needs no proxy: it knows the fan-ins itself
            found[name]["theirs, kaiming"] = rms(p)
    groups.stop()
    return found


@pytest.mark.dist
@pytest.mark.parametrize("arch", ARCHS)
def test_drawn_weights_are_as_wide_as_the_packages(arch: str) -> None:
    """What both really draw, to the error of a finite sample; what starts at zero is exactly zero."""
    found = ranks.run(1, spreads, arch=arch)[0]
    kaiming = 0
    for name, row in found.items():
        std, error = row.pop("rule"), 4 / math.sqrt(2 * row.pop("numel"))
        for who, drawn in row.items():
            assert drawn == pytest.approx(std, rel=error, abs=0.0), (name, who)
        kaiming += "theirs, kaiming" in row
    assert kaiming > 10
    zero = {name for name, row in found.items() if row["ours"] == 0.0}
    cross = {name for name in found if name.endswith(".cross.proj.weight")}
    assert zero == {name for name in found if name.endswith(".bias")} | cross


def weights_and_tables(rank: int, world: int, arch: str) -> dict[str, bool]:
    """At the proxy's width: are the tables and the initial weights under sp, mup and completep the same?"""
    from mpdit.parallel import groups
    from mpdit.train import session

    groups.start(Parallel(), seed=0)
    networks = {}
    for name in ("sp", "mup", "completep"):
        network = session.build_network(config(arch, BASE, parametrization=name, **NOTHING_ZERO))
        networks[name] = network.table, dict(network.chunks[0].named_parameters())
    (table, weights), same = networks.pop("sp"), {}
    for name, (other_table, others) in networks.items():
        same[f"{name} table"] = other_table == table
        same[f"{name} weights"] = all(torch.equal(others[n], w) for n, w in weights.items()) and len(others) > 20
    groups.stop()
    return same


@pytest.mark.dist
@pytest.mark.parametrize("arch", ARCHS)
def test_the_proxy_is_the_standard_model(arch: str) -> None:
    """At the base width every field of the table and every bit of the weights is the same under sp and muP."""
    same = ranks.run(1, weights_and_tables, arch=arch)[0]
    assert same == dict.fromkeys(("mup table", "mup weights", "completep table", "completep weights"), True)


# ---- training --------------------------------------------------------------------------------------------------------


def batches(arch: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(noisy latents, times, labels or text features, target: noise, and something for the variance) a step."""
    g = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        image, noise, other = torch.randn(3, BATCH, 4, SIDE, SIDE, generator=g)
        time = torch.randint(1024, (BATCH,), generator=g) / 1024  # 1000 times it is exact in fp32
        text, label = torch.randn(BATCH, TEXT_TOKENS, 64, generator=g), torch.randint(11, (BATCH, 1), generator=g)
        noisy = image + time[:, None, None, None] * (noise - image)
        yield noisy, time, text if arch == "pixart" else label, torch.cat([noise, other], dim=1)


def train_both(rank: int, world: int, settings: Config) -> dict[str, Any]:
    """Losses of both from the same weights, and how far apart each tensor ends, over how far it went."""
    from mpdit.models.layers import Inputs, patchify
    from mpdit.parallel import groups, schedule
    from mpdit.train import session
    from mpdit.train.batches import Batch

    shape, arch = settings.model, settings.model.arch
    groups.start(settings.parallel, settings.train.seed)
    run = session.build(settings)
    network, (chunk,) = run.network, run.network.chunks
    ours = dict(chunk.module.named_parameters())
    model = their_model(arch, shape.width, shape.depth)
    adam = their_optimizer(model)
    at_proxy = dataclasses.replace(settings, model=dataclasses.replace(shape, width=BASE))
    draw(arch, model, table_of(at_proxy))

    @torch.no_grad()
    def translated() -> dict[str, Tensor]:
        heads = shape.width // shape.head_dim
        return {
            mup_models.project_name(arch, name): mup_models.project_value(name, p, heads).clone()
            for name, p in model.named_parameters()
        }

    initial = translated()
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(initial[name])

    def their_step(noisy: Tensor, time: Tensor, condition: Tensor, target: Tensor) -> float:
        adam.zero_grad()
        loss = (model(noisy, 1000 * time, condition if arch == "pixart" else condition[:, 0]) - target).square().mean()
        loss.backward()
        adam.step()
        return loss.item()

    def our_step(noisy: Tensor, time: Tensor, condition: Tensor, target: Tensor) -> float:
        target_SBK = patchify(target, shape.patch)
        inputs = Inputs(image_BCHW=noisy, time_B=time, text_BL=condition)
        batch = Batch(size=BATCH, height=SIDE, width=SIDE, inputs=inputs)
        chunk.zero_grad_buffer()
        run.optimizer.zero_grad()
        loss = schedule.forward_backward(
            network.ctx,
            network.chunks,
            [batch],
            lambda prediction_SBK, _: (prediction_SBK - target_SBK).square().mean(),
            network.crossing([batch]),
        )
        run.update()
        return loss

    losses = [(our_step(*batch), their_step(*batch)) for batch in batches(arch)]
    final = translated()
    apart = {n: ((ours[n] - final[n]).norm() / (final[n] - initial[n]).norm()).item() for n in ours}
    groups.stop()
    return {"losses": losses, "apart": apart}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("width", "depth", "start"),
    [(BASE, 2, NOTHING_ZERO), (2 * BASE, 2, {"adaln_init": "hidden"}), (WIDE, 1, NOTHING_ZERO)],
    ids=["proxy", "2x, readout from zero", "4x"],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_training_is_the_packages(arch: str, width: int, depth: int, start: dict[str, Any]) -> None:
    """From the same weights on the same batches: the losses of 20 steps, and where every tensor goes."""
    found = ranks.run(1, train_both, settings=config(arch, width, depth, **LIKE_THEIRS, **start))[0]
    ours, theirs = zip(*found["losses"], strict=True)
    error = max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
    print(f"\n{arch}, width {width}: loss {theirs[0]:.3f} -> {theirs[-1]:.3f}, largest relative difference {error:.1e}")
    assert error <= LOSS_BOUND
    assert theirs[-1] < 0.9 * theirs[0]
    for name, apart in found["apart"].items():
        # A bias of keys adds the same to all scores of a query, which softmax undoes: its gradient is rounding.
        keys = name.endswith((".qkv.linear.bias", ".kv.bias"))
        assert keys or apart <= WEIGHT_BOUND, (name, apart)
