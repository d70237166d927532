"""Guards `parallel.share_gpu`: what ranks send each other goes through the host, whole, and a sender may go on at once.
A pipeline that runs on it is a layout of test_layouts.py; on a GPU, benchmarks/gpu.py compares its losses."""

import pytest
import torch
import torch.distributed as dist

import ranks


def exchanged(rank: int, world: int, batched: bool) -> list[list[float]]:
    """What a rank of two gets from the other: a view's values, before and after the sender overwrote it."""
    from mpdit.parallel import shared_gpu

    shared_gpu.use()
    mine = torch.arange(6.0).view(2, 3)[:, rank].contiguous() + 10 * rank
    first, second = torch.zeros(2, requires_grad=True), torch.zeros(2)  # Megatron asks for gradients beforehand
    other = 1 - rank
    if batched:
        sends = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, first, other)]
        works = dist.batch_isend_irecv(sends)
    else:
        works = [dist.isend(mine, other), dist.irecv(first, other)]
    mine.fill_(-1)
    works += [dist.isend(tensor=mine, dst=other), dist.irecv(tensor=second, src=other)]
    unfilled = first.tolist()
    for work in works:
        work.wait()
    return [unfilled, first.tolist(), second.tolist()]


@pytest.mark.dist
@pytest.mark.parametrize("batched", [False, True])
def test_what_is_sent_arrives(batched: bool) -> None:
    found = ranks.run(2, exchanged, batched=batched)
    assert found[0] == [[0.0, 0.0], [11.0, 14.0], [-1.0, -1.0]]
    assert found[1] == [[0.0, 0.0], [0.0, 3.0], [-1.0, -1.0]]


def test_ranks_that_share_a_gpu_meet_by_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    from mpdit.parallel import accel

    monkeypatch.setattr(accel, "is_cuda", lambda: True)
    assert [accel.collective_backend(share) for share in (False, True)] == ["nccl", "gloo"]
