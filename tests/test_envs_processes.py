"""Time grids, transition densities and bridges against their naive transcriptions."""

import math
import re
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
from driftstream.envs.processes import (
    BrownianProcess,
    DiffusionProcess,
    OrnsteinUhlenbeckProcess,
    ProcessConfig,
    Step,
    make_process,
)
from driftstream.envs.schedules import SCHEDULES, clock

Golden = Callable[[str], Mapping[str, np.ndarray]]

PROCESSES: dict[str, DiffusionProcess] = {
    **{f"brownian {schedule}": BrownianProcess(1.7, schedule, 8.0) for schedule in SCHEDULES},
    "dis": OrnsteinUhlenbeckProcess(1.4, noise=3.0),
    "dis linear": OrnsteinUhlenbeckProcess(0.6, noise=5.0, schedule="linear", schedule_ratio=20.0),
    "dds": OrnsteinUhlenbeckProcess(1.4, noise=3.0, exponential=True),
    "dds cosine": OrnsteinUhlenbeckProcess(2.5, noise=5.0, exponential=True, schedule="cosine"),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES.keys())
GIVEN = (0.0, 0.02, 0.1, 0.45, 0.5, 0.93, 1.0)


def grid(kind: str, sampling_steps: int, seed: int = 0) -> Tensor:
    if kind == "given":
        return make_grid(GridConfig("given", times=GIVEN), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return make_grid(GridConfig(kind, sampling_steps), generator, dtype=torch.float64)  # type: ignore[arg-type]


def log_normal(x: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """log N(x; mean, std² I) of x [..., D]; torch's own distribution would take numbers in single precision."""
    mean, std = (torch.as_tensor(value, dtype=torch.float64) for value in (mean, std))
    return Normal(mean, std).log_prob(x).sum(-1)


def noise_rate(t: np.ndarray, schedule: str, ratio: float) -> np.ndarray:
    """A rate that falls from `ratio` at t = 0 to 1 at t = 1, as the schedule's name says."""
    angle = math.acos(ratio**-0.5)
    shapes = {
        "constant": np.ones_like(t),
        "linear": ratio + (1.0 - ratio) * t,
        "cosine": ratio * np.cos(angle * t) ** 2,
        "geometric": ratio ** (1.0 - t),
    }
    return shapes[schedule]


def spent_share(t: float, schedule: str, ratio: float) -> float:
    """∫_0^t rate / ∫_0^1 rate, by quadrature."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    points = 0.5 * (nodes + 1.0)
    part, whole = (scale * weights @ noise_rate(scale * points, schedule, ratio) for scale in (t, 1.0))
    return float(part / whole)


def naive_step(process: DiffusionProcess, start: float, end: float) -> Step:
    """The kernels of one step, from the definition of the process."""
    assert isinstance(process, BrownianProcess | OrnsteinUhlenbeckProcess)
    before, after = (spent_share(t, process.schedule, process.schedule_ratio) for t in (start, end))
    if isinstance(process, BrownianProcess):
        # x_n given x_{n+1} of a Brownian motion from the origin: covariance over variance, and what is left.
        variance = process.diffusion_variance
        return Step(
            keep=1.0,
            gain=after - before,
            variance=variance * (after - before),
            back=before / after,
            back_variance=variance * (before - before**2 / after),
        )
    spent = process.noise * (after - before)
    if process.exponential:
        shrink = math.exp(-spent / 2)
        variance = process.prior_std**2 * (1 - shrink**2)
        return Step(shrink, 2 * (1 - shrink) / process.noise, variance, shrink, variance)
    variance = process.prior_std**2 * spent
    return Step(1 - spent / 2, after - before, variance, 1 - spent / 2, variance)


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
        (lambda: GridConfig("cosine"), "grid.kind = 'cosine': expected 'auto', 'uniform', 'random' or 'given'"),  # type: ignore[arg-type]
        (lambda: GridConfig(sampling_steps=0), "grid.sampling_steps = 0: expected at least 1"),
        (lambda: make_grid(GridConfig()), "grid.sampling_steps = None"),
        (lambda: BrownianProcess(math.nan), "diffusion_variance = nan"),
        (lambda: GridConfig("given"), "grid.times = (): expected rising numbers, 0 to 1"),
        (lambda: GridConfig("given", times=(0.0,)), "grid.times = (0.0,)"),
        (lambda: GridConfig("given", times=(0.0, 0.5, 0.5, 1.0)), "grid.times = (0.0, 0.5, 0.5, 1.0)"),
        (lambda: GridConfig("given", times=(0.0, 0.5, 0.9)), "grid.times = (0.0, 0.5, 0.9)"),
        (lambda: GridConfig("given", times=(0.1, 0.5, 1.0)), "grid.times = (0.1, 0.5, 1.0)"),
        (lambda: GridConfig("given", times=(0.0, math.nan, 1.0)), "grid.times = (0.0, nan, 1.0)"),
        (lambda: GridConfig("given", 3, (0.0, 0.5, 1.0)), "grid.sampling_steps = 3: expected 2, as grid.times says"),
        (lambda: GridConfig("uniform", 2, (0.0, 0.5, 1.0)), "grid.times = (0.0, 0.5, 1.0): expected nothing unless"),
        (lambda: ProcessConfig("vp"), "process.kind = 'vp': expected one of brownian, dis, dds"),  # type: ignore[arg-type]
        (lambda: ProcessConfig(diffusion_variance=0.0), "process.diffusion_variance = 0.0: expected a positive number"),
        (lambda: ProcessConfig(prior_std=-1.0), "process.prior_std = -1.0: expected a positive number"),
        (lambda: ProcessConfig(noise=math.inf), "process.noise = inf: expected a positive number"),
        (lambda: ProcessConfig(schedule="sigmoid"), "process.schedule = 'sigmoid': expected one of constant, linear"),  # type: ignore[arg-type]
        (lambda: ProcessConfig(schedule_ratio=1.0), "process.schedule_ratio = 1.0: expected a number above 1"),
        (lambda: make_process(ProcessConfig()), "process.diffusion_variance = None"),
        (lambda: make_process(ProcessConfig("dds", diffusion_variance=1.0)), "process.prior_std = None"),
        (lambda: OrnsteinUhlenbeckProcess(0.0), "prior_std = 0.0: expected a positive number"),
        (lambda: OrnsteinUhlenbeckProcess(1.0, noise=0.0), "noise = 0.0: expected a positive number"),
    ],
)
def test_bad_configuration_is_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build()


def test_the_configuration_says_which_process() -> None:
    assert isinstance(make_process(ProcessConfig(diffusion_variance=2.0, prior_std=3.0)), BrownianProcess)
    for kind, exponential in (("dis", False), ("dds", True)):
        config = ProcessConfig(kind, 2.0, 3.0, noise=4.0, schedule="cosine", schedule_ratio=7.0)  # type: ignore[arg-type]
        process = make_process(config)
        assert isinstance(process, OrnsteinUhlenbeckProcess)
        assert (process.prior_std, process.noise, process.exponential) == (3.0, 4.0, exponential)
        assert (process.schedule, process.schedule_ratio) == ("cosine", 7.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_times_are_the_grid(dtype: torch.dtype) -> None:
    config = GridConfig("given", times=GIVEN)
    assert torch.equal(make_grid(config, dtype=dtype), torch.tensor(GIVEN, dtype=dtype))
    assert torch.equal(make_grid(GridConfig("given", 6, GIVEN), dtype=dtype), make_grid(config, dtype=dtype))


@pytest.mark.parametrize("ratio", [1.01, 10.0, 1000.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_integrate_their_rate(schedule: str, ratio: float) -> None:
    times = torch.linspace(0.0, 1.0, 21, dtype=torch.float64)
    spent = clock(times, schedule, ratio)  # type: ignore[arg-type]
    expected = [spent_share(float(t), schedule, ratio) for t in times]
    np.testing.assert_allclose(spent, expected, rtol=1e-9, atol=1e-12)
    assert (spent[0], spent[-1]) == (0, pytest.approx(1.0, abs=1e-15))
    ends = [1e-6, 1.0 - 1e-6]
    rates = torch.autograd.functional.jacobian(lambda t: clock(t, schedule, ratio), torch.tensor(ends).double()).diag()  # type: ignore[arg-type]
    assert float(rates[0] / rates[1]) == pytest.approx(1.0 if schedule == "constant" else ratio, rel=1e-2)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="schedule = 'sigmoid': expected one of constant, linear, cosine, geometric"):
        clock(uniform_grid(3), "sigmoid", 10.0)  # type: ignore[arg-type]


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
    process: DiffusionProcess,
    states: Tensor,
    times: Tensor,
    drift: Tensor,
    log_var: Tensor,
    mean_factor: Tensor | None = None,
    variance_factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one row, one step and one distribution at a time; times [B, L+1]."""
    ones = torch.ones_like(drift)
    mean_factor, variance_factor = (ones if factor is None else factor for factor in (mean_factor, variance_factor))
    log_pf, log_pb = torch.zeros(2, *drift.shape[:2], dtype=states.dtype)
    for b, n in np.ndindex(*drift.shape[:2]):
        start, end = times[b, n : n + 2].tolist()
        step = naive_step(process, start, end)
        x, y = states[b, n], states[b, n + 1]
        std = (step.variance * log_var[b, n].exp()).sqrt()
        log_pf[b, n] = log_normal(y, step.keep * x + step.gain * drift[b, n], std)
        if start == 0 and process.prior_std:
            log_pf[b, n] += log_normal(x, 0.0, process.prior_std)
        if start == 0 and not process.prior_std:
            continue
        mean = y - (1 - step.back) * mean_factor[b, n] * y
        log_pb[b, n] = log_normal(x, mean, (step.back_variance * variance_factor[b, n]).sqrt())
    return log_pf, log_pb


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(PROCESSES)),
    batch=st.integers(1, 3),
    sampling_steps=st.integers(1, 7),
    dim=st.integers(1, 3),
    kind=st.sampled_from(["uniform", "random", "given"]),
    seed=st.integers(0, 2**20),
)
def test_log_probabilities_are_those_of_the_distributions(
    name: str, batch: int, sampling_steps: int, dim: int, kind: str, seed: int
) -> None:
    process, times = PROCESSES[name], grid(kind, sampling_steps, seed)
    sampling_steps = len(times) - 1
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, sampling_steps + 1, dim, dtype=torch.float64, generator=generator)
    drift, log_var = torch.randn(2, batch, sampling_steps, dim, dtype=torch.float64, generator=generator)
    factors = torch.rand(2, batch, sampling_steps, dim, dtype=torch.float64, generator=generator) + 0.5
    rows = times.expand(batch, -1)
    log_pf, log_pb = naive_log_probabilities(process, states, rows, drift, log_var)
    fixed_log_pf, learned_log_pb = naive_log_probabilities(
        process, states, rows, drift, torch.zeros_like(log_var), *factors
    )
    # One grid per row is the same as a shared one, row by row.
    for points in (times, rows):
        torch.testing.assert_close(process.log_pf(states, points, drift, log_var), log_pf)
        torch.testing.assert_close(process.log_pf(states, points, drift), fixed_log_pf)
        torch.testing.assert_close(process.log_pb(states, points), log_pb)
        torch.testing.assert_close(process.log_pb(states, points, *factors), learned_log_pb)
    if not process.prior_std:
        assert (process.log_pb(states, times, *factors)[:, 0] == 0).all()


