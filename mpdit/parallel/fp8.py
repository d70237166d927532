"""Linear products in FP8, emulated: operands rounded as Transformer Engine's recipes round them, products in fp32.

    y  = q(x) q(w)'        both along K
    dx = q(dy) q(w)        both along N
    dw = q(dy)' q(x)       both along M

x [M, K] is the input, its leading dimensions as rows, w [N, K] the weight, dy [M, N] the gradient of y. Under tensor
parallelism they are this rank's: whoever calls has gathered the input and sums the output. With one scale a tensor the
same codes serve both products; blocks along the contracted dimension are cut twice, both times from the unrounded.

What each recipe casts when: TE 2.20 pytorch/module/linear.py, and grad_output_preprocess in pytorch/module/base.py. Not
emulated: Hopper's accumulator, which is narrower than fp32 in the forward product.
"""

import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from mpdit.parallel import fp8_rules
from mpdit.parallel.context import Context
from mpdit_kernels import fp8
from mpdit_kernels.fp8 import E4M3, E5M2, TILE, Quantized

Name = Literal["x", "w", "dy"]
NAMES: tuple[Name, ...] = ("x", "w", "dy")
HYBRID: dict[Name, torch.dtype] = {"x": E4M3, "w": E4M3, "dy": E5M2}  # of the recipes with one scale a tensor
Watch = Callable[[Name, Tensor, Quantized], None]


class Operand(NamedTuple):
    """A matrix [R, C] for two products: along C, and transposed, [C, R], along R."""

    rows: Quantized
    columns: Quantized


class Product(nn.Module):
    """x [..., K], w [N, K], b [N] or None -> x w' + b, [..., N], in the type of x. `sharded`: which of its tensors each
    tensor rank has a part of. Subclasses say how a tensor is quantised."""

    def __init__(self, sharded: frozenset[Name] = frozenset()) -> None:
        super().__init__()
        self.sharded = sharded
        self.watch: Watch | None = None  # is shown what is quantised for the products along its rows

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The sum with `b` is rounded once."""
        return _Multiply.apply(x, w, b, self, torch.is_grad_enabled())

    def operand(self, name: Name, t_RC: Tensor) -> Operand:
        """`t_RC` for both of its products."""
        raise NotImplementedError

    def begin(self, learning: bool) -> None:
        """Before a forward product, of a training pass or another."""

    def after_forward(self) -> None:
        """When x and w have been quantised in a training pass."""

    def after_backward(self) -> None:
        """When dy has been quantised."""

    def quantised(self, name: Name, t_RC: Tensor) -> Operand:
        operand = self.operand(name, t_RC)
        if self.watch is not None:
            self.watch(name, t_RC, operand.rows)
        return operand


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, product: Product, learning: bool) -> Tensor:
        product.begin(learning)
        x_MK, w_NK = product.quantised("x", x.flatten(0, -2)), product.quantised("w", w)
        y_MN = x_MK.rows.dequantized() @ w_NK.rows.dequantized().t()
        if b is not None:
            y_MN += b
        product.after_forward()
        ctx.product, ctx.blocks = product, (x_MK.columns.block, w_NK.columns.block)
        ctx.like = x.shape, x.dtype, w.dtype, None if b is None else b.dtype
        ctx.save_for_backward(*(t for q in (x_MK.columns, w_NK.columns) for t in (q.codes, q.inverse)))
        return y_MN.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_codes, x_inverse, w_codes, w_inverse = ctx.saved_tensors
        shape, x_dtype, w_dtype, b_dtype = ctx.like
        product: Product = ctx.product
        gradient_MN = grads[0].flatten(0, -2)
        dy_MN = product.quantised("dy", gradient_MN)
        product.after_backward()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            w_KN = Quantized(codes=w_codes, inverse=w_inverse, block=ctx.blocks[1]).dequantized()
            dx = (dy_MN.rows.dequantized() @ w_KN.t()).to(x_dtype).view(shape)
        if ctx.needs_input_grad[1]:
            x_KM = Quantized(codes=x_codes, inverse=x_inverse, block=ctx.blocks[0]).dequantized()
            dw = (dy_MN.columns.dequantized() @ x_KM.t()).to(w_dtype)
        if ctx.needs_input_grad[2]:
            db = gradient_MN.sum(0, dtype=torch.float32).to(b_dtype)  # of what is not rounded, as in TE
        return dx, dw, db, None, None


def _reduced(amax: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group)
    return amax


class Tensorwise(Product):
    """TE's Float8CurrentScaling: one scale a tensor, of its own largest magnitude.

    A tensor that tensor ranks have parts of has one scale over all of them, so that a layout changes nothing; TE has
    one a part there, except where it gathers the parts afterwards (sequence parallelism).
    """

    def operand(self, name: Name, t_RC: Tensor) -> Operand:
        amax = fp8.amax(t_RC)
        if name in self.sharded:
            amax = _reduced(amax, parallel_state.get_tensor_model_parallel_group())
        rows = fp8.quantize_tensor(t_RC, HYBRID[name], fp8.scale_of(amax, HYBRID[name]))
        return Operand(rows, rows.transposed())


class Blockwise(Product):
    """TE's Float8BlockScaling: a power-of-two scale for 1 x 128 of x and dy, for 128 x 128 of w."""

    def operand(self, name: Name, t_RC: Tensor) -> Operand:
        if name == "w":
            rows = fp8.quantize_blocks(t_RC, E4M3, (TILE, TILE))
            return Operand(rows, rows.transposed())
        return Operand(fp8.quantize_blocks(t_RC), fp8.quantize_blocks(t_RC.t()))


