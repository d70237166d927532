"""One run trained twice: by the engine in some layout, and by a plain-PyTorch reference with the same draws."""

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mpdit.config import Config
from parallel.layouts import Case
from reference import plain_objective

_NAMES = {  # the references' words -> the project's, in this order
    r"^embed\.token_table\.": "embed.text.",
    r"\.in\.": ".linear_1.",
    r"\.mid\.": ".linear_2.",
    r"\.(q|k)_norm\.": r".qkv.\1_layernorm.",
    r"\.qkv\.(weight|bias)$": r".qkv.linear.\1",
    r"\.(fc1|fc2)\.": r".mlp.\1.",
}
_ONE_STREAM = {r"^(blocks\.\d+)\.(qkv|proj)\.": r"\1.attn.\2."}
_NAMES_OF = {
    "mmdit": {**_NAMES, r"^embed\.patch\.": "embed.patch.linear."},
    "dit": {**_NAMES, **_ONE_STREAM, r"^embed\.patch\.": "embed.patch.linear."},
    "pixart": {**_NAMES, **_ONE_STREAM, r"^embed\.patch\.": "embed.patch.linear."},
    "uvit": {**_NAMES, **_ONE_STREAM},
}


def project_name(arch: str, reference_name: str) -> str:
    for theirs, ours in _NAMES_OF[arch].items():
        reference_name = re.sub(theirs, ours, reference_name)
    return reference_name


def train_layout(rank: int, world: int, config: Config) -> dict[str, Any]:
    """One rank of a run, as :func:`trained` gives it."""
    from mpdit.parallel import groups
    from mpdit.train import batches, preflight, session
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    run, sets = session.build(config), Sets.open(config)
    feed = batches.TrainFeed(config, sets.train, sets.plan, sets.tokenizer, 0)
    found = trained(config, run, lambda step: feed.next())
    feed.close()
    groups.stop()
    return found


def trained(config: Config, run: Any, micro_batches: Callable[[int], list[Any]]) -> dict[str, Any]:
    """{name: (initial shard, its dim or None)}, this rank's tensor rank, losses, norms and EMA of all steps."""
    from megatron.core import parallel_state

    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    shards = {
        name: (p.detach().clone(), p.partition_dim if getattr(p, "tensor_model_parallel", False) else None)
        for chunk in run.network.chunks
        for name, p in chunk.module.named_parameters()
    }
    losses, norms = [], []
    for step in range(config.train.steps):
        losses.append(run.forward_backward(micro_batches(step)))
        run.ema.update()  # of the step before, as the loop does
        norms.append(run.update())
    with run.settled():
        run.ema.update()
    ema = {name: value.clone() for name, value in run.ema.values.items()}
    return {"shards": shards, "tensor_rank": tensor_rank, "losses": losses, "norms": norms, "ema": ema}


def train_reference(rank: int, world: int, config: Config, case: Case) -> dict[str, Any]:
    """The same run in plain PyTorch: the project's data, draws and initial weights, and nothing else of it."""
    from mpdit.data.decode import decode
    from mpdit.objective import draws, flow
    from mpdit.parallel import groups
    from mpdit.train import preflight
    from mpdit.train.sets import Sets

    config = preflight.check(config, world)
    groups.start(config.parallel, config.train.seed)
    sets, plain, m, seed = Sets.open(config), case.plain, config.model, config.train.seed
    diffusing, timesteps = config.objective.kind == "ddpm", set()

    def batches() -> Any:
        for step in range(config.train.steps):
            rows = sets.plan.batch(step)
            encoded, captions = zip(*(sets.train.read(int(i)) for i in rows.sample_ids), strict=True)
            images = decode(encoded, m.image_size, m.image_size)
            dropped = draws.uniform(seed, "caption drop", rows.sample_ids, rows.visits)
            kept = ["" if d < config.data.caption_drop else c for d, c in zip(dropped, captions, strict=True)]
            noise = draws.noise(seed, rows.sample_ids, rows.visits, tuple(images.shape[1:]))
            ids = torch.from_numpy(sets.tokenizer.encode(kept, m.text_tokens))
            if diffusing:
                uniform = torch.from_numpy(draws.uniform(seed, "time", rows.sample_ids, rows.visits))
                batch = plain_objective.diffusion(images, noise, uniform, ids)
                timesteps.update(batch.timestep_B.tolist())
                yield batch
            else:
                t = flow.times(config.objective, seed, rows.sample_ids, rows.visits)
                yield plain.Batch(image_BCYX=images, noise_BCYX=noise, t_B=t, ids_BL=ids)

    found = reference_trained(config, case, batches())
    groups.stop()
    return {**found, "timesteps": timesteps}


