"""Products of double wells."""

import math

import torch
from torch import Tensor

from driftstream.envs.errors import require
from driftstream.envs.targets_base import Constants, Target


class ManyWell(Target):
    """dim/2 independent pairs with log R = -a⁴ + 6a² + a/2 - b²/2 each, hence 2^(dim/2) modes.

    Coordinates 0, 2, ... are the wells' a and 1, 3, ... the Gaussian b. `log_z` and `left_well_mass`, the
    probability of a < 0, come from quadrature in float64. Source: Noé et al. 2019, arXiv 1812.01729; Midgley
    et al. 2022, arXiv 2208.01893; Sendera et al. 2024, arXiv 2402.05098.
    """

    name = "manywell"
    projections = ((0, 2), (1, 2))
    plot_range = (-3.0, 3.0)

    def __init__(self, dim: int = 32) -> None:
        require(isinstance(dim, int) and dim >= 2 and dim % 2 == 0, "dim", dim, "an even integer of at least 2")
        self.dim = dim
        # log R is a sum over coordinates of x (linear + x (square + quartic x²)), whichever kind they are.
        linear, square, quartic = (
            torch.tensor(pair, dtype=torch.float64).repeat(dim // 2) for pair in ((0.5, 0.0), (6.0, -0.5), (-1.0, 0.0))
        )
        self._constants = Constants(linear, square, quartic, 2 * square, 4 * quartic)

        # The density of a and all its derivatives vanish at both ends, so that the plain sum converges faster
        # than any power of the spacing.
        self._well_grid = torch.linspace(-5.0, 5.0, 20_001, dtype=torch.float64)
        grid = self._well_grid
        density = torch.exp(-(grid**4) + 6 * grid**2 + 0.5 * grid)
        spacing = 10.0 / 20_000
        mass = density.sum() * spacing
        self.log_z = (dim // 2) * (math.log(mass) + 0.5 * math.log(2 * math.pi))
        self._well_cdf = torch.cumulative_trapezoid(density, dx=spacing) / mass
        self._well_cdf = torch.cat([self._well_cdf.new_zeros(1), self._well_cdf])
        self.left_well_mass = self._well_cdf[10_000].item()

    def log_reward(self, x: Tensor) -> Tensor:
        linear, square, quartic, _, _ = self._constants.like(x)
        return (x * torch.addcmul(linear, x, torch.addcmul(square, quartic, x * x))).sum(-1)

    def score(self, x: Tensor) -> Tensor:
        linear, _, _, twice_square, four_quartic = self._constants.like(x)
        return torch.addcmul(linear, x, torch.addcmul(twice_square, four_quartic, x * x))

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_reward(x), self.score(x)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.device if generator is None else generator.device
        pairs = self.dim // 2
        uniform = torch.rand(n, pairs, dtype=torch.float64, device=device, generator=generator)
        gaussian = torch.randn(n, pairs, dtype=torch.float64, device=device, generator=generator)
        samples = torch.stack([self._inverse_cdf(uniform), gaussian], -1).reshape(n, self.dim)
        return samples.to(self.device, torch.get_default_dtype())

    def _inverse_cdf(self, uniform: Tensor) -> Tensor:
        grid, cdf = self._well_grid.to(uniform.device), self._well_cdf.to(uniform.device)
        right = torch.searchsorted(cdf, uniform).clamp(1, len(cdf) - 1)
        low, high = cdf[right - 1], cdf[right]
        fraction = ((uniform - low) / (high - low).clamp_min(1e-300)).clamp(0.0, 1.0)
        return torch.lerp(grid[right - 1], grid[right], fraction)
