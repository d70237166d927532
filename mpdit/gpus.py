"""GPUs by name, with what their makers promise of them."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GPU:
    """Makers' peak rates, dense, and the memory. Links are per GPU and direction: within a node, and between nodes."""

    capability: tuple[int, int]  # CUDA's compute capability
    fp8_flops_s: float  # 0: it has none
    bf16_flops_s: float
    fp32_flops_s: float
    memory_bytes: float
    memory_bytes_s: float
    node_bytes_s: float
    network_bytes_s: float

    def flops_s(self, precision: str) -> float:
        """The peak that a model's FLOPs are held against: FP8 runs too are measured in bf16's, as papers do."""
        return self.fp32_flops_s if precision == "fp32" else self.bf16_flops_s


# fmt: off
GPUS: dict[str, GPU] = {
    # SXM boards; NVLink 3, 4, 4, 5; one 200 or 400 Gbit/s port a GPU, as in a DGX.
    "a100": GPU(capability=(8, 0),  fp8_flops_s=0,       bf16_flops_s=312e12,  fp32_flops_s=19.5e12,
                memory_bytes=80e9,  memory_bytes_s=2.04e12, node_bytes_s=300e9, network_bytes_s=25e9),
    "h100": GPU(capability=(9, 0),  fp8_flops_s=1979e12, bf16_flops_s=989e12,  fp32_flops_s=67e12,
                memory_bytes=80e9,  memory_bytes_s=3.35e12, node_bytes_s=450e9, network_bytes_s=50e9),
    "h200": GPU(capability=(9, 0),  fp8_flops_s=1979e12, bf16_flops_s=989e12,  fp32_flops_s=67e12,
                memory_bytes=141e9, memory_bytes_s=4.8e12,  node_bytes_s=450e9, network_bytes_s=50e9),
    "b200": GPU(capability=(10, 0), fp8_flops_s=4500e12, bf16_flops_s=2250e12, fp32_flops_s=75e12,
                memory_bytes=180e9, memory_bytes_s=7.7e12,  node_bytes_s=900e9, network_bytes_s=50e9),
}
# fmt: on


def named(device_name: str) -> GPU | None:
    """By what the driver calls it, as "NVIDIA H100 80GB HBM3"; None for others, and for boards with lower rates."""
    words = device_name.lower().split()
    if "pcie" in words or "nvl" in words:
        return None
    return next((gpu for name, gpu in GPUS.items() if name in words or f"{name}-sxm" in device_name.lower()), None)
