"""Losses on paths and segments: against naive transcriptions, analytic truths and finite differences, in float64."""

import itertools
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.envs.grids import random_grid, uniform_grid
from driftstream.envs.processes import BrownianProcess, DiffusionProcess, OrnsteinUhlenbeckProcess, Step
from driftstream.envs.targets import CountedTarget, Target
from driftstream.envs.targets_gmm import GaussianMixture
from driftstream.learner.losses import Paths, draw_segments, log_flows, path_loss, state_log_flow
from driftstream.learner.objectives import ObjectiveConfig

DIM, STEPS, BATCH = 2, 5, 4
PROCESSES: dict[str, DiffusionProcess] = {
    "brownian": BrownianProcess(1.7),
    "dis": OrnsteinUhlenbeckProcess(1.3, noise=2.0),
    "dds": OrnsteinUhlenbeckProcess(1.3, noise=2.0, exponential=True),
}
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned variance": {"learned_variance": True},
    "learned backward": {"learned_backward": True, "backward_scale": 0.5},
    "langevin by dimension": {"langevin": True},
    "langevin scalar": {"langevin": True, "langevin_scale": "scalar"},
    "all": {"learned_variance": True, "learned_backward": True, "langevin": True, "precondition": True},
}
SUBTB = [ObjectiveConfig("subtrajectory_balance", lam=lam) for lam in (0.0, 0.9, 1.0, 2.0)]
BALANCED = [ObjectiveConfig("detailed_balance"), *SUBTB]
OBJECTIVES = [
    ObjectiveConfig("trajectory_balance"),
    ObjectiveConfig("vargrad"),
    ObjectiveConfig("maximum_likelihood"),
    *BALANCED,
]


every_policy = pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES.keys())
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_grid = pytest.mark.parametrize("kind", ["uniform", "random"])
every_flow = pytest.mark.parametrize("flow", ["plain", "forward_looking"])


def log_normal(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """log N(x; mean, std² I) of x [..., D]; torch's own distribution would take numbers in single precision."""
    mean, std = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, std))
    return Normal(mean, std).log_prob(x).sum(-1)


def make_grid(kind: str, steps: int = STEPS) -> Tensor:
    if kind == "uniform":
        return uniform_grid(steps, dtype=torch.float64)
    return random_grid(steps, torch.Generator().manual_seed(3), dtype=torch.float64)


def make_target() -> Target:
    means = torch.tensor([[1.0, 0.5], [-1.0, 0.0], [0.0, -2.0]])
    return GaussianMixture("three", means, 0.6, torch.tensor([1.0, 2.0, 3.0]))


def make_policy(seed: int = 0, **options: Any) -> DiffusionPolicy:
    torch.manual_seed(seed)
    policy = DiffusionPolicy(DIM, PolicyConfig(hidden=6, harmonics=4, **options)).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


def make_paths(target: Target, times: Tensor, process: DiffusionProcess, batch: int = BATCH, seed: int = 0) -> Paths:
    """Arbitrary states: the objectives hold for any path distribution."""
    steps = len(times) - 1
    states = torch.randn(batch, steps + 1, DIM, generator=torch.Generator().manual_seed(seed)).double()
    if not process.prior_std:
        states[:, 0] = 0.0
    return Paths(states, times, target.log_reward(states[:, -1]), target.score(states[:, :-1]))


def segments_of(paths: Paths, starts: Sequence[int], length: int) -> Paths:
    """The segment of `length` transitions of each row that starts at its place."""
    assert paths.scores is not None
    states = [paths.states[row, start : start + length + 1] for row, start in enumerate(starts)]
    scores = [paths.scores[row, start : start + length] for row, start in enumerate(starts)]
    index = torch.tensor([list(range(start, start + length + 1)) for start in starts])
    return Paths(torch.stack(states), paths.times, paths.log_reward, torch.stack(scores), index)


def naive_step(process: DiffusionProcess, start: float, end: float) -> Step:
    """The kernels of one step, from the definition of the process (constant schedule)."""
    dt = end - start
    if isinstance(process, BrownianProcess):
        variance = process.diffusion_variance
        return Step(1.0, dt, variance * dt, start / end, variance * dt * start / end)
    assert isinstance(process, OrnsteinUhlenbeckProcess)
    if process.exponential:
        shrink = math.exp(-process.noise * dt / 2)
        variance = process.prior_std**2 * (1 - shrink**2)
        return Step(shrink, 2 * (1 - shrink) / process.noise, variance, shrink, variance)
    spent = process.noise * dt
    variance = process.prior_std**2 * spent
    return Step(1 - spent / 2, dt, variance, 1 - spent / 2, variance)


