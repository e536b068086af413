"""A target density to start from: a ring in the plane, thicker on the right.

- Check it: driftstream check my_target.py:MyTarget
- Run it: driftstream train my_target.py:MyTarget --minutes 3
"""

import torch
from torch import Tensor

from driftstream.envs.targets import Target


class MyTarget(Target):
    """exp(-(|x| - radius)² / 2 thickness²), times a slope; options are `--target-options radius 4`."""

    dim = 2
    diffusion_variance = 4.0
    """Variance of the untrained sampler's samples: about as wide as the target is."""
    plot_range = (-6.0, 6.0)

    def __init__(self, radius: float = 3.0, thickness: float = 0.5) -> None:
        self.radius = radius
        self.thickness = thickness

    def log_reward(self, x: Tensor) -> Tensor:
        """The log density but for a constant, or minus the energy: x [..., D] -> [...].

        Made of torch operations, its gradient comes by itself; write `score` where you have a cheaper one.
        """
        ring = (torch.linalg.vector_norm(x, dim=-1) - self.radius) / self.thickness
        return -0.5 * ring.square() + 0.5 * x[..., 0].tanh()

    # Where they are known, evaluation compares with them:
    #
    #   log_z = 1.23
    #
    #   def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
    #       """n exact samples [n, D]."""
