"""Networks of time alone by native code (network.cpp): a policy has one or two, of as many rows as a grid has steps.

They are so small that torch's operations take ten times as long as what they compute.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from driftstream.actors.native import (
    GradientLayout,
    Layer,
    NativeParameters,
    built_library,
    check_memory,
    fits,
    gradients_by_torch,
    needs_torch,
    network_of,
    pairs,
    place,
)


def time_network(t: Tensor, frequencies: Tensor, phases: Tensor, layers: list[Layer]) -> Tensor:
    """layers((sin a, cos a)) with GELU between the layers, a = t f + p: `t [T] -> [T, outputs]`.

    Args:
        t: times, constants.
        frequencies: f `[h]`, constants.
        phases: p `[h]`.
        layers: weight and bias of at least two layers, from 2 h; all but the last have as many outputs.

    Returns:
        `[T, outputs]`. Gradients flow to phases and layers.
    """
    (weight, bias), *rest = layers
    constants = t.dim() == 1 and not (t.requires_grad or frequencies.requires_grad)
    sized = weight.shape[1] == 2 * len(phases) and bias.shape == weight.shape[:1]
    if constants and sized and fits((t, frequencies, phases, bias), weight, rest):
        parameters = [weight, *(parameter for layer in rest for parameter in layer)]
        if torch.is_grad_enabled():
            out: Tensor = _NativeTimes.apply(t, frequencies, phases, bias, *parameters)
            return out
        return _Times(t, frequencies, phases, bias, parameters).forward(None)
    return _of_torch(t, frequencies, phases, layers)


def _of_torch(t: Tensor, frequencies: Tensor, phases: Tensor, layers: list[Layer]) -> Tensor:
    angles = t.unsqueeze(-1) * frequencies + phases
    (weight, bias), *rest = layers
    return network_of(torch.cat([angles.sin(), angles.cos()], dim=-1), bias, weight, rest)


class _Times:
    """One pass there, and back."""

    def __init__(
        self,
        t: Tensor,
        frequencies: Tensor,
        phases: Tensor,
        bias: Tensor,
        parameters: list[Tensor] | tuple[Tensor, ...],
    ) -> None:
        self.built = built_library()
        self.inputs = [tensor.detach().contiguous() for tensor in (t, frequencies, phases, bias)]
        self.parameters = NativeParameters(parameters)
        features = 2 * len(phases)
        self.network = self.parameters.network(len(t), 1, features, features)
        self.features = t.new_empty(len(t), features)

    def forward(self, kept: Tensor | None) -> Tensor:
        """Outputs [T, outputs]; what the way back needs is written to `features`, and to `kept` if given."""
        factors = self.parameters.packed(self.built, self.network)
        out = self.features.new_empty(len(self.features), self.network.outputs)
        inputs = (tensor.data_ptr() for tensor in self.inputs)
        written = self.features.data_ptr(), place(kept), out.data_ptr()
        check_memory(self.built.times_forward(ctypes.byref(self.network), *inputs, factors.data_ptr(), *written))
        return out

    def backward(self, gradient: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
        """Gradients by the phases, the first bias, and the parameters in their order."""
        gradient, layout = gradient.contiguous(), GradientLayout(self.built, self.network, self.parameters.tensors)
        by, by_features = gradient.new_zeros(layout.size), torch.empty_like(self.features)
        by_phases = gradient.new_empty(self.network.inputs // 2)
        by_parameters = by.data_ptr() + layout.embedding * by.element_size()
        found = by_features.data_ptr(), by_phases.data_ptr(), by.data_ptr(), by_parameters
        given = self.features.data_ptr(), self.parameters.pointers, kept.data_ptr(), gradient.data_ptr()
        check_memory(self.built.times_backward(ctypes.byref(self.network), *given, *found))
        by_bias, others = layout.split(by)
        return by_phases, by_bias, *others


class _NativeTimes(torch.autograd.Function):
    """`time_network` and its gradient, by torch's operations where that is itself differentiated or batched."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, frequencies: Tensor, phases: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        call = _Times(t, frequencies, phases, bias, parameters)
        kept = t.new_empty(len(parameters) // 2, len(t), call.network.hidden)
        ctx.call = call
        ctx.save_for_backward(kept, t, frequencies, phases, bias, *parameters)
        return call.forward(kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, t, frequencies, *inputs = ctx.saved_tensors
        if needs_torch(gradient):

            def call(phases: Tensor, bias: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
                return _of_torch(t, frequencies, phases, [(weight, bias), *pairs(rest)])

            return None, None, *gradients_by_torch(call, inputs, ctx.needs_input_grad[2:], gradient)
        return None, None, *ctx.call.backward(gradient, kept)


__all__ = ["time_network"]
