"""The yardstick: trajectory balance step by step, as one writes it down first, and autograd through every step."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.targets import Target


class NaiveTrajectoryBalance:
    """One update of trajectory balance: a rollout that keeps its graph, the loss, backward and Adam's step.

    Every step embeds its time, evaluates the policy, and takes the log-probabilities of both kernels from
    `torch.distributions`; states are detached. The process is the plain Brownian one on a grid times [T+1] from 0 to
    1; a Langevin policy's score is autograd's. The policy is trained in place: give it one of its own.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        log_z: Tensor,
        target: Target,
        diffusion_variance: float,
        times: Tensor,
        batch_size: int,
        exploration_std: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        if policy.config.precondition or policy.config.learned_backward:
            raise ValueError("the yardstick knows neither preconditioned policies nor a learned P_B")
        self.policy = policy
        self.log_z = nn.Parameter(log_z.detach().clone())
        self.target = target
        self.diffusion_variance = diffusion_variance
        self.times = times
        self.batch_size = batch_size
        self.exploration_std = exploration_std
        self.generator = generator
        groups: list[dict[str, Any]] = [
            {"params": list(policy.parameters())},
            {"params": [self.log_z], "lr": 1e-1},
        ]
        self.optimizer = torch.optim.Adam(groups, lr=1e-3)

    def __call__(self) -> None:
        """Update once."""
        loss, _ = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def loss(self) -> tuple[Tensor, Tensor]:
        """The loss of a new batch, differentiable in policy and log Z, and its states [B, T+1, D]."""
        times = self.times
        x = times.new_zeros(self.batch_size, self.policy.dim)
        states = [x]
        log_pf = log_pb = times.new_zeros(self.batch_size)
        for n in range(len(times) - 1):
            start, end = times[n], times[n + 1]
            dt = end - start
            drift, log_var = self._policy(x, start)
            variance = self.diffusion_variance * dt * log_var.exp()
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            mean = x + drift * dt
            following = (mean + (variance + self.exploration_std**2 * dt).sqrt() * noise).detach()
            log_pf = log_pf + Normal(mean, variance.sqrt()).log_prob(following).sum(-1)
            if n:
                back = start / end
                backward = Normal(following * back, (self.diffusion_variance * dt * back).sqrt())
                log_pb = log_pb + backward.log_prob(x).sum(-1)
            x = following
            states.append(x)
        log_reward = self.target.log_reward(x)
        loss = (self.log_z + log_pf - log_pb - log_reward).square().mean()
        return loss, torch.stack(states, 1)

    def _policy(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift and log-variance [B, D] at states x [B, D] and time t []."""
        policy, config = self.policy, self.policy.config
        net = policy.forward_net
        embedding = net.time_net(net.time_features(t.reshape(1)))
        out = net.joint_net(net.state_net(x) + embedding)
        drift, log_var = out, torch.zeros_like(x)
        if policy.learned_variance:
            drift, raw = out.chunk(2, -1)
            log_var = config.log_var_range * torch.tanh(raw)
        if policy.langevin:
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                (score,) = torch.autograd.grad(self.target.log_reward(leaf).sum(), leaf)
            scale = policy.langevin_net(policy.langevin_features(t.reshape(1)))
            drift = drift + scale * score.clamp(-config.score_clip, config.score_clip)
        return drift.clamp(-config.drift_clip, config.drift_clip), log_var


def diffusion_variance_of(process: object) -> float:
    """σ² per unit of time of the process that the yardstick can follow; ValueError for any other."""
    variance = getattr(process, "diffusion_variance", math.nan)
    if not math.isfinite(variance) or getattr(process, "schedule", None) != "constant":
        raise ValueError(f"{type(process).__name__}: the yardstick knows the Brownian process with constant noise only")
    return variance
