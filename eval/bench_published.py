"""The published way of one update of trajectory balance, operation by operation.

It is the cost that published training times are made of. Source: the implementation of Sendera et al. 2024 (arXiv
2402.05098), whose operations are kept; the code is our own.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.densities import LOG_2PI
from driftstream.envs.targets import Target
from driftstream.envs.targets_gmm import GaussianMixture
from driftstream.eval.bench_naive import NaiveTrajectoryBalance


class PublishedTrajectoryBalance(NaiveTrajectoryBalance):
    """One update as published: variances as logarithms, and every step written into columns that keep the graph.

    A Gaussian mixture's log density is one multivariate Gaussian after another, and the states of Langevin policies
    keep the graph back to the first, though no parameter is reached through it. The loss is that of
    `NaiveTrajectoryBalance`, twice the published one.
    """

    def __init__(self, policy: DiffusionPolicy, *arguments: Any) -> None:
        super().__init__(policy, *arguments)
        self.log_reward = log_density(self.target)

    def loss(self) -> tuple[Tensor, Tensor]:
        times, rows, dim = self.times, self.batch_size, self.policy.dim
        steps = len(times) - 1
        log_pf, log_pb = times.new_zeros(rows, steps), times.new_zeros(rows, steps)
        log_flow, states = times.new_zeros(rows, steps + 1), times.new_zeros(rows, steps + 1, dim)
        x = times.new_zeros(rows, dim)
        for n in range(steps):
            start, end = float(times[n]), float(times[n + 1])
            dt = end - start
            mean, log_var = self._gaussian(x, times[n])
            log_flow[:, n] = self.log_z
            widened = log_var
            if self.exploration_std:
                widened = torch.logaddexp(log_var, torch.full_like(log_var, 2.0 * math.log(self.exploration_std)))
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            following = x + dt * mean.detach() + math.sqrt(dt) * (widened.detach() / 2).exp() * noise
            standard = (following - x - dt * mean) / (math.sqrt(dt) * (log_var / 2).exp())
            log_pf[:, n] = -0.5 * (standard**2 + LOG_2PI + math.log(dt) + log_var).sum(1)
            mean_factor, variance_factor = torch.ones_like(x), torch.ones_like(x)
            if n:
                back_mean = following - dt * following / end * mean_factor
                back_variance = self.diffusion_variance * dt * start / end * variance_factor
                backward = (x - back_mean) / back_variance.sqrt()
                log_pb[:, n] = -0.5 * (backward**2 + LOG_2PI + back_variance.log()).sum(1)
            x = following
            states[:, n + 1] = x
        with torch.no_grad():
            end_reward = self.log_reward(x)
        return (log_pf.sum(1) + log_flow[:, 0] - log_pb.sum(1) - end_reward).square().mean(), states

    def _gaussian(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Drift and log variance rate [B, D] at states x [B, D] and time t []."""
        policy, config = self.policy, self.policy.config
        net = policy.forward_net
        score = None
        if policy.langevin:
            x.requires_grad_(True)
            with torch.enable_grad():
                (score,) = torch.autograd.grad(self.log_reward(x).sum(), x)
            score = score.detach().nan_to_num().clip(-config.score_clip, config.score_clip)
        embedding = net.time_net(net.time_features(t.reshape(1))).repeat(len(x), 1)
        out = net.joint_net(net.state_net(x) + embedding)
        if score is not None:
            out[..., : policy.dim] += policy.langevin_net(policy.langevin_features(t.reshape(1))) * score
        out = torch.clip(out, -config.drift_clip, config.drift_clip)
        mean, log_var = out[..., : policy.dim], torch.zeros_like(x)
        if policy.learned_variance:
            log_var = out[..., policy.dim :].tanh() * config.log_var_range
        return mean, log_var + math.log(self.diffusion_variance)


def published_policy(policy: DiffusionPolicy) -> DiffusionPolicy:
    """A copy whose network has outputs for the variance even where it is fixed, as the published one has."""
    policy = copy.deepcopy(policy)
    last: Any = policy.forward_net.joint_net[-1]
    if not policy.learned_variance:
        wider = nn.Linear(last.in_features, 2 * last.out_features)
        nn.init.zeros_(wider.weight).data[: last.out_features] = last.weight.data
        nn.init.zeros_(wider.bias).data[: last.out_features] = last.bias.data
        policy.forward_net.joint_net[-1] = wider
    return policy


def log_density(target: Target) -> Callable[[Tensor], Tensor]:
    """The target's log density as one writes it down first: of a Gaussian mixture, one distribution a mode."""
    if not isinstance(target, GaussianMixture):
        return target.log_reward
    weights, covariance = target.weights.log(), target.std**2 * torch.eye(target.dim, dtype=torch.float64)
    modes: dict[torch.dtype, list[MultivariateNormal]] = {}

    def log_reward(x: Tensor) -> Tensor:
        if x.dtype not in modes:
            modes[x.dtype] = [MultivariateNormal(mean.to(x.dtype), covariance.to(x.dtype)) for mean in target.means]
        each = torch.stack([mode.log_prob(x) for mode in modes[x.dtype]])
        return torch.logsumexp(each + weights.to(x.dtype).unsqueeze(-1), 0)

    return log_reward
