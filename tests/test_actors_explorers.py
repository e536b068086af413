"""The actors in the box: where they look, which moves they keep, and what a batch costs."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from driftstream.actors.context import ActorContext, ExplorationConfig, no_replay
from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.explorers import (
    LangevinActor,
    LangevinOptions,
    LocalSearchActor,
    LocalSearchOptions,
    MixtureActor,
    MixtureOptions,
    ReplayedActor,
    ReplayedOptions,
    TemperedActor,
    TemperedOptions,
)
from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.registry import load_actor, make_options
from driftstream.envs.errors import ConfigError
from driftstream.envs.grids import GridConfig
from driftstream.envs.processes import BrownianProcess, DiffusionProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.envs.targets_gmm import GaussianMixture

STEPS = 6
AskReplayed = Callable[[int], tuple[Tensor, Tensor] | None]


def make_context(
    target: Target,
    batch_size: int = 16,
    seed: int = 0,
    process: DiffusionProcess | None = None,
    std: float = 0.0,
    spread: float = 0.2,
    ask_replayed: AskReplayed = no_replay,
    **policy: Any,
) -> ActorContext:
    """A context with a student whose parameters are off their start by normal numbers times `spread`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        student = DiffusionPolicy(target.dim, PolicyConfig(hidden=16, harmonics=8, **policy)).requires_grad_(False)
        for parameter in student.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    return ActorContext(
        student,
        process or BrownianProcess(5.0),
        CountedTarget(target),
        GridConfig(sampling_steps=STEPS),
        ExplorationConfig(std=std, decay="constant"),
        batch_size,
        torch.Generator().manual_seed(seed),
        ask_replayed=ask_replayed,
    )


