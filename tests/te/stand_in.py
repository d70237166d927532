"""What Transformer Engine's layers compute, in plain PyTorch on a CPU, and the FP8 context that each is asked in.

The rank's own Megatron mappings do the communication that TE documents for its parallel modes.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import stub
import transformer_engine.pytorch as te
from megatron.core import tensor_parallel as tp
from torch import Tensor
from torch.nn import functional as F
from transformer_engine.pytorch.quantization import FP8GlobalStateManager as State


@dataclasses.dataclass(frozen=True)
class Call:
    layer: Any
    recipe: str  # the recipe's class, or bf16
    group: Any
    first: bool | None


@contextlib.contextmanager
def computing(capability: tuple[int, int] = (9, 0)) -> Iterator[list[Call]]:
    """Within, TE's layers compute; the list holds what they were asked to, in order."""
    calls: list[Call] = []

    def note(layer: Any, first: bool | None = None) -> None:
        on = State.is_fp8_enabled()
        recipe = type(State.get_fp8_recipe()).__name__ if on else "bf16"
        calls.append(Call(layer, recipe, State.get_fp8_group() if on else None, first))

    def linear(self: Any, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        note(self, is_first_microbatch)
        if self.parallel_mode == "column":
            gather = tp.gather_from_sequence_parallel_region
            x = gather(x) if self.sequence_parallel else tp.copy_to_tensor_model_parallel_region(x)
            return F.linear(x, self.weight, self.bias if self.use_bias else None)
        y = F.linear(x, self.weight)
        scatter = tp.reduce_scatter_to_sequence_parallel_region
        y = scatter(y) if self.sequence_parallel else tp.reduce_from_tensor_model_parallel_region(y)
        return y + self.bias

    def attention(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        note(self)
        q_BHSd, k_BHLd, v_BHLd = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q_BHSd, k_BHLd, v_BHLd, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).flatten(2)

    def norm(self: Any, x: Tensor) -> Tensor:
        note(self)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def checkpoint(block: Any, *streams: Tensor, get_rng_state_tracker: Any) -> Any:
        assert get_rng_state_tracker is tp.get_cuda_rng_tracker
        return block(*streams)

    with (
        stub.building(capability),
        mock.patch.object(te.Linear, "forward", linear),
        mock.patch.object(te.DotProductAttention, "forward", attention),
        mock.patch.object(te.LayerNorm, "forward", norm),
        mock.patch.object(te, "checkpoint", checkpoint),
    ):
        yield calls
