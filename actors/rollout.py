"""The fused rollout, its way back, and the one scorer of trajectories in both directions.

TB-type objectives accept any path: the rollout's noise may be widened by exploration, while the score that the
learner trains on is always computed here, from states, with its current parameters.
"""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.native import serves
from driftstream.actors.native_balance import native_balance
from driftstream.actors.native_policy import NativeSteps, is_native, native_energies
from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.processes import DiffusionProcess, Kernels
from driftstream.envs.targets import CountedTarget, Target
from driftstream.envs.trajectory import make_trajectories


@torch.no_grad()
def rollout(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target | CountedTarget,
    times: Tensor,
    batch_size: int,
    exploration_std: float = 0.0,
    generator: torch.Generator | None = None,
) -> TensorDict:
    """Draw a batch of trajectories from the policy, with extra noise of rate `exploration_std`.

    Args:
        times: grid `[T+1]`; its dtype and device are those of the trajectories.
        batch_size: B.
        exploration_std: e; a step's variance gains e^2 times its `gain` (dt for the plain Brownian process).
        generator: of the noise; `None` uses the global one, as `DiffusionSamplingEnv.rollout` does.

    Returns:
        Trajectories (`envs.trajectory`) with batch size `[B]`; `scores [B, T, D]` at the start of every step are
        there when the policy uses them, so that the learner need not evaluate the target again. No gradient.
    """
    start = process.sample_prior(batch_size, policy.dim, generator, times.device, times.dtype)
    states, scores = roll_forward(policy, process, target, start, times, exploration_std, generator=generator)
    return make_trajectories(states, times, target.log_reward(states[:, -1]), scores=scores)


