"""HMC, annealed importance sampling and parallel tempering: kernels by transcription, invariance, what cycles keep."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from driftstream.actors.annealed import (
    AnnealedConfig,
    AnnealedRefiner,
    GaussianBase,
    anneal,
    bridge_step,
    effective_share,
    resampled,
    run_annealed,
    systematic_resample,
)
from driftstream.actors.hmc import HmcConfig, HmcRefiner, hmc_log_accept, hmc_step, leapfrog, run_hmc
from driftstream.actors.mala import MalaConfig, MalaState, Refinement, mala_init, run_mala
from driftstream.actors.refiner import Refiner
from driftstream.actors.tempering import (
    TemperingConfig,
    TemperingRefiner,
    run_tempering,
    swap_log_accept,
    swap_neighbours,
    temperature_ladder,
    tempered_mala_step,
    tempering_step,
)
from driftstream.envs.errors import ConfigError
from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.envs.targets_gmm import GaussianMixture

Run = Callable[..., Refinement]

CYCLES = [
    pytest.param(run_hmc, HmcConfig(mcmc_steps=20, burn_in=10), id="hmc"),
    pytest.param(run_annealed, AnnealedConfig(mcmc_steps=30), id="annealed"),
    pytest.param(run_tempering, TemperingConfig(mcmc_steps=20, burn_in=10, temperatures=3), id="tempering"),
]
every_cycle = pytest.mark.parametrize(("run", "config"), CYCLES)


class Normal(Target):
    """Independent normals; log R has no normaliser."""

    name = "normal"

    def __init__(self, mean: tuple[float, ...] = (0.5, -1.0), std: tuple[float, ...] = (1.0, 2.0)) -> None:
        self.dim = len(std)
        self.mean, self.std = mean, std
        self.log_z = sum(math.log(s) for s in std) + 0.5 * self.dim * math.log(2 * math.pi)

    def log_reward(self, x: Tensor) -> Tensor:
        return -0.5 * ((x - x.new_tensor(self.mean)) / x.new_tensor(self.std)).square().sum(-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.tensor(self.mean) + torch.tensor(self.std) * torch.randn(n, self.dim, generator=generator)


class Cliff(Target):
    """A Gaussian between a region where it is undefined and one where it is infinite."""

    name = "cliff"
    dim = 1

    def log_reward(self, x: Tensor) -> Tensor:
        log_reward = torch.where(x[..., 0] > 0.5, torch.nan, -0.5 * x[..., 0].square())
        return torch.where(x[..., 0] < -1.5, torch.inf, log_reward)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def two_modes(distance: float = 8.0, left_weight: float = 0.3) -> GaussianMixture:
    """Modes of standard deviation 1 at -distance/2 and distance/2 on the first axis."""
    means = torch.tensor([[-0.5 * distance, 0.0], [0.5 * distance, 0.0]])
    return GaussianMixture("two", means, 1.0, torch.tensor([left_weight, 1.0 - left_weight]))


def assert_moments(x: Tensor, mean: Tensor, std: Tensor, samples: float) -> None:
    """Means and standard deviations within 4.5 standard errors of that many independent samples."""
    assert ((x.mean(0) - mean).abs() < 4.5 * std / math.sqrt(samples)).all()
    assert ((x.std(0) / std - 1.0).abs() < 4.5 / math.sqrt(2 * samples)).all()


# Hamiltonian Monte Carlo


def test_leapfrog_is_reversible_and_costs_a_gradient_a_step() -> None:
    target = CountedTarget(make_target("manywell", dim=4))
    x, momentum = (torch.randn(20, 4, dtype=torch.float64, generator=seeded(seed)) for seed in (0, 1))
    start = mala_init(x, target)
    before = target.gradient_evaluations, target.energy_evaluations
    end, end_momentum = leapfrog(start, momentum, target, 0.05, 7)
    assert target.gradient_evaluations - before[0] == 20 * 7
    # The target writes its score, so that intermediate points cost no energy.
    assert target.energy_evaluations - before[1] == 20
    assert (end.x - x).norm(dim=-1).min() > 0.1
    back, back_momentum = leapfrog(end, -end_momentum, target, 0.05, 7)
    torch.testing.assert_close(back.x, x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(back_momentum, -momentum, rtol=1e-10, atol=1e-10)


def test_leapfrog_preserves_volume() -> None:
    target = make_target("manywell", dim=2)

    def flow(point: Tensor) -> Tensor:
        x, momentum = point[:2].unsqueeze(0), point[2:].unsqueeze(0)
        # The score's own derivative is in the flow's.
        state = MalaState(x, target.log_reward(x), target.score(x))
        end, end_momentum = leapfrog(state, momentum, target, 0.1, 5)
        return torch.cat([end.x[0], end_momentum[0]])

    jacobian: Any = torch.autograd.functional.jacobian(flow, torch.tensor([0.3, -0.2, 0.7, 1.1], dtype=torch.float64))
    assert float(jacobian.det()) == pytest.approx(1.0, abs=1e-10)


def test_energy_error_of_leapfrog_is_of_second_order() -> None:
    target = make_target("gmm9")
    x, momentum = (torch.randn(50, 2, dtype=torch.float64, generator=seeded(seed)) for seed in (2, 3))
    start = mala_init(x, target)

    def error(steps: int) -> float:
        end, end_momentum = leapfrog(start, momentum, target, 0.6 / steps, steps)
        kinetic = 0.5 * (end_momentum.square() - momentum.square()).sum(-1)
        return float((kinetic - end.log_reward + start.log_reward).abs().mean())

    errors = [error(steps) for steps in (8, 16, 32, 64)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4.0, rel=0.1)


def test_hmc_step_equals_its_transcription() -> None:
    target, step_size, steps = make_target("gmm9"), 0.45, 4
    state = mala_init(3.0 * torch.randn(40, 2, dtype=torch.float64, generator=seeded(4)), target)
    after, info = hmc_step(state, target, step_size, steps, seeded(5))
    generator = seeded(5)
    momenta = torch.randn(40, 2, dtype=torch.float64, generator=generator)
    uniforms = torch.rand(40, dtype=torch.float64, generator=generator)
    assert 5 < int(info.accepted.sum()) < 40
    for chain in range(40):
        q, p = state.x[chain], momenta[chain]
        for _ in range(steps):
            p = p + 0.5 * step_size * target.score(q)
            q = q + step_size * p
            p = p + 0.5 * step_size * target.score(q)
        old = 0.5 * float(momenta[chain] @ momenta[chain]) - float(target.log_reward(state.x[chain]))
        new = 0.5 * float(p @ p) - float(target.log_reward(q))
        accepted = float(uniforms[chain]) < math.exp(min(0.0, old - new))
        assert bool(info.accepted[chain]) == accepted
        torch.testing.assert_close(after.x[chain], q if accepted else state.x[chain], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.log_reward, target.log_reward(after.x))
    torch.testing.assert_close(after.score, target.score(after.x))


def test_hmc_rejects_ends_that_are_not_finite() -> None:
    log_reward, momentum = torch.zeros(4), torch.zeros(4, 1)
    end_log_reward = torch.tensor([math.nan, math.inf, -math.inf, 0.0])
    end_momentum = torch.tensor([[0.0], [0.0], [0.0], [math.nan]])
    log_accept = hmc_log_accept(log_reward, momentum, end_log_reward, end_momentum)
    assert (log_accept == -math.inf).all()


def test_hmc_leaves_the_target_invariant() -> None:
    target, generator = Normal(), seeded(6)
    state = mala_init(target.sample(20_000, generator), target)
    for _ in range(10):
        state, info = hmc_step(state, target, 0.8, 3, generator)
    assert 0.3 < info.acceptance_rate < 0.97
    assert_moments(state.x, torch.tensor(target.mean), torch.tensor(target.std), 20_000)
    covariance = torch.cov(state.x.T)[0, 1] / (target.std[0] * target.std[1])
    assert abs(float(covariance)) < 4.5 / math.sqrt(20_000)


def test_hmc_cycle_adapts_and_keeps_accepted_ends() -> None:
    target = CountedTarget(make_target("manywell"))
    seeds = 1.7 * torch.randn(200, 32, generator=seeded(7)).sign()
    config = HmcConfig(chains=200, mcmc_steps=60, burn_in=40)
    refinement = run_hmc(seeds, target, config, generator=seeded(8))
    assert refinement.acceptance_rate == pytest.approx(config.target_acceptance, abs=0.1)
    assert len(refinement.terminal) == pytest.approx(200 * 20 * refinement.acceptance_rate, rel=1e-6)
    assert target.energy_evaluations == 200 * 61
    assert target.gradient_evaluations == 200 * (60 * config.leapfrog_steps + 1)


def test_hmc_cycle_jitters_the_step_size() -> None:
    target, config = make_target("gmm9"), HmcConfig(mcmc_steps=1, burn_in=0, jitter=0.5)
    seeds = torch.zeros(20, 2)
    sizes = set()
    for seed in range(20):
        refinement = run_hmc(seeds, target, config, 0.4, seeded(seed))
        generator = seeded(seed)
        size = 0.4 * (1.0 + 0.5 * (2.0 * torch.rand((), generator=generator).item() - 1.0))
        state, info = hmc_step(mala_init(seeds, target), target, size, config.leapfrog_steps, generator)
        assert torch.equal(refinement.terminal, state.x[info.accepted])
        sizes.add(size)
    assert 0.2 <= min(sizes) < 0.3 < 0.5 < max(sizes) <= 0.6


@pytest.mark.parametrize(
    ("run", "config"),
    [(run_hmc, HmcConfig(mcmc_steps=9, burn_in=4)), (run_tempering, TemperingConfig(mcmc_steps=9, burn_in=4))],
)
def test_step_size_is_fixed_after_burn_in(run: Run, config: Any) -> None:
    # So small a step that every move is accepted, and every adaptation a growth.
    refinement = run(torch.zeros(20, 2), make_target("gmm9"), config, 1e-7, seeded(0))
    assert refinement.acceptance_rate == 1.0
    assert refinement.step_size == pytest.approx(1e-7 * 1.1**4)
    assert len(refinement.terminal) == 20 * 5


# Parallel tempering


def test_ladder_is_geometric() -> None:
    assert temperature_ladder(4, 0.008) == pytest.approx((1.0, 0.2, 0.04, 0.008))


def test_swap_probability_equals_its_transcription() -> None:
    for log_reward, other, beta, other_beta in [(-1.0, -3.0, 1.0, 0.5), (-3.0, -1.0, 1.0, 0.5), (2.0, 0.5, 0.9, 0.1)]:
        joint = beta * log_reward + other_beta * other
        swapped = beta * other + other_beta * log_reward
        got = swap_log_accept(torch.tensor(log_reward).double(), torch.tensor(other).double(), beta, other_beta)
        assert float(got.exp()) == pytest.approx(min(1.0, math.exp(swapped - joint)))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("temperatures", [2, 4, 5])
def test_swaps_equal_their_transcription(temperatures: int, first: int) -> None:
    chains, betas = 30, torch.tensor(temperature_ladder(temperatures, 0.1), dtype=torch.float64)
    state = mala_init(
        3.0 * torch.randn(temperatures * chains, 2, dtype=torch.float64, generator=seeded(9)), make_target("gmm9")
    )
    after, swapped = swap_neighbours(state, betas, first, seeded(10))
    rows = [list(range(k * chains, (k + 1) * chains)) for k in range(temperatures)]
    pairs = list(range(first, temperatures - 1, 2))
    uniforms = torch.rand(len(pairs), chains, dtype=torch.float64, generator=seeded(10))
    expected = torch.zeros(temperatures, chains, dtype=torch.bool)
    for index, k in enumerate(pairs):
        for c in range(chains):
            ratio = (betas[k] - betas[k + 1]) * (state.log_reward[rows[k + 1][c]] - state.log_reward[rows[k][c]])
            if float(uniforms[index, c]) < min(1.0, math.exp(float(ratio))):
                rows[k][c], rows[k + 1][c] = rows[k + 1][c], rows[k][c]
                expected[k : k + 2, c] = True
    order = torch.tensor(rows).flatten()
    assert torch.equal(swapped, expected)
    assert bool(swapped.any()) == bool(pairs)
    for name in ("x", "log_reward", "score"):
        assert torch.equal(getattr(after, name), getattr(state, name)[order])


def test_tempered_mala_equals_its_transcription() -> None:
    target, chains = make_target("gmm9"), 15
    betas, sizes = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, 0.4, 0.1], [0.3, 0.9, 5.0]))
    state = mala_init(3.0 * torch.randn(3 * chains, 2, dtype=torch.float64, generator=seeded(11)), target)
    after, accepted = tempered_mala_step(state, target, betas, sizes, seeded(12))
    generator = seeded(12)
    noise = torch.randn(3 * chains, 2, dtype=torch.float64, generator=generator)
    uniforms = torch.rand(3 * chains, dtype=torch.float64, generator=generator)
    assert 0 < int(accepted.sum()) < 3 * chains
    for row in range(3 * chains):
        beta, size = float(betas[row // chains]), float(sizes[row // chains])
        x = state.x[row]
        proposal = x + size * beta * target.score(x) + math.sqrt(2 * size) * noise[row]
        forward = proposal - x - size * beta * target.score(x)
        backward = x - proposal - size * beta * target.score(proposal)
        log_ratio = beta * float(target.log_reward(proposal) - target.log_reward(x))
        log_ratio += float(forward @ forward - backward @ backward) / (4 * size)
        moved = float(uniforms[row]) < math.exp(min(0.0, log_ratio))
        assert bool(accepted.flatten()[row]) == moved
        torch.testing.assert_close(after.x[row], proposal if moved else x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.log_reward, target.log_reward(after.x))


def test_tempering_cycle_keeps_what_is_new_at_the_lowest_temperature() -> None:
    target, chains = make_target("gmm9"), 40
    config = TemperingConfig(chains=chains, mcmc_steps=4, burn_in=0, temperatures=3, beta_min=0.25)
    seeds = 4.0 * torch.randn(chains, 2, generator=seeded(50))
    refinement = run_tempering(seeds, target, config, 0.4, seeded(51))
    betas, sizes = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0.4, 0.8, 1.6])
    state, generator = mala_init(seeds.repeat(3, 1), target), seeded(51)
    expected, swapped_only = [], 0
    for step in range(4):
        state, info = tempering_step(state, target, betas, sizes, step % 2, generator)
        for chain in range(chains):
            if info.accepted[0, chain] or info.swapped[0, chain]:
                expected.append(state.x[chain])
                swapped_only += not info.accepted[0, chain]
    assert swapped_only > 0
    assert torch.equal(refinement.terminal, torch.stack(expected))


def test_tempering_leaves_every_temperature_invariant() -> None:
    target, generator, chains = Normal(), seeded(13), 10_000
    betas = torch.tensor(temperature_ladder(3, 0.2))
    mean, std = torch.tensor(target.mean), torch.tensor(target.std)
    noise = torch.randn(3, chains, 2, generator=generator)
    exact = mean + std * noise / betas.sqrt()[:, None, None]
    state = mala_init(exact.flatten(0, 1), target)
    for step in range(10):
        state, info = tempering_step(state, target, betas, 0.6 / betas, step % 2, generator)
        assert 0.2 < float(info.swapped[1].float().mean()) < 0.99
    for beta, x in zip(betas, state.x.view(3, chains, 2), strict=True):
        assert_moments(x, mean, std / beta.sqrt(), chains)


def test_tempering_keeps_the_shares_of_modes() -> None:
    target, chains = two_modes(5.0), 3_000
    refinement = run_tempering(
        target.sample(chains, seeded(14)),
        target,
        TemperingConfig(chains=chains, mcmc_steps=20, burn_in=10, temperatures=4),
        step_size=0.8,
        generator=seeded(15),
    )
    # Modes of equal shape accept equally often, so that what is kept has the shares of R.
    left = float((refinement.terminal[:, 0] < 0).float().mean())
    share = float(torch.special.ndtr(torch.tensor(2.5))) * 0.3 + float(torch.special.ndtr(torch.tensor(-2.5))) * 0.7
    assert left == pytest.approx(share, abs=4.5 * math.sqrt(0.21 / chains))


def test_tempering_crosses_where_mala_does_not() -> None:
    target = two_modes()
    seeds = torch.randn(200, 2, generator=seeded(16)) - torch.tensor([4.0, 0.0])
    mala = run_mala(seeds, target, MalaConfig(chains=200), generator=seeded(17))
    assert float((mala.terminal[:, 0] > 0).float().mean()) < 0.02
    step_size = None
    for cycle in range(2):
        config = TemperingConfig(chains=200)
        refinement = run_tempering(seeds, target, config, step_size, seeded(18 + cycle))
        step_size = refinement.step_size
    assert refinement.acceptance_rate == pytest.approx(config.target_acceptance, abs=0.12)
    assert float((refinement.terminal[:, 0] > 0).float().mean()) == pytest.approx(0.7, abs=0.1)
    torch.testing.assert_close(refinement.log_reward, target.log_reward(refinement.terminal))


def test_tempering_asks_the_target_once_a_step_and_keeps_no_state_twice_in_a_row() -> None:
    target = CountedTarget(make_target("gmm9"))
    config = TemperingConfig(chains=1, mcmc_steps=60, burn_in=20, temperatures=3)
    refinement = run_tempering(torch.zeros(1, 2), target, config, generator=seeded(20))
    assert target.energy_evaluations == target.gradient_evaluations == 1 + 60 * 3
    assert 0 < len(refinement.terminal) <= 40
    assert refinement.terminal.diff(dim=0).abs().sum(-1).min() > 0


# Annealed importance sampling


def mixture(base: GaussianBase) -> torch.distributions.Distribution:
    each = torch.distributions.Independent(torch.distributions.Normal(base.mean, base.std), 1)
    equal = torch.distributions.Categorical(torch.ones(len(base.mean), dtype=base.mean.dtype))
    return torch.distributions.MixtureSameFamily(equal, each)


def test_bridge_step_equals_its_transcription() -> None:
    target, beta, size = make_target("gmm9"), 0.35, 0.9
    means, stds = [[0.5, -1.0], [0.0, 1.0]], [[3.0, 4.0], [1.0, 0.5]]
    base = GaussianBase(torch.tensor(means).double(), torch.tensor(stds).double())
    state = mala_init(base.sample(40, seeded(21)), target)
    after, info = bridge_step(state, target, base, beta, size, seeded(22))
    generator = seeded(22)
    noise = torch.randn(40, 2, dtype=torch.float64, generator=generator)
    uniforms = torch.rand(40, dtype=torch.float64, generator=generator)
    start = mixture(base)

    def log_bridge(x: Tensor) -> Tensor:
        return (1 - beta) * start.log_prob(x) + beta * target.log_reward(x)

    def score(x: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_bridge(leaf), leaf)
        return gradient

    assert 0 < int(info.accepted.sum()) < 40
    for row in range(40):
        x = state.x[row]
        proposal = x + size * score(x) + math.sqrt(2 * size) * noise[row]
        forward, backward = proposal - x - size * score(x), x - proposal - size * score(proposal)
        log_ratio = float(log_bridge(proposal) - log_bridge(x))
        log_ratio += float(forward @ forward - backward @ backward) / (4 * size)
        moved = float(uniforms[row]) < math.exp(min(0.0, log_ratio))
        assert bool(info.accepted[row]) == moved
        torch.testing.assert_close(after.x[row], proposal if moved else x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(after.score, target.score(after.x))


def test_annealed_weights_equal_their_transcription() -> None:
    target, config = make_target("gmm9"), AnnealedConfig(mcmc_steps=12, power=2.0, resample_below=0.0)
    base = GaussianBase(torch.zeros(3, 2).double(), torch.tensor([[4.0, 4.0], [1.0, 2.0], [0.5, 3.0]]).double())
    annealed = anneal(base, 30, target, config, 0.2, seeded(23))
    start = mixture(base)
    generator, step_size = seeded(23), 0.2
    state = mala_init(base.sample(30, generator), target)
    log_weight = torch.zeros(30, dtype=torch.float64)
    for step in range(1, 13):
        before, beta = ((step - 1) / 12) ** 2, (step / 12) ** 2
        for row in range(30):
            x = state.x[row]
            bridges = [(1 - b) * start.log_prob(x) + b * target.log_reward(x) for b in (before, beta)]
            log_weight[row] += bridges[1] - bridges[0]
        state, info = bridge_step(state, target, base, beta, step_size, generator)
        step_size *= 1.1 if info.acceptance_rate > config.target_acceptance else 0.9
    torch.testing.assert_close(annealed.log_weight, log_weight)
    assert torch.equal(annealed.state.x, state.x)
    assert annealed.step_size == pytest.approx(step_size)


@pytest.mark.parametrize("resample_below", [0.0, 0.5])
@pytest.mark.parametrize(
    "target", [Normal(), Normal((1.0,) * 8, (0.5,) * 8), make_target("gmm9")], ids=["normal", "normal8", "gmm9"]
)
def test_annealed_log_z_is_the_targets(target: Target, resample_below: float) -> None:
    config = AnnealedConfig(mcmc_steps=50, resample_below=resample_below)
    seeds = target.sample(100, seeded(24))
    assert seeds is not None
    assert target.log_z is not None
    base = GaussianBase.around(seeds, 1.5, 1.0)
    runs = [anneal(base, 400, target, config, 0.1, seeded(25 + run)) for run in range(8)]
    z = torch.tensor([run.log_z - target.log_z for run in runs]).double().exp()
    error = 4.5 * float(z.std()) / math.sqrt(len(runs))
    assert error < 0.3
    assert float(z.mean()) == pytest.approx(1.0, abs=error)
    if resample_below:
        assert min(effective_share(run.log_weight) for run in runs) > 0.3


@pytest.mark.parametrize("resample_below", [0.0, 0.5])
def test_annealed_outcome_approximates_the_target(resample_below: float) -> None:
    target = two_modes(left_weight=0.3)
    # Spread over both modes, in shares that are not the target's.
    seeds = two_modes(left_weight=0.7).sample(4_000, seeded(40))
    config = AnnealedConfig(chains=4_000, mcmc_steps=60, resample_below=resample_below)
    refinement = run_annealed(seeds, target, config, 0.5, seeded(41))
    x = refinement.terminal
    assert x.shape == (4_000, 2)
    torch.testing.assert_close(refinement.log_reward, target.log_reward(x))
    effective = len(x.unique(dim=0)) / 4
    share = float((x[:, 0] < 0).float().mean())
    assert share == pytest.approx(0.3, abs=4.5 * math.sqrt(0.21 / effective))
    around = x[:, 0] - 4.0 * x[:, 0].sign()
    assert_moments(torch.stack([around, x[:, 1]], -1), torch.zeros(2), torch.ones(2), effective)


def test_resampling_draws_every_particle_by_its_share() -> None:
    log_weight = torch.tensor([0.1, 0.0, 0.25, 0.65]).double().log()
    counts = torch.stack([systematic_resample(log_weight, seeded(run)).bincount(minlength=4) for run in range(2_000)])
    expected = 4 * log_weight.exp()
    assert (counts >= expected.floor()).all()
    assert (counts <= expected.ceil()).all()
    assert (counts.double().mean(0) - expected).abs().max() < 4.5 * 0.5 / math.sqrt(2_000)
    state = MalaState(torch.arange(4.0).unsqueeze(-1), torch.arange(4.0), torch.zeros(4, 1))
    chosen, equal = resampled(state, log_weight + 3.0, seeded(0))
    assert torch.equal(chosen.x[:, 0], chosen.log_reward)
    torch.testing.assert_close(equal.logsumexp(0), (log_weight + 3.0).logsumexp(0))
    # All of the weight on one, beyond the range of the others' floats.
    assert systematic_resample(torch.tensor([0.0, 1e4, 0.0]).double()).tolist() == [1, 1, 1]


def test_resampling_never_draws_a_particle_without_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    # The largest float64 below 1, with which the last position is rounded up to 1.
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(1.0 - 2.0**-53).double())
    assert systematic_resample(torch.tensor([0.0, -math.inf]).double()).tolist() == [0, 0]


def test_effective_share_equals_its_transcription() -> None:
    log_weight = torch.randn(20, dtype=torch.float64, generator=seeded(42))
    weights = [math.exp(w) for w in log_weight.tolist()]
    assert effective_share(log_weight) == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / 20)


def test_particles_that_start_where_there_is_no_reward_have_no_weight() -> None:
    target = CountedTarget(Cliff())
    base = GaussianBase(torch.zeros(1, 1), torch.ones(1, 1))
    annealed = anneal(base, 20_000, target, AnnealedConfig(mcmc_steps=10), 0.1, seeded(43))
    ends = torch.special.ndtr(torch.tensor([-1.5, 0.5], dtype=torch.float64))
    alive = float(ends[1] - ends[0])
    assert len(annealed.state.x) == pytest.approx(20_000 * alive, rel=0.03)
    assert annealed.log_z == pytest.approx(math.log(math.sqrt(2 * math.pi) * alive), abs=0.03)
    lost = anneal(GaussianBase(torch.full((1, 1), 50.0), torch.ones(1, 1)), 5, target, AnnealedConfig())
    assert lost.log_z == -math.inf
    assert lost.state.x.shape == (0, 1)


def test_base_has_moments_of_the_seeds_and_a_least_width() -> None:
    seeds = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    base = GaussianBase.around(seeds, 2.0, 0.5)
    torch.testing.assert_close(base.mean, torch.tensor([[2.0, 5.0]]))
    torch.testing.assert_close(base.std, torch.tensor([[2.0, 0.5]]))
    assert GaussianBase.around(seeds[:1], 2.0, 0.5).std.tolist() == [[0.5, 0.5]]


def test_a_base_with_cores_is_a_mixture_and_draws_every_part_equally() -> None:
    base = GaussianBase(torch.tensor([[0.0, 1.0], [5.0, -20.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.1]]))
    x = base.sample(4000, seeded(46))
    torch.testing.assert_close(base.log_prob(x), mixture(base).log_prob(x))
    leaf = x[:50].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mixture(base).log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(base.log_prob_and_score(leaf.detach())[1], gradient, rtol=1e-4, atol=1e-4)
    second = x[:, 1] < -10
    assert int(second.sum()) == 2000
    torch.testing.assert_close(x[~second].mean(0), base.mean[0], rtol=0.0, atol=0.2)
    torch.testing.assert_close(x[second].std(0), base.std[1], rtol=0.1, atol=0.0)


def test_cores_are_as_wide_as_the_spread_of_gaussian_seeds_and_narrow_where_tails_are_heavy() -> None:
    scale = torch.tensor([1.0, 4.0])
    gaussian = 2.0 + scale * torch.randn(20_000, 2, generator=seeded(47))
    base = GaussianBase.around(gaussian, 1.5, 0.1, narrowest=0.1)
    torch.testing.assert_close(base.std, 1.5 * scale.expand(3, 2), rtol=0.1, atol=0.0)
    torch.testing.assert_close(base.mean, torch.full((3, 2), 2.0), rtol=0.0, atol=0.2)
    heavy = GaussianBase.around(gaussian * (2.0 * torch.randn(20_000, 1, generator=seeded(48))).exp(), 1.5, 0.1, 0.5)
    assert bool((heavy.std[0] > 3 * heavy.std[1]).all())
    torch.testing.assert_close(heavy.std[2], (heavy.std[1] ** 2 / heavy.std[0]).clamp_min(0.5))
    for few in (gaussian[:1], 1e-3 * gaussian):  # the least width is no sign of heavy tails
        torch.testing.assert_close(
            GaussianBase.around(few, 1.5, 2.0, 0.5).std, torch.full((3, 2), 2.0), rtol=0.1, atol=0.0
        )


def test_annealing_reaches_both_ends_of_the_funnel() -> None:
    target = make_target("funnel")
    seeds = target.sample(900, seeded(49))
    assert seeds is not None
    below = []
    for run in range(6):
        outcome = run_annealed(seeds, target, AnnealedConfig(cores=True), None, seeded(50 + run))
        below.append(float((outcome.terminal[:, 0] < -2).float().mean()))
    # A quarter of the funnel's mass lies there; 0.002 of what starts from a Gaussian as wide as the seeds alone.
    assert 0.05 < sum(below) / 6 < 0.4, below


def test_annealing_counts_one_call_a_step() -> None:
    target = CountedTarget(make_target("gmm9"))
    run_annealed(torch.randn(50, 2, generator=seeded(44)), target, AnnealedConfig(mcmc_steps=20), None, seeded(45))
    assert target.gradient_evaluations == 50 * 21
    assert target.energy_evaluations == 50 * 22


# All of them


@every_cycle
def test_points_that_are_not_finite_are_never_kept(run: Run, config: object) -> None:
    target = CountedTarget(Cliff())
    refinement = run(torch.linspace(-2, 2, 50).unsqueeze(-1), target, config, generator=seeded(46))
    assert len(refinement.terminal) > 0
    assert refinement.log_reward.isfinite().all()
    assert ((refinement.terminal >= -1.5) & (refinement.terminal <= 0.5)).all()
    assert target.nonfinite > 0
    for seeds in (torch.full((3, 1), 1.0), torch.empty(0, 1)):
        nothing = run(seeds, target, config)
        assert nothing.terminal.shape == (0, 1)
        assert nothing.log_reward.shape == (0,)
        assert nothing.acceptance_rate == 0.0


@every_cycle
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cycles_of_one_seed_are_equal(run: Run, config: object, dtype: torch.dtype) -> None:
    target = make_target("gmm9")
    seeds = (4.0 * torch.randn(30, 2, generator=seeded(47))).to(dtype)
    original = seeds.clone()
    first, again, other = (run(seeds, target, config, 0.1, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.terminal, again.terminal)
    assert first.step_size == again.step_size
    assert first.terminal.shape != other.terminal.shape or not torch.equal(first.terminal, other.terminal)
    assert first.terminal.dtype == first.log_reward.dtype == dtype
    assert not first.terminal.requires_grad
    assert torch.equal(seeds, original)
    torch.testing.assert_close(first.log_reward, target.log_reward(first.terminal))


@pytest.mark.parametrize(
    ("refiner_class", "run", "options"),
    [
        (HmcRefiner, run_hmc, HmcConfig(chains=7, mcmc_steps=10, burn_in=5)),
        (AnnealedRefiner, run_annealed, AnnealedConfig(chains=7, mcmc_steps=10)),
        (TemperingRefiner, run_tempering, TemperingConfig(chains=7, mcmc_steps=10, burn_in=5)),
    ],
)
def test_refiners_run_cycles_and_carry_the_step_size_over(refiner_class: type[Refiner], run: Run, options: Any) -> None:
    target, seeds = CountedTarget(make_target("gmm9")), torch.randn(7, 2, generator=seeded(48))
    refiner = refiner_class(target, options, seeded(49))
    assert refiner.step_size == options.initial_step_size
    assert refiner.chains == 7
    generator, step_size = seeded(49), None
    for _ in range(2):
        expected = run(seeds, target, options, step_size, generator)
        step_size = expected.step_size
        refinement = refiner.run_cycle(seeds)
        assert torch.equal(refinement.terminal, expected.terminal)
        assert refiner.step_size == refinement.step_size == step_size
    assert refiner_class.Options is type(options)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (HmcConfig, {"leapfrog_steps": 0}, r"refiner\.options\.hmc\.leapfrog_steps = 0: expected at least 1"),
        (HmcConfig, {"burn_in": 60}, r"hmc\.burn_in = 60: expected between 0 and mcmc_steps - 1 = 59"),
        (HmcConfig, {"jitter": 1.0}, r"hmc\.jitter = 1\.0: expected a fraction in \[0, 1\)"),
        (HmcConfig, {"initial_step_size": math.nan}, r"hmc\.initial_step_size = nan: expected a positive number"),
        (AnnealedConfig, {"mcmc_steps": 0}, r"refiner\.options\.annealed\.mcmc_steps = 0: expected at least 1"),
        (AnnealedConfig, {"min_std": 0.0}, r"annealed\.min_std = 0\.0: expected a positive number"),
        (AnnealedConfig, {"resample_below": 1.0}, r"annealed\.resample_below = 1\.0: expected a fraction in \[0, 1\)"),
        (TemperingConfig, {"temperatures": 1}, r"refiner\.options\.tempering\.temperatures = 1: expected at least 2"),
        (TemperingConfig, {"beta_min": 1.0}, r"tempering\.beta_min = 1\.0: expected a fraction in \(0, 1\)"),
        (TemperingConfig, {"chains": 0}, r"tempering\.chains = 0: expected at least 1"),
    ],
)
def test_configuration_errors_name_field_value_and_what_is_allowed(
    config: Callable[..., object], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)
