"""One evaluation of a sampler: bounds on log Z, how far to trust them, and distances to exact samples."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.rollout import rollout, score_trajectories
from driftstream.envs.errors import require
from driftstream.envs.processes import BrownianProcess
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

# Trajectories at a time: bounds the memory whatever the number of samples.
_BATCH = 500


@dataclass(frozen=True)
class EvalConfig:
    """How a sampler is evaluated; raises ConfigError for a field out of range.

    `samples` trajectories give the estimates, the first `w2_samples` of them the distance (cubic in time; 0
    leaves it out). `every_s` is the least time between two evaluations during training. `sampling_steps` None
    evaluates on as many steps as in training.
    """

    samples: int = 2000
    every_s: float = 20.0
    w2_samples: int = 2000
    sampling_steps: int | None = None

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "at least 1")
        require(self.every_s >= 0, "every_s", self.every_s, "at least 0 seconds")
        in_range = 0 <= self.w2_samples <= self.samples
        require(in_range, "w2_samples", self.w2_samples, f"between 0 and the {self.samples} samples")
        steps = self.sampling_steps
        require(steps is None or steps >= 1, "sampling_steps", steps, "at least 1")


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and the finite samples [n,D] with their log weights [n] (float64)."""

    metrics: dict[str, float]
    samples: Tensor
    log_weight: Tensor


@torch.no_grad()
def evaluate_sampler(
    policy: DiffusionPolicy,
    process: BrownianProcess,
    target: Target,
    times: Tensor,
    config: EvalConfig | None = None,
    generator: torch.Generator | None = None,
    w2_floor: float | None = None,
) -> Evaluation:
    """Draws `config.samples` trajectories on the grid `times` [T+1] without exploration, and measures them.

    Bounds and differences are in nats. Metrics that need the true log Z or exact samples are left out where
    the target has none. Trajectories whose log weight is not finite are counted (`eval/nonfinite`), and left
    out but for the importance estimate and the effective sample size, where they have weight 0. No gradients.
    """
    config = config or EvalConfig()
    samples, log_weight = _draw(policy, process, target, times, config.samples, generator)
    finite = log_weight.isfinite() & samples.isfinite().all(-1)
    metrics = {"eval/nonfinite": float((~finite).sum())}
    weight_or_zero = log_weight.masked_fill(~finite, -math.inf)
    samples, log_weight = samples[finite], log_weight[finite]
    if len(samples):
        metrics |= _weight_metrics(log_weight, weight_or_zero, target.log_z) | mode_coverage(target, samples)

    exact = target.sample(config.samples, generator)
    if exact is not None:
        exact = exact.to(times)
        upper = log_z_upper_bound(_log_weight_of_exact(policy, process, target, exact, times, generator))
        metrics["eval/log_z_upper_bound"] = upper
        if len(samples):
            metrics["eval/elbo_eubo_gap"] = upper - metrics["eval/log_z_lower_bound"]
            if config.w2_samples:
                n = config.w2_samples
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


def _draw(
    policy: DiffusionPolicy,
    process: BrownianProcess,
    target: Target,
    times: Tensor,
    n: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """n samples [n,D] of the policy and their log weights [n]."""
    samples, log_weights = [], []
    for start in range(0, n, _BATCH):
        paths = rollout(policy, process, target, times, min(_BATCH, n - start), generator=generator)
        log_pf, log_pb = score_trajectories(policy, process, paths["states"], times, paths.get("scores", None))
        samples.append(paths["states"][:, -1])
        log_weights.append(_log_weight(paths["log_reward"], log_pf, log_pb))
    return torch.cat(samples), torch.cat(log_weights)


def _log_weight_of_exact(
    policy: DiffusionPolicy,
    process: BrownianProcess,
    target: Target,
    exact: Tensor,
    times: Tensor,
    generator: torch.Generator | None,
) -> Tensor:
    """Log weights [n] of bridges that end in exact samples [n,D]."""
    log_weights = []
    for terminal in exact.split(_BATCH):
        states = process.sample_bridge(terminal, times, generator)
        scores = target.score(states[:, :-1]) if policy.langevin else None
        log_pf, log_pb = score_trajectories(policy, process, states, times, scores)
        log_weights.append(_log_weight(target.log_reward(terminal), log_pf, log_pb))
    return torch.cat(log_weights)


def _log_weight(log_reward: Tensor, log_pf: Tensor, log_pb: Tensor) -> Tensor:
    # Sums over T steps of large terms that nearly cancel: in float64 whatever the network's type.
    return log_reward.double() + log_pb.double().sum(-1) - log_pf.double().sum(-1)