@every_process
def test_rows_may_be_segments_that_start_inside(process: DiffusionProcess) -> None:
    generator = torch.Generator().manual_seed(0)
    times, index = grid("random", 9), torch.tensor([[0], [1], [5], [6]]) + torch.arange(4)
    states = torch.randn(4, 4, 2, dtype=torch.float64, generator=generator)
    drift, log_var = torch.randn(2, 4, 3, 2, dtype=torch.float64, generator=generator)
    factors = torch.rand(2, 4, 3, 2, dtype=torch.float64, generator=generator) + 0.5
    log_pf, log_pb = naive_log_probabilities(process, states, times[index], drift, log_var, *factors)
    torch.testing.assert_close(process.log_pf(states, times[index], drift, log_var), log_pf)
    torch.testing.assert_close(process.log_pb(states, times[index], *factors), log_pb)
    certain = process.log_pb(states, times[index], *factors)[:, 0] == 0
    assert certain.tolist() == [process.prior_std == 0, False, False, False]


@every_process
def test_single_steps_are_those_of_the_kernels(process: DiffusionProcess) -> None:
    generator = torch.Generator().manual_seed(0)
    times = grid("given", 6)
    x, u, z, v = torch.randn(4, 5, 2, dtype=torch.float64, generator=generator)
    mean, variance = torch.rand(2, 5, 2, dtype=torch.float64, generator=generator) + 0.5
    for n, step in enumerate(process.steps(times)):
        expected = naive_step(process, GIVEN[n], GIVEN[n + 1])
        assert step == pytest.approx(expected, rel=1e-9, abs=1e-12)
        keep, gain, var, back, back_var = expected
        std = (var * v.exp() + 4.0 * gain).sqrt()
        torch.testing.assert_close(process.step(x, u, step, z, v, extra_variance=4.0), keep * x + gain * u + std * z)
        torch.testing.assert_close(process.step(x, u, step, z), keep * x + gain * u + math.sqrt(var) * z)
        torch.testing.assert_close(process.step_back(x, step, z), back * x + math.sqrt(back_var) * z)
        learned = x - (1 - back) * mean * x + (back_var * variance).sqrt() * z
        torch.testing.assert_close(process.step_back(x, step, z, mean, variance), learned)