Terms = tuple[list[Tensor], list[Tensor], list[Tensor]]


def naive_terms(
    policy: DiffusionPolicy, process: DiffusionProcess, target: Target, paths: Paths, log_z: Tensor, row: int
) -> Terms:
    """log P_F and log P_B of a row's transitions and log F of its states, one distribution at a time."""
    steps, length = len(paths.times) - 1, paths.states.shape[1] - 1
    index = list(range(length + 1)) if paths.index is None else paths.index[row].tolist()
    points = paths.times.tolist()
    log_pf, log_pb, log_flow = [], [], []
    for n in range(length):
        x, y = paths.states[row, n], paths.states[row, n + 1]
        before, after = paths.times[index[n]].reshape(1), paths.times[index[n + 1]].reshape(1)
        step = naive_step(process, points[index[n]], points[index[n + 1]])
        drift, log_var = policy(x, policy.embed_times(before, process)[0], target.score(x))
        scale = math.sqrt(step.variance) * (torch.ones(DIM).double() if log_var is None else (log_var / 2).exp())
        log_p = log_normal(y, step.keep * x + step.gain * drift, scale)
        if index[n] == 0 and process.prior_std:
            log_p = log_p + log_normal(x, 0.0, process.prior_std)
        log_pf.append(log_p)
        if index[n] == 0 and not process.prior_std:
            log_pb.append(torch.zeros((), dtype=torch.float64))
            continue
        embedding = policy.embed_backward(after)
        mean, variance = torch.ones(2, DIM, dtype=torch.float64)
        if policy.backward_net is not None:
            assert embedding is not None
            raw = policy.backward_net(y, embedding[0])
            mean, variance = (1 + policy.config.backward_scale * raw.tanh()).chunk(2)
        scale = (step.back_variance * variance).sqrt()
        log_pb.append(log_normal(x, y - (1 - step.back) * mean * y, scale))
    for n in range(length + 1):
        x, t = paths.states[row, n], points[index[n]]
        if index[n] == 0:
            log_flow.append(log_z)
        elif index[n] == steps:
            log_flow.append(paths.log_reward[row])
        elif policy.flow_net is not None:
            correction = policy.flow_net(x, policy.flow_net.embed(paths.times[index[n]].reshape(1))[0]).squeeze()
            if policy.config.state_flow == "forward_looking":
                std = process.prior_std
                if isinstance(process, BrownianProcess):
                    std = math.sqrt(process.diffusion_variance * t)
                correction = correction + (1 - t) * log_normal(x, 0.0, std) + t * target.log_reward(x)
            log_flow.append(correction)
    return log_pf, log_pb, log_flow


def naive_log_weights(terms: list[Terms], log_reward: Tensor) -> list[float]:
    return [float(log_reward[row] + sum(pb) - sum(pf)) for row, (pf, pb, _) in enumerate(terms)]


def naive_loss(objective: ObjectiveConfig, terms: list[Terms], log_reward: Tensor, log_z: Tensor) -> float:
    """The objective's equation, from the terms of every row."""
    if objective.name == "maximum_likelihood":
        return -sum(float(sum(pf)) for pf, _, _ in terms) / len(terms)
    if objective.name in ("trajectory_balance", "vargrad"):
        weights = naive_log_weights(terms, log_reward)
        level = float(log_z) if objective.name == "trajectory_balance" else sum(weights) / len(weights)
        return sum((level - weight) ** 2 for weight in weights) / len(weights)
    total, norm = 0.0, 0.0
    length = len(terms[0][0])
    for i in range(length):
        for j in range(i + 1, length + 1):
            # The common factor λ cancels; without it λ = 0 is the limit of single transitions.
            factor = objective.lam ** (j - i - 1)
            if objective.name == "detailed_balance":
                factor = 1.0 if j == i + 1 else 0.0
            norm += factor
            for pf, pb, flow in terms:
                residual = flow[i] + sum(pf[i:j]) - flow[j] - sum(pb[i:j])
                total += factor * float(residual) ** 2 / len(terms)
    return total if objective.name == "detailed_balance" else total / norm


