"""Attention over this rank's heads, with the muP softmax scale; Ulysses under context parallelism.

Shapes: S tokens, B samples, H heads of this tensor rank, d head_dim.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional as F


class _HeadsToTokens(torch.autograd.Function):
    """[S, B, H, d] with S this rank's tokens -> [S * cp, B, H / cp, d] with all tokens (`split_heads`), or back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split_heads: bool) -> Tensor:
        ctx.arguments = group, not split_heads
        cp = group.size()
        S, B, H, d = x.shape
        if split_heads:
            x = x.reshape(S, B, cp, H // cp, d).permute(2, 0, 1, 3, 4).contiguous()
        else:
            x = x.reshape(cp, S // cp, B, H, d).contiguous()
        y = torch.empty_like(x)
        dist.all_to_all_single(y, x, group=group)
        if split_heads:
            return y.flatten(0, 1)
        return y.permute(1, 2, 0, 3, 4).reshape(S // cp, B, H * cp, d)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _HeadsToTokens.apply(grads[0], *ctx.arguments), None, None


def attend(q_SBHd: Tensor, k_SBHd: Tensor, v_SBHd: Tensor, softmax_scale: float) -> Tensor:
    """Softmax attention of every token to every token, no mask -> [S, B, H * d].

    Under context parallelism S is this rank's share of the tokens: heads are exchanged for tokens before and back after
    (DeepSpeed-Ulysses, arXiv 2309.14509), so H must divide by cp. The order of tokens does not matter to attention.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() > 1:
        q_SBHd, k_SBHd, v_SBHd = (_HeadsToTokens.apply(x, group, True) for x in (q_SBHd, k_SBHd, v_SBHd))
    q_BHSd, k_BHSd, v_BHSd = (x.permute(1, 2, 0, 3) for x in (q_SBHd, k_SBHd, v_SBHd))
    o_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BHSd, v_BHSd, scale=softmax_scale)
    o_SBHd = o_BHSd.permute(2, 0, 1, 3)
    if group.size() > 1:
        o_SBHd = _HeadsToTokens.apply(o_SBHd, group, False)
    return o_SBHd.flatten(2)
