"""The fused rollout against the environment's, and the scorer against the equations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.preconditioning import compressed
from driftstream.actors.rollout import rollout, rollout_backward, score_trajectories
from driftstream.actors.torchrl_policy import make_torchrl_policy
from driftstream.envs.grids import random_grid, uniform_grid
from driftstream.envs.processes import BrownianProcess, DiffusionProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.sampling_env import DiffusionSamplingEnv
from driftstream.envs.targets import make_target
from driftstream.envs.trajectory import as_transitions, from_transitions, validate_trajectories

PROCESSES: dict[str, DiffusionProcess] = {
    "brownian": BrownianProcess(1.7, "linear"),
    "dis": OrnsteinUhlenbeckProcess(1.3, noise=2.0, schedule="geometric"),
    "dds": OrnsteinUhlenbeckProcess(1.3, noise=2.0, exponential=True, schedule="cosine"),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())


def make_policy(dim: int, seed: int = 0, **options: Any) -> DiffusionPolicy:
    torch.manual_seed(seed)
    policy = DiffusionPolicy(dim, PolicyConfig(hidden=16, harmonics=8, **options))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


def grid(kind: str, steps: int, dtype: torch.dtype = torch.float32) -> Tensor:
    if kind == "uniform":
        return uniform_grid(steps, dtype=dtype)
    return random_grid(steps, torch.Generator().manual_seed(3), dtype=dtype)


@pytest.mark.parametrize("exploration_std", [0.0, 1.5])
@pytest.mark.parametrize("kind", ["uniform", "random"])
@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"langevin": True, "precondition": True}], ids=str)
@pytest.mark.parametrize("name", ["gmm25", "manywell"])
def test_rollout_equals_the_environments(
    name: str, options: dict[str, bool], kind: str, exploration_std: float
) -> None:
    target = make_target(name)
    process = BrownianProcess(target.diffusion_variance)
    times = grid(kind, 7)
    policy = make_policy(target.dim, **options)
    env = DiffusionSamplingEnv(target, process, times, batch_size=16)
    actor = make_torchrl_policy(policy, process, target, times, exploration_std)
    torch.manual_seed(5)
    with torch.no_grad():
        expected = env.rollout(7, actor)
    torch.manual_seed(5)
    trajectories = rollout(policy, process, target, times, 16, exploration_std=exploration_std)
    validate_trajectories(trajectories, target.dim, 7)
    transitions = as_transitions(trajectories)
    for key in transitions.keys(include_nested=True, leaves_only=True):
        torch.testing.assert_close(transitions[key], expected[key], rtol=2e-4, atol=2e-4)
    back = from_transitions(expected, times)
    torch.testing.assert_close(back["states"], trajectories["states"], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("exploration_std", [0.0, 1.5])
@pytest.mark.parametrize(
    "options",
    [{"learned_variance": True, "precondition": True}, {"langevin": True, "langevin_scale": "scalar"}],
    ids=str,
)
@every_process
def test_rollouts_of_every_process_equal_the_environments(
    process: DiffusionProcess, options: dict[str, Any], exploration_std: float
) -> None:
    target, times = make_target("manywell", dim=4), grid("random", 6, torch.float64)
    policy = make_policy(4, **options).double()
    env = DiffusionSamplingEnv(target, process, times, batch_size=16)
    actor = make_torchrl_policy(policy, process, target, times, exploration_std)
    torch.manual_seed(5)
    with torch.no_grad():
        expected = env.rollout(6, actor)
    torch.manual_seed(5)
    trajectories = rollout(policy, process, target, times, 16, exploration_std=exploration_std)
    torch.testing.assert_close(from_transitions(expected, times)["states"], trajectories["states"])
    torch.testing.assert_close(expected["next", "reward"][:, -1, 0], trajectories["log_reward"])
    # The draws of x_0 come first, and only where there is a prior to draw from.
    torch.manual_seed(5)
    start = process.prior_std * torch.randn(16, 4, dtype=torch.float64)
    assert torch.equal(trajectories["states"][:, 0], start)
    if not exploration_std:
        log_pf, _ = score_trajectories(policy, process, trajectories["states"], times, trajectories.get("scores", None))
        log_pf[:, 0] -= process.log_prior(start)
        torch.testing.assert_close(expected["action_log_prob"], log_pf)


@every_process
def test_rollouts_of_one_seed_are_equal(process: DiffusionProcess) -> None:
    target, times, policy = make_target("gmm25"), uniform_grid(5), make_policy(2)
    first, again, other = (
        rollout(policy, process, target, times, 8, generator=torch.Generator().manual_seed(seed))["states"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first[:, -1], other[:, -1])
    assert bool((first[:, 0] == 0).all()) == (process.prior_std == 0)


@every_process
def test_backward_rollouts_of_a_fixed_policy_are_bridges(process: DiffusionProcess) -> None:
    terminal, times = torch.randn(8, 3), grid("random", 6)
    generators = [torch.Generator().manual_seed(2) for _ in range(2)]
    states = rollout_backward(make_policy(3), process, terminal, times, generators[0])
    assert torch.equal(states, process.sample_bridge(terminal, times, generators[1]))


@every_process
def test_backward_rollouts_of_a_learned_policy_follow_its_densities(process: DiffusionProcess) -> None:
    # Standardised by the step's mean and variance, the states are the noise that drew them.
    policy = make_policy(3, learned_backward=True, backward_scale=0.5).double()
    times, rows = grid("random", 4, torch.float64), 4_000
    terminal = torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = rollout_backward(policy, process, terminal, times, torch.Generator().manual_seed(1))
    assert states.shape == (rows, 5, 3)
    assert torch.equal(states[:, -1], terminal)
    assert bool((states[:, 0] == 0).all()) == (process.prior_std == 0)
    with torch.no_grad():
        _, log_pb = score_trajectories(policy, process, states, times)
    generator = torch.Generator().manual_seed(1)
    embedding = policy.embed_backward(times[1:])
    assert embedding is not None
    assert policy.backward_net is not None
    kernels = process.kernels(times)
    for n in reversed(range(4)):
        noise = torch.randn(rows, 3, dtype=torch.float64, generator=generator)
        if not kernels.back_variance[n]:
            assert (log_pb[:, n] == 0).all()
            continue
        after = states[:, n + 1]
        mean_factor, variance_factor = (1 + 0.5 * policy.backward_net(after, embedding[n]).tanh()).chunk(2, -1)
        mean = after - (1 - kernels.back[n]) * mean_factor * after
        std = (kernels.back_variance[n] * variance_factor).sqrt()
        torch.testing.assert_close((states[:, n] - mean) / std, noise)
        expected = torch.distributions.Normal(mean, std).log_prob(states[:, n]).sum(-1)
        torch.testing.assert_close(log_pb[:, n], expected)
        # An expected log density is minus the entropy: an error of 5 standard errors of 3 half chi-squares.
        entropy = (0.5 * math.log(2 * math.pi * math.e) + std.log()).sum(-1)
        assert float((log_pb[:, n] + entropy).detach().mean()) == pytest.approx(0.0, abs=5 * math.sqrt(1.5 / rows))


@pytest.mark.parametrize("kind", ["uniform", "random"])
@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"langevin": True, "precondition": True}], ids=str)
def test_scorer_equals_the_transition_densities_step_by_step(options: dict[str, bool], kind: str) -> None:
    target = make_target("manywell", dim=4)
    process = BrownianProcess(1.7)
    times = grid(kind, 6, torch.float64)
    policy = make_policy(4, **options).double()
    trajectories = rollout(policy, process, target, times, 5, exploration_std=0.5)
    states, scores = trajectories["states"], trajectories.get("scores", None)
    log_pf, log_pb = score_trajectories(policy, process, states, times, scores)
    for n in range(6):
        dt = float(times[n + 1] - times[n])
        x, after = states[:, n], states[:, n + 1]
        drift, log_var = policy(x, policy.embed_times(times[n : n + 1], process)[0], target.score(x))
        std = math.sqrt(1.7 * dt) * (torch.ones_like(x) if log_var is None else (0.5 * log_var).exp())
        forward = torch.distributions.Normal(x + drift * dt, std).log_prob(after).sum(-1)
        torch.testing.assert_close(log_pf[:, n], forward)
        if n == 0:
            assert torch.equal(log_pb[:, 0], torch.zeros(5, dtype=torch.float64))
        else:
            ratio = float(times[n] / times[n + 1])
            backward = torch.distributions.Normal(after * ratio, math.sqrt(1.7 * dt * ratio))
            torch.testing.assert_close(log_pb[:, n], backward.log_prob(x).sum(-1))


@every_process
def test_segments_are_scored_as_parts_of_their_paths(process: DiffusionProcess) -> None:
    target, times = make_target("manywell", dim=4), grid("random", 6, torch.float64)
    policy = make_policy(4, learned_variance=True, learned_backward=True, langevin=True, precondition=True).double()
    trajectories = rollout(policy, process, target, times, 5, generator=torch.Generator().manual_seed(0))
    states, scores = trajectories["states"], trajectories["scores"]
    whole = score_trajectories(policy, process, states, times, scores)
    index = torch.tensor([0, 1, 2, 3, 3]).unsqueeze(1) + torch.arange(4)
    row = torch.arange(5).unsqueeze(1)
    parts = score_trajectories(policy, process, states[row, index], times, scores[row, index[:, :-1]], index)
    for part, all_steps in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, all_steps[row, index[:, :-1]])


@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"langevin": True}], ids=str)
def test_preconditioned_drifts_are_measured_by_the_noise_that_is_left(options: dict[str, bool]) -> None:
    process, times = BrownianProcess(1.7, "geometric", 100.0), grid("random", 6)
    policy = make_policy(4, precondition=True, **options)
    x, score = 3.0 * torch.randn(2, 5, 6, 4)
    embedding = policy.embed_times(times[:-1], process)
    drift, log_var = policy(x, embedding, score)
    left = (1.7 * (1.0 - process.clock(times[:-1]))).sqrt().unsqueeze(-1)

    def compress(x: Tensor) -> Tensor:
        return 4.0 * x.sign() * torch.log(1.0 + x.abs() / 4.0)

    out = policy.forward_net(math.sqrt(1.7) * compress(x / math.sqrt(1.7)), embedding.hidden)
    expected = 1.7 / left * (out[..., :4] + out[..., 4:8] * compress(x / left))
    if policy.langevin:
        expected = expected + policy.langevin_net(policy.langevin_features(times[:-1])) * score
    torch.testing.assert_close(drift, expected, rtol=1e-4, atol=1e-4)
    assert (log_var is None) == (out.shape[-1] == 8)
    if log_var is not None:
        torch.testing.assert_close(log_var, 4.0 * out[..., 8:].tanh())


def test_a_pull_of_minus_one_is_the_way_to_the_origin() -> None:
    process, times = BrownianProcess(1.7, "geometric", 100.0), grid("random", 6, torch.float64)
    policy = DiffusionPolicy(3, PolicyConfig(hidden=4, harmonics=2, precondition=True)).double()
    last: Any = policy.forward_net.joint_net[-1]
    last.bias.data[3:] = -1.0
    x = 1e-3 * torch.randn(5, 3, dtype=torch.float64)
    for n in range(6):
        drift, _ = policy(x, policy.embed_times(times[n : n + 1], process)[0])
        left = 1.0 - process.clock(times[n])
        torch.testing.assert_close(drift, -x / left, rtol=1e-2, atol=0.0)


def test_measures_have_their_slope_at_the_start_too() -> None:
    x = torch.tensor([-7.0, -1.0, -0.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    value = compressed(x, 4.0)
    torch.testing.assert_close(value, x.sign() * (1.0 + x.abs() / 4.0).log())
    torch.testing.assert_close(compressed(x.detach(), 4.0), value.detach())
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, 1.0 / (4.0 + x.abs()))
    assert torch.autograd.grad(slope.sum(), x)[0].isfinite().all()


def test_a_preconditioned_policy_must_know_the_process() -> None:
    with pytest.raises(ValueError, match=r"policy\.precondition = true: the policy's times need the process"):
        make_policy(4, precondition=True).embed_times(grid("uniform", 6))


def test_exploration_widens_the_paths_and_not_the_score() -> None:
    target = make_target("gmm25")
    process = BrownianProcess(5.0)
    policy = DiffusionPolicy(2, PolicyConfig(learned_variance=False))
    times = uniform_grid(20)
    generator = torch.Generator().manual_seed(0)
    plain = rollout(policy, process, target, times, 4000, generator=generator)["states"][:, -1]
    wide = rollout(policy, process, target, times, 4000, exploration_std=2.0, generator=generator)
    assert plain.var().item() == pytest.approx(5.0, rel=0.08)
    assert wide["states"][:, -1].var().item() == pytest.approx(9.0, rel=0.08)
    # The untrained policy scores the widened paths as plain Brownian ones.
    log_pf, _ = score_trajectories(policy, process, wide["states"], times)
    step = torch.distributions.Normal(0.0, math.sqrt(5.0 / 20))
    torch.testing.assert_close(log_pf, step.log_prob(wide["states"].diff(dim=1)).sum(-1), rtol=1e-4, atol=1e-4)


def test_tb_residual_vanishes_for_the_optimal_drift_of_a_gaussian() -> None:
    # For R = N(0, c I) and Brownian noise the optimal Euler-Maruyama kernel is known exactly: the reverse of the
    # bridge chain, Gaussian with linear drift. Any path, however drawn, must then weigh the same.
    c, sigma2, steps, dim = 2.3, 1.7, 9, 3
    process = BrownianProcess(sigma2)
    times = grid("random", steps, torch.float64)
    states = torch.randn(8, steps + 1, dim, dtype=torch.float64) * 3
    states[:, 0] = 0.0
    t, dt = times[:-1], times.diff()
    # Marginal variance of the bridge mixture at t, and the Gaussian conditional of x_{n+1} given x_n.
    s = c * times**2 + sigma2 * times * (1 - times)
    gain = torch.where(t > 0, (t / times[1:]) * s[1:] / s[:-1].clamp_min(1e-300), 0.0)
    variance = s[1:] - gain**2 * s[:-1]
    drift = (gain - 1.0).unsqueeze(-1) * states[:, :-1] / dt.unsqueeze(-1)
    log_var = (variance / (sigma2 * dt)).log().unsqueeze(-1).expand_as(drift)
    log_pf = process.log_pf(states, times, drift, log_var)
    deviation = torch.full((dim,), math.sqrt(c), dtype=torch.float64)
    log_reward = torch.distributions.Normal(0.0, deviation).log_prob(states[:, -1]).sum(-1)
    log_weight = log_reward + (process.log_pb(states, times) - log_pf).sum(-1)
    torch.testing.assert_close(log_weight, torch.zeros_like(log_weight), rtol=0, atol=1e-9)
