"""Hamiltonian Monte Carlo as a pure kernel, chains that adapt their step size, and the refiner that runs them.

Source: Duane, Kennedy, Pendleton & Roweth 1987; Neal 2011 (arXiv 1206.1901), section 3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.actors.mala import MalaInfo, MalaState, Refinement, mala_init, metropolis, run_chains
from driftstream.actors.refiner import ChainRefiner
from driftstream.envs.errors import require
from driftstream.envs.targets import CountedTarget, Target


@dataclass(frozen=True)
class HmcConfig:
    """One cycle: `chains` chains of `mcmc_steps` trajectories; end points accepted after `burn_in` are kept.

    A trajectory is `leapfrog_steps` leapfrog steps, one gradient each. Its step size is drawn within a fraction
    `jitter` of the adapted one, so that no period of the dynamics is met every time.
    """

    chains: int = 300
    mcmc_steps: int = 60
    burn_in: int = 30
    leapfrog_steps: int = 5
    initial_step_size: float = 0.1
    target_acceptance: float = 0.8
    jitter: float = 0.2

    def __post_init__(self) -> None:
        for name in ("chains", "mcmc_steps", "leapfrog_steps"):
            require(getattr(self, name) >= 1, f"refiner.options.hmc.{name}", getattr(self, name), "at least 1")
        allowed = f"between 0 and mcmc_steps - 1 = {self.mcmc_steps - 1}"
        require(0 <= self.burn_in < self.mcmc_steps, "refiner.options.hmc.burn_in", self.burn_in, allowed)
        step_size = self.initial_step_size
        require(step_size > 0, "refiner.options.hmc.initial_step_size", step_size, "a positive number")
        rate = self.target_acceptance
        require(0 < rate < 1, "refiner.options.hmc.target_acceptance", rate, "a fraction in (0, 1)")
        require(0 <= self.jitter < 1, "refiner.options.hmc.jitter", self.jitter, "a fraction in [0, 1)")


def leapfrog(
    state: MalaState, momentum: Tensor, target: Target | CountedTarget, step_size: float, leapfrog_steps: int
) -> tuple[MalaState, Tensor]:
    """Follow the Hamiltonian |p|²/2 - log R(x) for `leapfrog_steps` steps of `step_size`.

    `momentum [C, D]`. The state's cached score opens the first half kick, so that the cost is a gradient a step,
    and log R at the end. Time-reversible (negate the momentum) and volume-preserving; the energy's error is
    of second order in the step size.
    """
    x, score = state.x, state.score
    for step in range(leapfrog_steps):
        momentum = torch.add(momentum, score, alpha=step_size if step else 0.5 * step_size)
        x = torch.add(x, momentum, alpha=step_size)
        if step < leapfrog_steps - 1:
            score = target.score(x)
    end = mala_init(x, target)
    return end, torch.add(momentum, end.score, alpha=0.5 * step_size)


def hmc_log_accept(log_reward: Tensor, momentum: Tensor, end_log_reward: Tensor, end_momentum: Tensor) -> Tensor:
    """Log of the acceptance probability, min(0, H - H'), of a trajectory's end: `[...]` from momenta `[..., D]`.

    -inf where the log reward at the end is not finite or the momentum has diverged, so that such a move is rejected.
    """
    kinetic_change = 0.5 * (end_momentum.square().sum(-1) - momentum.square().sum(-1))
    log_accept = (end_log_reward - log_reward - kinetic_change).clamp_max_(0.0)
    defined = end_log_reward.isfinite() & kinetic_change.isfinite()
    return log_accept.masked_fill_(~defined, -math.inf)


def hmc_step(
    state: MalaState,
    target: Target | CountedTarget,
    step_size: float,
    leapfrog_steps: int,
    generator: torch.Generator | None = None,
) -> tuple[MalaState, MalaInfo]:
    """One trajectory of every chain: draw momenta, integrate, accept or reject. Leaves R invariant."""
    x = state.x
    momentum = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    end, end_momentum = leapfrog(state, momentum, target, step_size, leapfrog_steps)
    log_accept = hmc_log_accept(state.log_reward, momentum, end.log_reward, end_momentum)
    return metropolis(state, end, log_accept, generator)


def run_hmc(
    seeds: Tensor,
    target: Target | CountedTarget,
    config: HmcConfig,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Refinement:
    """One cycle of HMC from `seeds [C, D]`: `run_chains` of `hmc_step`, its step size jittered at every trajectory."""

    def move(state: MalaState, size: float) -> tuple[MalaState, MalaInfo]:
        offset = 2.0 * torch.rand((), generator=generator, device=seeds.device).item() - 1.0
        return hmc_step(state, target, size * (1.0 + config.jitter * offset), config.leapfrog_steps, generator)

    return run_chains(seeds, target, config, step_size, move)


class HmcRefiner(ChainRefiner):
    """Chains of Hamiltonian Monte Carlo; the adapted step size carries over."""

    Options = HmcConfig
    cycle = staticmethod(run_hmc)