@torch.no_grad()
def assert_losses_equal_their_transcription(policy: DiffusionPolicy, process: DiffusionProcess, paths: Paths) -> None:
    target, log_z = make_target(), torch.tensor(1.3, dtype=torch.float64)
    terms = [naive_terms(policy, process, target, paths, log_z, row) for row in range(len(paths.states))]
    for objective in OBJECTIVES if paths.index is None else BALANCED:
        loss, log_weight = path_loss(objective, policy, process, target, paths, log_z)
        expected = naive_loss(objective, terms, paths.log_reward, log_z)
        assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12), objective
        if paths.index is None:
            assert log_weight is not None
            assert log_weight.tolist() == pytest.approx(naive_log_weights(terms, paths.log_reward), rel=1e-9)
        else:
            assert log_weight is None


@every_policy
@every_process
@every_grid
@every_flow
def test_losses_equal_their_transcription(
    options: dict[str, Any], process: DiffusionProcess, kind: str, flow: str
) -> None:
    paths = make_paths(make_target(), make_grid(kind), process)
    assert_losses_equal_their_transcription(make_policy(state_flow=flow, **options), process, paths)


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (3, 1), (1, 2), (2, 9)])
@every_process
def test_losses_of_other_shapes_equal_their_transcription(process: DiffusionProcess, batch: int, steps: int) -> None:
    policy = make_policy(state_flow="forward_looking", **POLICIES["all"])
    paths = make_paths(make_target(), make_grid("random", steps), process, batch)
    assert_losses_equal_their_transcription(policy, process, paths)


@pytest.mark.parametrize("length", [1, 2, 4])
@every_process
@every_grid
@every_flow
def test_losses_of_segments_equal_their_transcription(
    length: int, process: DiffusionProcess, kind: str, flow: str
) -> None:
    policy = make_policy(state_flow=flow, **POLICIES["all"])
    paths = make_paths(make_target(), make_grid(kind), process)
    assert_losses_equal_their_transcription(policy, process, segments_of(paths, [0, 1, STEPS - length, 0], length))


def directional_derivatives(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor], directions: int = 3, step: float = 1e-4
) -> list[tuple[float, float]]:
    """(autograd's, finite differences') derivative of the loss along random directions in all its parameters."""
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True, materialize_grads=True)
    start = [parameter.detach().clone() for parameter in parameters]
    pairs = []
    for seed in range(directions):
        generator = torch.Generator().manual_seed(seed)
        ways = [torch.randn(value.shape, generator=generator, dtype=torch.float64) for value in start]
        exact = sum(float((gradient * way).sum()) for gradient, way in zip(gradients, ways, strict=True))

        def at(distance: float, ways: Sequence[Tensor] = ways) -> float:
            with torch.no_grad():
                for parameter, value, way in zip(parameters, start, ways, strict=True):
                    parameter.copy_(value + distance * way)
            return float(loss().detach())

        # Fourth order, so that the step can be long enough for the loss's rounding.
        numeric = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)
        at(0.0)
        pairs.append((exact, numeric))
    return pairs


def assert_gradients_agree_with_finite_differences(
    policy: DiffusionPolicy, process: DiffusionProcess, paths: Paths, objectives: Sequence[ObjectiveConfig]
) -> None:
    target, log_z = make_target(), nn.Parameter(torch.tensor(1.3, dtype=torch.float64))
    for objective in objectives:

        def loss(objective: ObjectiveConfig = objective) -> Tensor:
            return path_loss(objective, policy, process, target, paths, log_z)[0]

        for exact, numeric in directional_derivatives(loss, [*policy.parameters(), log_z]):
            assert exact == pytest.approx(numeric, rel=1e-5), objective


@every_policy
@every_process
@every_flow
def test_gradients_agree_with_finite_differences(options: dict[str, Any], process: DiffusionProcess, flow: str) -> None:
    policy = make_policy(state_flow=flow, **options)
    paths = make_paths(make_target(), make_grid("random"), process)
    objectives = OBJECTIVES if flow == "plain" else BALANCED
    assert_gradients_agree_with_finite_differences(policy, process, paths, objectives)


@every_process
def test_gradients_on_segments_agree_with_finite_differences(process: DiffusionProcess) -> None:
    policy = make_policy(state_flow="forward_looking", **POLICIES["all"])
    segments = segments_of(make_paths(make_target(), make_grid("random"), process), [0, 1, 2, 3], 2)
    assert_gradients_agree_with_finite_differences(policy, process, segments, BALANCED)


