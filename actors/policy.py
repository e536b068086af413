"""The policy network: drift and log-variance of the forward process (PIS architecture)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from driftstream.envs.errors import require


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of the policy network. `learned_variance = None` is resolved from the target's dimension."""

    hidden: int = 64
    harmonics: int = 64
    learned_variance: bool | None = None
    log_var_range: float = 4.0
    langevin: bool = False
    score_clip: float = 100.0
    drift_clip: float = 1e4

    def __post_init__(self) -> None:
        require(self.hidden >= 1, "policy.hidden", self.hidden, "at least 1")
        require(self.harmonics >= 1, "policy.harmonics", self.harmonics, "at least 1")
        require(self.log_var_range > 0, "policy.log_var_range", self.log_var_range, "a positive number")
        require(self.score_clip > 0, "policy.score_clip", self.score_clip, "a positive number")
        require(self.drift_clip > 0, "policy.drift_clip", self.drift_clip, "a positive number")


class TimeFeatures(nn.Module):
    """Fourier features of time with learned phases: `t [T] -> [T, 2 * harmonics]`."""

    frequencies: Tensor

    def __init__(self, harmonics: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.1, 100.0, harmonics))
        self.phases = nn.Parameter(torch.randn(harmonics))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.unsqueeze(-1) * self.frequencies + self.phases
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


@dataclass(frozen=True)
class TimeEmbedding:
    """What the policy needs of the times alone, computed once per grid and sliced per step.

    `hidden [T, H]` enters the drift network; `langevin_scale [T, D]` multiplies the clipped score (LP only).
    """

    hidden: Tensor
    langevin_scale: Tensor | None

    def __getitem__(self, index: int) -> "TimeEmbedding":
        scale = self.langevin_scale
        return TimeEmbedding(self.hidden[index], None if scale is None else scale[index])


class DiffusionPolicy(nn.Module):
    """Drift u(x, t) and log-variance offset v(x, t) of the Euler-Maruyama forward policy.

    Time features -> Linear-GELU-Linear, plus Linear(state) -> GELU, [Linear, GELU] x 2, Linear; the last layer
    starts at zero, so an untrained policy is the uncontrolled process. With `langevin` the drift gains
    NN2(t) * clip(score), NN2 a three-layer network of its own time features with zero weights and bias 0.01 in
    its last layer. With `learned_variance` v = range * tanh(raw), else v is None (zero).

    Source: Zhang & Chen 2022 (PIS, arXiv 2111.15141); Sendera et al. 2024 (arXiv 2402.05098), appendix C.
    """

    def __init__(self, dim: int, config: PolicyConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.dim = dim
        self.config = config
        self.learned_variance = bool(config.learned_variance)
        self.langevin = config.langevin
        self.time_features = TimeFeatures(config.harmonics)
        self.time_net = nn.Sequential(nn.Linear(2 * config.harmonics, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.state_net = nn.Linear(dim, hidden)
        self.joint_net = nn.Sequential(
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, dim * (2 if self.learned_variance else 1)),
        )
        _zero(self.joint_net[-1])
        if self.langevin:
            self.langevin_features = TimeFeatures(config.harmonics)
            self.langevin_net = nn.Sequential(
                nn.Linear(2 * config.harmonics, hidden),
                nn.GELU(),
                nn.Linear(hidden, hidden),
                nn.GELU(),
                nn.Linear(hidden, dim),
            )
            _zero(self.langevin_net[-1], bias=0.01)

    def embed_times(self, t: Tensor) -> TimeEmbedding:
        """Embedding of the times `t [T]` at which steps start."""
        scale = self.langevin_net(self.langevin_features(t)) if self.langevin else None
        return TimeEmbedding(self.time_net(self.time_features(t)), scale)

    def forward(self, x: Tensor, embedding: TimeEmbedding, score: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Drift and log-variance offset at states `x`.

        Args:
            x: states `[..., D]`, e.g. `[B, D]` at one time or `[B, T, D]` on a whole grid.
            embedding: of the matching times; its leading dimensions broadcast against those of `x`.
            score: gradient of log R at `x`, `[..., D]`; needed with `langevin`, ignored without.

        Returns:
            `(drift [..., D], log_var [..., D] or None)`. Gradients flow to the parameters, to `x` and to `score`.
        """
        out = self.joint_net(self.state_net(x) + embedding.hidden)
        drift, log_var = out, None
        if self.learned_variance:
            drift, raw = out.chunk(2, dim=-1)
            log_var = self.config.log_var_range * raw.tanh()
        if self.langevin:
            if score is None or embedding.langevin_scale is None:
                raise ValueError("policy.langevin = true: the policy needs the score of the target at x")
            clip = self.config.score_clip
            drift = drift + embedding.langevin_scale * score.clamp(-clip, clip)
        return drift.clamp(-self.config.drift_clip, self.config.drift_clip), log_var


def _zero(layer: nn.Module, bias: float = 0.0) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, bias)


__all__ = ["DiffusionPolicy", "PolicyConfig", "TimeEmbedding", "TimeFeatures"]
