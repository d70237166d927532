"""One run of a check: a few updates on one batch, with every module and parameter looked at before each.

Sums of squares are taken on every rank and added over all of them: an element that several ranks hold counts as often
in the sum as in the number of elements, so the mean is the same in every layout.
"""

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from mpdit.config import Config
from mpdit.mup.coordcheck import ACTIVATION, CHANGE, GRADIENT, SPECTRAL, UPDATE, Key
from mpdit.mup.roles import Group, Role, Tag
from mpdit.parallel import groups, init, optimizer, tokens
from mpdit.parallel.attention import Attention
from mpdit.train import session
from mpdit_tools.coordcheck.batch import fixed_batch


def run(config: Config, steps: Sequence[int], *, from_data: bool = False) -> tuple[dict[Key, float], dict[str, Tag]]:
    """RMS of every statistic before the first update and after `steps` updates, and the whole model's tags; the same on
    every rank. Collective.

    `config` is checked (mpdit.train.preflight) and its groups are up.
    """
    built = session.build(config)
    probe = _Probe(built)
    micro_batches = fixed_batch(config, from_data=from_data)
    for step in range(max(steps) + 1):
        with probe.looking(step if step == 0 or step in steps else None):
            built.forward_backward(micro_batches)
        if step == 0 or step in steps:
            probe.look_at_parameters(step)
        if step < max(steps):
            built.update()
    return probe.result(), {name: entry.tag for name, entry in built.network.table.items()}


class _Probe:
    """Hooks on this rank's modules, and what they saw."""

    def __init__(self, built: session.Session) -> None:
        self.table = built.network.table
        self.modules = {name: module for chunk in built.network.chunks for name, module in chunk.module.named_modules()}
        self.parameters = {name: p for chunk in built.network.chunks for name, p in chunk.module.named_parameters()}
        self.start = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.sums: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.first: dict[str, list[Tensor]] = defaultdict(list)  # outputs at step 0, a micro-batch each
        self.calls: dict[str, int] = defaultdict(int)
        self.step: int | None = None
        self.inside = False  # of a look: modules that it calls are not looked at

    @contextlib.contextmanager
    def looking(self, step: int | None) -> Iterator[None]:
        """Within, every forward pass is measured as step `step`; None: not at all."""
        self.step = step
        self.calls.clear()
        handles = []
        if step is not None:
            handles = [m.register_forward_hook(self._hook(name)) for name, m in self.modules.items() if name]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self.inside:
                return
            self.inside = True
            for label, value in _outputs(name, module, inputs, output):
                self._see(label, value)
            if self.step and _is_matrix(module):
                self._own_update(name, module, inputs)
            self.inside = False

        return hook

    def _see(self, name: str, value: Tensor) -> None:
        value = value.detach().float()
        self._add(ACTIVATION, name, value)
        if self.step == 0:
            self.first[name].append(value.clone())
        else:
            self._add(CHANGE, name, value - self.first[name][self.calls[name]])
            self.calls[name] += 1

    def _own_update(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """What the change of a weight alone makes of the module's present input, in the module's own parallel way."""
        moved = {
            local: (p - self.start[f"{name}.{local}"]) * (local == "weight")
            for local, p in module.named_parameters(recurse=False)
        }
        self._add(UPDATE, f"{name}.weight", _joined(functional_call(module, moved, inputs)))

    @torch.no_grad()
    def look_at_parameters(self, step: int) -> None:
        """Gradients; own updates of vectors and tables; spectral norms of the matrices' updates."""
        self.step = step
        for name, p in self.parameters.items():
            tag = self.table[name].tag
            self._add(GRADIENT, name, optimizer.gradient(p))
            change = p.detach().float() - self.start[name].float()
            if step and _is_looked_up(tag):
                changed = change[change != 0]
                self._add(UPDATE, name, changed if changed.numel() else change)
            elif step:
                norm = _spectral_norm(init.whole(change, p).flatten(1))
                self._add(SPECTRAL, name, norm * (tag.fan_in / tag.fan_out) ** 0.5)

    def _add(self, statistic: str, name: str, value: Tensor) -> None:
        assert self.step is not None
        total = self.sums[Key(statistic=statistic, step=self.step, name=name)]
        total[0] += value.float().square().sum(dtype=torch.float64).item()
        total[1] += value.numel()

    def result(self) -> dict[Key, float]:
        gathered: list[Any] = [None] * groups.world_size()
        dist.all_gather_object(gathered, dict(self.sums))
        merged: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for part in gathered:
            for key, (total, count) in part.items():
                merged[key][0] += total
                merged[key][1] += count
        return {key: (total / count) ** 0.5 for key, (total, count) in sorted(merged.items())}


def _outputs(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Iterator[tuple[str, Tensor]]:
    """(label, value) of what is looked at of a module: its output, a block's streams, attention's logits."""
    if isinstance(module, Attention):
        q_SBHd, k_LBHd = inputs[0].float(), tokens.join_context(inputs[1].float())
        yield f"{name}.logits", torch.einsum("sbhd,lbhd->bhsl", q_SBHd, k_LBHd) * module.softmax_scale
    elif hasattr(module, "mup_tags"):
        yield name, _joined(output)
    elif name.startswith("blocks.") and name.count(".") == 1:
        # Streams that pass a block unchanged, and a U-ViT's older skips, are some other module's output.
        made = {id(stream): stream for stream in output if all(stream is not given for given in inputs)}
        for label, stream in zip(("image", "text"), made.values(), strict=False):
            yield f"{name}.{label}", stream


def _spectral_norm(matrix: Tensor) -> Tensor:
    """The largest singular value, from the smaller Gram matrix: much quicker than a decomposition."""
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt()


def _joined(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat(output, -1) if isinstance(output, tuple) else output


def _is_matrix(module: nn.Module) -> bool:
    tags: dict[str, Tag] = getattr(module, "mup_tags", {})
    return "weight" in tags and not _is_looked_up(tags["weight"])


def _is_looked_up(tag: Tag) -> bool:
    return tag.role is Role.VECTOR or tag.group is Group.TABLE


def at(config: Config, *, width: int, depth: int, seed: int, lr: float, batch_size: int, steps: int) -> Config:
    """`config` as a run of the check: another size, a small constant learning rate, nothing else that moves weights."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, preset=None, width=width, depth=depth, vocab_size=config.model.vocab_size or 64
        ),
        mup=dataclasses.replace(config.mup, base_batch_size=None, base_images=None),
        optim=dataclasses.replace(config.optim, lr=lr, schedule="constant", warmup_steps=0, clip=0.0, weight_decay=0.0),
        parallel=dataclasses.replace(
            config.parallel,
            recompute="none",
            distributed_optimizer=False,
            overlap_grad_reduce=False,
            overlap_param_gather=False,
        ),
        train=dataclasses.replace(config.train, seed=seed, batch_size=batch_size, steps=steps + 1),
    )
