"""A network of state and time without autograd's intermediate steps: one pass over all rows, or one step after another.

The gradient is written out. A whole batch's activations are as large as the caches, so that a copy, a sum into a new
tensor or a transposition costs as much as a layer's product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from driftstream.actors.native import Layer, NativeStepNetwork, fits, is_per_step, native_network, network_of
from driftstream.envs.densities import is_transformed


def is_plain(network: nn.Module, x: Tensor) -> bool:
    """Whether the network on `x` is no more than its parameters, so that other code may evaluate it.

    Not so where hooks watch it or a transformation of torch goes through it.
    """
    return not (is_transformed() or torch.is_autocast_enabled(x.device.type) or any(map(_is_hooked, network.modules())))


def _is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def joint_network(x: Tensor, embedding: Tensor, weight: Tensor, layers: list[Layer]) -> Tensor:
    """layers(GELU(x weight^T + embedding)), with GELU between the layers, of all rows at once.

    Args:
        x: `[..., D]`.
        embedding: `[..., H]`, broadcast against the leading dimensions of `x`.
        weight: `[H, D]`.
        layers: at least one, from H to the outputs.

    Returns:
        `[..., outputs]`. Gradients flow to everything. Where x needs none and the native network does not serve, those
        by the others have none of their own.
    """
    if fits((x, embedding), weight, layers) and is_per_step(x, embedding, weight):
        return native_network(x, embedding, weight, layers)
    if torch.is_grad_enabled() and x.requires_grad:
        return network_of(x, embedding, weight, layers)
    parameters = [parameter for layer in layers for parameter in layer]
    if torch.is_grad_enabled():
        return _JointNetwork.apply(x, embedding, weight, *parameters)
    return _forward(x, x.reshape(-1, x.shape[-1]), embedding, weight, parameters, None)


def _forward(
    x: Tensor, rows: Tensor, embedding: Tensor, weight: Tensor, parameters: list[Tensor], kept: list[Tensor] | None
) -> Tensor:
    """The network's output at x [..., D], whose `rows` are [N, D]; products and activations are appended to `kept`."""
    product = rows @ weight.t()
    product.view(*x.shape[:-1], len(weight)).add_(embedding)
    for layer_weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
        value = torch.nn.functional.gelu(product)
        if kept is not None:
            kept += [product, value]
        product = torch.addmm(bias, value, layer_weight.t())
    return product.view(*x.shape[:-1], product.shape[-1])


class _JointNetwork(torch.autograd.Function):
    """`joint_network` and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, embedding: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        rows, kept = x.reshape(-1, x.shape[-1]), list[Tensor]()
        out = _forward(x, rows, embedding, weight, list(parameters), kept)
        ctx.save_for_backward(rows, *parameters[::2], *kept)
        ctx.layers = len(parameters) // 2
        ctx.embedded = embedding.shape
        ctx.leading = x.shape[:-1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, *saved = ctx.saved_tensors
        weights, kept = saved[: ctx.layers], saved[ctx.layers :]
        gradient = gradient.reshape(-1, gradient.shape[-1])
        by_parameters: list[Tensor] = []
        for weight, product, value in zip(weights[::-1], kept[-2::-2], kept[::-2], strict=True):
            by_parameters = [gradient.t() @ value, gradient.sum(0), *by_parameters]
            gradient = gradient @ weight
            torch.ops.aten.gelu_backward.grad_input(gradient, product, grad_input=gradient)
        by_embedding = gradient.view(*ctx.leading, gradient.shape[-1]).sum_to_size(ctx.embedded)
        return None, by_embedding, gradient.t() @ rows, *by_parameters


def step_network(embedding: Tensor, weight: Tensor, layers: list[Layer], rows: int) -> Callable[[Tensor, int], Tensor]:
    """`joint_network` at one state of every row after another, without gradient: `(x [B, D], n) -> [B, outputs]`.

    `embedding [T, H]` holds that of step n in row n. What it returns is valid until the next call.
    """
    network = NativeStepNetwork if fits((embedding,), weight, layers) else StepNetwork
    return network(embedding, weight, layers, rows)


class StepNetwork:
    """`step_network` on torch's operations."""

    def __init__(self, embedding: Tensor, weight: Tensor, layers: list[Layer], rows: int) -> None:
        self._embeddings = embedding.detach().unbind()
        # Products of so few rows take a third longer with a transposed factor.
        self._weight = weight.detach().t().contiguous()
        self._layers = [(layer.detach().t().contiguous(), bias.detach()) for layer, bias in layers]
        widths = [weight.shape[0], *(layer.shape[0] for layer, _ in layers)]
        self._products = [weight.new_empty(rows, width) for width in widths]

    def __call__(self, x: Tensor, n: int) -> Tensor:
        product = torch.addmm(self._embeddings[n], x, self._weight, out=self._products[0])
        for (weight, bias), out in zip(self._layers, self._products[1:], strict=True):
            torch.ops.aten.gelu.out(product, out=product)
            product = torch.addmm(bias, product, weight, out=out)
        return product


__all__ = ["Layer", "is_plain", "joint_network", "step_network"]
