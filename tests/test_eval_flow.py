"""The true flow against quadrature, mean densities of bridges and a stub that knows it; its error and its figure."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import Tensor, nn

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import rollout_backward
from driftstream.envs.grids import random_grid, uniform_grid
from driftstream.envs.processes import BrownianProcess, DiffusionProcess, OrnsteinUhlenbeckProcess
from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.envs.targets_gmm import GaussianMixture
from driftstream.eval.evaluation import EvalConfig, evaluate_sampler
from driftstream.eval.flow import KnownFlow, known_flow
from driftstream.eval.flow_plots import plot_flow
from driftstream.learner.losses import state_log_flow

PROCESSES: dict[str, Callable[[], DiffusionProcess]] = {
    "brownian": lambda: BrownianProcess(5.0),
    "brownian, cosine": lambda: BrownianProcess(5.0, "cosine"),
    "dis": lambda: OrnsteinUhlenbeckProcess(2.0, schedule="linear"),
    "dds": lambda: OrnsteinUhlenbeckProcess(2.0, exponential=True),
}
EVERY_PROCESS = pytest.mark.parametrize("process", [make() for make in PROCESSES.values()], ids=list(PROCESSES))
QUICK = EvalConfig(samples=300, w2_samples=0)


def make_policy(dim: int = 2, seed: int = 0, **options: object) -> DiffusionPolicy:
    torch.manual_seed(seed)
    return DiffusionPolicy(dim, PolicyConfig(hidden=16, harmonics=8, **options))  # type: ignore[arg-type]


def flow_of(process: DiffusionProcess, target: Target, times: Tensor) -> KnownFlow:
    flow = known_flow(make_policy(target.dim, state_flow="plain"), process, target, times)
    assert flow is not None
    return flow


class Line(GaussianMixture):
    """Two unequal modes on a line, with a log Z that is not 0."""

    log_z = 1.5

    def __init__(self) -> None:
        super().__init__("line", torch.tensor([[-2.0], [3.0]]), 0.4, torch.tensor([3.0, 1.0]))

    def log_reward(self, x: Tensor) -> Tensor:
        return 1.5 + super().log_reward(x)


class TrueFlow(nn.Module):
    """Stands in for a flow network, and knows the truth, off by a constant."""

    def __init__(self, flow: KnownFlow, offset: float = 0.0) -> None:
        super().__init__()
        self.flow = flow
        self.offset = offset

    def embed(self, times: Tensor) -> Tensor:
        torch.testing.assert_close(times, self.flow.times)
        return times

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return (self.flow.log_flow(x) + self.offset).unsqueeze(-1)


@EVERY_PROCESS
def test_the_true_flow_is_the_integral_over_the_ends(process: DiffusionProcess) -> None:
    """p_n(x) = ∫ p(y) N(x; a_n y, b_n) dy, by the trapezoidal rule, with a_n and b_n step by step."""
    target, times = Line(), random_grid(6, torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linspace(-4.0, 4.0, 9, dtype=torch.float64)
    log_flow = flow_of(process, target, times).log_flow(x.reshape(-1, 1, 1).expand(-1, 5, 1)).numpy()
    ends = np.linspace(-12.0, 12.0, 40_001)
    shares = [0.75, 0.25]
    density = sum(
        share * np.exp(-((ends - mean) ** 2) / 0.8) / math.sqrt(0.8 * math.pi)
        for share, mean in zip(shares, (-2.0, 3.0), strict=True)
    )
    kernels = process.kernels(times)
    for n in range(1, 6):
        scale, variance = 1.0, 0.0
        for m in range(5, n - 1, -1):
            scale *= float(kernels.back[m])
            variance = float(kernels.back[m]) ** 2 * variance + float(kernels.back_variance[m])
        kernel = np.exp(-((x.numpy()[:, None] - scale * ends) ** 2) / (2 * variance)) / math.sqrt(
            2 * math.pi * variance
        )
        expected = 1.5 + np.log(np.trapezoid(density * kernel, ends, axis=1))
        np.testing.assert_allclose(log_flow[:, n - 1], expected, rtol=1e-7, atol=1e-7)


@EVERY_PROCESS
def test_states_of_bridges_follow_the_true_flow(process: DiffusionProcess) -> None:
    """The empirical characteristic function of bridges' states is that of the marginals, at a few frequencies."""
    target, times, n = make_target("gmm9"), uniform_grid(6), 40_000
    generator = torch.Generator().manual_seed(1)
    exact = target.sample(n, generator)
    assert exact is not None
    states = rollout_backward(make_policy(), process, exact, times, generator)
    frequencies = torch.tensor([[0.3, 0.0], [0.5, -0.4], [1.2, 1.2]])
    flow = flow_of(process, target, times)
    for index, marginal in enumerate(flow.marginals, start=1):
        phases = frequencies.double() @ marginal.means.T
        decay = torch.exp(-0.5 * marginal.std**2 * frequencies.double().square().sum(-1))
        expected = (phases.cos() @ marginal.weights) * decay
        seen = (states[:, index] @ frequencies.T).cos().double().mean(0)
        torch.testing.assert_close(seen, expected, rtol=0, atol=4 / n**0.5)