def test_an_objective_that_draws_its_own_paths_is_refused() -> None:
    target, process = make_target(), PROCESSES["brownian"]
    paths = make_paths(target, make_grid("uniform"), process)
    with pytest.raises(ValueError, match=r"objective\.name = 'reverse_kl': it draws its own paths"):
        path_loss(ObjectiveConfig("reverse_kl"), make_policy(), process, target, paths, torch.zeros(()))
    with pytest.raises(ValueError, match=r"policy\.state_flow = 'none': the policy has no state flow"):
        path_loss(SUBTB[0], make_policy(state_flow="none"), process, target, paths, torch.zeros(()))


# A Gaussian target, whose optimal policy and flow are known.

LOG_Z = 4.2


class Gaussian(Target):
    """e^LOG_Z N(mean, std² I)."""

    name, dim, log_z = "gaussian", DIM, LOG_Z

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def log_reward(self, x: Tensor) -> Tensor:
        return LOG_Z + log_normal(x, self.mean, self.std)


class OptimalPolicy:
    """The time reversal of P_B's chain from a Gaussian target, in the shape of a `DiffusionPolicy`.

    Backwards x_n has the law N(a_n E[x_{n+1}], a_n² Var[x_{n+1}] + b_n) with x_n = a_n x_{n+1} + noise of variance
    b_n; x_{n+1} given x_n follows from their joint Gaussian. Times are told apart by their place in the grid.
    """

    backward_net = None
    flow_level = torch.zeros((), dtype=torch.float64)
    config = SimpleNamespace(state_flow="plain", reward_clip=math.inf)

    def __init__(self, process: DiffusionProcess, times: Tensor, target: Gaussian) -> None:
        self.times = times
        points = times.tolist()
        means, variances = [target.mean], [target.std**2]
        steps = [naive_step(process, start, end) for start, end in itertools.pairwise(points)]
        for step in reversed(steps):
            means.insert(0, step.back * means[0])
            variances.insert(0, step.back**2 * variances[0] + step.back_variance)
        self.means, self.variances, rows = means, variances, []
        for n, step in enumerate(steps):
            # Where x_n is certain any slope will do, and this one leaves the drift without it.
            slope = step.back * variances[n + 1] / variances[n] if variances[n] else step.keep
            offset = means[n + 1] - slope * means[n]
            left = variances[n + 1] - slope**2 * variances[n]
            rows.append(((slope - step.keep) / step.gain, offset / step.gain, math.log(left / step.variance)))
        self.coefficients = torch.tensor(rows, dtype=torch.float64)
        self.moments = torch.tensor([means, variances], dtype=torch.float64).T
        self.flow_net = SimpleFlow(self)

    def embed_times(self, t: Tensor, process: DiffusionProcess | None = None) -> Tensor:
        return self.coefficients[torch.searchsorted(self.times, t)]

    def __call__(self, x: Tensor, embedding: Tensor, score: Tensor | None = None) -> tuple[Tensor, Tensor]:
        slope, offset, log_var = embedding.unsqueeze(-1).unbind(-2)
        return slope * x + offset, log_var + torch.zeros_like(x)

    def embed_backward(self, t: Tensor) -> None:
        return None

    def backward_factors(self, x: Tensor, embedding: Tensor | None) -> tuple[None, None]:
        return None, None


class SimpleFlow:
    """log Z plus the log density of the chain's marginal."""

    def __init__(self, policy: OptimalPolicy) -> None:
        self.policy = policy

    def embed(self, t: Tensor) -> Tensor:
        return self.policy.moments[torch.searchsorted(self.policy.times, t)]

    def __call__(self, x: Tensor, embedding: Tensor) -> Tensor:
        mean, variance = embedding.unsqueeze(-1).unbind(-2)
        return (LOG_Z + log_normal(x, mean, variance.sqrt())).unsqueeze(-1)


class MatchedPrior(OrnsteinUhlenbeckProcess):
    """The process with the noised target's exact law as its prior."""

    mean, variance = 0.0, 1.0

    def log_prior(self, x: Tensor) -> Tensor:
        return log_normal(x, self.mean, math.sqrt(self.variance))


