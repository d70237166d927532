"""What operators cost, read off while the project's own code runs on fake tensors: no layer has a formula here."""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operator: floating-point operations as torch.utils.flop_counter counts them (a multiply-add is two), and the
    bytes of the tensors that it reads and writes."""

    name: str
    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collective:
    """`bytes` that a rank sends to the others of its `group` (tp | cp) of `ranks`."""

    name: str
    group: str
    ranks: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Of a forward or a backward pass. `peak_bytes`: the most that its own tensors held at once, over what was there
    before it began."""

    ops: tuple[Op, ...]
    collectives: tuple[Collective, ...]
    peak_bytes: int

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    def sent_bytes(self, group: str) -> int:
        return sum(one.bytes for one in self.collectives if one.group == group)


# On a CPU attention is a fused operator of its own, which torch's counter does not know.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

# Of what a collective's ring sends, in the bytes of the whole tensor: see NCCL's performance notes, "bus bandwidth".
_ROUNDS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "alltoall_base_": 1, "allgather_": 1}


class Recorder(TorchDispatchMode):
    """Writes down every operator under it, and how many bytes its results hold at once."""

    def __init__(self, group_names: dict[str, str]) -> None:
        super().__init__()
        self.group_names = group_names
        self.ops: list[Op] = []
        self.collectives: list[Collective] = []
        self.live_bytes = self.peak_bytes = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "c10d":
            self._collective(func, args)
        elif func.namespace in ("aten", "mpdit"):  # the latter: mpdit_kernels
            self._op(func, args, kwargs, out)
        return out

    def _op(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        inputs = {id(x.untyped_storage()) for x in given}
        if made and not func._schema.is_mutable and all(id(x.untyped_storage()) in inputs for x in made):
            return  # a view
        name = func.overloadpacket.__name__
        if not name.startswith(("empty", "new_empty")):  # memory is found, nothing is run
            sizes = sum(map(_bytes, given)) + sum(map(_bytes, made))
            self.ops.append(Op(name=name, flops=_flops(func, args, kwargs, out), bytes=sizes))
        for x in made:
            self._hold(x.untyped_storage())

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live_bytes -= size

    def _collective(self, func: Any, args: Any) -> None:
        name = func.overloadpacket.__name__
        (group, *_) = [g for g in map(_group, tree_leaves(args)) if g is not None]
        whole = max(_bytes(x) for x in tree_leaves(args) if isinstance(x, Tensor))
        ranks = group.size()
        self.collectives.append(
            Collective(
                name=name,
                group=self.group_names.get(group.group_name, "other"),
                ranks=ranks,
                bytes=round(_ROUNDS[name] * whole * (ranks - 1) / ranks),
            )
        )


def _group(x: Any) -> dist.ProcessGroup | None:
    if not isinstance(x, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(x)
    except (RuntimeError, TypeError):  # a reduction's kind is a script object, too
        return None


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func.overloadpacket
    if packet is _CPU_ATTENTION:
        q, k, v = (x.shape for x in args[:3])
        return int(sdpa_flop_count(q, k, v))
    if packet is _CPU_ATTENTION_BACKWARD:
        grad, q, k, v = (x.shape for x in args[:4])
        return int(sdpa_backward_flop_count(grad, q, k, v))
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    return 0


@contextlib.contextmanager
def recorded(group_names: dict[str, str]) -> Iterator[list[Work]]:
    """Within, operators are recorded; afterwards the list holds their :class:`Work`."""
    found: list[Work] = []
    recorder = Recorder(group_names)
    with recorder:
        yield found
    found.append(Work(ops=tuple(recorder.ops), collectives=tuple(recorder.collectives), peak_bytes=recorder.peak_bytes))


class Saved:
    """Storages that autograd keeps for the backward pass, each once: ``with saved: forward()``."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}  # by id of the storage, which is held below so that no other gets it
        self._held: list[torch.UntypedStorage] = []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)

    def _pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            self._held.append(storage)
        return x

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
