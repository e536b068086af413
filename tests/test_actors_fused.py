"""Networks and densities whose gradients are written out, against torch's autograd through the same equations."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from driftstream.actors import native
from driftstream.actors import policy as policy_module
from driftstream.actors.fused import is_plain, joint_network
from driftstream.actors.policy import DiffusionPolicy, PolicyConfig, StateTimeNet
from driftstream.actors.rollout import rollout, rollout_backward, score_trajectories
from driftstream.envs import densities
from driftstream.envs.densities import log_steps
from driftstream.envs.grids import random_grid, uniform_grid
from driftstream.envs.processes import BrownianProcess, DiffusionProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.targets import make_target
from driftstream.learner.losses import Paths, draw_segments, path_loss
from driftstream.learner.objectives import ObjectiveConfig

DIM, STEPS, BATCH = 4, 7, 24
PROCESSES: dict[str, DiffusionProcess] = {
    "brownian": BrownianProcess(1.7),
    "dis": OrnsteinUhlenbeckProcess(1.3, noise=2.0),
    "dds": OrnsteinUhlenbeckProcess(1.3, noise=2.0, exponential=True),
}
POLICIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"drift_clip": 0.5},
    "preconditioned": {"precondition": True},
    "learned variance": {"learned_variance": True},
    "learned backward": {"learned_backward": True, "backward_scale": 0.5},
    "langevin by dimension": {"langevin": True, "score_clip": 5.0},
    "langevin scalar": {"langevin": True, "langevin_scale": "scalar"},
    "all": {"learned_variance": True, "learned_backward": True, "langevin": True, "precondition": True},
}


@pytest.fixture(params=[True, False], ids=["native", "torch"], autouse=True)
def _either_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs on torch's operations too, which take what the native network does not."""
    if not request.param:
        monkeypatch.setattr(native, "library", lambda: None)


every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
every_policy = pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES.keys())
every_grid = pytest.mark.parametrize("kind", ["uniform", "random"])


def make_policy(seed: int = 0, **options: Any) -> DiffusionPolicy:
    torch.manual_seed(seed)
    policy = DiffusionPolicy(DIM, PolicyConfig(hidden=16, harmonics=8, **options))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


def make_paths(policy: DiffusionPolicy, process: DiffusionProcess, kind: str = "uniform") -> Paths:
    times = uniform_grid(STEPS) if kind == "uniform" else random_grid(STEPS, torch.Generator().manual_seed(3))
    target = make_target("manywell", dim=DIM)
    batch = rollout(policy, process, target, times, BATCH, 0.5, torch.Generator().manual_seed(1))
    return Paths(batch["states"], times, batch["log_reward"], batch.get("scores", None))


