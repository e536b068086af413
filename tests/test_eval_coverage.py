"""Mode coverage of exact samples, and of samplers that collapsed in known ways."""

import pytest
import torch

from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.eval.coverage import mode_coverage


def exact(target: Target, n: int = 4_000) -> torch.Tensor:
    samples = target.sample(n, torch.Generator().manual_seed(0))
    assert samples is not None
    return samples


@pytest.mark.parametrize(("name", "modes"), [("gmm25", 25), ("gmm9", 9)])
def test_exact_mixture_samples_cover_every_mode(name: str, modes: int) -> None:
    target = CountedTarget(make_target(name))
    assert mode_coverage(target, exact(target)) == {"eval/mode_coverage": modes, "eval/modes": modes}
    assert target.calls == 0


def test_a_mode_counts_from_a_third_of_its_share() -> None:
    target = make_target("gmm9")
    means = target.means.float()  # type: ignore[attr-defined]
    # 270 samples, so a share is 30 and its third 10: modes 0 and 1 hold 9 and 10, mode 2 none.
    counts = torch.tensor([9, 10, 0, 251, 0, 0, 0, 0, 0])
    assert mode_coverage(target, means.repeat_interleave(counts, 0))["eval/mode_coverage"] == 2


def test_samples_between_the_modes_cover_none() -> None:
    target = make_target("gmm25")
    means = target.means.float()  # type: ignore[attr-defined]
    assert mode_coverage(target, means.repeat(10, 1) + 2.5)["eval/mode_coverage"] == 0


def test_wells_of_exact_samples() -> None:
    target = make_target("manywell")
    metrics = mode_coverage(target, exact(target))
    assert metrics["eval/mode_coverage_true"] == pytest.approx(0.15569, abs=1e-5)
    assert metrics["eval/mode_coverage"] == pytest.approx(0.15569, abs=0.006)
    assert metrics["eval/mode_coverage_worst"] == pytest.approx(0.15569, abs=0.025)


def test_one_collapsed_well_is_the_worst_pair() -> None:
    target = make_target("manywell")
    samples = exact(target)
    samples[:, 4] = samples[:, 4].abs()
    metrics = mode_coverage(target, samples)
    assert metrics["eval/mode_coverage_worst"] == 0.0
    assert metrics["eval/mode_coverage"] == pytest.approx(0.15569 * 15 / 16, abs=0.006)


def test_nothing_for_a_target_without_known_modes() -> None:
    target = make_target("funnel")
    samples = exact(target)
    assert mode_coverage(target, samples) == {}
    # Whatever its author calls his attributes.
    target.means, target.left_well_mass = "of the groups", None  # type: ignore[attr-defined]
    assert mode_coverage(CountedTarget(target), samples) == {}


@pytest.mark.parametrize("shape", [(0, 2), (5, 3), (2,)])
def test_shapes_are_checked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="samples has shape"):
        mode_coverage(make_target("gmm9"), torch.zeros(shape))
