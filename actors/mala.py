"""The Metropolis-adjusted Langevin algorithm as a pure kernel, and chains that adapt their step size.

Source: Roberts & Tweedie 1996; Sendera et al. 2024 (arXiv 2402.05098), algorithm 2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from driftstream.envs.errors import require
from driftstream.envs.targets import CountedTarget, Target

GROWTH, SHRINKAGE = 1.1, 0.9


@dataclass(frozen=True)
class MalaConfig:
    """One refinement cycle: `chains` chains of `mcmc_steps` steps; states accepted after `burn_in` are kept."""

    chains: int = 300
    mcmc_steps: int = 200
    burn_in: int = 100
    initial_step_size: float = 0.01
    target_acceptance: float = 0.574
    beta: float = 1.0

    def __post_init__(self) -> None:
        require(self.chains >= 1, "refiner.mala.chains", self.chains, "at least 1")
        require(self.mcmc_steps >= 1, "refiner.mala.mcmc_steps", self.mcmc_steps, "at least 1")
        allowed = f"between 0 and mcmc_steps - 1 = {self.mcmc_steps - 1}"
        require(0 <= self.burn_in < self.mcmc_steps, "refiner.mala.burn_in", self.burn_in, allowed)
        step_size = self.initial_step_size
        require(step_size > 0, "refiner.mala.initial_step_size", step_size, "a positive number")
        rate = self.target_acceptance
        require(0 < rate < 1, "refiner.mala.target_acceptance", rate, "a fraction in (0, 1)")
        require(self.beta > 0, "refiner.mala.beta", self.beta, "a positive number")


def mala_proposal(x: Tensor, score: Tensor, step_size: float, noise: Tensor) -> Tensor:
    """Langevin proposal x + step_size * score + sqrt(2 step_size) * noise; all `[..., D]`."""
    return torch.add(x, score, alpha=step_size).add_(noise, alpha=math.sqrt(2.0 * step_size))


def mala_log_accept(
    x: Tensor,
    log_reward: Tensor,
    score: Tensor,
    proposal: Tensor,
    proposal_log_reward: Tensor,
    proposal_score: Tensor,
    step_size: float,
    beta: float = 1.0,
) -> Tensor:
    """Log of the Metropolis-Hastings acceptance probability, min(0, .), of a move from `x` to `proposal`.

    Args:
        x, score, proposal, proposal_score: `[..., D]`; the scores are the gradients of the log rewards.
        log_reward, proposal_log_reward: `[...]`.
        step_size: of the proposal.
        beta: inverse temperature on the rewards inside the ratio (the proposal's drift has none).

    Returns:
        `[...]`; -inf where the proposal's log reward or score is not finite, so that such a move is rejected.
    """
    forward = (proposal - x).sub_(score, alpha=step_size)
    backward = (x - proposal).sub_(proposal_score, alpha=step_size)
    log_q_ratio = (forward.square_().sum(-1) - backward.square_().sum(-1)) / (4.0 * step_size)
    log_accept = (beta * (proposal_log_reward - log_reward) + log_q_ratio).clamp_max_(0.0)
    defined = proposal_log_reward.isfinite() & log_q_ratio.isfinite()
    return log_accept.masked_fill_(~defined, -math.inf)


@dataclass(frozen=True)
class MalaState:
    """Positions of the chains `[C, D]` with their cached log reward `[C]` and score `[C, D]`."""

    x: Tensor
    log_reward: Tensor
    score: Tensor


@dataclass(frozen=True)
class MalaInfo:
    """Of one step: which chains moved, `accepted [C]`, and their share."""

    accepted: Tensor
    acceptance_rate: float


def mala_init(x: Tensor, target: Target | CountedTarget) -> MalaState:
    """State of chains started at `x [C, D]`."""
    log_reward, score = target.log_reward_and_score(x)
    return MalaState(x, log_reward, score)


def finite_chains(seeds: Tensor, target: Target | CountedTarget) -> MalaState:
    """State of chains from those of `seeds [C, D]` whose log reward is finite."""
    state = mala_init(seeds, target)
    finite = state.log_reward.isfinite()
    return MalaState(state.x[finite], state.log_reward[finite], state.score[finite])


def metropolis(
    state: MalaState, proposal: MalaState, log_accept: Tensor, generator: torch.Generator | None = None
) -> tuple[MalaState, MalaInfo]:
    """Move every chain to its proposal with probability exp(log_accept [C])."""
    uniform = torch.rand(log_accept.shape, generator=generator, device=log_accept.device, dtype=log_accept.dtype)
    accepted = uniform.log_() < log_accept
    moved = accepted.unsqueeze(-1)
    return (
        MalaState(
            torch.where(moved, proposal.x, state.x),
            torch.where(accepted, proposal.log_reward, state.log_reward),
            torch.where(moved, proposal.score, state.score),
        ),
        MalaInfo(accepted, float(accepted.float().mean())),
    )


def mala_step(
    state: MalaState,
    target: Target | CountedTarget,
    step_size: float,
    beta: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[MalaState, MalaInfo]:
    """One step of every chain: propose, evaluate, accept or reject. Leaves R^beta invariant."""
    x = state.x
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    proposal = mala_proposal(x, state.score, step_size, noise)
    log_reward, score = target.log_reward_and_score(proposal)
    log_accept = mala_log_accept(x, state.log_reward, state.score, proposal, log_reward, score, step_size, beta)
    return metropolis(state, MalaState(proposal, log_reward, score), log_accept, generator)


def adapt_step_size(step_size: float, acceptance_rate: float, target_acceptance: float) -> float:
    """Step size x1.1 above the target acceptance rate, x0.9 below it."""
    return step_size * (GROWTH if acceptance_rate > target_acceptance else SHRINKAGE)


@dataclass(frozen=True)
class Refinement:
    """Outcome of one cycle: kept states `terminal [N, D]` with `log_reward [N]`, and the chains' statistics."""

    terminal: Tensor
    log_reward: Tensor
    step_size: float
    acceptance_rate: float


def gather(
    seeds: Tensor, kept: Sequence[tuple[Tensor, Tensor]], step_size: float, rates: Sequence[float]
) -> Refinement:
    """The cycle's outcome from pieces `(x [n, D], log_reward [n])` and acceptance rates; empty without any."""
    terminal = torch.cat([seeds[:0], *(x for x, _ in kept)])
    log_reward = torch.cat([seeds.new_empty(0), *(values for _, values in kept)])
    return Refinement(terminal, log_reward, step_size, sum(rates) / max(len(rates), 1))


class CycleConfig(Protocol):
    """What a cycle of chains needs of its configuration."""

    @property
    def mcmc_steps(self) -> int: ...
    @property
    def burn_in(self) -> int: ...
    @property
    def initial_step_size(self) -> float: ...
    @property
    def target_acceptance(self) -> float: ...


@torch.no_grad()
def run_chains(
    seeds: Tensor,
    target: Target | CountedTarget,
    config: CycleConfig,
    step_size: float | None,
    move: Callable[[MalaState, float], tuple[MalaState, MalaInfo]],
) -> Refinement:
    """Run one cycle of a kernel, `move(state, step size)`, from `seeds [C, D]`; keep what is accepted after burn-in.

    `step_size` continues the adaptation of an earlier cycle (None: the configured initial one). Seeds whose log
    reward is not finite are left out. The step size adapts during burn-in only, so that the kept states come from a
    kernel that leaves the target invariant.
    """
    step_size = config.initial_step_size if step_size is None else step_size
    state = finite_chains(seeds, target)
    kept: list[tuple[Tensor, Tensor]] = []
    rates: list[float] = []
    for step in range(config.mcmc_steps if len(state.x) else 0):
        state, info = move(state, step_size)
        if step < config.burn_in:
            step_size = adapt_step_size(step_size, info.acceptance_rate, config.target_acceptance)
        else:
            rates.append(info.acceptance_rate)
            kept.append((state.x[info.accepted], state.log_reward[info.accepted]))
    return gather(seeds, kept, step_size, rates)


def run_mala(
    seeds: Tensor,
    target: Target | CountedTarget,
    config: MalaConfig,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Refinement:
    """One cycle of MALA from `seeds [C, D]`: `run_chains` of `mala_step`."""

    def move(state: MalaState, size: float) -> tuple[MalaState, MalaInfo]:
        return mala_step(state, target, size, config.beta, generator)

    return run_chains(seeds, target, config, step_size, move)