@contextmanager
def torchs_own_gradients() -> Iterator[None]:
    """Whatever has a gradient of its own is left to autograd."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "is_plain", lambda *_: False)
        patch.setattr(densities, "is_transformed", lambda: True)
        yield


def loss_and_gradients(
    policy: DiffusionPolicy, process: DiffusionProcess, paths: Paths, objective: ObjectiveConfig
) -> tuple[Tensor, list[Tensor]]:
    log_z = torch.tensor(1.3, requires_grad=True)
    target = make_target("manywell", dim=DIM)
    loss, _ = path_loss(objective, policy, process, target, paths, log_z)
    parameters = [*policy.parameters(), log_z]
    return loss.detach(), list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def assert_gradients_agree(
    policy: DiffusionPolicy, process: DiffusionProcess, paths: Paths, objective: ObjectiveConfig
) -> None:
    """Within 1e-5 of each gradient's norm, in single precision, or nearer than torch's to that in double precision."""
    loss, gradients = loss_and_gradients(policy, process, paths, objective)
    with torchs_own_gradients():
        expected_loss, expected = loss_and_gradients(policy, process, paths, objective)
        _, exact = loss_and_gradients(copy.deepcopy(policy).double(), process, doubled(paths), objective)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0.0)
    assert any(gradient.norm() > 0 for gradient in expected)
    for gradient, other, true in zip(gradients, expected, exact, strict=True):
        near = float((gradient - other).norm()) <= 1e-5 * float(other.norm())
        assert near or float((gradient - true).norm()) <= float((other - true).norm())


def doubled(paths: Paths) -> Paths:
    scores = None if paths.scores is None else paths.scores.double()
    return Paths(paths.states.double(), paths.times.double(), paths.log_reward.double(), scores, paths.index)


@every_grid
@every_policy
@every_process
def test_gradients_are_autograds(process: DiffusionProcess, options: dict[str, Any], kind: str) -> None:
    policy = make_policy(**options)
    paths = make_paths(policy, process, kind)
    assert_gradients_agree(policy, process, paths, ObjectiveConfig())


@pytest.mark.parametrize("objective", ["vargrad", "maximum_likelihood", "detailed_balance", "subtrajectory_balance"])
@pytest.mark.parametrize("flow", ["plain", "forward_looking"])
@every_process
def test_gradients_of_every_objective_are_autograds(process: DiffusionProcess, flow: str, objective: str) -> None:
    policy = make_policy(**POLICIES["all"], state_flow=flow)
    assert_gradients_agree(policy, process, make_paths(policy, process, "random"), ObjectiveConfig(objective))


@every_policy
@every_process
def test_gradients_on_segments_are_autograds(process: DiffusionProcess, options: dict[str, Any]) -> None:
    policy = make_policy(**options, state_flow="plain")
    paths = draw_segments(make_paths(policy, process, "random"), 3, torch.Generator().manual_seed(2))
    assert_gradients_agree(policy, process, paths, ObjectiveConfig("subtrajectory_balance"))


def test_gradients_reach_states_as_autograds_do() -> None:
    policy, process = make_policy(**POLICIES["all"]), PROCESSES["dis"]
    paths = make_paths(policy, process)

    def by_states() -> Tensor:
        states = paths.states.clone().requires_grad_()
        log_pf, log_pb = score_trajectories(policy, process, states, paths.times, paths.scores)
        return torch.autograd.grad((log_pf - log_pb).square().mean(), states)[0]

    found = by_states()
    with torchs_own_gradients():
        torch.testing.assert_close(found, by_states(), rtol=1e-5, atol=1e-5)


def double_net(outputs: int = 3) -> StateTimeNet:
    torch.manual_seed(0)
    net = StateTimeNet(DIM, outputs, hidden=5, harmonics=3).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


@pytest.mark.parametrize("embedded", [(5,), (6, 5), (1, 5), (2, 1, 5), (2, 6, 5)], ids=str)
def test_the_networks_gradient_is_that_of_finite_differences(embedded: tuple[int, ...]) -> None:
    net, x = double_net(), torch.randn(2, 6, DIM, dtype=torch.float64)
    layers = [layer for layer in net.joint_net if isinstance(layer, nn.Linear)]
    leaves = [net.state_net.weight, *(part for layer in layers for part in (layer.weight, layer.bias))]

    def network(embedding: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        return joint_network(x, embedding, weight, list(zip(parameters[::2], parameters[1::2], strict=True)))

    embedding = torch.randn(embedded, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(network, (embedding, *leaves))


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("own_grids", [False, True])
def test_the_densities_gradient_is_that_of_finite_differences(learned_variance: bool, own_grids: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    moved, drift, log_var = torch.randn(3, 2, 5, DIM, dtype=torch.float64, generator=generator)
    gain, variance = 0.1 + torch.rand(2, *((2, 5) if own_grids else (5,)), dtype=torch.float64, generator=generator)
    leaves = [drift.requires_grad_(), *([log_var.requires_grad_()] if learned_variance else [])]
    assert torch.autograd.gradcheck(lambda *given: log_steps(moved, given[0], gain, variance, *given[1:]), leaves)
    scale = variance.unsqueeze(-1) * (log_var.exp() if learned_variance else torch.ones_like(drift))
    expected = torch.distributions.Normal(gain.unsqueeze(-1) * drift, scale.sqrt()).log_prob(moved).sum(-1)
    torch.testing.assert_close(log_steps(moved, drift, gain, variance, *leaves[1:]), expected)
    with torch.no_grad():
        torch.testing.assert_close(log_steps(moved, drift, gain, variance, *leaves[1:]), expected.detach())


@pytest.mark.parametrize("shape", [(3, DIM), (2, 3, DIM), (0, 3, DIM), (DIM,)], ids=str)
def test_the_network_is_the_modules(shape: tuple[int, ...]) -> None:
    net, x = double_net(), torch.randn(shape, dtype=torch.float64)
    embedding = net.embed(torch.tensor(0.3, dtype=torch.float64))
    time = net.time_net(net.time_features(torch.tensor(0.3, dtype=torch.float64)))
    expected = net.joint_net(net.state_net(x) + time)
    torch.testing.assert_close(net(x, embedding), expected)
    with torch.no_grad():
        torch.testing.assert_close(net(x, embedding), expected)


def test_states_are_broadcast_against_more_embeddings() -> None:
    net, x = double_net(), torch.randn(DIM, dtype=torch.float64)
    embedding = net.embed(torch.linspace(0, 1, 4, dtype=torch.float64))
    torch.testing.assert_close(net(x, embedding), net(x.expand(4, DIM), embedding))


def test_steps_are_those_of_the_whole_grid() -> None:
    net, x = double_net(), torch.randn(4, 6, DIM, dtype=torch.float64)
    embedding = net.embed(torch.linspace(0, 1, 4, dtype=torch.float64))
    steps = net.by_steps(embedding, 6)
    expected = net(x, embedding.unsqueeze(1))
    for n in (2, 0, 3, 1):
        torch.testing.assert_close(steps(x[n], n), expected[n])


def test_networks_that_are_watched_or_transformed_are_left_to_torch() -> None:
    net, x = double_net(), torch.randn(3, DIM, dtype=torch.float64)
    embedding = net.embed(torch.tensor([0.3], dtype=torch.float64))[0].detach()
    expected = net(x, embedding)
    assert is_plain(net, x)
    with torch.autocast("cpu"):
        assert not is_plain(net, x)
    torch.testing.assert_close(torch.vmap(lambda row: net(row, embedding))(x), expected)
    # Second derivatives by states, as physics-informed losses take.
    hessian = torch.autograd.functional.hessian(lambda row: net(row, embedding).sum(), x[0])
    assert hessian.abs().sum() > 0
    seen: list[Tensor] = []
    handle = net.joint_net[1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        torch.testing.assert_close(net(x, embedding), expected)
        torch.testing.assert_close(net.by_steps(embedding.unsqueeze(0), 3)(x, 0), expected)
    assert len(seen) == 2
    handle.remove()
    assert is_plain(net, x)


def test_second_derivatives_by_parameters_are_refused() -> None:
    net, x = double_net(), torch.randn(3, DIM, dtype=torch.float64)
    out = net(x, net.embed(torch.tensor([0.3], dtype=torch.float64)))
    (gradient,) = torch.autograd.grad(out.square().sum(), net.state_net.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_passes_that_are_alive_together_do_not_disturb_each_other() -> None:
    process = PROCESSES["brownian"]
    policy, other = make_policy(0), make_policy(1)
    paths = make_paths(policy, process)

    def loss(policy: DiffusionPolicy) -> Tensor:
        return score_trajectories(policy, process, paths.states, paths.times)[0].square().mean()

    alone = [torch.autograd.grad(loss(each), list(each.parameters())) for each in (policy, other)]
    losses = [loss(policy), loss(other), loss(policy)]
    rollout(policy, process, make_target("manywell", dim=DIM), paths.times, BATCH)
    together = [
        torch.autograd.grad(each, list(owner.parameters()))
        for each, owner in zip(losses, (policy, other, policy), strict=True)
    ]
    for expected, found in zip([*alone, alone[0]], together, strict=True):
        assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize("draw", ["forward", "backward"])
def test_drawn_states_are_nobody_elses(draw: str) -> None:
    process, target, times = PROCESSES["dis"], make_target("manywell", dim=DIM), uniform_grid(STEPS)
    policy, terminal = make_policy(**POLICIES["all"]), torch.randn(BATCH, DIM)
    functions: dict[str, Callable[[], Tensor]] = {
        "forward": lambda: rollout(policy, process, target, times, BATCH)["states"],
        "backward": lambda: rollout_backward(policy, process, terminal, times),
    }
    first = functions[draw]()
    kept = first.clone()
    functions[draw]()
    assert torch.equal(first, kept)


def test_changed_parameters_are_noticed_between_the_ways() -> None:
    policy, process = make_policy(), PROCESSES["brownian"]
    paths = make_paths(policy, process)
    log_pf, _ = score_trajectories(policy, process, paths.states, paths.times)
    before = copy.deepcopy(policy.state_dict())
    with torch.no_grad():
        policy.forward_net.joint_net[1].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_pf.sum().backward()
    policy.load_state_dict(before)
