"""Evaluations of samplers whose figures are known: perfect, untrained, partly outside the support."""

import math
from dataclasses import replace

import pytest
import torch

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import rollout, score_trajectories
from driftstream.envs.errors import ConfigError
from driftstream.envs.grids import uniform_grid
from driftstream.envs.processes import BrownianProcess
from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.eval.distances import wasserstein2
from driftstream.eval.estimators import log_z_importance, log_z_lower_bound
from driftstream.eval.evaluation import EvalConfig, Evaluation, evaluate_sampler

SIGMA2 = 1.5
TIMES = uniform_grid(8)
QUICK = EvalConfig(samples=400, w2_samples=200)


class Gaussian(Target):
    """N(0, SIGMA2), where the uncontrolled process ends, times exp(shift): every log weight is `shift`."""

    name = "gaussian"
    dim = 2

    def __init__(self, shift: float = 0.0) -> None:
        self.log_z = shift

    def log_reward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.log_z is not None
        return self.log_z - x.square().sum(-1) / (2 * SIGMA2) - math.log(2 * math.pi * SIGMA2)

    def sample(self, n: int, generator: torch.Generator | None = None) -> torch.Tensor:
        return SIGMA2**0.5 * torch.randn(n, self.dim, generator=generator)


class HalfDefined(Gaussian):
    """Zero where x_0 < 0, and undefined where x_0 > 2: Z is that of the rest."""

    def log_reward(self, x: torch.Tensor) -> torch.Tensor:
        log_reward = super().log_reward(x).masked_fill(x[..., 0] < 0, -torch.inf)
        return log_reward.masked_fill(x[..., 0] > 2, torch.nan)

    def sample(self, n: int, generator: torch.Generator | None = None) -> None:  # type: ignore[override]
        return None


def evaluate(target: Target, config: EvalConfig = QUICK, seed: int = 0, **policy_options: bool) -> Evaluation:
    torch.manual_seed(5)
    policy = DiffusionPolicy(target.dim, PolicyConfig(**policy_options))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    return evaluate_sampler(policy, BrownianProcess(SIGMA2), target, TIMES, config, generator, w2_floor=0.25)