def with_matched_prior(process: DiffusionProcess, times: Tensor, target: Gaussian) -> DiffusionProcess:
    if isinstance(process, BrownianProcess):
        return process
    assert isinstance(process, OrnsteinUhlenbeckProcess)
    matched = MatchedPrior(process.prior_std, process.noise, process.exponential)
    optimal = OptimalPolicy(process, times, target)
    matched.mean, matched.variance = optimal.means[0], optimal.variances[0]
    return matched


def assert_no_residual(
    policy: OptimalPolicy, process: DiffusionProcess, target: Gaussian, times: Tensor, spread: float = 3.0
) -> None:
    """Every objective that can be zero is zero, on arbitrary paths and on segments of them."""
    steps = len(times) - 1
    states = spread * torch.randn(6, steps + 1, DIM, generator=torch.Generator().manual_seed(1)).double()
    if not process.prior_std:
        states[:, 0] = 0.0
    paths = Paths(states, times, target.log_reward(states[:, -1]), torch.zeros(6, steps, DIM).double())
    log_z = torch.tensor(LOG_Z, dtype=torch.float64)

    def loss(objective: ObjectiveConfig, paths: Paths) -> float:
        return path_loss(objective, policy, process, target, paths, log_z)[0].item()  # type: ignore[arg-type]

    for objective in (ObjectiveConfig("trajectory_balance"), ObjectiveConfig("vargrad"), *BALANCED):
        # Log densities of some hundred nats cancel; what is left is squared.
        assert 0 <= loss(objective, paths) < 1e-18, objective
    for objective in BALANCED:
        assert 0 <= loss(objective, segments_of(paths, [0, 1, 2, 3, 4, steps - 3], 3)) < 1e-18, objective


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5), (-1.5, 2.0)])
@every_process
@every_grid
def test_the_optimal_policy_of_a_gaussian_leaves_no_residual(
    process: DiffusionProcess, kind: str, mean: float, std: float
) -> None:
    target, times = Gaussian(mean, std), make_grid(kind, 11)
    policy = OptimalPolicy(process, times, target)
    assert_no_residual(policy, with_matched_prior(process, times, target), target, times)


@every_grid
def test_the_uncontrolled_processes_are_optimal_for_their_stationary_laws(kind: str) -> None:
    times = make_grid(kind, 11)
    dds, brownian = PROCESSES["dds"], PROCESSES["brownian"]
    for process, std in ((dds, dds.prior_std), (brownian, math.sqrt(1.7))):
        target = Gaussian(0.0, std)
        policy = OptimalPolicy(process, times, target)
        torch.testing.assert_close(policy.coefficients, torch.zeros_like(policy.coefficients), rtol=0, atol=1e-9)
        assert_no_residual(policy, process, target, times)


# Segments and flows.


@pytest.mark.parametrize("length", [1, 3, 8, 10])
def test_segments_are_parts_of_their_paths(length: int) -> None:
    steps, rows = 10, 12_000
    states = torch.arange(rows * (steps + 1) * 2.0).view(rows, steps + 1, 2)
    scores = -states[:, :-1]
    paths = Paths(states, uniform_grid(steps), torch.arange(float(rows)), scores)
    segments = draw_segments(paths, length, torch.Generator().manual_seed(0))
    again = draw_segments(paths, length, torch.Generator().manual_seed(0))
    assert segments.index is not None
    assert segments.scores is not None
    assert again.index is not None
    assert torch.equal(segments.index, again.index)
    assert segments.states.shape == (rows, length + 1, 2)
    assert segments.scores.shape == (rows, length, 2)
    assert (segments.index.diff(dim=1) == 1).all()
    assert (segments.index.min(), segments.index.max()) == (0, steps)
    row = torch.arange(rows).unsqueeze(1)
    assert torch.equal(segments.states, states[row, segments.index])
    assert torch.equal(segments.scores, scores[row, segments.index[:, :-1]])
    assert torch.equal(segments.log_reward, paths.log_reward)
    assert segments.times is paths.times
    # A transition inside is in L of the T + L - 1 places; one near an end also in those that were moved inside.
    places = steps + length - 1
    counts = torch.bincount(segments.index[:, :-1].flatten(), minlength=steps)
    starts = [min(max(place, 0), steps - length) for place in range(1 - length, steps)]
    expected = [sum(start <= n < start + length for start in starts) for n in range(steps)]
    assert min(expected) >= length
    for n in range(steps):
        share = expected[n] / places
        error = math.sqrt(share * (1 - share) / rows)
        assert float(counts[n]) / rows == pytest.approx(share, abs=4.5 * error + 1e-9)


