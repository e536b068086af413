"""Simulation that the loss is differentiated through: the pathwise gradient of PIS, DIS and DDS."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.densities import LOG_2PI
from driftstream.envs.errors import require
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import CountedTarget, Target


@dataclass(frozen=True)
class RolloutConfig:
    """How the learner simulates what it differentiates through.

    With `checkpoint_segments` S > 1 only the states between S parts of the path are kept, and each part is
    simulated again on the way back: about 1/S of the memory for about half as much time again. `detach_score`
    leaves the target's second derivatives out of the gradient of Langevin policies.
    """

    checkpoint_segments: int = 1
    detach_score: bool = False

    def __post_init__(self) -> None:
        segments = self.checkpoint_segments
        require(segments >= 1, "rollout.checkpoint_segments", segments, "at least 1")


def pathwise_log_weight(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target | CountedTarget,
    times: Tensor,
    batch_size: int,
    config: RolloutConfig,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Log weights [B] of newly simulated trajectories on the grid times [T+1], differentiable in the policy.

    The noise is drawn first, and everything after it is a function of the parameters: states, scores (unless
    detached) and the target's log reward, whose gradient is its score. Memory is O(B T) of the network's
    activations, or a part of it with checkpoints.

    Source: Zhang & Chen 2022 (PIS, arXiv 2111.15141), equation 11; Chen et al. 2016 (arXiv 1604.06174) for checkpoints.
    """
    dim, sampling_steps = policy.dim, len(times) - 1
    x = process.sample_prior(batch_size, dim, generator, times.device, times.dtype)
    log_ratio = process.log_prior(x)
    noise = torch.randn(sampling_steps, batch_size, dim, generator=generator, device=times.device, dtype=times.dtype)
    embeddings, backward = policy.embed_times(times[:-1], process).unbind(), policy.embed_backward(times[1:])
    steps = process.steps(times)
    # P_F of a step is that of its noise, and so known without the state; only its scale can depend on parameters.
    log_ratio = log_ratio - 0.5 * noise.square().sum((0, 2))
    log_ratio = log_ratio - 0.5 * dim * (process.kernels_like(times, x).variance.log() + LOG_2PI).sum()

    def simulate(x: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """From x at step `first` to the state at `last`, with the sum of log P_F's changing part - log P_B."""
        states, log_vars = [x], []
        for n in range(first, last):
            score = None
            if policy.langevin:
                score = target.score(x.detach() if config.detach_score else x)
            drift, log_var = policy(x, embeddings[n], score)
            x = process.step(x, drift, steps[n], noise[n], log_var)
            states.append(x)
            if log_var is not None:
                log_vars.append(log_var)
        path = torch.stack(states, 1)
        factors = policy.backward_factors(path[:, 1:], None if backward is None else backward[first:last])
        log_ratio = -process.log_pb(path, times[first : last + 1], *factors).sum(-1)
        if log_vars:
            log_ratio = log_ratio - 0.5 * torch.stack(log_vars).sum((0, 2))
        return x, log_ratio

    count = min(config.checkpoint_segments, sampling_steps)
    bounds = [round(sampling_steps * part / count) for part in range(count + 1)]
    for first, last in itertools.pairwise(bounds):
        if count == 1:
            x, part = simulate(x, first, last)
        else:
            x, part = checkpoint(simulate, x, first, last, use_reentrant=False, preserve_rng_state=False)
        log_ratio = log_ratio + part
    return _log_reward(target, x) - log_ratio


def _log_reward(target: Target | CountedTarget, x: Tensor) -> Tensor:
    """log R(x) [B], with the target's own score as its gradient: `log_reward` need not be differentiable."""
    log_reward, score = target.log_reward_and_score(x.detach())
    return log_reward + ((x - x.detach()) * score).sum(-1)
