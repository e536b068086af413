"""Time grids, transition densities and bridges against their naive transcriptions."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from driftstream.envs.errors import ConfigError
from driftstream.envs.grids import GridConfig, make_grid, random_grid, uniform_grid
from driftstream.envs.processes import BrownianProcess, ProcessConfig

Golden = Callable[[str], Mapping[str, np.ndarray]]


def grid(kind: str, sampling_steps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return make_grid(GridConfig(kind, sampling_steps), generator, dtype=torch.float64)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["uniform", "random"])
@pytest.mark.parametrize("sampling_steps", [1, 7, 100, 1000])
def test_grids_rise_from_exactly_0_to_exactly_1(kind: str, sampling_steps: int, dtype: torch.dtype) -> None:
    config = GridConfig(kind, sampling_steps)  # type: ignore[arg-type]
    times = make_grid(config, torch.Generator().manual_seed(0), dtype=dtype)
    assert times.shape == (sampling_steps + 1,)
    assert times.dtype == dtype
    assert times[0] == 0
    assert times[-1] == 1
    assert (times.diff() > 0).all()


def test_random_steps_are_at_most_tenfold_apart_and_newly_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (random_grid(500, generator).double().diff() for _ in range(2))
    assert not torch.equal(first, second)
    assert first.max() / first.min() <= 10.001
    assert first.max() / first.min() > 8
    torch.testing.assert_close(uniform_grid(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GridConfig("cosine"), "grid.kind = 'cosine': expected 'uniform', 'random' or 'given'"),  # type: ignore[arg-type]
        (lambda: GridConfig(sampling_steps=0), "grid.sampling_steps = 0: expected at least 1"),
        (lambda: make_grid(GridConfig()), "grid.sampling_steps = None"),
        (lambda: ProcessConfig(0.0), "process.diffusion_variance = 0.0: expected a positive number"),
        (lambda: BrownianProcess(math.nan), "diffusion_variance = nan"),
    ],
)
def test_bad_configuration_is_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_golden_values(golden: Golden, kind: str, dtype: torch.dtype, rel: float) -> None:
    values = golden("process")
    process = BrownianProcess(float(values["sigma_squared"]))

    def load(name: str) -> Tensor:
        return torch.tensor(values[f"{kind}_{name}"], dtype=dtype)

    states, times, drift, log_var = (load(n) for n in ("states", "times", "drift", "log_var_offset"))
    results = {
        "log_pf_fixed": process.log_pf(states, times, drift),
        "log_pf_learned": process.log_pf(states, times, drift, log_var),
        "log_pb": process.log_pb(states, times),
    }
    for name, result in results.items():
        np.testing.assert_allclose(result, values[f"{kind}_{name}"], rtol=rel, err_msg=name)


def naive_log_probabilities(
    variance: float, states: Tensor, times: Tensor, drift: Tensor, log_var: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, one step and one distribution at a time."""
    log_pf, log_pb = [], []
    for n in range(len(times) - 1):
        dt = times[n + 1] - times[n]
        scale = (variance * dt * log_var[:, n].exp()).sqrt()
        forward = Normal(states[:, n] + drift[:, n] * dt, scale)
        log_pf.append(forward.log_prob(states[:, n + 1]).sum(-1))
        if n == 0:
            log_pb.append(torch.zeros(len(states), dtype=states.dtype))
        else:
            shrink = times[n] / times[n + 1]
            backward = Normal(states[:, n + 1] * shrink, (variance * dt * shrink).sqrt())
            log_pb.append(backward.log_prob(states[:, n]).sum(-1))
    return torch.stack(log_pf, 1), torch.stack(log_pb, 1)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    sampling_steps=st.integers(1, 9),
    dim=st.integers(1, 4),
    kind=st.sampled_from(["uniform", "random"]),
    variance=st.floats(0.05, 20.0),
    seed=st.integers(0, 2**20),
)
def test_log_probabilities_are_those_of_the_distributions(
    batch: int, sampling_steps: int, dim: int, kind: str, variance: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    times = grid(kind, sampling_steps, seed)
    states = torch.randn(batch, sampling_steps + 1, dim, dtype=torch.float64, generator=generator)
    drift, log_var = torch.randn(2, batch, sampling_steps, dim, dtype=torch.float64, generator=generator)
    process = BrownianProcess(variance)
    log_pf, log_pb = naive_log_probabilities(variance, states, times, drift, log_var)
    fixed_log_pf, _ = naive_log_probabilities(variance, states, times, drift, torch.zeros_like(log_var))
    torch.testing.assert_close(process.log_pf(states, times, drift, log_var), log_pf)
    torch.testing.assert_close(process.log_pf(states, times, drift), fixed_log_pf)
    torch.testing.assert_close(process.log_pb(states, times), log_pb)
    assert (process.log_pb(states, times)[:, 0] == 0).all()
    # One grid per row is the same as a shared one, row by row.
    rows = times.expand(batch, -1)
    torch.testing.assert_close(process.log_pf(states, rows, drift, log_var), log_pf)
    torch.testing.assert_close(process.log_pb(states, rows), log_pb)


def test_gradients_flow_to_states_drift_and_log_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    process, times = BrownianProcess(1.7), grid("random", 4)
    states = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    drift = torch.randn(2, 4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    log_var = torch.randn(2, 4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, u, v: process.log_pf(s, times, u, v), (states, drift, log_var))
    assert torch.autograd.gradcheck(lambda s, u: process.log_pf(s, times, u), (states, drift))
    assert torch.autograd.gradcheck(lambda s: process.log_pb(s, times), states)
    terminal = states.detach()[:, 0].clone().requires_grad_()

    def bridge(x: Tensor) -> Tensor:
        return process.sample_bridge(x, times, torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(bridge, terminal)


def test_inputs_are_not_edited() -> None:
    process, times = BrownianProcess(1.0), grid("uniform", 5)
    states, drift = torch.randn(3, 6, 2).double(), torch.randn(3, 5, 2).double()
    before = states.clone(), drift.clone(), times.clone()
    process.log_pf(states, times, drift, drift)
    process.log_pb(states, times)
    process.sample_bridge(states[:, -1], times)
    process.step(states[:, 0], drift[:, 0], 0.1, drift[:, 1])
    assert all(torch.equal(a, b) for a, b in zip(before, (states, drift, times), strict=True))


def test_a_step_has_the_stated_mean_and_variance() -> None:
    process = BrownianProcess(2.0)
    x, drift, noise, log_var = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    for dt in (0.25, torch.tensor(0.25)):
        torch.testing.assert_close(process.step(x, drift, dt, noise), x + 0.25 * drift + math.sqrt(0.5) * noise)
        std = ((2.0 * log_var.exp() + 4.0) * 0.25).sqrt()
        torch.testing.assert_close(
            process.step(x, drift, dt, noise, log_var, extra_variance=4.0), x + 0.25 * drift + std * noise
        )
    step = process.step(x, drift, 0.25, noise, torch.zeros_like(x), extra_variance=4.0)
    torch.testing.assert_close(process.step(x, drift, 0.25, noise, extra_variance=4.0), step)


def naive_bridge(process: BrownianProcess, terminal: Tensor, times: Tensor, seed: int) -> Tensor:
    """P_B as it is defined: one step back at a time."""
    generator = torch.Generator().manual_seed(seed)
    states = [terminal]
    for n in reversed(range(len(times) - 1)):
        shrink = times[n] / times[n + 1]
        std = (process.diffusion_variance * (times[n + 1] - times[n]) * shrink).sqrt()
        noise = torch.randn(terminal.shape, dtype=terminal.dtype, generator=generator)
        states.append(states[-1] * shrink + std * noise)
    return torch.stack(states[::-1], 1)


@pytest.mark.parametrize("kind", ["uniform", "random"])
def test_bridges_have_the_law_of_the_sequential_sampler(kind: str) -> None:
    process, times, n = BrownianProcess(2.3), grid(kind, 6), 60_000
    terminal = torch.tensor([1.5, -0.7], dtype=torch.float64).expand(n, 2)
    mean = times.unsqueeze(1) * terminal[0]
    earlier, later = torch.minimum(times, times.unsqueeze(1)), torch.maximum(times, times.unsqueeze(1))
    covariance = 2.3 * earlier * (1 - later)
    for paths in (
        process.sample_bridge(terminal, times, torch.Generator().manual_seed(0)),
        naive_bridge(process, terminal, times, seed=1),
    ):
        # Covariances of this many draws err by about 2.3 / 4 * sqrt(2 / n) = 0.003.
        torch.testing.assert_close(paths.mean(0), mean, rtol=0, atol=0.015)
        for d in range(2):
            torch.testing.assert_close(paths[..., d].T.cov(), covariance, rtol=0, atol=0.015)
        # Gaussian throughout, as the fourth moment of a middle point shows.
        middle = paths[:, 3, 0]
        standard = (middle - middle.mean()) / middle.std()
        assert standard.pow(4).mean().item() == pytest.approx(3.0, abs=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampling_steps", [1, 2, 50])
def test_bridges_start_at_0_and_end_where_they_must(sampling_steps: int, dtype: torch.dtype) -> None:
    process, times = BrownianProcess(5.0), uniform_grid(sampling_steps)
    terminal = 10 * torch.randn(8, 3, dtype=dtype, generator=torch.Generator().manual_seed(0))
    first, again = (process.sample_bridge(terminal, times, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.dtype == dtype
    assert first.shape == (8, sampling_steps + 1, 3)
    assert (first[:, 0] == 0).all()
    assert torch.equal(first[:, -1], terminal)
    per_row = process.sample_bridge(terminal, times.expand(8, -1), torch.Generator().manual_seed(1))
    assert torch.equal(per_row, first)


def test_the_optimal_drift_of_a_gaussian_leaves_no_residual() -> None:
    # Target N(0, σ²): the uncontrolled process is its own time reversal, so that log w = log Z on every path.
    process, times = BrownianProcess(1.3), grid("random", 12)
    states = torch.randn(16, 13, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states[:, 0] = 0
    log_pf = process.log_pf(states, times, torch.zeros(16, 12, 2, dtype=torch.float64))
    log_reward = Normal(0.0, torch.tensor(1.3, dtype=torch.float64).sqrt()).log_prob(states[:, -1]).sum(-1)
    log_weight = log_reward + process.log_pb(states, times).sum(1) - log_pf.sum(1)
    torch.testing.assert_close(log_weight, torch.zeros(16, dtype=torch.float64), rtol=0, atol=1e-10)
