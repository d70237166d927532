"""The average of the weights is the one of the formula, and borrowing its place leaves the weights as they were."""

import types
from typing import Any

import pytest
import torch
from torch import nn

from mpdit.train import profiles
from mpdit.train.ema import EMA


def chunk(*names: str, dtype: torch.dtype = torch.float32) -> Any:
    """A stage under DDP, as EMA sees it: parameters of three values each."""
    module = nn.Module()
    for number, name in enumerate(names):
        setattr(module, name, nn.Parameter(torch.tensor([1.0, -2.0, 0.3]).to(dtype) + number))
    return types.SimpleNamespace(module=module)


def parameters(*chunks: Any) -> dict[str, nn.Parameter]:
    return {name: p for c in chunks for name, p in c.module.named_parameters()}


def walk(parameters: dict[str, nn.Parameter], step: int) -> None:
    """Other weights at each step."""
    with torch.no_grad():
        for number, p in enumerate(parameters.values()):
            p.add_(torch.tensor([0.5, -0.25, 1.0]).to(p) * (step + 1) * (number + 1))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999, 1.0])
def test_after_k_steps_it_is_the_closed_form(decay: float) -> None:
    """decay^k w_0 + (1 - decay) sum over i of decay^(k - i) w_i, for i from 1 to k."""
    chunks = [chunk("a", "b"), chunk("c")]
    weights, ema = parameters(*chunks), EMA(chunks, decay)
    seen = [{name: p.detach().double() for name, p in weights.items()}]
    k = 7
    for step in range(k):
        walk(weights, step)
        seen.append({name: p.detach().double() for name, p in weights.items()})
        ema.update()
    assert ema.values.keys() == {"a", "b", "c"}
    for name, value in ema.values.items():
        closed = decay**k * seen[0][name] + (1 - decay) * sum(decay ** (k - i) * seen[i][name] for i in range(1, k + 1))
        torch.testing.assert_close(value.double(), closed, rtol=1e-5, atol=1e-6)


def test_it_starts_from_the_present_weights_and_does_not_follow_them_by_itself() -> None:
    one = chunk("a")
    ema = EMA([one], 0.9)
    start = one.module.a.detach().clone()
    walk(parameters(one), 0)
    assert torch.equal(ema.values["a"], start)
    assert not ema.values["a"].requires_grad


def test_of_bf16_weights_it_keeps_what_bf16_would_round_away() -> None:
    one = chunk("a", dtype=torch.bfloat16)
    ema = EMA([one], 0.999)
    with torch.no_grad():
        one.module.a.fill_(2.0)
    before = ema.values["a"].clone()
    ema.update()
    assert ema.values["a"].dtype == torch.float32
    torch.testing.assert_close(ema.values["a"], before + 0.001 * (2.0 - before), rtol=1e-6, atol=0)
    assert not torch.equal(ema.values["a"].bfloat16().float(), ema.values["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_swaps_and_restores_exactly(dtype: torch.dtype) -> None:
    chunks = [chunk("a", dtype=dtype), chunk("b", dtype=dtype)]
    weights, ema = parameters(*chunks), EMA(chunks, 0.7)
    walk(weights, 0)
    ema.update()
    walk(weights, 1)
    places = {name: p.data_ptr() for name, p in weights.items()}
    before = {name: p.detach().clone() for name, p in weights.items()}
    average = {name: value.clone() for name, value in ema.values.items()}
    with ema.applied():
        for name, p in weights.items():
            assert torch.equal(p, average[name].to(dtype))
            assert not torch.equal(p, before[name])
    for name, p in weights.items():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == places[name], "optimizer and DDP hold these very tensors"
        assert torch.equal(ema.values[name], average[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_power_function_averages_weigh_every_update_as_their_profile_does(dtype: torch.dtype) -> None:
    """The start does not count; update i of k weighs (i^(gamma + 1) - (i - 1)^(gamma + 1)) / k^(gamma + 1)."""
    chunks = [chunk("a", dtype=dtype), chunk("b", dtype=dtype)]
    weights, ema, k = parameters(*chunks), EMA(chunks, 0.9, (0.05, 0.2)), 9
    plain = EMA(chunks, 0.9)
    seen = []
    for step in range(k):
        walk(weights, step)
        seen.append({name: p.detach().double() for name, p in weights.items()})
        ema.update()
        plain.update()
    assert ema.power.updates == k
    for width in (0.05, 0.2):
        gamma = profiles.exponent(width)
        share = [((i + 1) ** (gamma + 1) - i ** (gamma + 1)) / k ** (gamma + 1) for i in range(k)]
        for name, p in weights.items():
            value = ema.power.whole(width, name)
            assert (value.dtype, value.shape) == (torch.float32, p.shape)
            closed = sum(part * w[name] for part, w in zip(share, seen, strict=True))
            torch.testing.assert_close(value.double(), closed, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, plain.values[name]) for name, value in ema.values.items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_applied_restores_when_something_goes_wrong_within(error: type[BaseException]) -> None:
    one = chunk("a")
    ema = EMA([one], 0.5)
    walk(parameters(one), 0)
    before = one.module.a.detach().clone()

    def look() -> None:
        with ema.applied():
            assert not torch.equal(one.module.a, before)
            raise error

    with pytest.raises(error):
        look()
    assert torch.equal(one.module.a, before)


def test_applied_hands_over_a_copy() -> None:
    """Whoever changes the weights within does not change the average."""
    one = chunk("a")
    ema = EMA([one], 0.5)
    average = ema.values["a"].clone()
    with ema.applied(), torch.no_grad():
        one.module.a.zero_()
    assert torch.equal(ema.values["a"], average)


def test_gradients_survive_the_swap() -> None:
    one = chunk("a")
    ema = EMA([one], 0.5)
    (one.module.a * 3).sum().backward()
    with ema.applied():
        pass
    assert one.module.a.grad.tolist() == [3.0, 3.0, 3.0]
    assert one.module.a.requires_grad
