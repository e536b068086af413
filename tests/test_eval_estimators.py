"""Estimators of log Z against golden values, literal transcriptions and cases known in closed form."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from driftstream.eval.estimators import (
    effective_sample_size,
    khat,
    log_z_importance,
    log_z_lower_bound,
    log_z_upper_bound,
)

ESTIMATORS = [log_z_lower_bound, log_z_upper_bound, log_z_importance, effective_sample_size, khat]


def test_match_golden(golden: Callable[[str], Mapping[str, np.ndarray]]) -> None:
    reference = golden("metrics")
    log_weight = reference["log_weights"]
    for values in (log_weight, torch.from_numpy(log_weight)):
        assert log_z_lower_bound(values) == pytest.approx(float(reference["log_z_lower_bound"]), rel=1e-9)
        assert log_z_importance(values) == pytest.approx(float(reference["log_z_importance"]), rel=1e-9)
        fraction = float(reference["effective_sample_size_fraction"])
        assert effective_sample_size(values) == pytest.approx(fraction, rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-20, 20), min_size=1, max_size=40), st.floats(-1e4, 1e4))
def test_naive_transcription_and_shift(log_weights: list[float], shift: float) -> None:
    """A shift of all log weights (another normaliser) shifts the estimates and leaves the sample size."""
    weights = [math.exp(value) for value in log_weights]
    importance = math.log(sum(weights) / len(weights))
    size = sum(weights) ** 2 / sum(w**2 for w in weights) / len(weights)
    shifted = np.array(log_weights) + shift
    assert log_z_importance(shifted) == pytest.approx(importance + shift, abs=1e-8)
    assert log_z_lower_bound(shifted) == pytest.approx(sum(log_weights) / len(weights) + shift, abs=1e-8)
    assert effective_sample_size(shifted) == pytest.approx(size, rel=1e-6)
    assert log_z_lower_bound(shifted) <= log_z_importance(shifted) + 1e-8


def test_gaussian_weights_in_closed_form() -> None:
    """log w ~ N(m, s²) under P_F, N(m + s², s²) under the target: log Z = m + s²/2, ESS = exp(−s²)."""
    generator = torch.Generator().manual_seed(0)
    m, s = 3.0, 0.5
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    log_weight = m + s * noise
    assert log_z_lower_bound(log_weight) == pytest.approx(m, abs=0.01)
    assert log_z_importance(log_weight) == pytest.approx(m + s**2 / 2, abs=0.01)
    assert log_z_upper_bound(log_weight + s**2) == pytest.approx(m + s**2, abs=0.01)
    assert effective_sample_size(log_weight) == pytest.approx(math.exp(-(s**2)), abs=0.01)


def test_float32_input_is_summed_in_float64() -> None:
    log_weight = torch.full((10_001,), 1234.5)
    log_weight[0] = 1235.5
    assert log_z_lower_bound(log_weight) == pytest.approx(1234.5 + 1 / 10_001, abs=1e-9)


def test_weights_of_zero() -> None:
    half = torch.tensor([0.0, -math.inf])
    assert log_z_importance(half) == pytest.approx(math.log(0.5))
    assert effective_sample_size(half) == pytest.approx(0.5)
    nothing = torch.full((3,), -math.inf)
    assert log_z_importance(nothing) == -math.inf
    assert effective_sample_size(nothing) == 0.0


@pytest.mark.parametrize("shape", [0.1, 0.5, 0.9])
def test_khat_finds_the_tail_of_pareto_weights(shape: float) -> None:
    u = np.random.default_rng(0).uniform(size=50_000)
    assert khat(-shape * np.log(u)) == pytest.approx(shape, abs=0.06)


def test_khat_warns_of_weights_beyond_the_range_of_floats() -> None:
    """One weight holds all the mass: the case in which the fit, left to itself, would report the best of tails."""
    noise = torch.randn(2_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shapes = [khat(scale * noise) for scale in (1.0, 10.0, 100.0, 1e3, 1e6)]
    assert shapes == sorted(shapes)
    assert shapes[0] < 0.7 < 3 < shapes[1]
    assert khat(torch.cat([torch.tensor([1e3]), noise])) > 0.7


def test_khat_is_nan_where_there_is_no_tail() -> None:
    generator = torch.Generator().manual_seed(0)
    assert math.isnan(khat(torch.zeros(100)))
    assert math.isnan(khat(torch.full((100,), torch.nan)))
    assert math.isnan(khat(torch.randn(24, generator=generator)))
    spoilt = torch.randn(1_000, generator=generator)
    whole = khat(spoilt)
    assert khat(torch.cat([spoilt, torch.tensor([torch.nan, -torch.inf])])) == pytest.approx(whole)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(0,), (3, 2), ()])
def test_shapes_are_checked(estimator: Callable[[torch.Tensor], float], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="log_weight has shape"):
        estimator(torch.zeros(shape))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_inputs_with_gradients_are_welcome(estimator: Callable[[torch.Tensor], float]) -> None:
    log_weight = torch.randn(100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert isinstance(estimator(log_weight), float)
