"""Noise schedules as clocks: how much of a process's whole noise has been spent by the time t."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Schedule = Literal["constant", "linear", "cosine", "geometric"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def clock(times: Tensor, schedule: Schedule, ratio: float) -> Tensor:
    """τ(t) = ∫_0^t rate / ∫_0^1 rate, of the shape of `times` [..., T+1]; rises from 0 to 1.

    The rate of noise falls from `ratio` (> 1) at t = 0, where the prior is, to 1 at t = 1, where the data is: not
    at all, linearly, as a squared cosine, or geometrically. The integrals are exact, whatever the grid.

    Source: Song et al. 2021 (arXiv 2011.13456); Nichol & Dhariwal 2021 (arXiv 2102.09672) for the cosine.
    """
    if schedule == "constant":
        return times
    if schedule == "linear":
        return (ratio * times - 0.5 * (ratio - 1.0) * times.square()) / (0.5 * (ratio + 1.0))
    if schedule == "cosine":
        angle = math.acos(ratio**-0.5)
        spent = 0.5 * times + torch.sin(2.0 * angle * times) / (4.0 * angle)
        return spent / (0.5 + math.sin(2.0 * angle) / (4.0 * angle))
    if schedule == "geometric":
        return torch.expm1(-math.log(ratio) * times) / math.expm1(-math.log(ratio))
    raise ValueError(f"schedule = {schedule!r}: expected one of {', '.join(SCHEDULES)}")
