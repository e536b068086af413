"""Steps and energies by native code against torch's operations, for every build that this processor can run."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from driftstream.actors import native, rollout
from driftstream.actors.native import Library
from driftstream.actors.native_policy import is_native
from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import fused_trajectory_balance, roll_forward, score_trajectories
from driftstream.envs.grids import random_grid
from driftstream.envs.processes import BrownianProcess, DiffusionProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.targets import Target

STEPS = 5
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"drift_clip": 0.3},
    "preconditioned": {"precondition": True},
    "learned variance": {"learned_variance": True},
    "langevin": {"langevin": True, "score_clip": 0.5},
    "all": {"learned_variance": True, "precondition": True, "langevin": True, "langevin_scale": "scalar"},
}
DIMS = (1, 2, 9, 600)  # fewer than a vector has, some more, and more than a chunk holds
PROCESSES = (BrownianProcess(1.7), OrnsteinUhlenbeckProcess(1.3, noise=2.0, exponential=True))
every_policy = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
every_dim = pytest.mark.parametrize("dim", DIMS)
every_process = pytest.mark.parametrize("process", PROCESSES, ids=["brownian", "dds"])


class Bowl(Target):
    def __init__(self, dim: int) -> None:
        self.dim = dim

    def log_reward(self, x: Tensor) -> Tensor:
        return -0.5 * (x - 1.0).square().sum(-1)


def make_policy(dim: int, **options: Any) -> DiffusionPolicy:
    torch.manual_seed(0)
    policy = DiffusionPolicy(dim, PolicyConfig(hidden=16, harmonics=4, **options))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return policy


def make_states(dim: int, rows: int = 60) -> Tensor:
    """States near the origin, and some very far from it."""
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(rows, STEPS + 1, dim, generator=generator)
    return states * torch.exp(2.0 * torch.randn(rows, 1, 1, generator=generator))


def scored(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    states: Tensor,
    times: Tensor,
    scores: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Both log densities, and gradients of a sum of those forwards by all parameters."""
    log_pf, log_pb = score_trajectories(policy, process, states, times, scores, index)
    weights = torch.linspace(-1.0, 2.0, log_pf.numel(), dtype=log_pf.dtype).view(log_pf.shape)
    gradients = torch.autograd.grad((weights * log_pf).sum(), list(policy.parameters()))
    return [log_pf.detach(), log_pb.detach()], list(gradients)


def error(one: Tensor, other: Tensor) -> float:
    """As a share of the norm."""
    assert one.shape == other.shape
    return float((one.double() - other).norm() / other.double().norm().clamp_min(1e-30))


def by_torch(*arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "is_native", lambda *_: False)
        return scored(*arguments)


def assert_as_exact_as_torch(policy: DiffusionPolicy, *arguments: Any) -> None:
    """Measured by float64, the error is at most three times that of torch's operations in single precision."""
    found, single = scored(policy, *arguments), by_torch(policy, *arguments)
    doubled = (each.double() if isinstance(each, Tensor) and each.is_floating_point() else each for each in arguments)
    exact = by_torch(copy.deepcopy(policy).double(), *doubled)
    for ours, theirs, true in zip(
        itertools.chain(*found), itertools.chain(*single), itertools.chain(*exact), strict=True
    ):
        assert error(ours, true) <= 3.0 * error(theirs, true) + 5e-7


@every_process
@every_policy
@every_dim
def test_densities_and_gradients_are_those_of_torch(
    build: Library, dim: int, options: dict[str, Any], process: DiffusionProcess
) -> None:
    policy, states, times = make_policy(dim, **options), make_states(dim), random_grid(STEPS)
    scores = -states[:, :-1] if policy.langevin else None
    kernels = process.kernels_like(times, states)
    assert is_native(policy, states[:, :-1], policy.embed_times(times[:-1], process), scores, kernels)
    assert_as_exact_as_torch(policy, process, states, times, scores)


