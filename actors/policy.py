"""The networks of a sampler: forward policy P_F, backward policy P_B and state flow (PIS architecture)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from driftstream.actors.fused import Layer, is_plain, joint_network, step_network
from driftstream.actors.native_times import time_network
from driftstream.actors.preconditioning import NoiseUnits
from driftstream.envs.errors import require
from driftstream.envs.processes import DiffusionProcess


@dataclass(frozen=True)
class PolicyConfig:
    """Shape of the networks, and which of them there are.

    Native code evaluates networks whose `hidden` is a multiple of 8. `learned_variance = None` is resolved from the
    target's dimension. `langevin_scale` says whether the score's factor of Langevin policies is one number a time, or
    one a dimension. With `precondition` the drift network's states and drifts, but not the score's part, are measured
    by the noise (`NoiseUnits`). With `learned_backward`, P_B's contraction and variance are multiplied by
    1 + `backward_scale` tanh(network). `state_flow` is needed by the objectives that balance flows, and `auto` is
    resolved from the objective; a `forward_looking` flow starts from the target (log rewards below -`reward_clip` are
    raised to it there).
    """

    hidden: int = 64
    harmonics: int = 64
    learned_variance: bool | None = None
    log_var_range: float = 4.0
    langevin: bool = False
    langevin_scale: Literal["dimension", "scalar"] = "dimension"
    score_clip: float = 100.0
    drift_clip: float = 1e4
    precondition: bool = False
    learned_backward: bool = False
    backward_scale: float = 0.1
    state_flow: Literal["auto", "none", "plain", "forward_looking"] = "auto"
    reward_clip: float = 1e4

    def __post_init__(self) -> None:
        for name in ("hidden", "harmonics"):
            require(getattr(self, name) >= 1, f"policy.{name}", getattr(self, name), "at least 1")
        for name in ("log_var_range", "score_clip", "drift_clip", "reward_clip"):
            require(getattr(self, name) > 0, f"policy.{name}", getattr(self, name), "a positive number")
        scales = ("dimension", "scalar")
        require(self.langevin_scale in scales, "policy.langevin_scale", self.langevin_scale, "'dimension' or 'scalar'")
        scale = self.backward_scale
        require(0 < scale < 1, "policy.backward_scale", scale, "a number in (0, 1)")
        flows = ("auto", "none", "plain", "forward_looking")
        require(self.state_flow in flows, "policy.state_flow", self.state_flow, "one of " + ", ".join(flows))


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


class StateTimeNet(nn.Module):
    """A function of state and time, zero at first: `(x [..., D], embedding [..., H]) -> [..., outputs]`.

    Time features -> Linear-GELU-Linear, plus Linear(state) -> GELU, [Linear, GELU] x 2, Linear. What depends on
    the times alone comes from `embed`, so that it is computed once a grid.
    """

    def __init__(self, dim: int, outputs: int, hidden: int, harmonics: int) -> None:
        super().__init__()
        self.time_features = TimeFeatures(harmonics)
        self.time_net = nn.Sequential(nn.Linear(2 * harmonics, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.state_net = nn.Linear(dim, hidden)
        self.joint_net = nn.Sequential(
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, outputs),
        )
        _zero(self.joint_net[-1])

    def embed(self, t: Tensor) -> Tensor:
        """Embedding `[T, H]` of the times `t [T]`, with the bias of the states' layer."""
        return _of_times(t, self.time_features, self.time_net) + self.state_net.bias

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        if is_plain(self, x) and torch.broadcast_shapes(x.shape[:-1], embedding.shape[:-1]) == x.shape[:-1]:
            return joint_network(x, embedding, self.state_net.weight, self.layers)
        return self.joint_net(nn.functional.linear(x, self.state_net.weight) + embedding)

    def by_steps(self, embedding: Tensor, rows: int) -> Callable[[Tensor, int], Tensor]:
        """The network for rollouts of so many rows, without gradient: `(x [B, D], n) -> [B, outputs]`.

        Step n is that of `embedding[n]`. What it returns is valid until the next call.
        """
        if is_plain(self, embedding):
            return step_network(embedding, self.state_net.weight, self.layers, rows)
        return lambda x, n: self(x, embedding[n])

    @property
    def layers(self) -> list[Layer]:
        """Weight and bias of every layer after the first product."""
        return _linear_layers(self.joint_net)


