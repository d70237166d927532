"""What a step is said to achieve: images, tokens and FLOPs a second and rank, and the share of a known GPU's peak."""

from typing import Any

import pytest
import torch

import ranks
from mpdit import config as configs
from mpdit import gpus
from mpdit.config import Config
from mpdit.train.batches import Batch
from mpdit.train.meters import Meter, flops_by_size, peak_flops_s

CONFIG: dict[str, Any] = {
    "model": {"width": 32, "depth": 2, "head_dim": 8, "patch": 2, "image_size": 8, "text_tokens": 6, "vocab_size": 9},
    "train": {"batch_size": 16},
}


@pytest.fixture
def config() -> Config:
    return configs.from_dict(CONFIG)


@pytest.fixture
def eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpdit.parallel.groups.world_size", lambda: 8)


def row(meter: Meter, height: int = 8, width: int = 8, **agreed: int) -> dict[str, Any]:
    return meter.row(0.5, [Batch(size=2, height=height, width=width)], {"memory": 1234, **agreed})


def on_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)


def test_rates_are_of_a_rank(config: Config, eight_ranks: None) -> None:
    found = row(Meter(config, None, {(8, 8): 3 * 10**12}))
    assert found == {
        "images_per_s_per_gpu": 4.0,  # 16 images in half a second on 8 ranks
        "tokens_per_s_per_gpu": 4.0 * (16 + 6),
        "memory_gb": 1.234,
        "tflops_per_gpu": 12.0,
    }
    assert row(Meter(config, None, {}), height=16, idle=250) == {
        "images_per_s_per_gpu": 4.0,
        "tokens_per_s_per_gpu": 4.0 * (32 + 6),
        "memory_gb": 1.234,
        "bubble": 0.25,
    }


def test_a_known_gpu_has_an_mfu(config: Config, eight_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, "NVIDIA H100 80GB HBM3")
    flops = {(8, 8): round(0.5 * 67e12 / 4)}
    assert row(Meter(config, None, flops))["mfu"] == 0.5
    on_gpu(monkeypatch, "NVIDIA GeForce RTX 3090")
    assert "mfu" not in row(Meter(config, None, flops))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_gpus_are_known_by_what_the_driver_calls_them(name: str, known: str | None) -> None:
    assert gpus.named(name) is (None if known is None else gpus.GPUS[known])


def test_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops_s("bf16") is None
    on_gpu(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert peak_flops_s("bf16") == peak_flops_s("fp8") == 989e12
    assert peak_flops_s("fp32") == 67e12


def flops(rank: int, world: int, tree: dict[str, Any]) -> dict[Any, int]:
    import torch.distributed as dist

    dist.destroy_process_group()
    return flops_by_size(configs.from_dict(tree))


@pytest.mark.dist
def test_flops_are_of_the_network_whatever_the_layout() -> None:
    """Of blocks of 72 D^2 a token (MMDiT's two streams, forward and backward), and of what stands around them."""
    buckets = {"data": {"buckets": [[8, 8], [16, 8]]}}
    alone, split = (
        ranks.run(1, flops, tree={**CONFIG, **buckets, "parallel": parallel})[0]
        for parallel in ({}, {"tp": 2, "pp": 2, "sp": True, "recompute": "full", "precision": "bf16"})
    )
    assert alone == split
    assert alone.keys() == {(8, 8), (16, 8)}
    one_more = ranks.run(1, flops, tree={**CONFIG, "model": CONFIG["model"] | {"depth": 3}})[0]
    attention = 12 * 32 * 22 * 22 + 2 * 32 * 22 * 22  # the fused kernel computes its scores once more
    adaln = 2 * 6 * 6 * 32 * 32
    assert one_more[8, 8] - alone[8, 8] == 72 * 32 * 32 * 22 + attention + adaln
