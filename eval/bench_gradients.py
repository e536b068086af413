"""How noisy the objectives' gradients are at equal cost: one policy, many independent gradients of each."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.actors.actor import Actor
from driftstream.actors.rollout import rollout
from driftstream.envs.errors import require
from driftstream.envs.grids import make_grid
from driftstream.learner.learner import Learner
from driftstream.learner.losses import Paths, draw_segments, path_loss
from driftstream.learner.objectives import ObjectiveConfig


@dataclass(frozen=True)
class GradientStatistics:
    """Signal and noise of one gradient g, estimated from K independent ones.

    `trace` of the covariance of g; `signal` |E g|², free of the bias trace / K that the square of a mean has;
    `noise_to_signal` = trace / signal with its jackknife `standard_error`, both NaN where the signal is lost in the
    noise (an estimate, or one with a gradient left out, that is not positive).
    """

    trace: float
    signal: float
    noise_to_signal: float
    standard_error: float


@dataclass(frozen=True)
class GradientRow:
    """What one objective's gradients cost (medians, in seconds) and how noisy they are.

    `transitions` at which the forward network is evaluated for one gradient; `rollout_s` for the trajectories that
    it is computed from, 0 where the loss simulates its own.
    """

    transitions: int
    gradient_s: float
    rollout_s: float
    statistics: GradientStatistics


@dataclass(frozen=True)
class Moment:
    """Every objective's gradients at one moment of training, with what tells how far it is.

    `log_z` as learned; `log_z_lower_bound` the mean log weight of one batch of trajectories.
    """

    step: int
    log_z: float
    log_z_lower_bound: float
    rows: dict[str, GradientRow]


def gradient_statistics(gradients: Tensor) -> GradientStatistics:
    """Statistics of K >= 3 independent gradients [K, P], in O(K P).

    Source: Efron & Stein 1981 (Annals of Statistics 9) for the jackknife.
    """
    count = len(gradients)
    if count < 3:
        raise ValueError(f"gradients [{count}, …]: expected at least 3 of them")
    gradients = gradients.double()
    squares, total = gradients.square().sum(1), gradients.sum(0)
    trace, signal = _moments(squares.sum(), total.square().sum(), count)
    without = total.square().sum() - 2.0 * (gradients @ total) + squares
    traces, signals = _moments(squares.sum() - squares, without, count - 1)
    ratio = error = math.nan
    if signal > 0 and (signals > 0).all():
        ratio = float(trace / signal)
        error = float(((count - 1) * (traces / signals).var(correction=0)).sqrt())
    return GradientStatistics(float(trace), float(signal), ratio, error)


def _moments(sum_of_squares: Tensor, square_of_sum: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Trace of the covariance and |mean|² less its bias, from Σ|g|² and |Σ g|²."""
    square = square_of_sum / count**2
    trace = (sum_of_squares - count * square) / (count - 1)
    return trace, square - trace / count


def draw_paths(learner: Learner, objective: ObjectiveConfig, rows: int) -> Paths:
    """`rows` new trajectories of the policy, or one segment of each of them, without gradient."""
    times = make_grid(learner.grid, generator=learner.generator, device=learner.device)
    batch = rollout(learner.policy, learner.process, learner.target, times, rows, generator=learner.generator)
    paths = Paths(batch["states"], times, batch["log_reward"], batch.get("scores", None))
    if objective.segment_length is None:
        return paths
    return draw_segments(paths, objective.segment_length, learner.generator)


def draw_gradient(learner: Learner, objective: ObjectiveConfig, transitions: int) -> tuple[Tensor, float, float]:
    """A gradient [P] by the forward network, on new data of its own: (gradient, rollout seconds, gradient seconds).

    Trajectories have T transitions and segments their length, so that `transitions` says how many rows there are.
    """
    start = time.perf_counter()
    if objective.pathwise:
        drawn = start
        loss, _ = learner.pathwise_loss(transitions // sampling_steps(learner))
    else:
        paths = draw_paths(learner, objective, transitions // (objective.segment_length or sampling_steps(learner)))
        drawn = time.perf_counter()
        policy, process, target = learner.policy, learner.process, learner.target
        loss, _ = path_loss(objective, policy, process, target, paths, learner.log_z)
    gradients = torch.autograd.grad(loss, list(learner.policy.forward_net.parameters()))
    end = time.perf_counter()
    return torch.cat([gradient.flatten() for gradient in gradients]), drawn - start, end - drawn


def measure_gradients(
    learner: Learner, objectives: Mapping[str, ObjectiveConfig], batch_size: int, repeats: int
) -> dict[str, GradientRow]:
    """`repeats` gradients of every objective with the learner's present parameters, in turns.

    Every gradient costs batch_size x T transitions; ConfigError where segments do not divide them.
    """
    transitions = batch_size * sampling_steps(learner)
    for objective in objectives.values():
        length = objective.segment_length
        fits = length is None or transitions % length == 0
        require(fits, "objective.segment_length", length, f"a divisor of the batch's {transitions} transitions")
    draws = [
        {name: draw_gradient(learner, objective, transitions) for name, objective in objectives.items()}
        for _ in range(repeats)
    ]
    rows = {}
    for name in objectives:
        gradients, rollout_s, gradient_s = zip(*(draw[name] for draw in draws), strict=True)
        rows[name] = GradientRow(
            transitions,
            float(torch.tensor(gradient_s).median()),
            float(torch.tensor(rollout_s).median()),
            gradient_statistics(torch.stack(gradients)),
        )
    return rows


def bench_gradients(
    learner: Learner,
    actor: Actor,
    objectives: Mapping[str, ObjectiveConfig],
    steps: int,
    repeats: int,
) -> list[Moment]:
    """Measure the untrained policy, train it for `steps` updates of the learner's own objective, and measure again.

    The learner needs a state flow if any objective balances flows. log Z starts at the mean log weight.
    """
    moments = []
    for length in (0, steps):
        while learner.step < length:
            batch = actor.generate(learner.step / steps)
            if len(batch):
                learner.learn_fresh(batch, learner.step / steps)
        bound = float(learner.log_weight(draw_paths(learner, ObjectiveConfig(), learner.config.batch_size)).mean())
        if not learner.step:
            learner.start_log_z(torch.tensor(bound))
        rows = measure_gradients(learner, objectives, learner.config.batch_size, repeats)
        moments.append(Moment(learner.step, learner.log_z.item(), bound, rows))
    return moments


def sampling_steps(learner: Learner) -> int:
    """T of the learner's grid, which is resolved."""
    assert learner.grid.sampling_steps is not None
    return learner.grid.sampling_steps
