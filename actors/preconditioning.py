"""States and drifts measured by the noise, so that a network deals with numbers of order one at all times.

Source: after the preconditioning of denoisers, which skip past the network too (Karras et al. 2022, arXiv 2206.00364,
section 5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.envs.densities import is_transformed
from driftstream.envs.processes import DiffusionProcess

REACH = 4.0
"""How many deviations of the noise a state may be off where its measure turns from linear to logarithmic."""


@dataclass(frozen=True)
class NoiseUnits:
    """Units of states and drifts at some times: `reach`, which is `REACH` deviations r of the noise that is left, and
    `drift`, the rate of the noise's variance over r, both [T, 1].

    Drifts grow by orders of magnitude as r falls. Near a place where the target is narrower than r a state drifts
    towards it by its distance over r in these units, which a network of the state alone would have to learn for every
    r. So it gives an offset and a pull, and the pull acts on the state measured by r (`scaled`). Both may differ
    between places, as the target's width does.

    `width` is `REACH` deviations of all noise. The network sees the logarithm of states beyond, so that a path that has
    strayed far does not spoil its first layer for all others.
    """

    reach: Tensor
    drift: Tensor
    width: float

    @classmethod
    def of(cls, process: DiffusionProcess, t: Tensor) -> "NoiseUnits":
        """At the times `t [T]` < 1 of the process, in their dtype (at t = 1 no noise is left to measure by)."""
        left = process.noise_left(t.double()).unsqueeze(-1)
        return cls((REACH * left).to(t.dtype), (process.noise_rate / left).to(t.dtype), REACH * process.all_noise)

    def __getitem__(self, index: int | Tensor) -> "NoiseUnits":
        return NoiseUnits(self.reach[index], self.drift[index], self.width)

    def unbind(self) -> list["NoiseUnits"]:
        """Those of every time, as a list."""
        rows = zip(self.reach.unbind(), self.drift.unbind(), strict=True)
        return [NoiseUnits(*row, self.width) for row in rows]

    def inputs(self, x: Tensor) -> Tensor:
        """What the network sees of states x [..., D]: width φ(x / width), φ = `compressed`."""
        return compressed(x, self.width) * self.width

    def scaled(self, x: Tensor, offset: Tensor, pull: Tensor) -> Tensor:
        """The drift (offset + c pull φ(x / (c r))) σ²/r, φ = `compressed` and c = `REACH`, of states x; all [..., D].

        Of Brownian motion a pull of -1 brings states within a few r of 0 there by t = 1. Gradients flow to all three.
        """
        return torch.addcmul(offset, pull, compressed(x, self.reach), value=REACH) * self.drift


def compressed(x: Tensor, reach: Tensor | float) -> Tensor:
    """±log(1 + |x| / reach) of x [..., D]: about x / reach near 0. Like asinh, which costs ten times as much.

    Source: Hafner et al. 2023 (arXiv 2301.04104), for targets of very different sizes.
    """
    x = x / reach
    if not (x.requires_grad or is_transformed()):
        return x.abs().log1p_().copysign_(x)
    # `abs` and `copysign` have no slope at 0.
    side = x.new_ones(()).copysign(x)
    return (x * side).log1p() * side


__all__ = ["REACH", "NoiseUnits", "compressed"]
