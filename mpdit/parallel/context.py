"""What a layer needs to know to build itself: the run's config, and the same said in Megatron's words."""

import dataclasses

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from mpdit.config import Config
from mpdit.mup import rules
from mpdit.mup.roles import Width
from mpdit.parallel import fp8_rules


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """Of the whole network, or of one block (:meth:`of_block`)."""

    config: Config
    megatron: TransformerConfig
    block: int | None = None

    def of_block(self, index: int) -> "Context":
        """What layers may want to know of the block they are built for: its number, of the whole network."""
        return dataclasses.replace(self, block=index)

    @property
    def width(self) -> Width:
        return Width(self.config.model.width, self.config.mup.base_width)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations; losses, norms' statistics and master weights are fp32."""
        return self.megatron.params_dtype

    @property
    def softmax_scale(self) -> float:
        return rules.softmax_scale(self.config.model.head_dim, self.config.mup)

    @property
    def fp8(self) -> bool:
        """Whether the hidden linears built with this context multiply in FP8."""
        return fp8_rules.quantised(self.config, self.block)

    @property
    def emulates_fp8(self) -> bool:
        """Whether this project's own linears do."""
        return self.fp8 and self.config.parallel.precision == "fp8_emulated"

    @property
    def residual_multiplier(self) -> float:
        return rules.residual_multiplier(self.config)


def build(config: Config) -> Context:
    model, parallel = config.model, config.parallel
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[fp8_rules.stored(parallel.precision)]
    interleaved = parallel.vpp > 1
    recompute = parallel.recompute == "full"
    megatron = TransformerConfig(
        # Megatron asserts that its own layer count divides; ours may not, so it is told of one layer a chunk.
        num_layers=parallel.pp * parallel.vpp,
        hidden_size=model.width,
        num_attention_heads=model.width // model.head_dim,
        ffn_hidden_size=model.mlp_ratio * model.width,
        qk_layernorm=model.qk_norm,
        tensor_model_parallel_size=parallel.tp,
        sequence_parallel=parallel.sp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if interleaved else None,
        context_parallel_size=parallel.cp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Which blocks stay in bf16 is our layers' business: Megatron would count its own.
        fp8=fp8_rules.number_format(parallel.fp8_recipe) if parallel.precision == "fp8" else None,
        fp8_recipe=parallel.fp8_recipe,
        fp8_amax_history_len=fp8_rules.AMAX_HISTORY,
        fp8_amax_compute_algo=fp8_rules.AMAX_ALGORITHM,
        # Weights are drawn by mpdit.parallel.init, so that they do not depend on the layout.
        perform_initialization=False,
        use_cpu_initialization=True,
        # Of Megatron's own linears, which need apex for it. Transformer Engine's have theirs (optimizer.wrap).
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # With interleaving, 0.16.1 frees an output that is still being sent (NaN or small errors in half of the runs).
        deallocate_pipeline_outputs=not interleaved,
        # Batched send/receive mixes up activations and gradients where the previous and the next stage are one rank.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )
    return Context(config=config, megatron=megatron)
