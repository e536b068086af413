"""One evaluation of a sampler: bounds on log Z, how far to trust them, and distances to exact samples."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.rollout import rollout, rollout_backward, score_trajectories
from driftstream.envs.errors import require
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import Target
from driftstream.eval.coverage import mode_coverage
from driftstream.eval.distances import wasserstein2
from driftstream.eval.estimators import (
    effective_sample_size,
    khat,
    log_z_importance,
    log_z_lower_bound,
    log_z_upper_bound,
)
from driftstream.eval.flow import KnownFlow, known_flow

# Trajectories at a time: bounds the memory whatever the number of samples.
_BATCH = 500


@dataclass(frozen=True)
class EvalConfig:
    """How a sampler is evaluated; raises ConfigError for a field out of range.

    `samples` trajectories give the estimates, the first `w2_samples` of them (at most all) the distance, which is
    cubic in time; 0 leaves it out. `every_s` is the least time between two evaluations during training.
    `sampling_steps` None evaluates on as many steps as in training.
    """

    samples: int = 2000
    every_s: float = 20.0
    w2_samples: int = 2000
    sampling_steps: int | None = None

    def __post_init__(self) -> None:
        require(self.samples >= 1, "eval.samples", self.samples, "at least 1")
        require(self.every_s >= 0, "eval.every_s", self.every_s, "at least 0 seconds")
        require(self.w2_samples >= 0, "eval.w2_samples", self.w2_samples, "at least 0")
        steps = self.sampling_steps
        require(steps is None or steps >= 1, "eval.sampling_steps", steps, "at least 1")

    @property
    def distance_samples(self) -> int:
        """How many samples the distance takes."""
        return min(self.w2_samples, self.samples)


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and the finite samples [n,D] with their log weights [n] (float64)."""

    metrics: dict[str, float]
    samples: Tensor
    log_weight: Tensor


@torch.no_grad()
def evaluate_sampler(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target,
    times: Tensor,
    config: EvalConfig | None = None,
    generator: torch.Generator | None = None,
    w2_floor: float | None = None,
) -> Evaluation:
    """Draws `config.samples` trajectories on the grid `times` [T+1] without exploration, and measures them.

    Bounds and differences are in nats. Metrics that need the true log Z or exact samples are left out where
    the target has none, and `eval/flow_error` (root mean square, on bridges from exact samples) where there is no
    state flow or the true one is not known. Trajectories whose log weight is not finite are counted
    (`eval/nonfinite`), and left out but for the importance estimate and the effective sample size, where they have
    weight 0. No gradients.
    """
    config = config or EvalConfig()
    samples, _, log_weight = draw(policy, process, target, times, config.samples, generator)
    finite = log_weight.isfinite() & samples.isfinite().all(-1)
    metrics = {"eval/nonfinite": float((~finite).sum())}
    weight_or_zero = log_weight.masked_fill(~finite, -math.inf)
    samples, log_weight = samples[finite], log_weight[finite]
    if len(samples):
        metrics |= _weight_metrics(log_weight, weight_or_zero, target.log_z) | mode_coverage(target, samples)

    exact = target.sample(config.samples, generator)
    if exact is not None:
        exact = exact.to(times)
        flow = known_flow(policy, process, target, times)
        weight_of_exact, flow_error = _score_exact(policy, process, target, exact, times, flow, generator)
        upper = log_z_upper_bound(weight_of_exact)
        metrics["eval/log_z_upper_bound"] = upper
        if flow_error is not None:
            metrics["eval/flow_error"] = flow_error
        if len(samples):
            metrics["eval/elbo_eubo_gap"] = upper - metrics["eval/log_z_lower_bound"]
            if n := config.distance_samples:
                metrics["eval/w2"] = wasserstein2(samples[:n], exact[:n])
                if w2_floor is not None:
                    metrics["eval/w2_floor"] = w2_floor
    return Evaluation(metrics, samples, log_weight)


def _weight_metrics(log_weight: Tensor, weight_or_zero: Tensor, log_z: float | None) -> dict[str, float]:
    lower, importance = log_z_lower_bound(log_weight), log_z_importance(weight_or_zero)
    metrics = {
        "eval/log_z_lower_bound": lower,
        "eval/log_z_importance": importance,
        "eval/ess": effective_sample_size(weight_or_zero),
        "eval/khat": khat(log_weight),
    }
    if log_z is not None:
        metrics |= {"eval/delta_log_z": log_z - lower, "eval/delta_log_z_rw": log_z - importance}
    return metrics


@torch.no_grad()
def draw(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target,
    times: Tensor,
    n: int,
    generator: torch.Generator | None = None,
    batch_size: int = _BATCH,
) -> tuple[Tensor, Tensor, Tensor]:
    """n samples [n,D] of the policy, their log rewards [n] and log importance weights [n] (float64).

    At most `batch_size` trajectories on the grid `times` [T+1] are held at a time. No gradients.
    """
    batches = []
    for start in range(0, n, batch_size):
        paths = rollout(policy, process, target, times, min(batch_size, n - start), generator=generator)
        states, log_reward = paths["states"], paths["log_reward"]
        log_pf, log_pb = score_trajectories(policy, process, states, times, paths.get("scores", None))
        # A view of the last states would keep the whole paths.
        batches.append((states[:, -1].clone(), log_reward, _log_weight(log_reward, log_pf, log_pb)))
    samples, log_rewards, log_weights = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return samples, log_rewards, log_weights


def _score_exact(
    policy: DiffusionPolicy,
    process: DiffusionProcess,
    target: Target,
    exact: Tensor,
    times: Tensor,
    flow: KnownFlow | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, float | None]:
    """Log weights [n] of bridges that end in exact samples [n,D], and on their states the flow's error, if known."""
    log_weights, squares = [], []
    for terminal in exact.split(_BATCH):
        states = rollout_backward(policy, process, terminal, times, generator)
        scores = target.score(states[:, :-1]) if policy.langevin else None
        log_pf, log_pb = score_trajectories(policy, process, states, times, scores)
        log_weights.append(_log_weight(target.log_reward(terminal), log_pf, log_pb))
        if flow is not None:
            squares.append(flow.residual(policy, process, target, states).square())
    return torch.cat(log_weights), torch.cat(squares).mean().sqrt().item() if squares else None


def _log_weight(log_reward: Tensor, log_pf: Tensor, log_pb: Tensor) -> Tensor:
    # Sums over T steps of large terms that nearly cancel: in float64 whatever the network's type.
    return log_reward.double() + log_pb.double().sum(-1) - log_pf.double().sum(-1)