@dataclass(frozen=True)
class TimeEmbedding:
    """What the forward policy needs of the times alone, computed once per grid and sliced per step.

    `hidden [T, H]` enters the drift network; `langevin_scale [T, D or 1]` multiplies the clipped score (LP only);
    `units` are those of states and drifts (with preconditioning only).
    """

    hidden: Tensor
    langevin_scale: Tensor | None = None
    units: NoiseUnits | None = None

    def __getitem__(self, index: int | Tensor) -> "TimeEmbedding":
        scale, units = self.langevin_scale, self.units
        return TimeEmbedding(
            self.hidden[index],
            None if scale is None else scale[index],
            None if units is None else units[index],
        )

    def unbind(self) -> list["TimeEmbedding"]:
        """Those of every time, as a list: cheaper than an index for each of them."""
        hidden = self.hidden.unbind()
        none = [None] * len(hidden)
        scales = none if self.langevin_scale is None else self.langevin_scale.unbind()
        units = none if self.units is None else self.units.unbind()
        return [TimeEmbedding(*parts) for parts in zip(hidden, scales, units, strict=True)]


class DiffusionPolicy(nn.Module):
    """Drift u(x, t) and log-variance offset v(x, t) of the forward policy, with what the configuration adds.

    The last layers start at zero, so an untrained policy is the uncontrolled process. With `langevin` the drift
    gains NN2(t) * clip(score), NN2 a three-layer network of its own time features with zero weights and bias 0.01
    in its last layer. With `learned_variance` v = range * tanh(raw), else v is None (zero).

    With `precondition` NN1 gives an offset and a pull of every coordinate (`NoiseUnits.scaled`).

    Source: Zhang & Chen 2022 (PIS, arXiv 2111.15141); Sendera et al. 2024 (arXiv 2402.05098), appendix C.
    """

    flow_level: Tensor | None

    def __init__(self, dim: int, config: PolicyConfig) -> None:
        super().__init__()
        hidden, harmonics = config.hidden, config.harmonics
        self.dim = dim
        self.config = config
        self.learned_variance = bool(config.learned_variance)
        self.langevin = config.langevin
        outputs = dim * (1 + config.precondition + self.learned_variance)
        self.forward_net = StateTimeNet(dim, outputs, hidden, harmonics)
        if self.langevin:
            self.langevin_features = TimeFeatures(harmonics)
            self.langevin_net = nn.Sequential(
                nn.Linear(2 * harmonics, hidden),
                nn.GELU(),
                nn.Linear(hidden, hidden),
                nn.GELU(),
                nn.Linear(hidden, dim if config.langevin_scale == "dimension" else 1),
            )
            _zero(self.langevin_net[-1], bias=0.01)
        self.backward_net = StateTimeNet(dim, 2 * dim, hidden, harmonics) if config.learned_backward else None
        has_flow = config.state_flow in ("plain", "forward_looking")
        self.flow_net = StateTimeNet(dim, 1, hidden, harmonics) if has_flow else None
        # The learner's log Z, at which flows start: the network learns what is left of them.
        self.register_buffer("flow_level", torch.zeros(()) if has_flow else None)

    def embed_times(self, t: Tensor, process: DiffusionProcess | None = None) -> TimeEmbedding:
        """Embedding of the times `t [T]` < 1 at which steps of `process` start.

        Raises ValueError where the policy is preconditioned and `process` is not given.
        """
        langevin_scale = _of_times(t, self.langevin_features, self.langevin_net) if self.langevin else None
        hidden = self.forward_net.embed(t)
        if not self.config.precondition:
            return TimeEmbedding(hidden, langevin_scale)
        if process is None:
            raise ValueError("policy.precondition = true: the policy's times need the process")
        return TimeEmbedding(hidden, langevin_scale, NoiseUnits.of(process, t))

    def forward(self, x: Tensor, embedding: TimeEmbedding, score: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Drift and log-variance offset at states `x`.

        Args:
            x: states `[..., D]`, e.g. `[B, D]` at one time or `[B, T, D]` on a whole grid.
            embedding: of the matching times; its leading dimensions broadcast against those of `x`.
            score: gradient of log R at `x`, `[..., D]`; needed with `langevin`, ignored without.

        Returns:
            `(drift [..., D], log_var [..., D] or None)`. Gradients flow to the parameters, to `x` and to `score`.
        """
        return self.drift(x, self.forward_net(self.inputs(x, embedding), embedding.hidden), embedding, score)

    @staticmethod
    def inputs(x: Tensor, embedding: TimeEmbedding) -> Tensor:
        """What `forward_net` sees of states x [..., D]."""
        return x if embedding.units is None else embedding.units.inputs(x)

    def is_plain(self, x: Tensor) -> bool:
        """Whether the policy on x is no more than its parameters, so that other code may evaluate it."""
        return is_plain(self, x)

    def drift(
        self, x: Tensor, out: Tensor, embedding: TimeEmbedding, score: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` from the output `out [..., outputs]` of `forward_net`, which may be overwritten."""
        drift, *others = (out,) if out.shape[-1] == self.dim else out.split(self.dim, dim=-1)
        log_var = self.config.log_var_range * others[-1].tanh() if self.learned_variance else None
        if embedding.units is not None:
            drift = embedding.units.scaled(x, drift, others[0])
        if self.langevin:
            if score is None or embedding.langevin_scale is None:
                raise ValueError("policy.langevin = true: the policy needs the score of the target at x")
            clip = self.config.score_clip
            drift = torch.addcmul(drift, embedding.langevin_scale, score.clamp(-clip, clip))
        return _clip(drift, self.config.drift_clip), log_var

    def backward_factors(self, x: Tensor, embedding: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Factors of P_B's contraction and variance at states `x [..., D]` after a step, each like `x`, near 1.

        `embedding` is `embed_backward` of the times of `x`. (None, None) where P_B is fixed. Gradients flow to the
        parameters and to `x`.
        """
        if self.backward_net is None or embedding is None:
            return None, None
        return self.factors(self.backward_net(x, embedding))

    def factors(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """`backward_factors` from the output `out [..., 2 D]` of `backward_net`."""
        mean, variance = (1.0 + self.config.backward_scale * out.tanh()).chunk(2, dim=-1)
        return mean, variance

    def embed_backward(self, t: Tensor) -> Tensor | None:
        """Embedding `[T, H]` for `backward_factors` of the times `t [T]` at which steps end; None for a fixed P_B."""
        return None if self.backward_net is None else self.backward_net.embed(t)


def _linear_layers(network: nn.Sequential) -> list[Layer]:
    return [(layer.weight, layer.bias) for layer in network if isinstance(layer, nn.Linear)]


def _of_times(t: Tensor, features: TimeFeatures, network: nn.Sequential) -> Tensor:
    """The network of the times' features: `t [T] -> [T, outputs]`."""
    if is_plain(network, t) and is_plain(features, t):
        return time_network(t, features.frequencies, features.phases, _linear_layers(network))
    return network(features(t))


def _clip(values: Tensor, limit: float) -> Tensor:
    """`values` within ±limit, where gradients pass; overwritten where none are wanted."""
    if torch.is_grad_enabled():
        # The way back of `clamp` makes three passes over the values, that of `hardtanh` one.
        return nn.functional.hardtanh(values, -limit, limit)
    return values.clamp_(-limit, limit)


def _zero(layer: nn.Module, bias: float = 0.0) -> None:
    assert isinstance(layer, nn.Linear)
    nn.init.zeros_(layer.weight)
    nn.init.constant_(layer.bias, bias)


__all__ = ["DiffusionPolicy", "PolicyConfig", "StateTimeNet", "TimeEmbedding", "TimeFeatures"]