def reference_trained(config: Config, case: Case, batches: Iterable[Any]) -> dict[str, Any]:
    """Losses, norms and EMA of the plain-PyTorch run on these batches, and the initial weights, by their names here."""
    from mpdit.parallel import init
    from mpdit.train import session

    plain, m, seed = case.plain, config.model, config.train.seed
    shape, recipe = _shape(config, case), _recipe(config, case)
    shape = replace(shape, residual=plain.residual_multiplier(shape, recipe))
    table = session.build_network(config).table
    names = {name: project_name(m.arch, name) for name in plain.parameters(shape)}
    initial = {name: init.full_value(ours, table[ours], seed) for name, ours in names.items()}
    rules, parameters = plain.rules(shape, recipe), plain.parameters(shape)
    diffusing = config.objective.kind == "ddpm"
    optim, weights, ema = config.optim, _copy(initial), _copy(initial)
    losses, norms = plain.train(
        weights,
        rules,
        batches,
        config.train.steps,
        shape=shape,
        loss=(lambda prediction, batch: plain_objective.loss(prediction, shape, batch)) if diffusing else None,
        betas=(optim.beta1, optim.beta2),
        clip=optim.clip,
        schedule=lambda step: _warm_up_and_cosine(config, step),
        ema=ema,
        ema_decay=config.train.ema_decay,
    )
    return {
        "losses": losses,
        "norms": norms,
        "initial": {names[n]: v for n, v in initial.items()},
        "drawn": {names[n]: (rule.init_std, parameters[n].mean) for n, rule in rules.items()},
        "ema": {names[n]: v for n, v in ema.items()},
    }


def _copy(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def _shape(config: Config, case: Case) -> Any:
    m = config.model
    side = m.image_size // m.patch
    own = {"grid": (side, side), "text_tokens": m.text_tokens} if m.arch == "uvit" else {}
    return case.plain.Shape(
        width=m.width,
        depth=m.depth,
        head_dim=m.head_dim,
        patch=m.patch,
        channels=m.channels,
        vocab=m.vocab_size,
        qk_norm=m.qk_norm,
        side=side,
        learn_sigma=m.learn_sigma,
        **own,
    )


def _recipe(config: Config, case: Case) -> Any:
    mup, optim = config.mup, config.optim
    return case.plain.Recipe(
        parametrization=mup.parametrization,
        base_width=mup.base_width,
        base_depth=mup.base_depth,
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        eps=optim.eps,
        adaln_init=mup.adaln_init,
        readout_init=mup.readout_init,
        output_mult=mup.output_mult,
    )


def _warm_up_and_cosine(config: Config, step: int) -> float:
    optim = config.optim
    if step <= optim.warmup_steps:
        return step / optim.warmup_steps
    along = (step - optim.warmup_steps) / (config.train.steps - optim.warmup_steps)
    return float(optim.final_lr_ratio + 0.5 * (1 - optim.final_lr_ratio) * (1 + np.cos(np.pi * along)))


def difference(found: list[float], wanted: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(wanted)
    assert np.isfinite([*found, *wanted]).all(), "max() may pass over what is no number"
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def whole(results: list[dict[str, Any]], key: str = "shards") -> dict[str, torch.Tensor]:
    """The whole model's tensors out of every rank's. What several ranks hold must be the same bits on all."""
    parts: dict[str, dict[int, torch.Tensor]] = {}
    dims = {name: dim for result in results for name, (_, dim) in result["shards"].items()}
    for result in results:
        for name, dim in ((name, dim) for name, (_, dim) in result["shards"].items()):
            value = result[key][name][0] if key == "shards" else result[key][name]
            place = 0 if dim is None else result["tensor_rank"]
            known = parts.setdefault(name, {}).setdefault(place, value)
            assert torch.equal(known, value), f"{name} differs between ranks that share it"
    return {
        name: places[0] if dims[name] is None else torch.cat([places[i] for i in sorted(places)], dims[name])
        for name, places in parts.items()
    }
