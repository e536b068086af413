"""The pathwise gradient: against a step-by-step simulation and finite differences, and its memory with checkpoints."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal
from torch.profiler import ProfilerActivity, profile

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import score_trajectories
from driftstream.envs.errors import ConfigError
from driftstream.envs.grids import random_grid, uniform_grid
from driftstream.envs.processes import BrownianProcess, DiffusionProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.envs.targets_gmm import GaussianMixture
from driftstream.learner.objectives import log_weights
from driftstream.learner.on_policy import RolloutConfig, pathwise_log_weight

DIM, STEPS, BATCH = 2, 6, 5
PROCESSES: dict[str, DiffusionProcess] = {
    "brownian": BrownianProcess(1.7),
    "dis": OrnsteinUhlenbeckProcess(1.3, noise=2.0, schedule="linear"),
    "dds": OrnsteinUhlenbeckProcess(1.3, noise=2.0, exponential=True, schedule="cosine"),
}
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned variance": {"learned_variance": True},
    "learned backward": {"learned_backward": True, "backward_scale": 0.5},
    "langevin": {"langevin": True, "precondition": True},
    "all": {
        "learned_variance": True,
        "learned_backward": True,
        "langevin": True,
        "langevin_scale": "scalar",
        "precondition": True,
    },
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_policy = pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES.keys())


class Curved(Target):
    """A density whose score is left to autograd."""

    name, dim = "curved", DIM

    def log_reward(self, x: Tensor) -> Tensor:
        return -0.25 * x.square().square().sum(-1) + (x[..., 0] * x[..., 1]).sin()


def make_mixture() -> Target:
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.0, -2.0]])
    return GaussianMixture("three", means, 0.6, torch.tensor([1.0, 2.0, 3.0]))


TARGETS: dict[str, Callable[[], Target]] = {"own score": make_mixture, "score by autograd": Curved}
every_target = pytest.mark.parametrize("build", TARGETS.values(), ids=TARGETS.keys())


def make_policy(dim: int = DIM, **options: Any) -> DiffusionPolicy:
    torch.manual_seed(0)
    policy = DiffusionPolicy(dim, PolicyConfig(hidden=6, harmonics=4, **options)).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


def make_grid(kind: str = "random") -> Tensor:
    if kind == "uniform":
        return uniform_grid(STEPS, dtype=torch.float64)
    return random_grid(STEPS, torch.Generator().manual_seed(3), dtype=torch.float64)


def simulate(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target,
    times: Tensor,
    config: RolloutConfig | None = None,
    seed: int = 0,
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pathwise_log_weight(policy, process, target, times, BATCH, config or RolloutConfig(), generator)


def gradient(log_weight: Tensor, policy: DiffusionPolicy) -> Tensor:
    parameters = list(policy.parameters())
    parts = torch.autograd.grad(-log_weight.mean(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def naive_log_weight(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target,
    times: Tensor,
    detach_score: bool = False,
    seed: int = 0,
) -> Tensor:
    """Simulate with the same noise, keep every state and score in the graph, and score the result."""
    generator = torch.Generator().manual_seed(seed)
    x = process.sample_prior(BATCH, DIM, generator, dtype=torch.float64)
    noise = torch.randn(STEPS, BATCH, DIM, generator=generator, dtype=torch.float64)
    keep, gain, variance, _, _ = process.kernels(times)
    states, scores = [x], []
    for n in range(STEPS):
        scores.append(target.score(x.detach() if detach_score else x))
        drift, log_var = policy(x, policy.embed_times(times[n : n + 1], process)[0], scores[-1])
        std = variance[n].sqrt() * (torch.ones_like(x) if log_var is None else (0.5 * log_var).exp())
        x = keep[n] * x + gain[n] * drift + std * noise[n]
        states.append(x)
    log_pf, log_pb = score_trajectories(policy, process, torch.stack(states, 1), times, torch.stack(scores, 1))
    return log_weights(log_pf, log_pb, target.log_reward(x))


@every_process
@every_policy
@every_target
def test_log_weights_and_gradients_equal_those_of_scored_trajectories(
    process: DiffusionProcess, options: dict[str, Any], build: Callable[[], Target]
) -> None:
    target, policy = build(), make_policy(**options)
    for kind in ("uniform", "random"):
        for detach in (False, True):
            times = make_grid(kind)
            log_weight = simulate(policy, process, target, times, RolloutConfig(detach_score=detach))
            expected = naive_log_weight(policy, process, target, times, detach)
            torch.testing.assert_close(log_weight, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(gradient(log_weight, policy), gradient(expected, policy), rtol=1e-8, atol=1e-10)


@every_process
@every_policy
@every_target
def test_gradients_agree_with_finite_differences(
    process: DiffusionProcess, options: dict[str, Any], build: Callable[[], Target]
) -> None:
    target, policy, times = build(), make_policy(**options), make_grid()
    exact = gradient(simulate(policy, process, target, times), policy)
    start = torch.nn.utils.parameters_to_vector(policy.parameters()).detach()
    for seed in range(3):
        way = torch.randn(start.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def at(distance: float, way: Tensor = way) -> float:
            torch.nn.utils.vector_to_parameters(start + distance * way, policy.parameters())
            with torch.no_grad():
                return -float(simulate(policy, process, target, times).mean())

        # Fourth order, so that the step can be long enough for the loss's rounding.
        numeric = (8 * (at(1e-4) - at(-1e-4)) - (at(2e-4) - at(-2e-4))) / 12e-4
        assert float(exact @ way) == pytest.approx(numeric, rel=1e-5)


@every_process
@every_target
def test_a_detached_score_leaves_out_the_targets_curvature(
    process: DiffusionProcess, build: Callable[[], Target]
) -> None:
    target, policy, times = build(), make_policy(langevin=True), make_grid()
    true = gradient(simulate(policy, process, target, times), policy)
    detached = gradient(simulate(policy, process, target, times, RolloutConfig(detach_score=True)), policy)
    assert float((detached - true).norm() / true.norm()) > 0.01
    plain = make_policy()
    gradients = [
        gradient(simulate(plain, process, target, times, RolloutConfig(detach_score=detach)), plain)
        for detach in (False, True)
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("segments", [2, 4, STEPS, STEPS + 5])
@every_process
@every_target
def test_checkpoints_change_nothing(process: DiffusionProcess, build: Callable[[], Target], segments: int) -> None:
    target, policy, times = build(), make_policy(**POLICIES["all"]), make_grid()
    for detach in (False, True):
        whole = simulate(policy, process, target, times, RolloutConfig(1, detach))
        parts = simulate(policy, process, target, times, RolloutConfig(segments, detach))
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient(parts, policy), gradient(whole, policy), rtol=1e-8, atol=1e-10)


def test_the_noise_comes_from_the_generator_alone() -> None:
    target, policy, times = make_mixture(), make_policy(), make_grid()
    for process in PROCESSES.values():
        before = torch.get_rng_state()
        first, again, other = (simulate(policy, process, target, times, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize("langevin", [False, True])
def test_every_evaluation_of_the_target_is_counted(langevin: bool) -> None:
    policy, times = make_policy(langevin=langevin), make_grid()
    for segments in (1, 3):
        target = CountedTarget(make_mixture())
        gradient(simulate(policy, PROCESSES["brownian"], target, times, RolloutConfig(segments)), policy)
        # What checkpoints simulate again is evaluated again.
        scores = STEPS * (1 if segments == 1 else 2) if langevin else 0
        assert (target.energy_evaluations, target.gradient_evaluations) == (BATCH, BATCH * (1 + scores))


class OnlyForward(Target):
    """A target whose log reward autograd cannot pass, with a score of its own."""

    name, dim = "only-forward", DIM

    def log_reward(self, x: Tensor) -> Tensor:
        return -0.5 * x.detach().square().sum(-1)

    def score(self, x: Tensor) -> Tensor:
        return -x


def test_the_gradient_of_the_reward_is_the_targets_score() -> None:
    class Differentiable(OnlyForward):
        def log_reward(self, x: Tensor) -> Tensor:
            return -0.5 * x.square().sum(-1)

    policy, times, process = make_policy(), make_grid(), PROCESSES["brownian"]
    gradients = [
        gradient(simulate(policy, process, target, times), policy) for target in (OnlyForward(), Differentiable())
    ]
    torch.testing.assert_close(*gradients)


def test_the_optimal_drift_of_a_gaussian_gives_every_path_the_weight_z() -> None:
    """An untrained policy is optimal for N(0, σ²), whatever the noise."""

    class Stationary(Target):
        name, dim = "stationary", DIM

        def log_reward(self, x: Tensor) -> Tensor:
            std = torch.tensor(1.7, dtype=torch.float64).sqrt()
            return 4.2 + Normal(torch.zeros_like(std), std).log_prob(x).sum(-1)

    torch.manual_seed(0)
    policy = DiffusionPolicy(DIM, PolicyConfig(hidden=6, harmonics=4)).double()
    log_weight = simulate(policy, BrownianProcess(1.7), Stationary(), make_grid())
    torch.testing.assert_close(log_weight, torch.full((BATCH,), 4.2, dtype=torch.float64))


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("segments", [2, 4])
def test_checkpoints_go_with_a_counted_target_whose_score_is_by_autograd(segments: int, detach: bool) -> None:
    policy, times = make_policy(langevin=True), make_grid()

    def gradient(count: int) -> tuple[Tensor, int]:
        target, config = CountedTarget(Curved()), RolloutConfig(count, detach)
        generator = torch.Generator().manual_seed(2)
        log_weight = pathwise_log_weight(policy, BrownianProcess(1.3), target, times, BATCH, config, generator)
        parts = torch.autograd.grad(log_weight.sum(), list(policy.parameters()), allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None]), target.gradient_evaluations

    whole, calls = gradient(1)
    parts, more_calls = gradient(segments)
    torch.testing.assert_close(parts, whole)
    assert calls == BATCH * (STEPS + 1)
    # Every score of the path is asked for twice, and that of the end once.
    assert more_calls == BATCH * (2 * STEPS + 1)


def test_bad_configuration_is_named() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.checkpoint_segments = 0: expected at least 1"):
        RolloutConfig(0)


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that torch's CPU allocator held at once, above what it held before: every allocation is counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, change in memory:
        held += change
        peak = max(peak, held)
    return peak


def test_the_measure_of_memory_counts_what_is_held_at_once() -> None:
    def hold(count: int) -> list[Tensor]:
        return [torch.empty(1_000_000, dtype=torch.uint8) for _ in range(count)]

    def one_after_the_other() -> None:
        for _ in range(5):
            hold(1)

    assert peak_bytes(lambda: hold(5)) == pytest.approx(5e6, rel=0.01)
    assert peak_bytes(one_after_the_other) == pytest.approx(1e6, rel=0.01)


@pytest.mark.parametrize("langevin", [False, True])
def test_four_checkpoint_segments_halve_the_memory_of_manywell(langevin: bool) -> None:
    target, times = make_target("manywell"), uniform_grid(100)
    torch.manual_seed(0)
    policy = DiffusionPolicy(target.dim, PolicyConfig(langevin=langevin))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    gradients: list[Tensor] = []

    def update(segments: int) -> None:
        generator = torch.Generator().manual_seed(0)
        config = RolloutConfig(segments)
        process = BrownianProcess(target.diffusion_variance)
        log_weight = pathwise_log_weight(policy, process, target, times, 300, config, generator)
        gradients.append(gradient(log_weight, policy))

    whole, parts = (peak_bytes(lambda segments=segments: update(segments)) for segments in (1, 4))  # type: ignore[misc]
    assert parts <= whole / 2, (parts, whole)
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 1e-5
    assert math.isfinite(float(gradients[0].norm()))
