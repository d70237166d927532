"""Attention over this rank's heads, with the muP softmax scale; Ulysses under context parallelism.

Shapes: S and L tokens, B samples, H heads of this tensor rank, d head_dim.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.nn import functional as F

from mpdit.parallel.context import Context


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


class Attention(nn.Module):
    """Softmax attention of every query to every key, no mask: [S, B, H, d], twice [L, B, H, d] -> [S, B, H * d].

    Under context parallelism S and L are this rank's shares of the tokens: heads are exchanged for tokens before and
    back after (DeepSpeed-Ulysses, arXiv 2309.14509), so H must divide by cp. The order of tokens does not matter.
    """

    def __init__(self, ctx: Context) -> None:
        super().__init__()
        self.softmax_scale = ctx.softmax_scale

    def forward(self, q_SBHd: Tensor, k_LBHd: Tensor, v_LBHd: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        if group.size() > 1:
            q_SBHd, k_LBHd, v_LBHd = (_HeadsToTokens.apply(x, group, True) for x in (q_SBHd, k_LBHd, v_LBHd))
        o_SBHd = self.attend(q_SBHd, k_LBHd, v_LBHd)
        if group.size() > 1:
            o_SBHd = _HeadsToTokens.apply(o_SBHd, group, False)
        return o_SBHd.flatten(2)

    def attend(self, q_SBHd: Tensor, k_LBHd: Tensor, v_LBHd: Tensor) -> Tensor:
        """[S, B, H, d] of whole tokens and this rank's heads."""
        q_BHSd, k_BHLd, v_BHLd = (x.permute(1, 2, 0, 3) for x in (q_SBHd, k_LBHd, v_LBHd))
        return F.scaled_dot_product_attention(q_BHSd, k_BHLd, v_BHLd, scale=self.softmax_scale).permute(2, 0, 1, 3)