def test_segments_are_no_longer_than_the_grid() -> None:
    paths = make_paths(make_target(), make_grid("uniform"), PROCESSES["brownian"])
    with pytest.raises(ValueError, match="length = 6: expected at most the 5 steps of the grid"):
        draw_segments(paths, 6)
    bare = Paths(paths.states, paths.times, paths.log_reward)
    assert draw_segments(bare, 2).scores is None


@every_process
@every_flow
def test_a_segment_as_long_as_the_path_is_the_path(process: DiffusionProcess, flow: str) -> None:
    target, log_z = make_target(), torch.tensor(1.3, dtype=torch.float64)
    policy = make_policy(state_flow=flow, **POLICIES["all"])
    for steps in (1, STEPS):
        paths = make_paths(target, make_grid("random", steps), process)
        for objective in BALANCED:
            whole, _ = path_loss(objective, policy, process, target, paths, log_z)
            segment, _ = path_loss(objective, policy, process, target, draw_segments(paths, steps), log_z)
            torch.testing.assert_close(segment, whole, rtol=1e-10, atol=0)


@every_flow
@every_process
def test_flows_end_in_log_z_and_log_reward(process: DiffusionProcess, flow: str) -> None:
    target, log_z = make_target(), torch.tensor(1.3, dtype=torch.float64)
    policy = make_policy(state_flow=flow)
    paths = make_paths(target, make_grid("random"), process)
    whole = log_flows(policy, process, target, paths, log_z)
    assert (whole[:, 0] == 1.3).all()
    assert torch.equal(whole[:, -1], paths.log_reward)
    segments = segments_of(paths, [0, 1, 2, 3], 2)
    assert segments.index is not None
    torch.testing.assert_close(log_flows(policy, process, target, segments, log_z), whole.gather(1, segments.index))


def test_a_forward_looking_flow_stays_finite_where_the_reward_does_not() -> None:
    class Walled(Gaussian):
        def log_reward(self, x: Tensor) -> Tensor:
            return torch.where(x[..., 0] > 0.0, super().log_reward(x), -math.inf).where(x[..., 1] > 0.0, math.nan)

    policy = make_policy(state_flow="forward_looking", reward_clip=50.0)
    states = torch.tensor([[[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]], dtype=torch.float64)
    times = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    process, target = PROCESSES["brownian"], Walled(0.0, 1.0)
    log_flow = state_log_flow(policy, process, target, states, times)
    assert log_flow.isfinite().all()
    assert policy.flow_net is not None
    correction = policy.flow_net(states, policy.flow_net.embed(times)).squeeze(-1)
    expected = (1 - times) * process.log_reference(states, times) - 50.0 * times + correction
    torch.testing.assert_close(log_flow[:, 1:], expected[:, 1:])


@pytest.mark.parametrize("flow", ["plain", "forward_looking"])
def test_only_a_forward_looking_flow_asks_the_target(flow: str) -> None:
    target, process = CountedTarget(make_target()), PROCESSES["brownian"]
    paths = make_paths(make_target(), make_grid("uniform"), process)
    policy, log_z = make_policy(state_flow=flow), torch.zeros((), dtype=torch.float64)
    path_loss(SUBTB[-1], policy, process, target, paths, log_z)
    assert target.calls == (BATCH * (STEPS - 1) if flow == "forward_looking" else 0)


@pytest.mark.parametrize("state_flow", ["plain", "forward_looking"])
def test_a_state_flow_moves_along_with_the_level_of_log_z(state_flow: str) -> None:
    torch.manual_seed(0)
    policy = DiffusionPolicy(2, PolicyConfig(hidden=6, harmonics=4, state_flow=state_flow)).double()  # type: ignore[arg-type]
    process, target, times = BrownianProcess(1.3), make_target(), torch.tensor([0.25, 0.5], dtype=torch.float64)
    states = torch.randn(5, 2, 2, dtype=torch.float64)
    before = state_log_flow(policy, process, target, states, times)
    assert policy.flow_level is not None
    policy.flow_level.fill_(165.0)
    moved = state_log_flow(policy, process, target, states, times) - before
    share = torch.ones(2, dtype=torch.float64) if state_flow == "plain" else 1.0 - times
    torch.testing.assert_close(moved, (165.0 * share).expand(5, 2))