@pytest.mark.parametrize("kind", ["plain", "forward_looking"])
@EVERY_PROCESS
def test_error_of_a_network_is_the_root_mean_square_over_bridges(process: DiffusionProcess, kind: str) -> None:
    target, times = make_target("gmm9"), uniform_grid(5)
    policy = make_policy(state_flow=kind)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1
    error = evaluate_sampler(policy, process, target, times, QUICK, torch.Generator().manual_seed(2)).metrics[
        "eval/flow_error"
    ]
    generator = torch.Generator().manual_seed(3)
    exact = target.sample(4_000, generator)
    assert exact is not None
    states = rollout_backward(policy, process, exact, times, generator)
    scale, variance = process.bridge_moments(times)
    squares = []
    for n in range(1, 5):
        x, spread = states[:, n].double(), float(scale[n]) ** 2 * 0.3 + float(variance[n])
        modes = torch.cartesian_prod(*[torch.tensor([-5.0, 0.0, 5.0]).double()] * 2)
        distance = (x[:, None] - float(scale[n]) * modes).square().sum(-1)
        true = torch.logsumexp(-distance / (2 * spread), 1) - math.log(9 * 2 * math.pi * spread)
        with torch.no_grad():
            learned = state_log_flow(policy, process, target, states[:, n : n + 1], times[n : n + 1])[:, 0]
        squares.append((learned.double() - true).square())
    assert error == pytest.approx(math.sqrt(float(torch.stack(squares).mean())), rel=0.15)


@pytest.mark.parametrize(("offset", "expected"), [(0.0, 0.0), (-0.75, 0.75)])
@EVERY_PROCESS
def test_a_network_that_knows_the_truth_has_no_error(process: DiffusionProcess, offset: float, expected: float) -> None:
    for target in (CountedTarget(make_target("gmm25")), Line()):
        times = uniform_grid(7)
        policy = make_policy(target.dim, state_flow="plain")
        flow = known_flow(policy, process, target, times)
        assert flow is not None
        policy.flow_net = TrueFlow(flow, offset)  # type: ignore[assignment]
        # More than one batch, the last of them a small one.
        config = EvalConfig(samples=520, w2_samples=0)
        metrics = evaluate_sampler(policy, process, target, times, config, torch.Generator().manual_seed(0)).metrics
        assert metrics["eval/flow_error"] == pytest.approx(expected, abs=1e-5)


