"""Parallel tempering: MALA at a ladder of temperatures at once, with swaps between neighbours.

Hot replicas cross the barriers that keep chains of MALA in their modes; swaps bring what they find down to R.

Source: Geyer 1991; Earl & Deem 2005 (arXiv physics/0508111); alternating swaps: Syed et al. 2022 (arXiv 1905.02939).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.actors.mala import (
    MalaState,
    Refinement,
    adapt_step_size,
    finite_chains,
    gather,
    mala_init,
    mala_log_accept,
    mala_proposal,
    metropolis,
)
from driftstream.actors.refiner import ChainRefiner
from driftstream.envs.errors import require
from driftstream.envs.targets import CountedTarget, Target


@dataclass(frozen=True)
class TemperingConfig:
    """One cycle: `chains` ladders of `temperatures` replicas, each `mcmc_steps` steps; R's are kept after `burn_in`.

    Inverse temperatures fall geometrically from 1 to `beta_min`. A step costs chains x temperatures evaluations,
    in one call of the target.
    """

    chains: int = 300
    mcmc_steps: int = 100
    burn_in: int = 50
    temperatures: int = 8
    beta_min: float = 0.03
    initial_step_size: float = 0.01
    target_acceptance: float = 0.574

    def __post_init__(self) -> None:
        prefix = "refiner.options.tempering"
        require(self.chains >= 1, f"{prefix}.chains", self.chains, "at least 1")
        require(self.mcmc_steps >= 1, f"{prefix}.mcmc_steps", self.mcmc_steps, "at least 1")
        allowed = f"between 0 and mcmc_steps - 1 = {self.mcmc_steps - 1}"
        require(0 <= self.burn_in < self.mcmc_steps, f"{prefix}.burn_in", self.burn_in, allowed)
        require(self.temperatures >= 2, f"{prefix}.temperatures", self.temperatures, "at least 2")
        require(0 < self.beta_min < 1, f"{prefix}.beta_min", self.beta_min, "a fraction in (0, 1)")
        step_size = self.initial_step_size
        require(step_size > 0, f"{prefix}.initial_step_size", step_size, "a positive number")
        rate = self.target_acceptance
        require(0 < rate < 1, f"{prefix}.target_acceptance", rate, "a fraction in (0, 1)")


@dataclass(frozen=True)
class TemperingInfo:
    """Of one step, by temperature and chain: which replicas moved and which were swapped, both `[K, C]`."""

    accepted: Tensor
    swapped: Tensor


def temperature_ladder(temperatures: int, beta_min: float) -> tuple[float, ...]:
    """Inverse temperatures `[K]`, geometric from 1 down to `beta_min`."""
    return tuple(beta_min ** (k / (temperatures - 1)) for k in range(temperatures))


def swap_log_accept(
    log_reward: Tensor, neighbour_log_reward: Tensor, beta: Tensor | float, neighbour_beta: Tensor | float
) -> Tensor:
    """Log of the probability, min(0, (β - β')(log R(x') - log R(x))), that replicas at β and β' swap states."""
    return ((beta - neighbour_beta) * (neighbour_log_reward - log_reward)).clamp_max(0.0)


def swap_neighbours(
    state: MalaState, betas: Tensor, first: int, generator: torch.Generator | None = None
) -> tuple[MalaState, Tensor]:
    """Offer the pairs of temperatures (first, first + 1), (first + 2, first + 3), … a swap, chain by chain.

    Args:
        state: replicas `[K*C, ...]`, temperature by temperature.
        betas: inverse temperatures `[K]`.
        first: 0 or 1.

    Returns:
        The state after the swaps, and which replicas took part in one, `[K, C]`. The product of the R^β, and so
        R at β = 1, stays invariant.
    """
    by_temperature = state.log_reward.view(len(betas), -1)
    chains = by_temperature.shape[1]
    cold = torch.arange(first, len(betas) - 1, 2, device=betas.device)
    log_accept = swap_log_accept(
        by_temperature[cold], by_temperature[cold + 1], betas[cold, None], betas[cold + 1, None]
    )
    uniform = torch.rand(log_accept.shape, generator=generator, device=betas.device, dtype=log_accept.dtype)
    accepted = (uniform.log_() < log_accept).long()
    shift = torch.zeros(by_temperature.shape, dtype=torch.long, device=betas.device)
    shift[cold], shift[cold + 1] = accepted, -accepted
    source = torch.arange(len(state.x), device=betas.device) + chains * shift.flatten()
    return MalaState(state.x[source], state.log_reward[source], state.score[source]), shift != 0


