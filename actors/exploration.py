"""Gaussian exploration: extra variance of the behaviour policy, decayed over training."""

from dataclasses import dataclass
from typing import Literal

from driftstream.envs.errors import require


@dataclass(frozen=True)
class ExplorationConfig:
    """Extra noise of the actors. `std` is a rate: the behaviour policy's variance gains std^2 dt.

    `std = None` is resolved to the diffusion's own rate (the square root of `diffusion_variance`).
    """

    std: float | None = None
    decay: Literal["linear", "constant"] = "linear"
    decay_until: float = 0.5

    def __post_init__(self) -> None:
        require(self.std is None or self.std >= 0, "exploration.std", self.std, "a number >= 0")
        require(self.decay in ("linear", "constant"), "exploration.decay", self.decay, "'linear' or 'constant'")
        require(0 < self.decay_until <= 1, "exploration.decay_until", self.decay_until, "a fraction in (0, 1]")

    def std_at(self, progress: float) -> float:
        """Exploration rate when the learner has done the fraction `progress` of its training."""
        std = self.std or 0.0
        if self.decay == "constant":
            return std
        return std * max(0.0, 1.0 - progress / self.decay_until)
