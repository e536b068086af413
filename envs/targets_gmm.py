"""Gaussian mixtures on a grid."""

import math

import torch
from torch import Tensor

from driftstream.envs.errors import require
from driftstream.envs.targets_base import Constants, Target

LN_2 = math.log(2.0)


class GaussianMixture(Target):
    """Mixture of isotropic Gaussians of one variance; normalised, so that log Z = 0.

    means [M, D], weights [M] (equal by default, normalised here), variance > 0 (else ConfigError).
    """

    log_z = 0.0

    def __init__(self, name: str, means: Tensor, variance: float, weights: Tensor | None = None) -> None:
        require(means.ndim == 2 and means.numel() > 0, "means", list(means.shape), "a shape [M, D]")
        require(0.0 < variance < math.inf, "variance", variance, "a positive number")
        count, self.dim = means.shape
        self.name = name
        self.means = means.double()
        self.std = math.sqrt(variance)
        self.weights = torch.ones(count).double() if weights is None else weights.double()
        valid = self.weights.shape == (count,) and bool((self.weights >= 0).all()) and self.weights.sum() > 0
        require(bool(valid), "weights", self.weights.tolist(), f"{count} non-negative numbers, one per mean")
        self.weights = self.weights / self.weights.sum()
        # Log densities are in base 2, as exp2 is as fast at -500, where most components are, as at 0, but exp
        # turns 10 times slower near underflow. Components come first, as the first axis reduces fastest.
        log_scale = self.weights.log() - 0.5 * self.dim * math.log(2 * math.pi * variance)
        center = self.weights @ self.means
        spread = float(self.weights @ (self.means - center).square().mean(1))
        # The whole spread lets more paths stray, and reaches the modes no better.
        self.noise_range = (0.5 * spread + variance, variance) if spread > 0 else None
        self._precision = 1.0 / variance
        self._constants = Constants(self.means.T, self.means.T.unsqueeze(-1), log_scale.unsqueeze(-1) / LN_2)

    def log_reward(self, x: Tensor) -> Tensor:
        _, peak, ratios = self._components(x)
        return self._log_sum(peak, ratios.sum(0)).view(x.shape[:-1])

    def score(self, x: Tensor) -> Tensor:
        columns, _, ratios = self._components(x)
        return self._mean_pull(columns, ratios, ratios.sum(0)).T.reshape(x.shape)

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        columns, peak, ratios = self._components(x)
        total = ratios.sum(0)
        log_reward = self._log_sum(peak, total).view(x.shape[:-1])
        return log_reward, self._mean_pull(columns, ratios, total).T.reshape(x.shape)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.device if generator is None else generator.device
        modes = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.dim, device=device, generator=generator)
        return (self.means.to(device, noise.dtype)[modes] + self.std * noise).to(self.device)

    def noised(self, scale: float, variance: float) -> "GaussianMixture":
        """The law of scale * x + N(0, variance I) for x of this mixture: a normalised mixture again.

        ConfigError where nothing would be left to spread it (scale and variance both 0).
        """
        return GaussianMixture(self.name, scale * self.means, (scale * self.std) ** 2 + variance, self.weights)

    def _components(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x as columns [D, N]; log2 of the largest w_m N(x; mean_m, variance) [N]; ratios to it [M, N]."""
        _, means, log_scale = self._constants.like(x)
        columns = x.reshape(-1, self.dim).T.contiguous()
        # Expanding the square into |x|² - 2 x·m + |m|² would be one product, but it cancels in float32.
        distance = (columns.unsqueeze(1) - means).square().sum(0)
        log_components = torch.add(log_scale, distance, alpha=-0.5 * self._precision / LN_2)
        peak = log_components.detach().amax(0)
        return columns, peak, torch.exp2(log_components - peak)

    def _log_sum(self, peak: Tensor, total: Tensor) -> Tensor:
        return (peak + total.log2()) * LN_2

    def _mean_pull(self, columns: Tensor, ratios: Tensor, total: Tensor) -> Tensor:
        """[D, N]: (the mean of the components that x may belong to - x) / variance."""
        means = self._constants.like(columns)[0]
        return (means @ ratios / total - columns) * self._precision


class GridMixture(GaussianMixture):
    """Equal isotropic Gaussians at all points of side^D: D independent mixtures along one axis, evaluated as such.

    side [M], of which the mixture has M^D means; else as `GaussianMixture`.
    """

    def __init__(self, name: str, side: Tensor, dim: int, variance: float) -> None:
        super().__init__(name, torch.cartesian_prod(*[side] * dim).view(-1, dim), variance)
        self.side = side.double()
        self._log_scale = -math.log(len(side)) - 0.5 * math.log(2 * math.pi * variance)
        # In these units a squared distance is minus the log density to base 2.
        self._unit = math.sqrt(2.0 * variance * LN_2)
        self._axis = Constants((self.side / self._unit).unsqueeze(-1))
        # log N(x; m, variance) but for what all m share: a line in x, which suffices to tell components apart.
        pull = self.side * self._precision
        self._lines = Constants(pull.unsqueeze(0), pull.unsqueeze(-1), (-0.5 * pull * self.side).unsqueeze(-1))

    def log_reward(self, x: Tensor) -> Tensor:
        (side,) = self._axis.like(x)
        distance = (x.reshape(-1) / self._unit - side).square()
        nearest = distance.detach().amin(0)
        along_axes = self._log_sum(-nearest, torch.exp2(nearest - distance).sum(0))
        return along_axes.view(x.shape).sum(-1) + self.dim * self._log_scale

    def score(self, x: Tensor) -> Tensor:
        pull, slopes, levels = self._lines.like(x)
        line = x.reshape(1, -1)
        share = torch.addcmul(levels, slopes, line).softmax(0)
        return torch.addmm(line, pull, share, beta=-self._precision).view(x.shape)

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_reward(x), self.score(x)

    def noised(self, scale: float, variance: float) -> "GridMixture":
        return GridMixture(self.name, scale * self.side, self.dim, (scale * self.std) ** 2 + variance)


def _grid_mixture(name: str, side: tuple[float, ...], variance: float) -> GaussianMixture:
    target = GridMixture(name, torch.tensor(side, dtype=torch.float64), 2, variance)
    reach = max(side) + 5.0
    target.diffusion_variance = 5.0
    target.plot_range = (-reach, reach)
    return target


def gmm25(variance: float = 0.3) -> GaussianMixture:
    """25 equal Gaussians of that variance at {-10, -5, 0, 5, 10}² (Sendera et al. 2024, arXiv 2402.05098)."""
    return _grid_mixture("gmm25", (-10.0, -5.0, 0.0, 5.0, 10.0), variance)


def gmm9(variance: float = 0.3) -> GaussianMixture:
    """9 equal Gaussians of that variance at {-5, 0, 5}² (Zhang and Chen 2022, arXiv 2111.15141)."""
    return _grid_mixture("gmm9", (-5.0, 0.0, 5.0), variance)