@every_policy
def test_segments_have_kernels_of_their_own(build: Library, options: dict[str, Any]) -> None:
    dim, length, process, times = 3, 2, PROCESSES[0], random_grid(STEPS)
    policy, whole = make_policy(dim, **options), make_states(dim)
    start = torch.randint(0, STEPS - length + 1, (len(whole), 1))
    index = start + torch.arange(length + 1)
    states = whole.gather(1, index.unsqueeze(-1).expand(-1, -1, dim))
    scores = -states[:, :-1] if policy.langevin else None
    assert_as_exact_as_torch(policy, process, states, times, scores, index)


def test_states_may_stand_anywhere(build: Library) -> None:
    """Every other trajectory of a batch, and states whose entries are not side by side."""
    policy, process, times = make_policy(3, precondition=True), PROCESSES[0], random_grid(STEPS)
    states = make_states(3)
    for placed in (states[::2], states.transpose(0, 2).contiguous().transpose(0, 2), states.expand(1, -1, -1, -1)[0]):
        found, other = scored(policy, process, placed, times), scored(policy, process, placed.clone(), times)
        for one, two in zip([*found[0], *found[1]], [*other[0], *other[1]], strict=True):
            assert torch.equal(one, two)


@every_process
@every_policy
@every_dim
def test_steps_are_those_of_torch(
    build: Library, dim: int, options: dict[str, Any], process: DiffusionProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, target, times = make_policy(dim, **options), Bowl(dim), random_grid(STEPS)
    start = 2.0 * torch.randn(70, dim, generator=torch.Generator().manual_seed(2))

    def paths() -> tuple[Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(3)
        return roll_forward(policy, process, target, start, times, 0.7, 0.9, 1.2, generator)

    states, scores = paths()
    monkeypatch.setattr(rollout, "is_native", lambda *_: False)
    expected, expected_scores = paths()
    assert error(states, expected) < 1e-5
    if scores is not None and expected_scores is not None:
        assert error(scores, expected_scores) < 1e-5


@every_policy
def test_what_is_not_finite_stays_in_its_row(build: Library, options: dict[str, Any]) -> None:
    policy, process, times, states = make_policy(3, **options), PROCESSES[0], random_grid(STEPS), make_states(3)
    scores = torch.zeros_like(states[:, :-1]) if policy.langevin else None
    finite = score_trajectories(policy, process, states, times, scores)
    for value in (math.nan, math.inf, -math.inf):
        states[7, 2, 1] = value
        found = score_trajectories(policy, process, states, times, scores)
        for one, other in zip(found, finite, strict=True):
            assert not bool(one[7, 1:3].isfinite().any())
            unchanged = torch.ones_like(one, dtype=torch.bool)
            unchanged[7, 1:3] = False
            assert torch.equal(one[unchanged], other[unchanged])


def test_threads_share_the_rows(build: Library, two_threads: None) -> None:
    policy, process, times = make_policy(3, **OPTIONS["all"]), PROCESSES[0], random_grid(STEPS)
    states = make_states(3, rows=600)
    scores = -states[:, :-1]
    found = scored(policy, process, states, times, scores)
    torch.set_num_threads(1)
    for one, other in zip(
        itertools.chain(*found), itertools.chain(*scored(policy, process, states, times, scores)), strict=True
    ):
        assert error(one, other) < 1e-5


@every_policy
def test_gradients_may_be_batched(build: Library, options: dict[str, Any]) -> None:
    policy, process, times, states = make_policy(2, **options), PROCESSES[0], random_grid(STEPS), make_states(2)
    scores = -states[:, :-1] if policy.langevin else None
    log_pf, _ = score_trajectories(policy, process, states, times, scores)
    by, parameters = torch.randn(3, *log_pf.shape), list(policy.parameters())
    batched = torch.autograd.grad(log_pf, parameters, by, retain_graph=True, is_grads_batched=True)
    for index, one in enumerate(by):
        singly = torch.autograd.grad(log_pf, parameters, one, retain_graph=True)
        for several, alone in zip(batched, singly, strict=True):
            assert error(several[index], alone) < 1e-4


def test_what_torch_alone_can_do_is_left_to_it(build: Library) -> None:
    policy, process, times, states = make_policy(2, langevin=True), PROCESSES[0], random_grid(STEPS), make_states(2)
    at, embedding = states[:, :-1], policy.embed_times(times[:-1], process)
    kernels = process.kernels_like(times, states)
    assert is_native(policy, at, embedding, at, kernels)
    assert is_native(policy, at[:, 0], embedding, at[:, 0])
    assert not is_native(policy, at, embedding, None, kernels)
    assert not is_native(policy, at, embedding, at[:, :2], kernels)
    assert not is_native(policy, at[..., :1], embedding, at[..., :1], kernels)
    assert not is_native(policy, at[:, :1], embedding, at[:, :1], kernels)
    assert not is_native(policy, at, embedding[:1], at, process.kernels_like(times[:2], states))
    assert not is_native(policy, at, embedding, at, process.kernels_like(times[:-1], states))
    assert not is_native(policy, at.double(), embedding, at.double(), kernels)
    followed = at.clone().requires_grad_()
    assert not is_native(policy, followed, embedding, at, kernels)
    assert not is_native(policy, at, embedding, followed, kernels)
    assert not is_native(policy, at, embedding, at, process.kernels_like(times.clone().requires_grad_(), states))
    with torch.no_grad():
        assert is_native(policy, followed, embedding, followed, kernels)
    hook = policy.forward_net.joint_net[0].register_forward_hook(lambda *_: None)
    assert not is_native(policy, at, embedding, at, kernels)
    hook.remove()

    class Other(DiffusionPolicy):
        pass

    assert not is_native(Other(2, policy.config), at, embedding, at, kernels)
    policy.forward_net.joint_net[-1] = torch.nn.Linear(16, 4)
    assert not is_native(policy, at, embedding, at, kernels)


def test_scores_of_another_type_are_converted(build: Library) -> None:
    """A target that nobody counts may give any."""
    policy, process, times = make_policy(2, langevin=True), PROCESSES[0], random_grid(STEPS)
    target, start = Bowl(2), torch.zeros(8, 2)
    expected, _ = roll_forward(policy, process, target, start, times, generator=torch.Generator().manual_seed(0))
    score = target.score
    target.score = lambda x: score(x.double())  # type: ignore[method-assign]
    found, _ = roll_forward(policy, process, target, start, times, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, expected)


def test_no_rows_have_no_gradient(build: Library) -> None:
    policy, process, times = make_policy(2, **OPTIONS["all"]), PROCESSES[0], random_grid(STEPS)
    states, index = torch.zeros(0, 3, 2), torch.zeros(0, 3, dtype=torch.int64)
    for arguments in ((states, times[:3], states[:, :-1], None), (states, times, states[:, :-1], index)):
        log_pf, _ = score_trajectories(policy, process, *arguments)
        log_pf.sum().backward()
    assert not any(bool(p.grad.any()) for p in policy.parameters() if p.grad is not None)


def test_the_default_type_plays_no_part(build: Library) -> None:
    policy, process, times, states = make_policy(2, langevin=True), PROCESSES[0], random_grid(STEPS), make_states(2)

    def everything() -> list[Tensor]:
        found = scored(policy, process, states, times, -states[:, :-1])
        drawn = roll_forward(policy, process, Bowl(2), states[:, 0], times, generator=torch.Generator().manual_seed(0))
        return [*found[0], *found[1], drawn[0]]

    expected = everything()
    torch.set_default_dtype(torch.float64)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert error(one, other) < 1e-6


def test_a_start_of_another_type_is_converted(build: Library) -> None:
    policy, process, times, start = make_policy(2), PROCESSES[0], random_grid(STEPS), torch.ones(4, 2)
    states = [
        roll_forward(policy, process, Bowl(2), each, times, generator=torch.Generator().manual_seed(0))[0]
        for each in (start, start.double(), start.half())
    ]
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_states_that_were_written_to_are_noticed(build: Library) -> None:
    policy, process, times, states = make_policy(2), PROCESSES[0], random_grid(STEPS), make_states(2)
    log_pf, _ = score_trajectories(policy, process, states, times)
    states.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_pf.sum().backward()


def test_threads_share_the_rows_of_a_step(build: Library, two_threads: None) -> None:
    policy, process, times = make_policy(3, **OPTIONS["all"]), PROCESSES[0], random_grid(STEPS)
    start = torch.randn(2 * native.PART_ROWS + 5, 3)
    one = roll_forward(policy, process, Bowl(3), start, times, generator=torch.Generator().manual_seed(0))[0]
    torch.set_num_threads(1)
    other = roll_forward(policy, process, Bowl(3), start, times, generator=torch.Generator().manual_seed(0))[0]
    assert torch.equal(one, other)


def make_offset(states: Tensor) -> Tensor:
    return torch.linspace(-3.0, 5.0, len(states), dtype=states.dtype).requires_grad_()


def balanced(policy: DiffusionPolicy, *arguments: Any) -> list[Tensor]:
    """Loss, residuals, and gradients of twice the loss by offset and parameters."""
    found = fused_trajectory_balance(policy, *arguments)
    assert found is not None
    return with_gradients(policy, arguments[3], *found)


def balanced_by_densities(policy: DiffusionPolicy, *arguments: Any) -> list[Tensor]:
    process, states, times, offset, scores = arguments
    log_pf, log_pb = score_trajectories(policy, process, states, times, scores)
    residual = offset + (log_pb - log_pf).sum(-1)
    return with_gradients(policy, offset, residual.square().mean(), residual)


def with_gradients(policy: DiffusionPolicy, offset: Tensor, loss: Tensor, residual: Tensor) -> list[Tensor]:
    return [loss.detach(), residual.detach(), *torch.autograd.grad(2.0 * loss, [offset, *policy.parameters()])]


@every_process
@every_policy
@pytest.mark.parametrize(("dim", "steps"), [(1, 5), (2, 1), (3, 130), (9, 5), (600, 2)])
def test_balance_there_and_back_is_that_of_the_densities(
    build: Library,
    dim: int,
    steps: int,
    options: dict[str, Any],
    process: DiffusionProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As exact as torch's operations in single precision, for trajectories that fill no block, or more than one."""
    policy, times = make_policy(dim, **options), random_grid(steps)
    states = 0.3 * torch.randn(30, steps + 1, dim, generator=torch.Generator().manual_seed(1)).cumsum(1)
    arguments = process, states, times, make_offset(states), -states[:, :-1] if policy.langevin else None
    found = balanced(policy, *arguments)
    monkeypatch.setattr(rollout, "is_native", lambda *_: False)
    assert fused_trajectory_balance(policy, *arguments) is None
    single = balanced_by_densities(policy, *arguments)
    doubled = [each.detach().double() if isinstance(each, Tensor) else each for each in arguments]
    doubled[3].requires_grad_()
    exact = balanced_by_densities(copy.deepcopy(policy).double(), *doubled)
    for ours, theirs, true in zip(found, single, exact, strict=True):
        assert error(ours, true) <= 3.0 * error(theirs, true) + 1e-6


def test_balance_goes_back_as_often_as_it_is_asked_to(build: Library) -> None:
    policy, process, times, states = make_policy(3, **OPTIONS["all"]), PROCESSES[1], random_grid(STEPS), make_states(3)
    arguments = policy, process, states / 9.0, times, make_offset(states), states[:, :-1]
    found = fused_trajectory_balance(*arguments)
    assert found is not None
    loss, residual = found
    assert not residual.requires_grad
    inputs = [arguments[4], *policy.parameters()]
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    twice = torch.autograd.grad(2.0 * loss, inputs, retain_graph=True)
    batched = torch.autograd.grad(loss, inputs, torch.tensor([1.0, 2.0]), retain_graph=True, is_grads_batched=True)
    for one, two, both in zip(once, twice, batched, strict=True):
        torch.testing.assert_close(two, 2.0 * one)
        assert error(both[0], one) < 1e-4
        assert error(both[1], two) < 1e-4
    arguments[2].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_balance_takes_states_that_stand_anywhere(build: Library) -> None:
    policy, process, times, states = make_policy(3), PROCESSES[0], random_grid(STEPS), make_states(3)
    offset = make_offset(states)
    for placed in (states[::2], states.transpose(0, 2).contiguous().transpose(0, 2)):
        for each in zip(
            balanced(policy, process, placed, times, offset[: len(placed)], None),
            balanced(policy, process, placed.clone(), times, offset[: len(placed)], None),
            strict=True,
        ):
            assert torch.equal(*each)


def test_threads_share_the_trajectories_of_a_balance(build: Library, two_threads: None) -> None:
    policy, process, times = make_policy(3, **OPTIONS["all"]), PROCESSES[0], random_grid(STEPS)
    states = make_states(3, rows=601)
    arguments = process, states, times, make_offset(states), -states[:, :-1]
    found = balanced(policy, *arguments)
    torch.set_num_threads(1)
    alone = balanced(policy, *arguments)
    assert torch.equal(found[1], alone[1])
    for one, other in zip(found, alone, strict=True):
        assert error(one, other) < 1e-5


@every_policy
def test_what_is_not_finite_is_the_residual_of_its_trajectory(build: Library, options: dict[str, Any]) -> None:
    policy, process, times, states = make_policy(3, **options), PROCESSES[0], random_grid(STEPS), make_states(3)
    scores, offset = torch.zeros_like(states[:, :-1]) if policy.langevin else None, make_offset(states)
    expected = balanced(policy, process, states, times, offset, scores)[1]
    for value in (math.nan, math.inf, -math.inf):
        states[7, 2, 1] = value
        loss, residual, *_ = balanced(policy, process, states, times, offset, scores)
        assert not bool(loss.isfinite())
        assert not bool(residual[7].isfinite())
        assert torch.equal(residual[:7], expected[:7])
        assert torch.equal(residual[8:], expected[8:])


def test_offsets_of_another_kind_are_converted_or_left_to_the_densities(build: Library) -> None:
    policy, process, times, states = make_policy(2), PROCESSES[0], random_grid(STEPS), make_states(2)
    offset = make_offset(states)
    expected = balanced(policy, process, states, times, offset, None)
    for kind in (torch.float64, torch.float16):
        found = balanced(policy, process, states, times, offset.detach().to(kind).requires_grad_(), None)
        assert found[2].dtype == kind
        for one, other in zip(found, expected, strict=True):
            assert error(one, other) < 1e-2
    every_other = offset.detach().repeat_interleave(2)[::2]
    assert torch.equal(balanced(policy, process, states, times, every_other.requires_grad_(), None)[1], expected[1])
    assert fused_trajectory_balance(policy, process, states, times, offset[:1]) is None
    assert fused_trajectory_balance(policy, process, states, times, offset.sum()) is None


def test_balance_without_rows_or_gradients_is_left_to_the_densities(build: Library) -> None:
    policy, process, times, states = make_policy(2), PROCESSES[0], random_grid(STEPS), make_states(2)
    offset = make_offset(states)
    assert fused_trajectory_balance(policy, process, states, times, offset) is not None
    assert fused_trajectory_balance(policy, process, states[:0], times, offset[:0]) is None
    assert fused_trajectory_balance(policy, process, states[:, :1], times[:1], offset) is None
    learned = make_policy(2, learned_backward=True)
    assert fused_trajectory_balance(learned, process, states, times, offset) is None
    with torch.no_grad():
        assert fused_trajectory_balance(policy, process, states, times, offset) is None
