"""One contract over every registered target, and the registry, options and wrapper around them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from driftstream.envs.errors import ConfigError, TargetError
from driftstream.envs.targets import CountedTarget, Target, make_target, target_names, unwrap
from driftstream.envs.targets_gmm import GaussianMixture

Golden = Callable[[str], Mapping[str, np.ndarray]]
EVERY_TARGET = [*target_names(), "gmm25 counted"]


def build(name: str) -> Target:
    target = make_target(name.removesuffix(" counted"))
    return CountedTarget(target) if name.endswith(" counted") else target


def points(target: Target, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    low, high = target.plot_range
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(*shape, target.dim, dtype=torch.float64, generator=generator)
    return (0.5 * (low + (high - low) * unit)).to(dtype)


class Quartic(Target):
    """A target as a user writes it: only log R, so that every default is in use."""

    name = "quartic"
    dim = 3

    def log_reward(self, x: Tensor) -> Tensor:
        return -x.pow(4).sum(-1)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["gmm25", "funnel", "easy_funnel", "manywell"])
def test_golden_values(golden: Golden, name: str, dtype: torch.dtype, rel: float) -> None:
    values = golden("targets")
    target = make_target(name)
    x = torch.tensor(values[f"{name}_x"], dtype=dtype)
    np.testing.assert_allclose(target.log_reward(x), values[f"{name}_log_reward"], rtol=rel)
    np.testing.assert_allclose(target.score(x), values[f"{name}_score"], rtol=rel)
    assert target.log_z == pytest.approx(float(values[f"{name}_log_z"]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 3), (0,), (2, 0)])
@pytest.mark.parametrize("name", EVERY_TARGET)
def test_shapes_follow_the_leading_dimensions(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    target = build(name)
    x = points(target, *shape, dtype=dtype)
    log_reward, score = target.log_reward_and_score(x)
    assert log_reward.shape == shape
    assert score.shape == x.shape
    assert log_reward.dtype == score.dtype == dtype
    assert torch.equal(log_reward, target.log_reward(x))
    assert torch.equal(score, target.score(x))


@pytest.mark.parametrize("name", EVERY_TARGET)
def test_score_is_the_gradient_of_log_reward(name: str) -> None:
    target = build(name)
    x = points(target, 6).requires_grad_()
    (by_autograd,) = torch.autograd.grad(target.log_reward(x).sum(), x)
    with torch.no_grad():
        score = target.score(x)
        offsets = 1e-5 * torch.eye(target.dim, dtype=x.dtype)
        ahead, behind = (target.log_reward(x.unsqueeze(1) + sign * offsets) for sign in (1, -1))
    torch.testing.assert_close(score, by_autograd)
    torch.testing.assert_close(score, (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", EVERY_TARGET)
def test_score_is_differentiable(name: str) -> None:
    target = build(name)
    x = points(target, 2).requires_grad_()
    assert torch.autograd.gradcheck(target.score, x)
    assert torch.autograd.gradcheck(target.log_reward_and_score, x)


@pytest.mark.parametrize("name", EVERY_TARGET)
def test_rows_do_not_depend_on_their_batch(name: str) -> None:
    target = build(name)
    x = points(target, 50)
    log_reward, score = target.log_reward_and_score(x)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    part_log_reward, part_score = target.log_reward_and_score(x[order[:7]])
    torch.testing.assert_close(part_log_reward, log_reward[order[:7]], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part_score, score[order[:7]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EVERY_TARGET)
def test_exact_samples_are_reproducible_and_draw_from_their_generator_only(name: str) -> None:
    target = build(name)
    state = torch.get_rng_state()
    first, again = (target.sample(64, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    assert torch.equal(state, torch.get_rng_state())
    assert first.shape == (64, target.dim)
    assert first.dtype == torch.get_default_dtype()


@pytest.mark.parametrize("name", EVERY_TARGET)
def test_exact_samples_follow_the_density(name: str) -> None:
    # Stein: under the target E[score] = 0 and E[x · score] = -D, whatever the normaliser.
    target = build(name)
    n = 40_000
    samples = target.sample(n, torch.Generator().manual_seed(4))
    assert samples is not None
    x = samples.double()
    score = target.score(x)
    for mean_zero in (score, x * score + 1.0):
        # The funnel's heavy tails make a mean's own standard error unreliable; 6 of them leave room.
        error = mean_zero.std(0) / math.sqrt(n)
        assert (mean_zero.mean(0).abs() < 6 * error + 1e-9).all()


@pytest.mark.parametrize("name", target_names())
def test_log_z_is_that_of_the_density(name: str) -> None:
    # Quadrature over the plane, for the family's member in two dimensions.
    target = make_target(name) if name.startswith("gmm") else make_target(name, dim=2)
    assert target.log_z is not None
    first, spacing = torch.linspace(-20, 20, 801, dtype=torch.float64), 40 / 800
    # The second axis is scaled to the funnel's width at each x_0.
    width = torch.exp(0.5 * first) if "funnel" in name else torch.ones_like(first)
    second = width.unsqueeze(1) * first
    grid = torch.stack([first.unsqueeze(1).expand_as(second), second], -1)
    cell = spacing**2 * width.unsqueeze(1)
    log_z = (target.log_reward(grid) + cell.log()).flatten().logsumexp(0)
    assert log_z.item() == pytest.approx(target.log_z, abs=1e-6)


def test_manywell_agrees_with_the_published_constants() -> None:
    target = make_target("manywell")
    assert target.log_z is not None
    assert target.log_z / 16 == pytest.approx(math.log(11784.50927) + 0.5 * math.log(2 * math.pi), rel=1e-8)
    assert target.left_well_mass == pytest.approx(0.15569, abs=5e-6)
    samples = target.sample(20_000, torch.Generator().manual_seed(0))
    assert (samples[:, 0::2] < 0).double().mean().item() == pytest.approx(0.15569, abs=4e-3)


def test_mixture_samples_fill_their_modes_by_weight() -> None:
    means = torch.tensor([[-4.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
    target = GaussianMixture("pair", means, variance=0.25, weights=torch.tensor([3.0, 1.0]))
    samples = target.sample(20_000, torch.Generator().manual_seed(0))
    left = samples[:, 0] < 0
    assert left.double().mean().item() == pytest.approx(0.75, abs=0.015)
    torch.testing.assert_close(samples[left].mean(0), means[0], rtol=0, atol=0.03)
    torch.testing.assert_close(samples[left].std(0), torch.full((3,), 0.5), rtol=0, atol=0.02)


def test_mixture_is_the_mixture_distribution_far_from_its_modes_too() -> None:
    target = make_target("gmm25")
    modes = torch.distributions.MultivariateNormal(target.means, 0.3 * torch.eye(2, dtype=torch.float64))
    law = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(target.weights), modes)
    x = 100 * torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(target.log_reward(x), law.log_prob(x))
    assert target.score(x.float()).isfinite().all()


def test_a_noised_mixture_is_the_law_of_noised_samples() -> None:
    means = torch.tensor([[-4.0, 0.0], [4.0, 2.0]])
    target = GaussianMixture("pair", means, variance=0.25, weights=torch.tensor([3.0, 1.0]))
    noised = target.noised(-0.5, 0.7)
    x = torch.linspace(-3.0, 3.0, 14, dtype=torch.float64).reshape(7, 2)
    spread = 0.25 / 4 + 0.7
    squares = (x[:, None] + 0.5 * means.double()).square().sum(-1)
    density = torch.exp(-squares / (2 * spread)) @ torch.tensor([0.75, 0.25]).double() / (2 * math.pi * spread)
    torch.testing.assert_close(noised.log_reward(x), density.log())
    # The same mixture, where nothing is done to it.
    torch.testing.assert_close(target.noised(1.0, 0.0).log_reward(x), target.log_reward(x))
    with pytest.raises(ConfigError, match=r"^variance = 0.0: expected a positive number"):
        target.noised(0.0, 0.0)


def test_default_score_works_under_no_grad_and_leaves_its_input_alone() -> None:
    target = Quartic()
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        log_reward, score = target.log_reward_and_score(x)
    torch.testing.assert_close(score, -4 * x**3)
    assert not any(tensor.requires_grad for tensor in (x, log_reward, score))
    y = x.double().requires_grad_()
    assert torch.autograd.gradcheck(target.score, y)


class OwnScore(Quartic):
    """A simulator that torch cannot differentiate, with its gradient."""

    def log_reward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(-(x.numpy() ** 4).sum(-1))

    def score(self, x: Tensor) -> Tensor:
        return torch.from_numpy(-4 * x.numpy() ** 3)


class Clipped(Quartic):
    def score(self, x: Tensor) -> Tensor:
        return super().score(x).clamp(-1, 1)


def test_a_score_of_ones_own_is_the_gradient_everywhere() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for target, expected in ((OwnScore(), -4 * x**3), (Clipped(), (-4 * x**3).clamp(-1, 1))):
        log_reward, score = CountedTarget(target).log_reward_and_score(x)
        torch.testing.assert_close(log_reward, -x.pow(4).sum(-1))
        torch.testing.assert_close(score, expected)
        torch.testing.assert_close(CountedTarget(target).score(x), expected)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gm25", {}, "target = 'gm25': expected one of .*gmm25.*did you mean 'gmm25'"),
        ("nothing_like_it", {}, "expected one of easy_funnel, funnel, gmm25, gmm9, manywell, or"),
        ("manywell", {"dim": 31}, "dim = 31: expected an even integer"),
        ("manywell", {"wells": 3}, r"wells = 3: expected an option of manywell \(dim\)"),
        ("gmm25", {"variance": -1.0}, "variance = -1.0: expected a positive number"),
        ("funnel", {"dim": 1}, "dim = 1: expected an integer of at least 2"),
    ],
)
def test_wrong_names_and_options_are_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_target(name, **options)


PLUGIN = """
from driftstream.envs.targets import Target

