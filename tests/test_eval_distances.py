"""The Wasserstein distance against golden values, brute force and translations."""

from collections.abc import Callable, Mapping
from itertools import permutations

import numpy as np
import pytest
import torch

from driftstream.envs.targets import Target, make_target
from driftstream.eval.distances import wasserstein2, wasserstein2_floor


def test_matches_golden(golden: Callable[[str], Mapping[str, np.ndarray]]) -> None:
    reference = golden("metrics")
    a, b = torch.from_numpy(reference["samples_a"]), torch.from_numpy(reference["samples_b"])
    assert wasserstein2(a, b) == pytest.approx(float(reference["wasserstein2"]), rel=1e-9)


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_is_the_best_of_all_pairings(dim: int, seed: int) -> None:
    a, b = torch.randn(2, 6, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    best = min(float((a - b[list(order)]).square().sum(-1).mean()) for order in permutations(range(6)))
    assert wasserstein2(a, b) == pytest.approx(best**0.5, rel=1e-9)


def test_translation_and_identity_at_any_distance_from_the_origin() -> None:
    a = torch.randn(100, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1e3
    assert wasserstein2(a, a[torch.randperm(100)]) == 0.0
    assert wasserstein2(a, a + torch.tensor([3.0, 4.0, 0.0, 0.0])) == pytest.approx(5.0, rel=1e-9)


def test_sets_of_different_sizes() -> None:
    a = torch.tensor([[0.0], [1.0]])
    b = torch.tensor([[0.0], [1.0], [1.0], [1.0]])
    # A quarter of the mass has to move by 1.
    assert wasserstein2(a, b) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(3, 2), torch.zeros(3, 1)),
        (torch.zeros(0, 2), torch.zeros(3, 2)),
        (torch.zeros(3, 2), torch.full((3, 2), torch.nan)),
        (torch.full((3, 2), torch.inf), torch.zeros(3, 2)),
    ],
)
def test_bad_sets_raise(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected \[N,D\]|finite samples"):
        wasserstein2(a, b)


def test_floor_is_the_distance_of_exact_sets() -> None:
    target = make_target("gmm9")
    floor = wasserstein2_floor(target, 400, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    a, b = target.sample(400, generator), target.sample(400, generator)
    assert a is not None
    assert b is not None
    assert floor == wasserstein2(a, b) > 0.1


def test_no_floor_without_exact_samples() -> None:
    class Unsampled(Target):
        dim = 2

        def log_reward(self, x: torch.Tensor) -> torch.Tensor:
            return -x.square().sum(-1)

    assert wasserstein2_floor(Unsampled(), 10) is None