@torch.no_grad()
def roll_forward(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target | CountedTarget,
    start: Tensor,
    times: Tensor,
    exploration_std: float = 0.0,
    drift_scale: float = 1.0,
    noise_scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Paths of the policy from `start [B, D]` at `times[0]`, of any grid, to `times[-1]`.

    Its drift and the variance of its noise are multiplied by `drift_scale` and `noise_scale`; extra noise is not.

    Returns:
        States `[B, L+1, D]` for times `[L+1]`, and the scores `[B, L, D]` at the start of every step where the policy
        uses them, else None. Log rewards are not evaluated. No gradient.
    """
    sampling_steps, (batch_size, dim) = len(times) - 1, start.shape
    states = times.new_empty(batch_size, sampling_steps + 1, dim)
    scores = times.new_empty(batch_size, sampling_steps, dim) if policy.langevin else None
    score = None
    noise = states.new_empty(batch_size, dim)
    states[:, 0] = start
    x = states[:, 0].contiguous()
    advance = _steps(policy, process, times, states, scores, exploration_std**2, drift_scale, noise_scale)
    for n in range(sampling_steps):
        if scores is not None:
            score = target.score(x)
        noise.normal_(generator=generator)
        x = advance(x, n, score, noise)
    return states, scores


def _steps(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    times: Tensor,
    states: Tensor,
    scores: Tensor | None,
    extra_variance: float,
    drift_scale: float,
    noise_scale: float,
) -> Callable[[Tensor, int, Tensor | None, Tensor], Tensor]:
    """`(x [B, D], n, score, noise)` -> the states after step n.

    They are written to `states [B, T+1, D]` as well, and the score to `scores [B, T, D]`.
    """
    embedding = policy.embed_times(times[:-1], process)
    if is_native(policy, states[:, 0], embedding, states[:, 0] if policy.langevin else None):
        kernels = process.kernels(times.double())
        scaled = kernels._replace(gain=drift_scale * kernels.gain, variance=noise_scale * kernels.variance)
        return NativeSteps(policy, embedding, scaled, extra_variance * kernels.gain, states, scores)
    steps = process.steps(times)
    network, embeddings = policy.forward_net.by_steps(embedding.hidden, len(states)), embedding.unbind()
    columns = states.unbind(1)

    def advance(x: Tensor, n: int, score: Tensor | None, noise: Tensor) -> Tensor:
        step = steps[n]
        if scores is not None and score is not None:
            scores[:, n] = score
        drift, log_var = policy.drift(x, network(policy.inputs(x, embeddings[n]), n), embeddings[n], score)
        if (drift_scale, noise_scale) != (1.0, 1.0):
            drift, step = drift_scale * drift, step._replace(variance=noise_scale * step.variance)
        x = process.step(x, drift, step, noise, log_var=log_var, extra_variance=extra_variance)
        columns[n + 1].copy_(x)
        return x

    return advance


@torch.no_grad()
def rollout_backward(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    terminal: Tensor,
    times: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Paths of P_B that end in terminal [B, D], on the grid times [T+1]: states [B, T+1, D], without gradient.

    A fixed P_B needs no network (`DiffusionProcess.sample_bridge`); a learned one is run step by step.
    """
    embedding = policy.embed_backward(times[1:])
    if policy.backward_net is None or embedding is None:
        return process.sample_bridge(terminal, times, generator)
    network = policy.backward_net.by_steps(embedding, len(terminal))
    x = terminal
    states = [x]
    for n, step in reversed(list(enumerate(process.steps(times)))):
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        if step.back_variance:
            x = process.step_back(x, step, noise, *policy.factors(network(x, n)))
        else:
            x = torch.zeros_like(x)
        states.append(x)
    return torch.stack(states[::-1], 1)


def score_trajectories(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    states: Tensor,
    times: Tensor,
    scores: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-step log densities of given trajectories under the forward and the backward policy.

    Args:
        states: `[B, T+1, D]`, wherever they came from (rollouts, bridges, another sampler).
        times: `[T+1]`.
        scores: gradient of log R at `states[:, :-1]`, `[B, T, D]`; needed when the policy uses it.
        index: for segments: `states [B, L+1, D]` (and `scores [B, L, D]`) stand at `times[index]`, index `[B, L+1]`.

    Returns:
        `(log_pf [B, T], log_pb [B, T])`, L for T with segments. Gradients flow to the policy's parameters, and to
        `states` if they require it; exploration noise plays no part.

    Source: Sendera et al. 2024 (arXiv 2402.05098), section 2.
    """
    forward, backward = policy.embed_times(times[:-1], process), policy.embed_backward(times[1:])
    kernels = process.kernels_like(times, states)
    if index is not None:
        times, kernels = times[index], Kernels(*(part[index[:, :-1]] for part in kernels))
        forward = forward[index[:, :-1]]
        backward = None if backward is None else backward[index[:, 1:] - 1]
    if is_native(policy, states[:, :-1], forward, scores, kernels):
        energy, squares = native_energies(policy, states, forward, kernels, scores)
        log_pf = process.log_pf_of(energy, states, times, kernels)
        if backward is None:
            return log_pf, process.log_pb_of(squares, policy.dim, kernels)
    else:
        drift, log_var = policy(states[:, :-1], forward, scores)
        log_pf = process.log_pf(states, times, drift, log_var, kernels)
    factors = policy.backward_factors(states[:, 1:], backward)
    return log_pf, process.log_pb(states, times, *factors, kernels)


def fused_trajectory_balance(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    states: Tensor,
    times: Tensor,
    offset: Tensor,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The mean square of offset + Σ log P_B - Σ log P_F, and these residuals [B], detached, in one pass there and back.

    For states [B, T+1, D], times [T+1], scores [B, T, D] where the policy uses them, and an offset [B]; log R - log Z
    makes it the loss of trajectory balance. Gradients flow to the policy's parameters and the offset.

    None where native code does not serve, where P_B is learned and where no gradient is wanted: then
    `score_trajectories` has the densities, and keeps for the way back what every step's network computes.

    Source: Malkin et al. 2022 (arXiv 2201.13259); Lahlou et al. 2023 (arXiv 2301.12594).
    """
    if policy.backward_net is not None or not torch.is_grad_enabled() or not serves(states):
        return None
    if offset.shape != states.shape[:1] or not states[:, 1:].numel():
        return None
    forward, kernels = policy.embed_times(times[:-1], process), process.kernels_like(times, states)
    if not is_native(policy, states[:, :-1], forward, scores, kernels):
        return None
    if process.prior_std and times[0] == 0:
        offset = offset - process.log_prior(states[:, 0])
    return native_balance(policy, states, forward, kernels, scores, offset.to(states))