def tempered_mala_step(
    state: MalaState,
    target: Target | CountedTarget,
    betas: Tensor,
    step_sizes: Tensor,
    generator: torch.Generator | None = None,
) -> tuple[MalaState, Tensor]:
    """One MALA step of every replica towards its R^β, with one call of the target.

    `state` holds the replicas `[K*C, ...]`, temperature by temperature, with log R and its score untempered;
    `betas` and `step_sizes` are `[K]`. Returns the new state and which replicas moved, `[K, C]`.
    """
    chains = len(state.x) // len(betas)
    beta = betas.repeat_interleave(chains)
    # In units of the square root of its step size, every replica takes MALA steps of size 1.
    unit = step_sizes.sqrt().repeat_interleave(chains).unsqueeze(-1)
    drift = unit * beta.unsqueeze(-1)
    noise = torch.randn(state.x.shape, generator=generator, device=state.x.device, dtype=state.x.dtype)
    x, score = state.x / unit, state.score * drift
    moved = mala_proposal(x, score, 1.0, noise)
    proposal = mala_init(moved * unit, target)
    log_accept = mala_log_accept(
        x, beta * state.log_reward, score, moved, beta * proposal.log_reward, proposal.score * drift, 1.0
    )
    state, info = metropolis(state, proposal, log_accept, generator)
    return state, info.accepted.view(len(betas), chains)


def tempering_step(
    state: MalaState,
    target: Target | CountedTarget,
    betas: Tensor,
    step_sizes: Tensor,
    first: int,
    generator: torch.Generator | None = None,
) -> tuple[MalaState, TemperingInfo]:
    """A MALA step at every temperature, then swaps of the neighbours that `first` (0 or 1) names.

    Shapes as for `tempered_mala_step` and `swap_neighbours`. Leaves R invariant at β = 1.
    """
    state, accepted = tempered_mala_step(state, target, betas, step_sizes, generator)
    state, swapped = swap_neighbours(state, betas, first, generator)
    return state, TemperingInfo(accepted, swapped)


@torch.no_grad()
def run_tempering(
    seeds: Tensor,
    target: Target | CountedTarget,
    config: TemperingConfig,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Refinement:
    """Run one cycle of ladders from `seeds [C, D]` and keep what is new at β = 1 after burn-in.

    Every replica of a ladder starts from the ladder's seed; seeds whose log reward is not finite are left out.
    `step_size` is that of β = 1 and continues the adaptation of an earlier cycle (default: the configured initial
    one); at β it starts from step_size / β. All adapt during burn-in only, each by its own acceptance rate. Kept is
    the state at β = 1 where it moved or was swapped in, once a step, as MALA keeps accepted states: one that stayed
    is there already, and a replica that is stuck would fill the replay with copies. `acceptance_rate` and
    `step_size` of the outcome are those of MALA at β = 1.
    """
    ladder = temperature_ladder(config.temperatures, config.beta_min)
    betas = torch.tensor(ladder, dtype=seeds.dtype, device=seeds.device)
    first_size = config.initial_step_size if step_size is None else step_size
    sizes = [first_size / beta for beta in ladder]
    state = finite_chains(seeds, target)
    chains, replicas = len(state.x), config.temperatures
    state = MalaState(state.x.repeat(replicas, 1), state.log_reward.repeat(replicas), state.score.repeat(replicas, 1))
    kept: list[tuple[Tensor, Tensor]] = []
    rates: list[float] = []
    for step in range(config.mcmc_steps if chains else 0):
        state, info = tempering_step(state, target, betas, betas.new_tensor(sizes), step % 2, generator)
        by_temperature = info.accepted.float().mean(1).tolist()
        if step < config.burn_in:
            pairs = zip(sizes, by_temperature, strict=True)
            sizes = [adapt_step_size(size, rate, config.target_acceptance) for size, rate in pairs]
        else:
            rates.append(by_temperature[0])
            new = info.accepted[0] | info.swapped[0]
            kept.append((state.x[:chains][new], state.log_reward[:chains][new]))
    return gather(seeds, kept, sizes[0], rates)


class TemperingRefiner(ChainRefiner):
    """Parallel tempering; the adapted step size at β = 1 carries over."""

    Options = TemperingConfig
    cycle = staticmethod(run_tempering)
