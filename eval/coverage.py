"""Does the sampler find every mode?"""

import torch
from torch import Tensor

from driftstream.envs.targets import Target, unwrap
from driftstream.envs.targets_gmm import GaussianMixture
from driftstream.envs.targets_manywell import ManyWell


def mode_coverage(target: Target, samples: Tensor) -> dict[str, float]:
    """Coverage of the target's known modes by samples [N,D], as metrics; {} for a target without known modes.

    `GaussianMixture`: `eval/mode_coverage` counts the modes that hold at least a third of their share of the
    samples, out of `eval/modes`. `ManyWell`: `eval/mode_coverage` is the share of samples in the left well,
    averaged over pairs, `eval/mode_coverage_worst` that of the pair furthest from the truth,
    `eval/mode_coverage_true`: a collapsed pair shows 0 or 1, which averages can hide.
    Raises ValueError unless `samples` is [N,D], N ≥ 1.
    """
    if samples.ndim != 2 or samples.shape[1] != target.dim or not len(samples):
        raise ValueError(f"samples has shape {list(samples.shape)}, expected [N,{target.dim}], N at least 1")
    samples = samples.detach().to("cpu", torch.float64)
    known = unwrap(target)
    if isinstance(known, ManyWell):
        return _well_coverage(samples, known.left_well_mass)
    if isinstance(known, GaussianMixture):
        weights = known.weights.cpu()
        held = _modes_held(samples, known.means.cpu(), known.std, weights)
        return {"eval/mode_coverage": float(held), "eval/modes": float((weights > 0).sum())}
    return {}


def _modes_held(samples: Tensor, means: Tensor, std: float, weights: Tensor) -> int:
    distance, mode = torch.cdist(samples, means).min(1)
    # 99.8% or more of an exact mode's samples lie within; what lies between the modes covers none.
    within = distance <= (samples.shape[1] ** 0.5 + 3.0) * std
    share = torch.bincount(mode[within], minlength=len(means)) / len(samples)
    return int(((share >= weights / 3) & (weights > 0)).sum())


def _well_coverage(samples: Tensor, left_well_mass: float) -> dict[str, float]:
    left = (samples[:, 0::2] < 0).double().mean(0)
    worst = left[(left - left_well_mass).abs().argmax()]
    return {
        "eval/mode_coverage": left.mean().item(),
        "eval/mode_coverage_worst": worst.item(),
        "eval/mode_coverage_true": left_well_mass,
    }
