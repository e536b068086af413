"""Trajectory balance by native code (network.cpp), there and back a few trajectories at a time.

A trajectory's part in the gradient is known as soon as its own steps are evaluated. So what the way back needs of them
is used while it is in the caches, and no update keeps the activations of all states.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from driftstream.actors.native import GradientLayout, check_memory, gradients_by_torch, in_parts, needs_torch, place
from driftstream.actors.native_policy import GivenSteps, policy_parameters
from driftstream.actors.policy import DiffusionPolicy, TimeEmbedding
from driftstream.envs.densities import log_of_energy
from driftstream.envs.processes import DiffusionProcess, Kernels


def native_balance(
    policy: DiffusionPolicy,
    states: Tensor,
    embedding: TimeEmbedding,
    kernels: Kernels,
    scores: Tensor | None,
    offset: Tensor,
) -> tuple[Tensor, Tensor]:
    """The mean square of residuals [B], and these residuals, detached, of whole trajectories [B, T+1, D], B, T >= 1.

    A residual is offset + Σ log P_B - Σ log P_F, without the density of x_0: with the right offset [B] that of
    trajectory balance. Gradients flow to the policy, the embedding and the offset. They are computed here, so that this
    is for where gradients are enabled. The policy `is_native` at states[:, :-1] and the kernels [T] of one grid.

    Source: Malkin et al. 2022 (arXiv 2201.13259); Lahlou et al. 2023 (arXiv 2301.12594).
    """
    given = GivenSteps(policy, states, embedding, kernels, scores)
    inputs = embedding.hidden, embedding.langevin_scale, *policy_parameters(policy)
    loss, residual = _NativeBalance.apply(given, offset, *inputs)
    return loss, residual


class _NativeBalance(torch.autograd.Function):
    """`native_balance`, and its gradient, by torch's operations where that is batched."""

    @staticmethod
    def forward(
        ctx: Any, given: GivenSteps, offset: Tensor, hidden: Tensor, scale: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        residual, by, by_scale, ctx.layout = _forward_and_backward(given, offset, hidden, scale, parameters)
        ctx.given = given
        ctx.save_for_backward(given.states, given.scores, residual, by, by_scale, offset, hidden, scale, *parameters)
        ctx.mark_non_differentiable(residual)
        return residual.square().mean(), residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        _states, _scores, residual, by, by_scale, *inputs = ctx.saved_tensors
        if needs_torch(gradient):

            def loss(offset: Tensor, *others: Any) -> Tensor:
                return _residual_by_torch(ctx.given, offset, *others).square().mean()

            return None, *gradients_by_torch(loss, inputs, ctx.needs_input_grad[1:], gradient)
        by_hidden, by_parameters = ctx.layout.split(gradient * by)
        by_scale = None if by_scale is None else gradient * by_scale
        by_offset = 2.0 / len(residual) * gradient * residual
        return None, by_offset, by_hidden.view(inputs[1].shape), by_scale, *by_parameters


def _forward_and_backward(
    given: GivenSteps, offset: Tensor, hidden: Tensor, scale: Tensor | None, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None, GradientLayout]:
    """Residuals [B]; gradients of their mean square, those that the layout tells and that by the score's factors."""
    rows = given.rows(hidden, parameters)
    network, read, offset = rows.network, given.read(rows, hidden, scale), offset.contiguous()
    layout = GradientLayout(rows.built, network, rows.parameters.tensors)
    residual = torch.empty_like(offset)

    def part(begin: int, end: int) -> tuple[Tensor, Tensor | None]:
        by = residual.new_zeros(layout.size)
        by_scale = None if scale is None else torch.zeros(scale.shape, dtype=torch.float64, device=scale.device)
        by_parameters = by.data_ptr() + layout.embedding * by.element_size()
        written = residual.data_ptr(), place(by_scale), by.data_ptr(), by_parameters
        shape, head, weight = ctypes.byref(network), ctypes.byref(given.head), 1.0 / len(offset)
        given_loss = rows.parameters.pointers, offset.data_ptr(), weight
        check_memory(rows.built.balance(shape, head, begin, end, *map(place, read), *given_loss, *written))
        return by, by_scale

    sums, sums_by_scale = zip(*in_parts(network.rows, part, group=network.period), strict=True)
    by_scale = None if scale is None else sum(sums_by_scale).to(scale.dtype)
    return residual, sum(sums), by_scale, layout


def _residual_by_torch(given: GivenSteps, offset: Tensor, *inputs: Any) -> Tensor:
    kernels, dim = Kernels(*given.steps[..., 2:7].unbind(-1)), given.states.shape[-1]
    log_pf = log_of_energy(given.of_torch(*inputs), kernels.variance, dim)
    ways_back = torch.addcmul(given.states[:, :-1], given.states[:, 1:], kernels.back.unsqueeze(-1), value=-1.0)
    log_pb = DiffusionProcess.log_pb_of(ways_back.square().sum(-1), dim, kernels)
    return offset + (log_pb - log_pf).sum(-1)


__all__ = ["native_balance"]