def replay_of(target: Target, n: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    terminal = target.sample(n, torch.Generator().manual_seed(seed))
    assert terminal is not None
    return terminal, target.log_reward(terminal)


def make_actor(name: str, **options: Any) -> ExplorationActor:
    actor_class = load_actor(name)
    return actor_class(make_options(actor_class.Options, options, f"actor.options.{name}"))


def gaussian(variance: float, dim: int = 2) -> GaussianMixture:
    return GaussianMixture("gaussian", torch.zeros(1, dim), variance)


# Tempered.


@pytest.mark.parametrize("policy", [{}, {"learned_variance": True}, {"langevin": True}], ids=str)
def test_untempered_rollouts_are_the_students_own(policy: dict[str, bool]) -> None:
    own = ExplorationActor().generate(make_context(make_target("gmm9"), **policy))
    for options in (TemperedOptions(noise_scale=1.0), TemperedOptions(0.0, 3.0, anneal=True)):
        context = make_context(make_target("gmm9"), **policy)
        context.progress = 1.0
        batch = TemperedActor(options).generate(context)
        assert batch.keys() == own.keys()
        assert all(torch.equal(batch[key], own[key]) for key in own.keys())  # noqa: SIM118


def test_tempered_steps_have_scaled_drift_and_variance() -> None:
    process = OrnsteinUhlenbeckProcess(1.5, exponential=True)
    context = make_context(make_target("gmm9"), process=process, learned_variance=True)
    paths = TemperedActor(TemperedOptions(0.3, 2.5)).generate(context)
    states, times = paths["states"], paths["times"][0]
    generator = torch.Generator().manual_seed(0)
    x = 1.5 * torch.randn(16, 2, generator=generator)
    torch.testing.assert_close(states[:, 0], x)
    kernels = process.kernels(times)
    for n in range(STEPS):
        drift, log_var = context.policy(x, context.policy.embed_times(times[n : n + 1])[0])
        assert log_var is not None
        mean = kernels.keep[n] * x + kernels.gain[n] * 0.3 * drift
        std = (2.5 * kernels.variance[n] * log_var.exp()).sqrt()
        x = mean + std * torch.randn(16, 2, generator=generator)
        torch.testing.assert_close(states[:, n + 1], x, rtol=1e-4, atol=1e-4)


def test_annealed_scales_go_to_one_with_progress() -> None:
    options = TemperedOptions(0.5, 3.0, anneal=True)
    assert [options.scales_at(progress) for progress in (0.0, 0.5, 1.0)] == [(0.5, 3.0), (0.75, 2.0), (1.0, 1.0)]
    assert TemperedOptions(0.5, 3.0).scales_at(1.0) == (0.5, 3.0)


# Local search.


@pytest.mark.parametrize(
    ("depth", "process", "policy"),
    [
        (0.5, BrownianProcess(5.0), {"learned_variance": True}),
        (0.5, BrownianProcess(5.0), {"langevin": True, "learned_backward": True, "backward_scale": 0.5}),
        (1.0, OrnsteinUhlenbeckProcess(4.0, noise=2.0, exponential=True), {}),
    ],
    ids=["brownian", "langevin", "dds"],
)
def test_metropolis_search_leaves_the_target_invariant(
    depth: float, process: DiffusionProcess, policy: dict[str, Any]
) -> None:
    target, n = make_target("gmm9"), 6_000
    assert isinstance(target, GaussianMixture)
    held = replay_of(target, n)
    first = held[0]
    context = make_context(target, n, process=process, spread=0.1, ask_replayed=lambda n: held, **policy)
    actor = LocalSearchActor(LocalSearchOptions(depth=depth, adaptive=False))
    for _ in range(12):
        batch = actor.generate(context)
        held = batch["states"][:, -1], batch["log_reward"]
    x = held[0]
    means = target.means.float()
    mode, started = (torch.cdist(points, means).argmin(1) for points in (x, first))
    assert float((x != first).any(1).float().mean()) > 0.3
    assert float((mode != started).float().mean()) > 0.05
    # Every chain is a sample of its own, so that the error bars are those of independent draws.
    counts, share = torch.bincount(mode, minlength=9), 1 / 9
    assert float((counts - n * share).abs().max()) < 4.0 * math.sqrt(n * share * (1 - share))
    squares = (x - means[mode]).square().sum(1) / 0.3
    assert float(squares.mean()) == pytest.approx(2.0, abs=4.0 * 2.0 / math.sqrt(n))
    torch.testing.assert_close(held[1], target.log_reward(x))


def test_metropolis_ratio_is_that_of_the_two_ways() -> None:
    # One step back and forth, by its equation in float64, with the uniform numbers that the actor drew.
    target, n, sigma2 = make_target("gmm9"), 64, 5.0
    terminal, log_reward = replay_of(target, n)
    context = make_context(target, n, ask_replayed=lambda n: (terminal, log_reward), spread=0.1)
    batch = LocalSearchActor(LocalSearchOptions(depth=0.01)).generate(context)
    generator = torch.Generator().manual_seed(0)
    bridge = context.process.sample_bridge(terminal, batch["times"][0], generator)
    turn = bridge[:, -2]
    drift, _ = context.policy(turn, context.policy.embed_times(batch["times"][0][-2:-1])[0])
    proposal = turn + drift / STEPS + math.sqrt(sigma2 / STEPS) * torch.randn(n, 2, generator=generator)
    uniform = torch.rand(n, generator=generator)

    def log_joint(x: Tensor) -> Tensor:
        """log R(x) P_B(turn | x) / P_F(x | turn)."""
        x, s, mean = x.double(), turn.double(), (turn + drift / STEPS).double()
        back = 1 - 1 / STEPS
        backward = torch.distributions.Normal(back * x, math.sqrt(back * sigma2 / STEPS)).log_prob(s).sum(1)
        forward = torch.distributions.Normal(mean, math.sqrt(sigma2 / STEPS)).log_prob(x).sum(1)
        return target.log_reward(x) + backward - forward

    accepted = uniform.log() < log_joint(proposal) - log_joint(terminal)
    assert 0 < int(accepted.sum()) < n
    expected = bridge.clone()
    expected[:, -1] = torch.where(accepted.unsqueeze(1), proposal, terminal)
    torch.testing.assert_close(batch["states"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("langevin", [False, True])
def test_greedy_search_never_lowers_the_reward(langevin: bool) -> None:
    target = make_target("funnel")
    terminal, log_reward = replay_of(target, 200)
    context = make_context(target, 200, ask_replayed=lambda n: (terminal, log_reward), langevin=langevin)
    batch = LocalSearchActor(LocalSearchOptions(accept="greedy")).generate(context)
    moved = (batch["states"][:, -1] != terminal).any(1)
    assert 0 < int(moved.sum()) < 200
    assert (batch["log_reward"][moved] > log_reward[moved]).all()
    assert torch.equal(batch["log_reward"][~moved], log_reward[~moved])


@pytest.mark.parametrize("accept", ["metropolis", "greedy"])
def test_search_leaves_what_is_undefined_and_never_goes_there(accept: str) -> None:
    class Half(Target):
        name, dim = "half", 2

        def log_reward(self, x: Tensor) -> Tensor:
            return torch.where(x[..., 0] > 0, -0.5 * x.square().sum(-1), torch.nan)

    context = make_context(Half(), 200, spread=0.0)
    batch = LocalSearchActor(LocalSearchOptions(depth=1.0, accept=accept)).generate(context)  # type: ignore[arg-type]
    # Half of the rollouts and half of the moves are undefined: both together are a quarter.
    undefined = int(batch["log_reward"].isnan().sum())
    assert 25 < undefined < 75
    assert torch.equal(batch["states"][:, -1, 0] > 0, batch["log_reward"].isfinite())


def test_a_perfect_student_is_always_accepted_and_searches_ever_deeper() -> None:
    # Untrained it is Brownian motion, which ends in N(0, sigma^2): R P_B / P_F is 1 on every path.
    terminal, log_reward = replay_of(gaussian(5.0), 50)
    context = make_context(gaussian(5.0), 50, spread=0.0, ask_replayed=lambda n: (terminal, log_reward))
    actor = LocalSearchActor(LocalSearchOptions(depth=0.3))
    depths = []
    for _ in range(20):
        batch = actor.generate(context)
        assert (batch["states"][:, -1] != terminal).all()
        depths.append(actor.depth)
    assert depths == sorted(depths)
    assert depths[-1] == 1.0
    fixed = LocalSearchActor(LocalSearchOptions(depth=0.3, adaptive=False))
    fixed.generate(context)
    assert fixed.depth == 0.3


def test_search_that_finds_nothing_goes_back_a_single_step() -> None:
    narrow = gaussian(1e-4)
    terminal, log_reward = replay_of(narrow, 50)
    context = make_context(narrow, 50, spread=0.0, ask_replayed=lambda n: (terminal, log_reward))
    actor = LocalSearchActor(LocalSearchOptions(depth=1.0))
    for _ in range(20):
        actor.generate(context)
    assert actor.depth == 1 / STEPS


# Langevin-driven.


def test_plain_langevin_steps_change_the_variance_as_they_must() -> None:
    # Of N(0, c), a step of size h makes v into (1 - h/c)^2 v + 2h.
    c, h, steps, n = 2.0, 0.3, 4, 4_000
    context = make_context(gaussian(c), n, std=1.0, spread=0.0)
    batch = LangevinActor(LangevinOptions(steps, h, adjusted=False)).generate(context)
    variance = 5.0 + 1.0
    for _ in range(steps):
        variance = (1 - h / c) ** 2 * variance + 2 * h
    relative_error = 4.0 * math.sqrt(2 / (2 * n))
    assert float(batch["states"][:, -1].var()) == pytest.approx(variance, rel=relative_error)


def test_adjusted_langevin_steps_leave_the_target_invariant_and_adapt() -> None:
    n = 4_000
    context = make_context(gaussian(5.0), n, spread=0.0)
    actor = LangevinActor(LangevinOptions(20, 0.5))
    batch = actor.generate(context)
    x = batch["states"][:, -1]
    error = 4.0 / math.sqrt(2 * n)
    assert float(x.mean()) == pytest.approx(0.0, abs=math.sqrt(5.0) * error)
    assert float(x.square().mean()) == pytest.approx(5.0, rel=math.sqrt(2) * error)
    # Nearly every step of such a size is accepted.
    assert actor.step_size > 1.0


def test_langevin_steps_stay_finite_where_the_target_is_steep() -> None:
    for adjusted in (True, False):
        context = make_context(make_target("funnel"), 100, std=3.0)
        batch = LangevinActor(LangevinOptions(50, adjusted=adjusted)).generate(context)
        assert batch["states"].isfinite().all()
        assert batch["states"].abs().max() < 1e3


# Replayed.


def test_replayed_paths_end_in_replayed_states() -> None:
    target = make_target("gmm9")
    terminal, log_reward = replay_of(target, 500)
    context = make_context(target, 500, ask_replayed=lambda n: (terminal[:n], log_reward[:n]))
    exact = ReplayedActor(ReplayedOptions(std=0.0)).generate(context)
    assert torch.equal(exact["states"][:, -1], terminal)
    assert torch.equal(exact["log_reward"], log_reward)
    noised = ReplayedActor(ReplayedOptions(std=0.2)).generate(context)
    moves = noised["states"][:, -1] - terminal
    assert float(moves.square().mean().sqrt()) == pytest.approx(0.2, rel=4.0 / math.sqrt(2 * 1000))
    torch.testing.assert_close(noised["log_reward"], target.log_reward(noised["states"][:, -1]))
    # The paths are P_B's: half-way they have the bridge's mean and variance.
    middle = exact["states"][:, STEPS // 2] - 0.5 * terminal
    assert float(middle.var()) == pytest.approx(5.0 / 4, rel=4.0 * math.sqrt(2 / 1000))


def test_replayed_rolls_out_before_there_is_anything() -> None:
    own = ExplorationActor().generate(make_context(make_target("gmm9"), std=1.0))
    batch = ReplayedActor(ReplayedOptions()).generate(make_context(make_target("gmm9"), std=1.0))
    assert torch.equal(batch["states"], own["states"])


# Mixtures.


def test_a_mixture_makes_every_batch_by_one_of_its_kinds_as_often_as_its_weight() -> None:
    target = make_target("gmm9")
    terminal, log_reward = replay_of(target, 4)
    context = make_context(target, 4, std=1.0, ask_replayed=lambda n: (terminal, log_reward))
    mixture = MixtureActor(MixtureOptions("explore:3,replayed"))
    assert [type(part) for part in mixture.parts] == [ExplorationActor] * 3 + [ReplayedActor]
    explored = 0
    for _ in range(200):
        ends = mixture.generate(context)["states"][:, -1]
        explored += bool((ends - terminal).abs().max() > 0.6)
    assert explored == pytest.approx(150, abs=4 * math.sqrt(200 * 3 / 16))


def test_parts_of_a_mixture_keep_their_state() -> None:
    mixture = MixtureActor(MixtureOptions("local_search:2"))
    searching, same = mixture.parts
    assert isinstance(searching, LocalSearchActor)
    assert searching is same
    mixture.generate(make_context(make_target("gmm9")))
    assert searching.depth != searching.options.depth


# What they cost, and what they refuse.


@pytest.mark.parametrize("replay", [False, True], ids=["before", "replaying"])
@pytest.mark.parametrize("langevin", [False, True], ids=["plain", "langevin"])
@pytest.mark.parametrize(
    ("name", "options", "energy", "gradient", "scores"),
    [
        ("tempered", {}, (1, 1), (0, 0), (6, 6)),
        ("local_search", {"depth": 0.5}, (2, 1), (0, 0), (6 + 6 + 3, 6 + 3)),
        ("local_search", {"depth": 0.5, "accept": "greedy"}, (2, 1), (0, 0), (6 + 6 + 3, 6 + 3)),
        ("langevin", {"mcmc_steps": 3}, (4, 4), (4, 4), (12, 12)),
        ("langevin", {"mcmc_steps": 3, "adjusted": False}, (1, 1), (3, 3), (12, 12)),
        ("replayed", {}, (1, 1), (0, 0), (6, 6)),
        ("replayed", {"std": 0.0}, (1, 0), (0, 0), (6, 6)),
        ("mixture", {"of": "tempered"}, (1, 1), (0, 0), (6, 6)),
    ],
)
def test_batches_cost_what_is_documented(
    name: str,
    options: dict[str, Any],
    energy: tuple[int, int],
    gradient: tuple[int, int],
    scores: tuple[int, int],
    langevin: bool,
    replay: bool,
) -> None:
    target, n = make_target("gmm9"), 5
    held = replay_of(target, n)
    context = make_context(target, n, ask_replayed=(lambda n: held) if replay else no_replay, langevin=langevin)
    make_actor(name, **options).generate(context)
    assert context.target.energy_evaluations == n * energy[replay]
    assert context.target.gradient_evaluations == n * (gradient[replay] + langevin * scores[replay])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("tempered", "drift_scale", -1.0),
        ("tempered", "noise_scale", math.inf),
        ("local_search", "depth", 0.0),
        ("local_search", "depth", 1.1),
        ("local_search", "target_acceptance", 1.0),
        ("local_search", "accept", "always"),
        ("langevin", "mcmc_steps", 0),
        ("langevin", "step_size", 0.0),
        ("langevin", "target_acceptance", 0.0),
        ("replayed", "std", -0.1),
        ("mixture", "of", ""),
        ("mixture", "of", "explore,explore"),
        ("mixture", "of", "explore,mixture"),
    ],
)
def test_options_out_of_range_are_refused_by_name(name: str, field: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        make_actor(name, **{field: value})
    assert error.value.field == f"actor.options.{name}.{field}"
    assert error.value.value == value


def test_a_mixture_of_what_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'temperd'.*did you mean 'tempered'"):
        make_actor("mixture", of="explore,temperd")
