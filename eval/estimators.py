"""Estimators of log Z and of how far to trust them, from log importance weights.

The log weight of a trajectory is log R(x_T) + Σ log P_B − Σ log P_F: under P_F its exponential has mean Z.
All take n log weights (a tensor or array of any float type), work in float64 without gradients, and return a
float.
"""

import math

import numpy as np
import torch
from torch import Tensor

LogWeight = Tensor | np.ndarray

# Below this many weights the Pareto fit has no tail to look at.
_KHAT_MINIMUM = 25

# A tail of log weights that spans more nats loses its lower part to underflow, and the fit with it.
_KHAT_RANGE = 500.0


def _as_float64(log_weight: LogWeight) -> Tensor:
    values = torch.as_tensor(log_weight).detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"log_weight has shape {list(values.shape)}, expected [n] with n of at least 1")
    return values


def log_z_lower_bound(log_weight: LogWeight) -> float:
    """The evidence lower bound (ELBO): the mean log weight of trajectories drawn from P_F.

    Raises ValueError unless `log_weight` is [n], n ≥ 1.
    """
    return _as_float64(log_weight).mean().item()


def log_z_upper_bound(log_weight_of_exact: LogWeight) -> float:
    """The evidence upper bound (EUBO): the mean log weight of exact samples under bridges drawn from P_B.

    The gap between the two bounds is the symmetrised Kullback-Leibler divergence of the paths.
    Raises ValueError unless `log_weight_of_exact` is [n], n ≥ 1.
    Source: Blessing et al. 2024 (arXiv 2406.07423).
    """
    return _as_float64(log_weight_of_exact).mean().item()


def log_z_importance(log_weight: LogWeight) -> float:
    """The importance-weighted estimate log (1/n) Σ exp(log weight); a log weight of −inf counts as weight 0.

    Raises ValueError unless `log_weight` is [n], n ≥ 1.
    Source: Sendera et al. 2024 (arXiv 2402.05098), there log Z_RW.
    """
    values = _as_float64(log_weight)
    return values.logsumexp(0).item() - math.log(len(values))


def effective_sample_size(log_weight: LogWeight) -> float:
    """Kish's effective sample size (Σw)² / Σw² as a fraction of n, in [1/n, 1]; 0 if no weight is positive.

    Raises ValueError unless `log_weight` is [n], n ≥ 1.
    """
    values = _as_float64(log_weight)
    if values.max() == -math.inf:
        return 0.0
    share = values.softmax(0)
    return 1.0 / (len(values) * share.square().sum().item())


def khat(log_weight: LogWeight) -> float:
    """Shape k of the Pareto tail of the weights: below 0.7 importance estimates can be trusted, above 1 not.

    Where a few weights outweigh all others beyond the range of floats, Hill's estimator, which the fit approaches
    for large k, takes its place. NaN where there is no tail: fewer than 25 finite weights, or ties throughout.
    Raises ValueError unless `log_weight` is [n], n ≥ 1.
    Source: Vehtari et al. 2024 (Pareto smoothed importance sampling, arXiv 1507.02646); Hill 1975.
    """
    # Slow to import, and used by the evaluator alone.
    from arviz_stats.base import array_stats

    values = _as_float64(log_weight)
    values = values[values.isfinite()]
    n = len(values)
    if n < _KHAT_MINIMUM:
        return math.nan
    size = math.ceil(min(n / 5, 3 * math.sqrt(n)))
    tail = values.sort().values[-size - 1 :]
    excess = tail[1:] - tail[0]
    if excess[size // 4] == 0:
        return math.nan
    if excess[-1] > _KHAT_RANGE:
        return excess.mean().item()
    # It expects leave-one-out log likelihoods, and takes the weights to be their inverse.
    _, shape = array_stats.psislw(-values.numpy())
    return float(shape)