def test_no_error_where_the_truth_or_the_flow_is_unknown() -> None:
    class Unnormalised(Line):
        log_z = None  # type: ignore[assignment]

    process, times = BrownianProcess(2.0), uniform_grid(4)
    mixture = make_target("gmm9")
    cases: list[tuple[DiffusionPolicy, Target, Tensor]] = [
        (make_policy(), mixture, times),
        (make_policy(state_flow="plain", learned_backward=True), mixture, times),
        (make_policy(state_flow="plain"), make_target("manywell", dim=2), times),
        (make_policy(1, state_flow="plain"), Unnormalised(), times),
        (make_policy(state_flow="plain"), mixture, uniform_grid(1)),
    ]
    for policy, target, grid in cases:
        assert known_flow(policy, process, target, grid) is None
        metrics = evaluate_sampler(policy, process, target, grid, QUICK, torch.Generator().manual_seed(0)).metrics
        assert "eval/log_z_upper_bound" in metrics
        assert "eval/flow_error" not in metrics
    assert known_flow(make_policy(state_flow="plain"), process, mixture, times) is not None


def test_the_error_costs_no_random_numbers() -> None:
    """Figures of a run with a flow compare with those of one without."""
    process, target, times = BrownianProcess(2.0), make_target("gmm9"), uniform_grid(4)
    config = EvalConfig(samples=100)
    bare, flowing = (
        evaluate_sampler(make_policy(state_flow=kind), process, target, times, config, torch.Generator().manual_seed(0))
        for kind in ("none", "plain")
    )
    assert {name: value for name, value in flowing.metrics.items() if name != "eval/flow_error"} == bare.metrics


@pytest.mark.parametrize("name", ["brownian", "dds"])
def test_the_figure_shows_the_same_where_the_flow_is_right(tmp_path: Path, name: str) -> None:
    class ByTime(nn.Module):
        """The truth at one time after the other: the figure asks for one at a time."""

        def __init__(self, flow: KnownFlow) -> None:
            super().__init__()
            self.flow = flow

        def embed(self, times: Tensor) -> Tensor:
            return times

        def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
            n = int((self.flow.times - embedding).abs().argmin())
            return self.flow.marginals[n].log_reward(x).unsqueeze(-1)

    process = PROCESSES[name]()
    process = PROCESSES[name]()
    target, times = CountedTarget(make_target("gmm9")), uniform_grid(8)
    policy = make_policy(state_flow="plain")
    policy.flow_net = ByTime(flow_of(process, target, times))  # type: ignore[assignment]
    path = plot_flow(policy, process, target, times, tmp_path / "plots" / "flow.png")
    assert path == tmp_path / "plots" / "flow.png"
    assert target.calls == 0
    image = imread(path)[..., :3]
    # The darkest colour of the scale fills the panels, the brightest their peaks, in both rows alike.
    yellow = (image[..., 0] > 0.9) & (image[..., 2] < 0.3)
    upper, lower = (
        yellow[: len(yellow) * 45 // 100].mean(),
        yellow[len(yellow) * 45 // 100 : len(yellow) * 85 // 100].mean(),
    )
    assert upper > 0
    assert lower == pytest.approx(upper, rel=0.5)


@pytest.mark.parametrize(("steps", "columns"), [(2, 1), (3, 2), (20, 3)])
def test_the_figure_has_as_many_columns_as_there_are_times(tmp_path: Path, steps: int, columns: int) -> None:
    policy, process, target = make_policy(state_flow="forward_looking"), BrownianProcess(5.0), make_target("gmm9")
    path = plot_flow(policy, process, target, uniform_grid(steps), tmp_path / "flow.png")
    assert path is not None
    assert imread(path).shape[1] == pytest.approx(columns * 510, abs=2)


def test_no_figure_where_there_is_nothing_to_draw(tmp_path: Path) -> None:
    process, path = BrownianProcess(5.0), tmp_path / "flow.png"
    flowing = make_policy(state_flow="plain")
    assert plot_flow(make_policy(), process, make_target("gmm9"), uniform_grid(4), path) is None
    assert plot_flow(flowing, process, make_target("gmm9"), uniform_grid(1), path) is None
    assert plot_flow(make_policy(1, state_flow="plain"), process, Line(), uniform_grid(4), path) is None
    assert not path.exists()
