"""Neal's funnel."""

import math

import torch
from torch import Tensor

from driftstream.envs.errors import require
from driftstream.envs.targets_base import Target


class Funnel(Target):
    """x_0 ~ N(0, variance), x_i ~ N(0, exp(x_0)) for i > 0; log Z = 0 (Neal 2003, Slice sampling)."""

    log_z = 0.0
    plot_range = (-10.0, 10.0)

    def __init__(self, name: str, dim: int, variance: float) -> None:
        require(isinstance(dim, int) and dim >= 2, "dim", dim, "an integer of at least 2")
        require(0.0 < variance < math.inf, "variance", variance, "a positive number")
        self.name = name
        self.dim = dim
        self.variance = variance
        # How far the neck reaches, and how narrow it is at one and a half of its standard deviations.
        narrow = math.exp(-1.5 * math.sqrt(variance))
        self.noise_range = (variance, narrow) if 0.0 < narrow < variance else None
        self._constant = -0.5 * (dim * math.log(2 * math.pi) + math.log(variance))

    def log_reward(self, x: Tensor) -> Tensor:
        neck, rest = x[..., 0], x[..., 1:]
        return self._log_density(neck, self._energy_of_rest(neck, rest))

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        neck, rest = x[..., 0], x[..., 1:]
        energy = self._energy_of_rest(neck, rest)
        neck_score = energy - neck / self.variance - 0.5 * (self.dim - 1)
        rest_score = -rest * torch.exp(-neck).unsqueeze(-1)
        score = torch.cat([neck_score.unsqueeze(-1), rest_score], -1)
        return self._log_density(neck, energy), score

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.device if generator is None else generator.device
        noise = torch.randn(n, self.dim, device=device, generator=generator)
        neck = math.sqrt(self.variance) * noise[:, :1]
        return torch.cat([neck, torch.exp(0.5 * neck) * noise[:, 1:]], 1).to(self.device)

    def _energy_of_rest(self, neck: Tensor, rest: Tensor) -> Tensor:
        return 0.5 * rest.square().sum(-1) * torch.exp(-neck)

    def _log_density(self, neck: Tensor, energy: Tensor) -> Tensor:
        return self._constant - 0.5 * (neck.square() / self.variance + (self.dim - 1) * neck) - energy


def funnel(dim: int = 10, variance: float = 9.0) -> Funnel:
    """The funnel as published: variance 9 at the neck."""
    return Funnel("funnel", dim, variance)


def easy_funnel(dim: int = 10, variance: float = 1.0) -> Funnel:
    """The funnel of variance 1 that most sampler code evaluates under the name "funnel"."""
    return Funnel("easy_funnel", dim, variance)
