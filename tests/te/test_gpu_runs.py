"""That what tests/parallel/te_gpu_runs.py asks a GPU is well asked: the same code, on the stand-in's sums."""

from typing import Any

import pytest
from stand_in import computing

import ranks
from parallel import te_gpu_runs


def asked(rank: int, world: int, what: str, of: str) -> dict[str, float]:
    import torch.distributed as dist

    from mpdit.parallel import accel

    dist.destroy_process_group()
    accel.device = lambda: accel._CPU  # of an imagined GPU, which the layers are built for
    accel.collective_backend = lambda share_gpu: "gloo"
    with computing((10, 0)):
        found: dict[str, float] = getattr(te_gpu_runs, what)(of)
    return found


@pytest.fixture(autouse=True)
def _entered(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks.warm()
    from mpdit.parallel import accel

    monkeypatch.setattr(accel, "enter", lambda: None)


@pytest.mark.dist
@pytest.mark.parametrize("arch", te_gpu_runs.ARCHITECTURES)
def test_blocks(arch: str) -> None:
    found = ranks.run(1, asked, what="block", of=arch)[0]
    assert len(found) > 20
    assert max(found.values()) < 2e-2


@pytest.mark.dist
@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_linears(recipe: str) -> None:
    """The stand-in does not round to FP8: it is as far away as FP8 is."""
    found: dict[str, Any] = ranks.run(1, asked, what="linear", of=recipe)[0]
    assert {name.split()[1] for name in found} == {"y", "dx", "dw"}
    assert all(0.01 < off < 0.1 for off in found.values())
