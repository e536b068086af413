"""Log densities of Gaussian steps on whole batches of paths."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG_2PI = math.log(2 * math.pi)


def is_transformed() -> bool:
    """Whether torch compiles what runs now, or maps or differentiates it as a function: no place for own gradients."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def log_normal(squares: Tensor, variance: Tensor, dim: int) -> Tensor:
    """Log density of an isotropic normal in `dim` dimensions, from squared distances to its mean."""
    return -0.5 * (squares / variance + dim * (variance.log() + LOG_2PI))


def log_steps(moved: Tensor, drift: Tensor, gain: Tensor, variance: Tensor, log_var: Tensor | None = None) -> Tensor:
    """log N(moved; gain u, variance exp(v) I) with u = `drift`, v = `log_var`, all [..., D] -> [...].

    gain and variance, broadcast against [...], are constants. Gradients flow to moved, drift and log_var; they have
    gradients of their own only where moved requires one.
    """
    return log_of_energy(step_energy(moved, drift, gain, variance, log_var), variance, moved.shape[-1])


def log_of_energy(energy: Tensor, variance: Tensor, dim: int) -> Tensor:
    """The log density of steps in `dim` dimensions, whose variance is `variance` exp(v), from their `step_energy`."""
    return -0.5 * (energy + dim * (variance.log() + LOG_2PI))


def step_energy(moved: Tensor, drift: Tensor, gain: Tensor, variance: Tensor, log_var: Tensor | None = None) -> Tensor:
    """Σ_D (moved - gain u)² / (variance exp(v)) + v, as `log_steps` has it -> [...]."""
    if torch.is_grad_enabled() and not (moved.requires_grad or is_transformed()):
        energy: Tensor = _StepEnergy.apply(moved, drift, gain, variance, log_var)
        return energy
    squares = torch.addcmul(moved, drift, gain.unsqueeze(-1), value=-1.0).square()
    if log_var is None:
        return squares.sum(-1) / variance
    return (squares * torch.exp(-log_var)).sum(-1) / variance + log_var.sum(-1)


class _StepEnergy(torch.autograd.Function):
    """`step_energy`, and its gradient by u and v."""

    @staticmethod
    def forward(
        ctx: Any, moved: Tensor, drift: Tensor, gain: Tensor, variance: Tensor, log_var: Tensor | None
    ) -> Tensor:
        residual = torch.addcmul(moved, drift, gain.unsqueeze(-1), value=-1.0)
        if log_var is None:
            ctx.save_for_backward(residual, gain, variance)
            return residual.square().sum(-1) / variance
        squares = residual.square().mul_(torch.exp(-log_var)).div_(variance.unsqueeze(-1))
        ctx.save_for_backward(residual, gain, variance, log_var, squares)
        return (squares + log_var).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        residual, gain, variance, *saved = ctx.saved_tensors
        by_drift = residual * (-2.0 * gradient * gain / variance).unsqueeze(-1)
        if not saved:
            return None, by_drift, None, None, None
        log_var, squares = saved
        by_drift *= torch.exp(-log_var)
        gradient = gradient.unsqueeze(-1)
        return None, by_drift, None, None, torch.addcmul(gradient, squares, gradient, value=-1.0)


__all__ = ["LOG_2PI", "is_transformed", "log_normal", "log_of_energy", "log_steps", "step_energy"]
