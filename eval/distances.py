"""Distances between sets of samples."""

import torch
from torch import Tensor

from driftstream.envs.targets import Target

# Sets of 2,000 need some tens of thousands of pivots; POT only warns when it runs out of them.
_MAX_PIVOTS = 10_000_000


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """The exact 2-Wasserstein distance of two samples: the square root of the optimal mean squared cost.

    `a` [N,D], `b` [M,D], in the units of x; computed in float64 without gradients, in O(N³) time (1-2 s for
    N = M = 2,000). Raises ValueError for other shapes, empty sets or values that are not finite.
    Source: network simplex of Bonneel et al. 2011, in POT (Flamary et al. 2021).
    """
    # Slow to import, and used by the evaluator alone.
    import ot

    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.numel() or not b.numel():
        raise ValueError(f"a {list(a.shape)}, b {list(b.shape)}: expected [N,D] and [M,D], N and M at least 1")
    a, b = a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("wasserstein2 needs finite samples")
    # Differences, not |a|² - 2 a·b + |b|², which cancels where the sets are close.
    cost = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    return float(ot.emd2([], [], cost.numpy(), numItermax=_MAX_PIVOTS)) ** 0.5


def wasserstein2_floor(target: Target, n: int, generator: torch.Generator | None = None) -> float | None:
    """The distance between two exact sets of n samples: the least that `wasserstein2` of n samples can mean.

    None where the target has no exact samples. It is random: a sampler's distance below it is no merit.
    """
    a, b = target.sample(n, generator), target.sample(n, generator)
    return None if a is None or b is None else wasserstein2(a, b)