def test_a_perfect_sampler_closes_every_gap() -> None:
    evaluation = evaluate(Gaussian(shift=2.5))
    metrics = evaluation.metrics
    for name in ("eval/log_z_lower_bound", "eval/log_z_importance", "eval/log_z_upper_bound"):
        assert metrics[name] == pytest.approx(2.5, abs=1e-4)
    for name in ("eval/delta_log_z", "eval/delta_log_z_rw", "eval/elbo_eubo_gap"):
        assert metrics[name] == pytest.approx(0.0, abs=1e-4)
    assert metrics["eval/ess"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["eval/nonfinite"] == 0
    assert 0 < metrics["eval/w2"] < 0.6
    assert metrics["eval/w2_floor"] == 0.25
    assert evaluation.samples.shape == (400, 2)
    assert evaluation.log_weight.shape == (400,)
    assert evaluation.log_weight.dtype == torch.float64


def test_an_untrained_sampler_of_a_mixture() -> None:
    metrics = evaluate(make_target("gmm9")).metrics
    assert metrics["eval/log_z_lower_bound"] < metrics["eval/log_z_importance"] < metrics["eval/log_z_upper_bound"]
    assert metrics["eval/delta_log_z"] == pytest.approx(-metrics["eval/log_z_lower_bound"])
    assert metrics["eval/delta_log_z_rw"] == pytest.approx(-metrics["eval/log_z_importance"])
    gap = metrics["eval/log_z_upper_bound"] - metrics["eval/log_z_lower_bound"]
    assert metrics["eval/elbo_eubo_gap"] == pytest.approx(gap)
    assert metrics["eval/ess"] < 0.1
    assert metrics["eval/khat"] > 0.4
    assert metrics["eval/mode_coverage"] < metrics["eval/modes"] == 9


@pytest.mark.parametrize("langevin", [False, True])
def test_equals_one_rollout_scored_by_hand(langevin: bool) -> None:
    """The log weights are those of the very trajectories that were drawn."""
    target, n = make_target("gmm9"), 300
    evaluation = evaluate(target, replace(QUICK, samples=n, w2_samples=50), langevin=langevin)
    torch.manual_seed(5)
    policy, process = DiffusionPolicy(2, PolicyConfig(langevin=langevin)), BrownianProcess(SIGMA2)
    generator = torch.Generator().manual_seed(0)
    paths = rollout(policy, process, target, TIMES, n, generator=generator)
    scores = target.score(paths["states"][:, :-1]) if langevin else None
    with torch.no_grad():
        log_pf, log_pb = score_trajectories(policy, process, paths["states"], TIMES, scores)
    log_weight = paths["log_reward"].double() + (log_pb.double() - log_pf.double()).sum(-1)
    torch.testing.assert_close(evaluation.samples, paths["states"][:, -1])
    torch.testing.assert_close(evaluation.log_weight, log_weight, rtol=1e-5, atol=1e-4)
    assert evaluation.metrics["eval/log_z_lower_bound"] == pytest.approx(log_z_lower_bound(log_weight), rel=1e-5)
    exact = target.sample(n, generator)
    assert exact is not None
    w2 = wasserstein2(paths["states"][:50, -1], exact[:50])
    assert evaluation.metrics["eval/w2"] == pytest.approx(w2, rel=1e-5)


def test_samples_of_density_zero_are_counted_and_weigh_nothing() -> None:
    evaluation = evaluate(HalfDefined(), replace(QUICK, samples=4_000))
    metrics, kept = evaluation.metrics, len(evaluation.samples)
    assert metrics["eval/nonfinite"] == 4_000 - kept
    assert ((evaluation.samples[:, 0] >= 0) & (evaluation.samples[:, 0] <= 2)).all()
    # All weights are 1 or 0, so that Z and the sample size are the share of the ones.
    assert metrics["eval/log_z_importance"] == pytest.approx(math.log(kept / 4_000), abs=1e-4)
    assert metrics["eval/ess"] == pytest.approx(kept / 4_000, abs=1e-4)
    mass = 0.5 * math.erf(2 / math.sqrt(2 * SIGMA2))
    assert metrics["eval/log_z_importance"] == pytest.approx(math.log(mass), abs=0.05)
    assert log_z_importance(evaluation.log_weight) == pytest.approx(0.0, abs=1e-4)
    assert not {"eval/w2", "eval/w2_floor", "eval/log_z_upper_bound", "eval/elbo_eubo_gap"} & set(metrics)


def test_nothing_finite_is_reported_and_does_not_raise() -> None:
    class Nowhere(Gaussian):
        def log_reward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., 0] * torch.nan

    evaluation = evaluate(CountedTarget(Nowhere()))
    assert evaluation.metrics["eval/nonfinite"] == 400
    assert "eval/log_z_lower_bound" not in evaluation.metrics
    assert evaluation.samples.shape == (0, 2)


def test_evaluations_are_counted_and_repeatable() -> None:
    target = CountedTarget(make_target("manywell", dim=4))
    first, second = evaluate(target), evaluate(target)
    assert target.energy_evaluations == 2 * (400 + 400)  # the samples, and the exact ones for the upper bound
    assert first.metrics == second.metrics
    assert torch.equal(first.samples, second.samples)
    assert evaluate(target, seed=1).metrics != first.metrics


def test_no_distance_when_asked_for_none() -> None:
    metrics = evaluate(make_target("gmm9"), replace(QUICK, w2_samples=0)).metrics
    assert "eval/w2" not in metrics
    assert "eval/log_z_upper_bound" in metrics


def test_the_distance_takes_no_more_samples_than_there_are() -> None:
    few = EvalConfig(samples=100)
    assert (few.distance_samples, QUICK.distance_samples) == (100, 200)
    metrics = evaluate(make_target("gmm9"), few).metrics
    assert metrics == evaluate(make_target("gmm9"), replace(few, w2_samples=100)).metrics


@pytest.mark.parametrize(
    ("field", "value"),
    [("samples", 0), ("every_s", -1.0), ("w2_samples", -1), ("sampling_steps", 0)],
)
def test_bad_configuration_is_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^eval.{field} = "):
        replace(EvalConfig(), **{field: value})  # type: ignore[arg-type]
