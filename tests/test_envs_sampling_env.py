"""The TorchRL environment, and the trajectory schema beside it."""

import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor
from torchrl.envs.utils import check_env_specs

from driftstream.envs.grids import uniform_grid
from driftstream.envs.processes import BrownianProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.sampling_env import DiffusionSamplingEnv
from driftstream.envs.targets import CountedTarget, make_target
from driftstream.envs.trajectory import (
    TrajectoryError,
    as_transitions,
    from_transitions,
    make_trajectories,
    validate_trajectories,
)

BATCH, STEPS = 7, 12


def make_env(name: str = "gmm25", dtype: torch.dtype = torch.float32) -> DiffusionSamplingEnv:
    target = CountedTarget(make_target(name))
    times = uniform_grid(STEPS, dtype=dtype)
    return DiffusionSamplingEnv(target, BrownianProcess(target.diffusion_variance), times, BATCH)


def random_walk() -> TensorDictModule:
    return TensorDictModule(lambda state: state + torch.randn_like(state), ["state"], ["action"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["gmm25", "manywell"])
def test_specs(name: str, dtype: torch.dtype) -> None:
    check_env_specs(make_env(name, dtype))


@pytest.mark.parametrize("policy", [None, random_walk()], ids=["random", "walk"])
def test_full_rollout(policy: TensorDictModule | None) -> None:
    env = make_env()
    rollout = env.rollout(10 * STEPS, policy)
    assert rollout.shape == (BATCH, STEPS)
    assert (rollout["state"][:, 0] == 0).all()
    assert torch.equal(rollout["next", "state"], rollout["action"])
    assert torch.equal(rollout["state"][:, 1:], rollout["next", "state"][:, :-1])
    assert rollout["step"][0, :, 0].tolist() == list(range(STEPS))
    assert rollout["next", "step"][0, :, 0].tolist() == list(range(1, STEPS + 1))
    reward = rollout["next", "reward"].squeeze(-1)
    assert (reward[:, :-1] == 0).all()
    terminal = rollout["next", "state"][:, -1]
    torch.testing.assert_close(reward[:, -1], make_target("gmm25").log_reward(terminal))
    for key in ("done", "terminated"):
        assert not rollout["next", key][:, :-1].any()
        assert rollout["next", key][:, -1].all()
    # Log R is asked for once per trajectory.
    assert env.target.energy_evaluations == BATCH


@pytest.mark.parametrize("exponential", [False, True], ids=["dis", "dds"])
def test_episodes_start_in_a_gaussian_prior(exponential: bool) -> None:
    process = OrnsteinUhlenbeckProcess(2.5, exponential=exponential)
    env = DiffusionSamplingEnv(make_target("gmm25"), process, uniform_grid(3), batch_size=20_000)
    check_env_specs(env)
    env.set_seed(0)
    first, second = env.reset()["state"], env.reset()["state"]
    assert not torch.equal(first, second)
    # A standard deviation of 40,000 draws errs by 2.5 / sqrt(80,000) = 0.009.
    assert first.std().item() == pytest.approx(2.5, abs=0.04)
    env.set_seed(0)
    torch.testing.assert_close(env.reset()["state"], first)
    rollout = env.rollout(3, random_walk())
    torch.testing.assert_close(rollout["state"][:, 0], second)


def test_steps_edit_nothing_that_was_returned() -> None:
    env = make_env()
    kept: list[tuple[TensorDict, TensorDict]] = []
    tensordict = env.reset()
    for _ in range(STEPS):
        tensordict = env.step(tensordict.set("action", tensordict["state"] + 1.0))
        kept.append((tensordict, tensordict.clone()))
        tensordict = tensordict["next"].clone(recurse=False)
    for original, copy in kept:
        assert (original == copy).all()


def test_rollouts_go_on_after_resets() -> None:
    rollout = make_env().rollout(2 * STEPS + 3, random_walk(), break_when_any_done=False)
    assert rollout.shape == (BATCH, 2 * STEPS + 3)
    assert rollout["next", "done"][:, :, 0].sum(1).tolist() == [2] * BATCH
    assert (rollout["state"][:, [0, STEPS, 2 * STEPS]] == 0).all()


def test_partial_resets_pay_each_row_at_its_own_end() -> None:
    env = make_env()
    tensordict = env.reset()
    for _ in range(3):
        tensordict = env.step(tensordict.set("action", tensordict["state"] + 1.0))["next"].exclude("reward")
    late = torch.arange(BATCH).unsqueeze(1) % 2 == 0
    tensordict = env.reset(tensordict.set("_reset", late))
    assert tensordict["step"].squeeze(1).tolist() == [0 if row % 2 == 0 else 3 for row in range(BATCH)]
    for _ in range(STEPS - 3):
        tensordict = env.step(tensordict.set("action", tensordict["state"] + 1.0))["next"]
    assert torch.equal(tensordict["done"], ~late)
    expected = make_target("gmm25").log_reward(tensordict["state"]).unsqueeze(1)
    torch.testing.assert_close(tensordict["reward"], torch.where(late, 0.0, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trajectories_lay_out_as_the_rollout_does(dtype: torch.dtype) -> None:
    env = make_env(dtype=dtype)
    rollout = env.rollout(STEPS, random_walk())
    trajectories = from_transitions(rollout, env.times)
    validate_trajectories(trajectories, dim=2, sampling_steps=STEPS)
    assert trajectories["times"].stride(0) == 0
    transitions = as_transitions(trajectories)
    expected = {key: (value.shape, value.dtype) for key, value in rollout.items(True, True)}
    assert {key: (value.shape, value.dtype) for key, value in transitions.items(True, True)} == expected
    assert transitions.batch_size == rollout.batch_size
    assert (transitions == rollout).all()
    start = trajectories["states"].untyped_storage().data_ptr()
    for key in ("state", "action", ("next", "state")):
        assert transitions[key].untyped_storage().data_ptr() == start
    again = from_transitions(transitions, env.times)
    assert (again == trajectories).all()
    with pytest.raises(TrajectoryError, match="a rollout of 12 steps: expected 5"):
        from_transitions(rollout, uniform_grid(5))


def valid_batch(**replaced: Tensor) -> TensorDict:
    columns = {
        "states": torch.zeros(3, 5, 2),
        "times": uniform_grid(4),
        "log_reward": torch.zeros(3),
        "scores": torch.zeros(3, 4, 2),
    }
    return make_trajectories(**(columns | replaced))


def test_a_valid_batch_passes() -> None:
    validate_trajectories(valid_batch(), dim=2)
    validate_trajectories(valid_batch(condition=torch.zeros(3, 4)), dim=2, sampling_steps=4)
    validate_trajectories(make_trajectories(torch.zeros(2, 2, 1), uniform_grid(1), torch.zeros(2)), dim=1)
    # Finite values whose sum overflows are no fault.
    validate_trajectories(valid_batch(log_reward=torch.full((3,), -3e38)), dim=2)


def with_nan(*shape: int) -> Tensor:
    values = torch.zeros(*shape)
    values.view(-1)[1] = float("nan")
    return values


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"states": torch.zeros(3, 5, 4)}, "'states' has shape [3, 5, 4]: expected [B, 5, 2]"),
        ({"states": torch.zeros(3, 8, 2)}, "'states' has shape [3, 8, 2]: expected [B, 5, 2]"),
        ({"states": torch.zeros(3, 5)}, "'states' has shape [3, 5]: expected [B, 5, 2]"),
        (
            {"states": torch.zeros(3, 5, 2).int()},
            "'states' has dtype torch.int32: expected float32 or float64",
        ),
        ({"states": with_nan(3, 5, 2)}, "'states' has 1 values that are not finite"),
        ({"times": uniform_grid(5)}, "'times' has shape [3, 6]: expected [3, 5]"),
        ({"times": uniform_grid(4) * 0.5}, "'times' is no grid: expected 0 = t_0 < ... < t_T = 1"),
        ({"times": uniform_grid(4)[[0, 2, 1, 3, 4]]}, "'times' is no grid"),
        ({"log_reward": torch.zeros(3, 1)}, "'log_reward' has shape [3, 1]: expected [3]"),
        ({"log_reward": with_nan(3)}, "'log_reward' has 1 values that are not finite"),
        ({"scores": torch.zeros(3, 5, 2)}, "'scores' has shape [3, 5, 2]: expected [3, 4, 2]"),
        ({"scores": with_nan(3, 4, 2)}, "'scores' has 1 values that are not finite"),
    ],
)
def test_faults_of_a_tensor_are_named(replaced: dict[str, Tensor], message: str) -> None:
    with pytest.raises(TrajectoryError, match=re.escape(message)):
        validate_trajectories(valid_batch(**replaced), dim=2, sampling_steps=4)


def test_faults_of_a_batch_are_named() -> None:
    with pytest.raises(TrajectoryError, match="key 'log_reward' is missing"):
        validate_trajectories(valid_batch().exclude("log_reward"), dim=2)
    with pytest.raises(TrajectoryError, match=re.escape("batch size is [1, 3]: expected [B]")):
        validate_trajectories(valid_batch().unsqueeze(0), dim=2)


def test_every_row_of_its_own_times_is_checked() -> None:
    batch = valid_batch()
    times = batch["times"].clone()
    times[:, 1] = 2.0
    with pytest.raises(TrajectoryError, match="'times' is no grid"):
        validate_trajectories(batch.clone().set("times", times), dim=2)
    times = batch["times"].clone()
    times[1, 2] = 0.9
    with pytest.raises(TrajectoryError, match="'times' differs between trajectories"):
        validate_trajectories(batch.set("times", times), dim=2)