class Well(Target):
    dim = 2
    def __init__(self, depth: float):
        self.depth = depth
    def log_reward(self, x):
        return -self.depth * x.square().sum(-1)

def half_well():
    return Well(0.5)

def broken():
    raise RuntimeError("no data file")

number = 3
"""


def test_targets_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    target = make_target(f"{path}:Well", depth=2.0)
    assert target.name == "Well"
    assert target.score(torch.ones(2)).tolist() == [-4.0, -4.0]
    assert type(make_target(f"{path}:half_well")) is type(target)
    for spec, message in [
        ("Wall", r"expected an attribute of .*mine\.py \(did you mean 'Well'"),
        ("number", "expected a Target subclass or a function"),
        ("Well", "depth = None: expected a value"),
    ]:
        with pytest.raises(ConfigError, match=message):
            make_target(f"{path}:{spec}")
    with pytest.raises(TargetError, match="broken' raised RuntimeError: no data file"):
        make_target(f"{path}:broken")


def test_missing_and_faulty_files(tmp_path: Path) -> None:
    faulty = tmp_path / "faulty.py"
    faulty.write_text("import no_such_module_anywhere")
    with pytest.raises(ConfigError, match=r"ModuleNotFoundError: .*no_such_module_anywhere"):
        make_target(f"{faulty}:Anything")
    with pytest.raises(ConfigError, match="expected an existing file"):
        make_target(f"{tmp_path}/absent.py:Anything")
    with pytest.raises(ConfigError, match="expected code that imports"):
        make_target("no_such_module_anywhere:Thing")
    with pytest.raises(ConfigError, match=r"expected package\.module:Attr or path/file\.py:Attr"):
        make_target("mine.py:")
    assert type(make_target("driftstream.envs.targets_manywell:ManyWell", dim=4)).__name__ == "ManyWell"


class Patchy(Quartic):
    """Finite for x_0 > 0 only."""

    def log_reward(self, x: Tensor) -> Tensor:
        return x[..., 0].log() - x.square().sum(-1)


def test_counts_points_not_calls() -> None:
    target = CountedTarget(make_target("gmm25"))
    x = torch.zeros(4, 5, 2)
    target.log_reward(x)
    target.score(x[0])
    target.log_reward_and_score(x[0, 0])
    assert (target.energy_evaluations, target.gradient_evaluations, target.calls) == (21, 6, 27)
    assert target.nonfinite == 0


def test_unwrapping_takes_no_attribute_for_the_wrapper() -> None:
    target = Quartic()
    target.target = "the moon"  # type: ignore[attr-defined]
    assert unwrap(target) is unwrap(CountedTarget(target)) is target


def test_counts_nonfinite_points_and_stills_their_score() -> None:
    target = CountedTarget(Patchy())
    x = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.0, 0.0], [float("inf"), 0.0, 0.0], [2.0, 0.0, 1.0]])
    log_reward, score = target.log_reward_and_score(x)
    assert target.nonfinite == 2
    assert log_reward.isfinite().tolist() == [True, False, False, True]
    assert torch.equal(score[2], torch.zeros(3))
    expected = torch.tensor([[1.0 - 2.0, -4.0, -6.0], [0.5 - 4.0, 0.0, -2.0]])
    torch.testing.assert_close(score[[0, 3]], expected)
    target.log_reward(x)
    assert target.nonfinite == 4
    # Finite values whose sum overflows are no fault.
    huge = CountedTarget(Quartic())
    huge.log_reward(torch.full((4, 3), 2.6e9))
    assert huge.nonfinite == 0


class Raises(Quartic):
    def log_reward(self, x: Tensor) -> Tensor:
        raise KeyError("simulator")


class Flat(Quartic):
    def log_reward(self, x: Tensor) -> Tensor:
        return -x.square()


class NoTensor(Quartic):
    def log_reward(self, x: Tensor) -> Tensor:
        return 0.0  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Raises(), "target 'quartic' raised KeyError: 'simulator'"),
        (Flat(), r"log_reward of x \[2, 3\] has shape \[2, 3\], expected \[2\]"),
        (NoTensor(), "log_reward gave float, expected a Tensor"),
    ],
)
def test_faults_of_a_target_name_it(target: Target, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        CountedTarget(target).log_reward(torch.zeros(2, 3))
