"""The trajectory TensorDict, which actors send and the learner trains on, and its form as an env's rollout.

A batch of B trajectories with T steps in D dimensions has batch size [B] and the keys

    states      [B, T+1, D]  x_0 ... x_T
    times       [B, T+1]     0 = t_0 < ... < t_T = 1, a view of one grid that the batch shares
    log_reward  [B]          log R(x_T)
    scores      [B, T, D]    optional: ∇ log R(x_n) at n = 0 ... T-1, for Langevin policies
    condition   [B, ...]     optional
"""

import itertools
from collections.abc import Sequence

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.envs.finiteness import is_finite


class TrajectoryError(ValueError):
    """A trajectory batch that does not follow the schema; the message names the key and what is expected."""


def make_trajectories(
    states: Tensor,
    times: Tensor,
    log_reward: Tensor,
    scores: Tensor | None = None,
    condition: Tensor | None = None,
) -> TensorDict:
    """The batch of states [B, T+1, D] on the grid times [T+1] (not copied); unchecked."""
    batch_size = states.shape[0]
    columns = {"states": states, "times": times.expand(batch_size, -1), "log_reward": log_reward}
    if scores is not None:
        columns["scores"] = scores
    if condition is not None:
        columns["condition"] = condition
    return TensorDict(columns, batch_size=[batch_size], device=states.device)


ALL_KEYS = ("states", "times", "log_reward", "scores")


def validate_trajectories(
    trajectories: TensorDict, dim: int, sampling_steps: int | None = None, finite: Sequence[str] = ALL_KEYS
) -> None:
    """Raise TrajectoryError unless keys, shapes, dtypes and times are as the schema has them.

    The values under the keys `finite` must be finite too.
    """
    present = dict(trajectories.items())
    for key in ("states", "times", "log_reward"):
        if key not in present:
            raise TrajectoryError(f"key {key!r} is missing: expected states, times and log_reward")
    if trajectories.batch_dims != 1:
        raise TrajectoryError(f"batch size is {list(trajectories.batch_size)}: expected [B]")
    batch_size = trajectories.batch_size[0]
    states, times = present["states"], present["times"]
    points = states.shape[1] if states.ndim == 3 else 0
    if points < 2 or states.shape[2] != dim or sampling_steps not in (None, points - 1):
        steps = "T+1 (T >= 1)" if sampling_steps is None else str(sampling_steps + 1)
        raise TrajectoryError(f"'states' has shape {list(states.shape)}: expected [B, {steps}, {dim}]")
    expected = {
        "states": [batch_size, points, dim],
        "times": [batch_size, points],
        "log_reward": [batch_size],
        "scores": [batch_size, points - 1, dim],
    }
    for key, shape in expected.items():
        if key in present:
            _check_tensor(key, present[key], shape, key in finite)
    # A row that was expanded stands for all, and has to: what reads the batch reads the first.
    if times.stride(0) != 0 and not bool((times == times[:1]).all()):
        raise TrajectoryError("'times' differs between trajectories: expected one grid for the batch")
    grid = times[:1].flatten().tolist()
    if grid and not (grid[0] == 0 and grid[-1] == 1 and all(t < later for t, later in itertools.pairwise(grid))):
        raise TrajectoryError("'times' is no grid: expected 0 = t_0 < ... < t_T = 1")


def _check_tensor(key: str, value: Tensor, shape: list[int], finite: bool) -> None:
    if list(value.shape) != shape:
        raise TrajectoryError(f"{key!r} has shape {list(value.shape)}: expected {shape}")
    if value.dtype not in (torch.float32, torch.float64):
        raise TrajectoryError(f"{key!r} has dtype {value.dtype}: expected float32 or float64")
    if finite and not is_finite(value):
        bad = value.numel() - int(value.isfinite().sum())
        raise TrajectoryError(f"{key!r} has {bad} values that are not finite: expected none")


def as_transitions(trajectories: TensorDict) -> TensorDict:
    """The same batch as `DiffusionSamplingEnv.rollout` lays it out, [B, T]; states are views, not copies."""
    states, log_reward = trajectories["states"], trajectories["log_reward"]
    batch_size, points, _ = states.shape
    steps = points - 1
    step = torch.arange(points, device=states.device).view(1, points, 1).expand(batch_size, -1, -1)
    done = step == steps
    reward = torch.zeros(batch_size, steps, 1, dtype=log_reward.dtype, device=states.device)
    reward[:, -1, 0] = log_reward
    transitions = {
        "state": states[:, :-1],
        "step": step[:, :-1],
        "action": states[:, 1:],
        "done": done[:, :-1],
        "terminated": done[:, :-1],
        "next": {
            "state": states[:, 1:],
            "step": step[:, 1:],
            "reward": reward,
            "done": done[:, 1:],
            "terminated": done[:, 1:],
        },
    }
    return TensorDict(transitions, batch_size=[batch_size, steps], device=states.device)


def from_transitions(transitions: TensorDict, times: Tensor) -> TensorDict:
    """Trajectories from an environment's rollout [B, T] over the grid times [T+1]."""
    first, following = transitions["state"][:, :1], transitions["next", "state"]
    states = torch.cat([first, following], 1)
    if states.shape[1] != times.shape[-1]:
        raise TrajectoryError(f"a rollout of {states.shape[1] - 1} steps: expected {times.shape[-1] - 1}")
    return make_trajectories(states, times, transitions["next", "reward"][:, -1, 0])