class Microscaled(Product):
    """TE's MXFP8BlockScaling: a power-of-two scale for 1 x 32 of everything."""

    def operand(self, name: Name, t_RC: Tensor) -> Operand:
        return Operand(fp8.quantize_mx(t_RC), fp8.quantize_mx(t_RC.t()))


class Delayed(Product):
    """TE's DelayedScaling: one scale a tensor, of the largest magnitude in the steps before; 1 at first.

    A step is a micro-batch's pass. Its amaxes are those of all ranks that have a part of the tensor or another batch,
    as Megatron's amax reduction group has it. Passes without gradients use the scales and leave them as they are.
    """

    scale: Tensor  # fp32 [3]: of x, w, dy
    history: Tensor  # fp32 [H, 3]: amaxes, the present step's in row 0, the oldest in row 1

    def __init__(self, sharded: frozenset[Name] = frozenset()) -> None:
        super().__init__(sharded)
        self.register_buffer("scale", torch.ones(len(NAMES)))
        self.register_buffer("history", torch.zeros(fp8_rules.AMAX_HISTORY, len(NAMES)))
        self._used, self._learning = self.scale, False

    def begin(self, learning: bool) -> None:
        self._used, self._learning = self.scale, learning
        if (memory := _memory.get()) is not None:
            self._learning = self not in memory
            if self._learning:
                memory[self] = self.scale.clone()
            else:
                self._used = memory.pop(self)

    def operand(self, name: Name, t_RC: Tensor) -> Operand:
        index = NAMES.index(name)
        if name == "dy":
            self._used, self._learning = self.scale, True
        if self._learning:
            self.history[0, index] = fp8.amax(t_RC)
        rows = fp8.quantize_tensor(t_RC, HYBRID[name], self._used[index])
        return Operand(rows, rows.transposed())

    def after_forward(self) -> None:
        if self._learning:
            self._move_on(slice(0, 2), E4M3)

    def after_backward(self) -> None:
        self._move_on(slice(2, 3), E5M2)

    def _move_on(self, which: slice, format: torch.dtype) -> None:
        last = self.history[0, which].contiguous()
        self.history[0, which] = _reduced(last, parallel_state.get_amax_reduction_group(with_context_parallel=True))
        most_recent = fp8_rules.AMAX_ALGORITHM == "most_recent"
        moved = fp8.next_scales(self.history[:, which], self.scale[which], format, most_recent=most_recent)
        self.history[:, which], self.scale[which] = moved


_RECIPES: dict[str, type[Product]] = {
    "tensorwise": Tensorwise,
    "delayed": Delayed,
    "blockwise": Blockwise,
    "mxfp8": Microscaled,
}


def product(ctx: Context, sharded: frozenset[Name]) -> Product:
    """The product of ``parallel.fp8_recipe``; `sharded`: which of its tensors each tensor rank has a part of."""
    parallel = ctx.config.parallel
    return _RECIPES[parallel.fp8_recipe](sharded if parallel.tp > 1 else frozenset())


# ---- recompute -------------------------------------------------------------------------------------------------------

# The scales of a first pass, which the second one takes again; None outside of such passes.
_memory: contextvars.ContextVar[dict[Delayed, Tensor] | None] = contextvars.ContextVar("memory", default=None)


def run_twice(block: Callable[..., Any]) -> Callable[..., Any]:
    """`block` for recompute: its first call learns scales although it has no gradients, its second one repeats it."""
    memory: dict[Delayed, Tensor] = {}

    def run(*streams: Tensor) -> Any:
        token = _memory.set(memory)
        try:
            return block(*streams)
        finally:
            _memory.reset(token)

    return run


# ---- what is kept ----------------------------------------------------------------------------------------------------

STATE = ("fp8_history", "fp8_scale")  # kinds in a checkpoint, beside those of a parameter


def products(stages: Sequence[nn.Module]) -> Iterator[tuple[str, Product]]:
    """(the linear's name, its product) of all FP8 linears of this rank's stages, bare or under DDP."""
    for stage in stages:
        for name, module in stage.named_modules():
            if isinstance(module, Product):
                yield name.removeprefix("module.").removesuffix(".product"), module


def state(stages: Sequence[nn.Module]) -> dict[str, dict[str, Tensor]]:
    """The weight's name: kind: tensor, of all that delayed scaling remembers; the same on all ranks of a stage."""
    return {
        f"{name}.weight": dict(zip(STATE, (found.history, found.scale), strict=True))
        for name, found in products(stages)
        if isinstance(found, Delayed)
    }


def remembered(ctx: Context, stages: Sequence[nn.Module]) -> list[Tensor]:
    """The tensors of :func:`state` themselves, of all stages."""
    return [tensor for kinds in state(stages).values() for tensor in kinds.values()]