@pytest.mark.parametrize("start", [0.0, 0.3, 0.9])
@every_process
def test_noise_that_is_left_is_what_the_kernels_add(process: DiffusionProcess, start: float) -> None:
    times = torch.linspace(start, 1.0, 1001, dtype=torch.float64)
    keep, gain, variance, _, _ = process.kernels(times)
    added = 0.0
    for part, noise in zip(keep.tolist(), variance.tolist(), strict=True):
        added = part**2 * added + noise
    assert process.noise_left(times[0]).item() == pytest.approx(math.sqrt(added), rel=5e-3)
    torch.testing.assert_close(variance / gain, torch.full_like(gain, process.noise_rate), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("name", ["brownian cosine", "dds", "dds cosine"])
def test_the_reference_is_the_law_of_the_uncontrolled_process(name: str) -> None:
    process, times = PROCESSES[name], grid("random", 5)
    variance = process.prior_std**2
    for n, step in enumerate(process.steps(times)):
        variance = step.keep**2 * variance + step.variance
        x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        expected = log_normal(x, 0.0, math.sqrt(variance))
        torch.testing.assert_close(process.log_reference(x, times[n + 1].expand(3)), expected)


def test_initial_states_are_drawn_from_the_prior() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert torch.equal(BrownianProcess(2.0).sample_prior(3, 2, generator), torch.zeros(3, 2))
    assert torch.equal(generator.get_state(), before)
    process = OrnsteinUhlenbeckProcess(1.7)
    x = process.sample_prior(20_000, 2, generator, dtype=torch.float64)
    assert x.dtype == torch.float64
    # A standard deviation of 40,000 draws errs by 1.7 / sqrt(80,000) = 0.006.
    assert x.std().item() == pytest.approx(1.7, abs=0.025)
    assert x.mean().item() == pytest.approx(0.0, abs=0.035)
    torch.testing.assert_close(process.log_prior(x), log_normal(x, 0.0, 1.7))
    assert (BrownianProcess(2.0).log_prior(x) == 0).all()


@every_process
def test_gradients_flow_to_states_drift_log_variance_and_factors(process: DiffusionProcess) -> None:
    generator = torch.Generator().manual_seed(0)
    times = grid("random", 4)
    states = torch.randn(2, 5, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    drift = torch.randn(2, 4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    log_var = torch.randn(2, 4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, u, v: process.log_pf(s, times, u, v), (states, drift, log_var))
    assert torch.autograd.gradcheck(lambda s, u: process.log_pf(s, times, u), (states, drift))
    assert torch.autograd.gradcheck(lambda s: process.log_pb(s, times), states)
    factors = (torch.rand(2, 2, 4, 2, dtype=torch.float64, generator=generator) + 0.5).unbind()
    inputs = (states, *(factor.requires_grad_() for factor in factors))
    assert torch.autograd.gradcheck(lambda s, m, v: process.log_pb(s, times, m, v), inputs)
    terminal = states.detach()[:, 0].clone().requires_grad_()

    def bridge(x: Tensor) -> Tensor:
        return process.sample_bridge(x, times, torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(bridge, terminal)


@every_process
def test_inputs_are_not_edited(process: DiffusionProcess) -> None:
    times = grid("uniform", 5)
    states, drift = torch.randn(3, 6, 2).double(), torch.randn(3, 5, 2).double()
    before = states.clone(), drift.clone(), times.clone()
    process.log_pf(states, times, drift, drift)
    process.log_pb(states, times)
    process.sample_bridge(states[:, -1], times)
    for step in process.steps(times):
        process.step(states[:, 0], drift[:, 0], step, drift[:, 1])
        process.step_back(states[:, 0], step, drift[:, 1])
    assert all(torch.equal(a, b) for a, b in zip(before, (states, drift, times), strict=True))


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


@every_process
@pytest.mark.parametrize("kind", ["uniform", "random", "given"])
def test_bridges_have_the_stated_moments(process: DiffusionProcess, kind: str) -> None:
    times, n = grid(kind, 6), 20_000
    scale, variance = process.bridge_moments(times)
    # Each point's law given the end, by its definition: one step back after the other.
    expected = [(1.0, 0.0)]
    for start, end in reversed(list(zip(times[:-1].tolist(), times[1:].tolist(), strict=True))):
        step = naive_step(process, start, end)
        expected.append((step.back * expected[-1][0], step.back**2 * expected[-1][1] + step.back_variance))
    np.testing.assert_allclose(torch.stack([scale, variance], 1), expected[::-1], rtol=1e-9, atol=1e-12)
    terminal = torch.tensor([1.5, -0.7], dtype=torch.float64)
    paths = process.sample_bridge(terminal.expand(n, 2), times, torch.Generator().manual_seed(0))
    assert torch.equal(paths[:, -1], terminal.expand(n, 2))
    # 5 standard errors of a mean and of a variance.
    deviation = (paths.mean(0) - scale.unsqueeze(1) * terminal).abs()
    assert (deviation <= 5 * (variance / n).sqrt().unsqueeze(1) + 1e-12).all()
    error = (paths.var(0) - variance.unsqueeze(1)).abs()
    assert (error <= 5 * variance.unsqueeze(1) * math.sqrt(2 / n) + 1e-12).all()
    # Neighbours are as correlated as the step back says.
    back = torch.tensor([step.back for step in process.steps(times)], dtype=torch.float64)
    residual = paths - scale.unsqueeze(1) * terminal
    covariance = (residual[:, :-1] * residual[:, 1:]).mean(0)
    bound = 5 * (variance[:-1] * variance[1:] * 2 / n).sqrt().unsqueeze(1) + 1e-12
    assert ((covariance - (back * variance[1:]).unsqueeze(1)).abs() <= bound).all()


def test_rows_of_brownian_bridges_may_have_grids_of_their_own() -> None:
    process = PROCESSES["brownian geometric"]
    terminal = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grids = torch.stack([grid("random", 5, seed=1), grid("random", 5, seed=2)])
    both = process.sample_bridge(terminal, grids, torch.Generator().manual_seed(3))
    for row in range(2):
        alone = process.sample_bridge(terminal, grids[row], torch.Generator().manual_seed(3))
        torch.testing.assert_close(both[row], alone[row])


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
