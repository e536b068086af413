"""States and drifts measured by the noise, so that a network deals with numbers of order one at all times.

Source: after the preconditioning of denoisers, which skip past the network too (Karras et al. 2022, arXiv 2206.00364,
section 5).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.envs.processes import DiffusionProcess

RANGE = 4.0
"""States are measured linearly up to about so many units, and beyond by the logarithm."""


@dataclass(frozen=True)
class NoiseLeft:
    """The deviation r of the noise that is left at some times, and the unit of drifts σ²/r, both [T, 1].

    Drifts grow by orders of magnitude as r falls. A state that is drawn to a place where the target is narrower than r
    drifts by its distance over r in that unit, whatever r is, and a network of the state alone would have to learn a
    factor for every time. So it gives an offset and a pull instead: `drift` is their sum in these units, the pull
    acting on the state measured by r. A pull of -1 is the drift towards a narrow place at 0; it may differ between
    places, as the target's width does.

    `spread` is the deviation of all noise, beyond which the network sees the logarithm of states: a path that has
    strayed far does not spoil its first layer for all others.
    """

    deviation: Tensor
    drift_unit: Tensor
    spread: float

    @classmethod
    def of(cls, process: DiffusionProcess, t: Tensor) -> "NoiseLeft":
        """At the times `t [T]` < 1 of the process."""
        deviation = process.noise_left(t.double()).unsqueeze(-1)
        spread = float(process.noise_left(torch.zeros((), dtype=torch.float64)))
        return cls(deviation.to(t.dtype), (process.noise_rate / deviation).to(t.dtype), spread)

    def __getitem__(self, index: int | Tensor) -> "NoiseLeft":
        return NoiseLeft(self.deviation[index], self.drift_unit[index], self.spread)

    def unbind(self) -> list["NoiseLeft"]:
        """That of every time."""
        rows = zip(self.deviation.unbind(), self.drift_unit.unbind(), strict=True)
        return [NoiseLeft(*row, self.spread) for row in rows]

    def inputs(self, x: Tensor) -> Tensor:
        """What the network sees of states x [..., D]."""
        return symlog(x / self.spread) * self.spread

    def drift(self, x: Tensor, offset: Tensor, pull: Tensor) -> Tensor:
        """σ²/r (offset + pull symlog(x / r)): x, offset, pull [..., D] -> [..., D]."""
        return torch.addcmul(offset, pull, symlog(x / self.deviation)) * self.drift_unit


def symlog(x: Tensor) -> Tensor:
    """±c log(1 + |x| / c), c = `RANGE`: about x near 0, of any shape.

    Source: Hafner et al. 2023 (arXiv 2301.04104). It is like asinh, which costs ten times as much.
    """
    x = x / RANGE
    return x.abs().log1p().copysign(x) * RANGE


__all__ = ["RANGE", "NoiseLeft", "symlog"]
