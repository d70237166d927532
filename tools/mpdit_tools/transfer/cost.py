"""What the search cost, as a share of the target's run: R S B T / (S B T) of Zheng et al., arXiv 2505.15270.

R runs of a proxy with S parameters on B T images (batch size times steps), over the target's S B T.
"""

import dataclasses
import math
from collections.abc import Sequence

from mpdit_tools.transfer.trials import Trial

_BY_HAND = 5  # runs of the target: what the paper says that experts spend


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Counts are exact; ``searched_*`` are sums over all trials, cut short or not."""

    trials: int
    searched_images: int
    searched_flops: int | None  # None where a trial does not say
    proxy_parameters: int
    target_parameters: int
    target_images: int
    target_flops: int

    @property
    def share(self) -> float:
        """Of the target's run, with exact counts."""
        return self._share(self.proxy_parameters, self.target_parameters)

    @property
    def flops_share(self) -> float | None:
        """The same counted out; None where a trial does not say what it took."""
        return None if self.searched_flops is None else self.searched_flops / self.target_flops

    @property
    def printed_share(self) -> float | None:
        """The same with sizes as papers print them; None where the proxy is too small to be printed so."""
        proxy, target = printed(self.proxy_parameters), printed(self.target_parameters)
        return self._share(proxy, target) if proxy else None

    def _share(self, proxy: float, target: float) -> float:
        return proxy * self.searched_images / (target * self.target_images)


def of_trials(
    trials: Sequence[Trial],
    proxy_parameters: int,
    target_parameters: int,
    *,
    target_images: int,
    flops_per_image: int,
) -> Cost:
    flops = [trial.flops for trial in trials]
    return Cost(
        trials=len(trials),
        searched_images=sum(trial.images for trial in trials),
        searched_flops=None if None in flops else sum(flop or 0 for flop in flops),
        proxy_parameters=proxy_parameters,
        target_parameters=target_parameters,
        target_images=target_images,
        target_flops=target_images * flops_per_image,
    )


def printed(parameters: int) -> float:
    """Billions as papers print them: two digits, and no more than two decimals (0.04, 0.61, 0.18, 18).

    0 for less than 0.02 billion, of which two decimals would leave nothing to compute with.
    """
    billions = parameters / 1e9
    return round(billions, min(2, 1 - math.floor(math.log10(billions)))) if billions >= 0.02 else 0.0


def sentences(cost: Cost | None, arch: str) -> list[str]:
    """The cost with everything that it was computed from."""
    if cost is None:
        return ["Unknown: `--from` holds no search. `--trials R` says how many runs of the proxy there were."]
    inputs = (
        f"R = {cost.trials:,} trials of S = {cost.proxy_parameters:,} parameters saw R B T = "
        f"{cost.searched_images:,} images; the target has S = {cost.target_parameters:,} parameters and is to see "
        f"B T = {cost.target_images:,}."
    )
    found = [inputs, f"R S B T / (S B T) = **{percent(cost.share)}** of the target's run, with these exact counts."]
    if cost.printed_share is not None:
        proxy, target = printed(cost.proxy_parameters), printed(cost.target_parameters)
        found.append(
            f"With sizes rounded as papers print them, {proxy:g}B and {target:g}B: **{percent(cost.printed_share)}**."
        )
    if cost.flops_share is not None:
        found.append(
            f"Counted out: {cost.searched_flops:.3g} FLOPs of the target's {cost.target_flops:.3g}, "
            f"**{percent(cost.flops_share)}**."
        )
    if arch == "mmdit":
        found.append(
            "The paper's 3 % for its MMDiT is of what experts spend on tuning by hand, quoted as about "
            f"{_BY_HAND} runs of the target. Of that many, this search is {percent(cost.share / _BY_HAND)}. The "
            "paper's own figure can't be computed again: its proxy's batch size is not published."
        )
    return found


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"
