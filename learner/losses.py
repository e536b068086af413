"""From trajectories to a loss under the current parameters, whatever the objective."""

from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.rollout import fused_trajectory_balance, score_trajectories
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import CountedTarget, Target
from driftstream.learner.objective_plugins import plugin_loss
from driftstream.learner.objectives import (
    ObjectiveConfig,
    detailed_balance,
    forward_looking_log_flow,
    log_weights,
    maximum_likelihood,
    subtrajectory_balance,
    trajectory_balance,
    vargrad,
)


@dataclass(frozen=True)
class Paths:
    """What a loss is computed from: trajectories, or segments of them.

    states [B, L+1, D], log_reward [B] of the trajectories' ends, the grid times [T+1], scores [B, L, D] where the
    policy needs them, and for segments (L < T) the points of the grid at which the states stand, index [B, L+1].
    """

    states: Tensor
    times: Tensor
    log_reward: Tensor
    scores: Tensor | None = None
    index: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Paths":
        scores, index = self.scores, self.index
        return Paths(
            self.states[rows],
            self.times,
            self.log_reward[rows],
            None if scores is None else scores[rows],
            None if index is None else index[rows],
        )


def draw_segments(paths: Paths, length: int, generator: torch.Generator | None = None) -> Paths:
    """One segment of `length` transitions of each trajectory, at a random place.

    Segments that would overlap an end of the trajectory are moved inside: no transition is drawn less often than
    those in the middle, and the ends, which carry log Z and the reward, are drawn more often than any other place.

    Source: Zhang et al. 2024 (DGFS, arXiv 2310.02679), on partial trajectories.
    """
    rows, steps = len(paths.states), len(paths.times) - 1
    if length > steps:
        raise ValueError(f"length = {length}: expected at most the {steps} steps of the grid")
    device = paths.states.device
    draw_device = device if generator is None else generator.device
    start = torch.randint(1 - length, steps, (rows,), generator=generator, device=draw_device).to(device)
    index = start.clamp(0, steps - length).unsqueeze(1) + torch.arange(length + 1, device=device)

    def gather(points: Tensor, at: Tensor) -> Tensor:
        return points.gather(1, at.unsqueeze(-1).expand(-1, -1, points.shape[-1]))

    scores = None if paths.scores is None else gather(paths.scores, index[:, :-1])
    return Paths(gather(paths.states, index), paths.times, paths.log_reward, scores, index)


def log_flows(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target | CountedTarget,
    paths: Paths,
    log_z: Tensor,
) -> Tensor:
    """log F of every state, [B, L+1]: log Z at the start of the grid, log R at its end, the state flow between.

    A forward-looking flow evaluates the target at the states between. Gradients flow to `log_z` and the policy's
    state flow (and to states that require them).
    """
    rows, steps = len(paths.states), len(paths.times) - 1
    if paths.index is None:
        between = state_log_flow(policy, process, target, paths.states[:, 1:-1], paths.times[1:-1])
        return torch.cat([log_z.expand(rows, 1), between, paths.log_reward.unsqueeze(1)], 1)
    # At the ends the network's value is replaced; a time inside keeps what it is computed from finite.
    inside = paths.index.clamp(1, max(1, steps - 1))
    log_flow = state_log_flow(policy, process, target, paths.states, paths.times, inside)
    log_flow = torch.where(paths.index == 0, log_z, log_flow)
    return torch.where(paths.index == steps, paths.log_reward.unsqueeze(1), log_flow)


def state_log_flow(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target | CountedTarget,
    states: Tensor,
    times: Tensor,
    index: Tensor | None = None,
) -> Tensor:
    """The policy's log F(x, t) at states [B, N, D] and times [N] in (0, 1), or times[index], index [B, N] -> [B, N].

    A plain flow is log Z + network; a forward-looking one has (1 - t) log Z in its correction, as the flow is log Z
    at the start and log R at the end. That log Z is `policy.flow_level`, which gradients do not reach.
    """
    if policy.flow_net is None or policy.flow_level is None:
        raise ValueError("policy.state_flow = 'none': the policy has no state flow")
    embedding = policy.flow_net.embed(times)
    if index is not None:
        embedding, times = embedding[index], times[index]
    correction = policy.flow_net(states, embedding).squeeze(-1)
    if policy.config.state_flow == "plain":
        return policy.flow_level + correction
    correction = correction + (1.0 - times) * policy.flow_level
    clip = policy.config.reward_clip
    # Any finite value will do for what is undefined: the network corrects it.
    log_reward = target.log_reward(states).nan_to_num(-clip, clip, -clip).clamp_min(-clip)
    return forward_looking_log_flow(process.log_reference(states, times), times, log_reward, correction)


def path_loss(
    objective: ObjectiveConfig,
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target | CountedTarget,
    paths: Paths,
    log_z: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The objective's loss on given paths, and the log weights [B] of whole trajectories (None for segments).

    Gradients flow to the policy and `log_z`. Raises ValueError for an objective that needs paths of its own, and
    PluginError where a user's objective fails.
    """
    if objective.name == "trajectory_balance" and paths.index is None:
        offset = paths.log_reward - log_z
        found = fused_trajectory_balance(policy, process, paths.states, paths.times, offset, paths.scores)
        if found is not None:
            loss, residual = found
            return loss, residual + log_z.detach()
    log_pf, log_pb = score_trajectories(policy, process, paths.states, paths.times, paths.scores, paths.index)
    log_weight = None if paths.index is not None else log_weights(log_pf, log_pb, paths.log_reward).detach()
    if objective.name == "trajectory_balance":
        loss = trajectory_balance(log_pf, log_pb, paths.log_reward, log_z)
    elif objective.name == "vargrad":
        loss = vargrad(log_pf, log_pb, paths.log_reward)
    elif objective.name == "maximum_likelihood":
        loss = maximum_likelihood(log_pf)
    elif objective.balances_flows:
        log_flow = log_flows(policy, process, target, paths, log_z)
        if objective.name == "detailed_balance":
            loss = detailed_balance(log_pf, log_pb, log_flow)
        else:
            loss = subtrajectory_balance(log_pf, log_pb, log_flow, objective.lam)
    elif objective.plugin:
        loss = plugin_loss(objective.name, log_pf, log_pb, paths.log_reward, log_z)
    else:
        raise ValueError(f"objective.name = {objective.name!r}: it draws its own paths")
    return loss, log_weight
