"""Whether values are finite, at the price of a sum."""

import math

import torch
from torch import Tensor


def is_finite(values: Tensor) -> bool:
    """Whether every element is finite: one pass by the sum, a second only where the sum itself overflows."""
    values = values.detach()
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())
