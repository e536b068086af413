"""Annealed importance sampling: from a Gaussian around the seeds to R, by MALA moves through geometric bridges.

Source: Neal 2001 (arXiv physics/9803008); with resampling on the way: Del Moral, Doucet & Jasra 2006
(arXiv cond-mat/0212648); step sizes that adapt to the particles: Beskos et al. 2016 (arXiv 1306.6462).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from driftstream.actors.mala import (
    MalaInfo,
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

CORE = 0.1
"""Share of the seeds by whose distance from their median the width of their core is measured."""


@dataclass(frozen=True)
class AnnealedConfig:
    """One cycle: `chains` particles, each `mcmc_steps` bridges with a MALA step on each, then resampled by weight.

    The Gaussian that they start from has the seeds' mean, and per coordinate `broadening` times their standard
    deviation, or `min_std` if that is more. With `cores` a target that has a `noise_range` has narrower ones beside it
    (`GaussianBase.around`), which reach what is narrow whether or not the policy can follow. Bridge k is at
    β = (k / mcmc_steps)^`power`. Particles are resampled on the way too, where their effective sample size falls below
    the fraction `resample_below` (0: never).
    """

    chains: int = 300
    mcmc_steps: int = 200
    broadening: float = 1.5
    min_std: float = 2.0
    cores: bool = True
    power: float = 3.0
    resample_below: float = 0.5
    initial_step_size: float = 0.01
    target_acceptance: float = 0.574

    def __post_init__(self) -> None:
        prefix = "refiner.options.annealed"
        require(self.chains >= 1, f"{prefix}.chains", self.chains, "at least 1")
        require(self.mcmc_steps >= 1, f"{prefix}.mcmc_steps", self.mcmc_steps, "at least 1")
        for name in ("broadening", "min_std", "power", "initial_step_size"):
            require(getattr(self, name) > 0, f"{prefix}.{name}", getattr(self, name), "a positive number")
        fraction = self.resample_below
        require(0 <= fraction < 1, f"{prefix}.resample_below", fraction, "a fraction in [0, 1), 0 for never")
        rate = self.target_acceptance
        require(0 < rate < 1, f"{prefix}.target_acceptance", rate, "a fraction in (0, 1)")


@dataclass(frozen=True)
class GaussianBase:
    """Where annealing starts: K equally likely Gaussians of independent coordinates, `mean [K, D]` and `std [K, D]`."""

    mean: Tensor
    std: Tensor

    @classmethod
    def around(cls, seeds: Tensor, broadening: float, min_std: float, narrowest: float | None = None) -> "GaussianBase":
        """Mean and `broadening` times the standard deviation of `seeds [C, D]`, at least `min_std`.

        A standard deviation may be that of a few far seeds. So where the target says how narrow it is somewhere, there
        are two Gaussians more, about the median: one narrower by the factor by which the seeds' core is (a Gaussian
        with as many near the median), and one by that factor again, as seeds may miss what is narrow. Coordinates
        without heavy tails are as wide in all three, and none becomes narrower than `narrowest`.
        """
        mean, spread = seeds.mean(0), seeds.std(0, correction=0)
        wide = (broadening * spread).clamp_min(min_std)
        if narrowest is None:
            return cls(mean[None], wide[None])
        median = seeds.median(0).values
        core = (seeds - median).abs().quantile(CORE, 0) / NormalDist().inv_cdf(0.5 + 0.5 * CORE)
        factor = (core / spread).nan_to_num(1.0).clamp_max(1.0)
        stds = torch.stack([wide, factor * wide, factor.square() * wide])
        return cls(torch.stack([mean, median, median]), stds.maximum(wide.clamp_max(narrowest)))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws `[n, D]`, of every Gaussian in turn, the first by chance."""
        mean, which = self.mean, torch.arange(n, device=self.mean.device)
        if len(mean) > 1:
            which += torch.randint(len(mean), (1,), generator=generator, device=mean.device)
        which %= len(mean)
        noise = torch.randn(n, mean.shape[1], generator=generator, device=mean.device, dtype=mean.dtype)
        return mean[which] + self.std[which] * noise

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised log density `[...]` and its gradient `[..., D]` at x `[..., D]`."""
        standard, each = self._each(x)
        share = each.softmax(-1).unsqueeze(-1)
        return each.logsumexp(-1) - math.log(len(self.mean)), -(share * standard / self.std).sum(-2)

    def log_prob(self, x: Tensor) -> Tensor:
        """Normalised log density: x `[..., D]` -> `[...]`."""
        return self._each(x)[1].logsumexp(-1) - math.log(len(self.mean))

    def _each(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised x `[..., K, D]` and log density `[..., K]` of every Gaussian."""
        standard = (x.unsqueeze(-2) - self.mean) / self.std
        return standard, -(0.5 * standard.square() + self.std.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def bridge(state: MalaState, base: GaussianBase, beta: float) -> tuple[Tensor, Tensor]:
    """(1 - β) log p_0 + β log R `[C]` and its gradient `[C, D]`, from the state's cached log R and score."""
    log_prob, score = base.log_prob_and_score(state.x)
    return torch.lerp(log_prob, state.log_reward, beta), torch.lerp(score, state.score, beta)


def bridge_step(
    state: MalaState,
    target: Target | CountedTarget,
    base: GaussianBase,
    beta: float,
    step_size: float,
    generator: torch.Generator | None = None,
) -> tuple[MalaState, MalaInfo]:
    """One MALA step of every particle on the bridge at `beta`, which it leaves invariant. States cache R's values."""
    noise = torch.randn(state.x.shape, generator=generator, device=state.x.device, dtype=state.x.dtype)
    log_bridge, score = bridge(state, base, beta)
    proposal = mala_init(mala_proposal(state.x, score, step_size, noise), target)
    log_accept = mala_log_accept(
        state.x, log_bridge, score, proposal.x, *bridge(proposal, base, beta), step_size=step_size
    )
    return metropolis(state, proposal, log_accept, generator)


@dataclass(frozen=True)
class Annealed:
    """Particles at R: their state `[n, ...]`, `log_weight [n]` in float64, and the statistics of their moves.

    `particles` is how many there were at first; those that started where the log reward is not finite have weight 0
    and are left out. The mean of exp(log_weight) over all of them estimates Z.
    """

    state: MalaState
    log_weight: Tensor
    particles: int
    step_size: float
    acceptance_rate: float

    @property
    def log_z(self) -> float:
        """The estimate of log Z; -inf where no particle has any weight."""
        return self.log_weight.logsumexp(0).item() - math.log(self.particles)


@torch.no_grad()
def anneal(
    base: GaussianBase,
    particles: int,
    target: Target | CountedTarget,
    config: AnnealedConfig,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Annealed:
    """Take `particles` draws from `base` to R, with a MALA step on each of the configured bridges, and weigh them.

    The step size adapts to the share of particles that moved on the bridge before, as it must shrink on the way
    from a broad Gaussian to R. Every move leaves its bridge invariant; that the particles choose its size together
    makes the estimate of Z consistent in their number rather than unbiased at any number.
    """
    step_size = config.initial_step_size if step_size is None else step_size
    state = finite_chains(base.sample(particles, generator), target)
    log_weight = torch.zeros(len(state.x), dtype=torch.float64, device=state.x.device)
    before, rate = 0.0, 0.0
    for step in range(1, config.mcmc_steps + 1 if len(state.x) else 0):
        beta = (step / config.mcmc_steps) ** config.power
        log_weight += (beta - before) * (state.log_reward - base.log_prob(state.x))
        if effective_share(log_weight) < config.resample_below:
            state, log_weight = resampled(state, log_weight, generator)
        state, info = bridge_step(state, target, base, beta, step_size, generator)
        step_size = adapt_step_size(step_size, info.acceptance_rate, config.target_acceptance)
        before = beta
        rate += info.acceptance_rate / config.mcmc_steps
    return Annealed(state, log_weight, particles, step_size, rate)


def systematic_resample(log_weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Indices `[n]` of particles, each drawn floor or ceil of n times its share of the weights `[n]` times.

    Source: Kitagawa 1996.
    """
    n, share = len(log_weight), log_weight.softmax(0)
    cumulative = share.cumsum(0)
    offset = torch.rand((), generator=generator, device=share.device, dtype=share.dtype)
    positions = (torch.arange(n, device=share.device) + offset) / n * cumulative[-1]
    # Rounding may put the last position at the end of the last interval, which is open.
    return torch.searchsorted(cumulative, positions, right=True).clamp_max(int(share.nonzero()[-1]))


def effective_share(log_weight: Tensor) -> float:
    """Kish's effective sample size of the weights `[n]` as a fraction of n."""
    share = log_weight.softmax(0)
    return 1.0 / (len(share) * share.square().sum().item())


def resampled(
    state: MalaState, log_weight: Tensor, generator: torch.Generator | None = None
) -> tuple[MalaState, Tensor]:
    """Particles drawn by weight (`systematic_resample`), and their equal log weights `[n]` of the same total."""
    chosen = systematic_resample(log_weight, generator)
    mean = log_weight.logsumexp(0) - math.log(len(log_weight))
    return MalaState(state.x[chosen], state.log_reward[chosen], state.score[chosen]), mean.expand_as(log_weight).clone()


@torch.no_grad()
def run_annealed(
    seeds: Tensor,
    target: Target | CountedTarget,
    config: AnnealedConfig,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> Refinement:
    """Anneal as many particles as there are `seeds [C, D]` from a Gaussian around them, and resample by weight.

    Of the seeds only mean and spread are used; those whose log reward is not finite are left out, and so are
    particles that start where it is not. The outcome holds one state for each of the others: they approximate R,
    and several are equal where few particles carry the weight. `step_size` continues the adaptation of an earlier
    cycle (default: the configured initial one); `acceptance_rate` is the mean over all bridges.
    """
    step_size = config.initial_step_size if step_size is None else step_size
    seeds = seeds[target.log_reward(seeds).isfinite()]
    if not len(seeds):
        return gather(seeds, [], step_size, [])
    narrowest = math.sqrt(target.noise_range[1]) if config.cores and target.noise_range else None
    base = GaussianBase.around(seeds, config.broadening, config.min_std, narrowest)
    annealed = anneal(base, len(seeds), target, config, step_size, generator)
    state = annealed.state
    if len(state.x):
        state, _ = resampled(state, annealed.log_weight, generator)
    return gather(seeds, [(state.x, state.log_reward)], annealed.step_size, [annealed.acceptance_rate])


class AnnealedRefiner(ChainRefiner):
    """Annealed importance sampling; the adapted step size carries over."""

    Options = AnnealedConfig
    cycle = staticmethod(run_annealed)
