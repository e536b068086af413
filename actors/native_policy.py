"""Steps of a policy by native code (network.cpp): drawn one after the other, or the energies of given ones.

Network, drift, variance and what they are for go over a block of rows together, which with torch's operations takes
some twenty passes over all of them.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from driftstream.actors.native import (
    NativeParameters,
    NativeRows,
    Network,
    built_library,
    check_memory,
    fits,
    gradients_by_torch,
    in_parts,
    is_per_step,
    needs_torch,
    network_of,
    pairs,
    place,
)
from driftstream.actors.policy import DiffusionPolicy, TimeEmbedding
from driftstream.actors.preconditioning import REACH
from driftstream.envs.densities import step_energy
from driftstream.envs.processes import Kernels


class _Head(ctypes.Structure):
    """`Head` of network.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("pulls", "variances", "scales")),
        *((name, ctypes.c_float) for name in ("pull", "score_clip", "drift_clip", "log_var_range")),
    )


class _Table(ctypes.Structure):
    """`Table` of network.cpp."""

    _fields_ = (("entries", ctypes.c_void_p), ("row", ctypes.c_int64), ("number", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor | None) -> "_Table":
        """The rows of a tensor [B, N, D], whose last dimension is contiguous."""
        return cls() if tensor is None else cls(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


class _Rollout(ctypes.Structure):
    """`Rollout` of network.cpp."""

    _fields_ = (
        ("network", Network),
        ("head", _Head),
        *((name, ctypes.c_void_p) for name in ("steps", "scale", "embedding", "factors")),
        ("states", _Table),
        ("scores", _Table),
    )


def is_native(
    policy: DiffusionPolicy,
    states: Tensor,
    embedding: TimeEmbedding,
    scores: Tensor | None,
    kernels: Kernels | None = None,
) -> bool:
    """Whether native code can make steps from `states`, at which the target's score is `scores`.

    The states are [B, D], at any one time of the embedding; with `kernels` [B, L, D], at all times of the embedding and
    of the kernels, [L] or [B, L]. Not so where gradients flow to anything but the policy, or where shapes would have to
    be broadcast or do not fit.
    """
    if type(policy) is not DiffusionPolicy:
        return False
    hidden, scale, units = embedding.hidden, embedding.langevin_scale, embedding.units
    network, leading = policy.forward_net, embedding.hidden.shape[:-1]
    weight, layers = network.state_net.weight, network.layers
    constants = [states, *([] if units is None else [units.reach, units.drift]), *(kernels or ())]
    if policy.langevin:
        if scores is None or scale is None or scores.shape != states.shape:
            return False
        if scale.shape != (*leading, _head(policy).scales):
            return False
        constants.append(scores)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in constants):
        return False
    if kernels is None:
        fitting = states.dim() == hidden.dim() == 2 and states.shape[1] == policy.dim
    else:
        fitting = states.dim() == 3 and is_per_step(states, hidden, weight)
        fitting = fitting and all(part.shape == leading for part in kernels)
    if units is not None:
        fitting = fitting and units.reach.shape == units.drift.shape == (*leading, 1)
    outputs = policy.dim * (1 + policy.config.precondition + policy.learned_variance)
    every = (*constants, hidden, *(() if scale is None else (scale,)))
    return fitting and layers[-1][0].shape[0] == outputs and policy.is_plain(states) and fits(every, weight, layers)


class NativeSteps:
    """Steps of a grid, drawn for B states at a time into `states [B, T+1, D]`, with the scores into `scores [B, T, D]`.

    `embedding` is that of the T times at which the steps of these kernels [T] start; `extra [T]` is what their
    variances gain.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        embedding: TimeEmbedding,
        kernels: Kernels,
        extra: Tensor,
        states: Tensor,
        scores: Tensor | None,
    ) -> None:
        built, (rows, _, dim) = built_library(), states.shape
        parameters = NativeParameters(policy_parameters(policy))
        network = parameters.network(rows, 1, dim, dim, _width(embedding))
        steps = torch.stack([*kernels, extra], 1).to(states)
        constants = torch.cat([_units(embedding, len(steps)), steps], 1)
        scale, hidden = embedding.langevin_scale, embedding.hidden.detach().contiguous()
        scale, factors = None if scale is None else scale.detach().contiguous(), parameters.packed(built, network)
        places = (place(tensor) for tensor in (constants, scale, hidden, factors))
        self._rollout = _Rollout(network, _head(policy), *places, _Table.of(states), _Table.of(scores))
        self._kept = constants, scale, hidden, factors, states, scores
        self._step, self._address = built.step, ctypes.addressof(self._rollout)

    def __call__(self, x: Tensor, n: int, score: Tensor | None, noise: Tensor) -> Tensor:
        """The states after step n from x [B, D], with the score and the noise there."""
        x, noise = x.contiguous(), noise.contiguous()
        if score is not None:
            score = score.to(x).expand_as(x).contiguous()
        to = torch.empty_like(x)
        places = x.data_ptr(), place(score), noise.data_ptr(), to.data_ptr()
        in_parts(len(x), lambda begin, end: check_memory(self._step(self._address, n, begin, end, *places)))
        return to


def native_energies(
    policy: DiffusionPolicy, states: Tensor, embedding: TimeEmbedding, kernels: Kernels, scores: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Energies (`step_energy`) of the steps between states [B, L+1, D], and the squares of those back, both [B, L].

    What is squared on the way back is x_n - back x_{n+1}. Embedding and kernels are of one grid, or of each row.
    Gradients of the energies flow to the policy and to the embedding. The policy `is_native` at states[:, :-1] and
    these kernels.
    """
    given = GivenSteps(policy, states, embedding, kernels, scores)
    if not torch.is_grad_enabled():
        energy, back = given.energies(embedding.hidden, embedding.langevin_scale, policy_parameters(policy))
        return energy, back
    inputs = embedding.hidden, embedding.langevin_scale, *policy_parameters(policy)
    energy, back = _NativeEnergies.apply(given, *inputs)
    return energy, back


class GivenSteps:
    """The steps of `native_energies`; the parameters come separately, as torch wants to know them."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        states: Tensor,
        embedding: TimeEmbedding,
        kernels: Kernels,
        scores: Tensor | None,
    ) -> None:
        self.policy, self.states, self.units = policy, states, embedding.units
        self.scores = None if scores is None or not policy.langevin else scores.contiguous()
        units = _units(embedding, kernels.keep.numel()).view(*kernels.keep.shape, 2)
        self.steps = torch.cat([units, torch.stack([*kernels, torch.zeros_like(kernels.keep)], -1)], -1)
        self.width = _width(embedding)
        self.head = _head(policy)

    def rows(self, hidden: Tensor, parameters: Sequence[Tensor]) -> NativeRows:
        return NativeRows(self.states[:, :-1], hidden, parameters, self.width)

    def read(self, rows: NativeRows, hidden: Tensor, scale: Tensor | None) -> list[Tensor | None]:
        """What native code reads of the steps, in its order; places are to be taken while these tensors are there."""
        following = self.states[:, 1:]
        if rows.x.data_ptr() != self.states.data_ptr():
            following = following.contiguous()  # as those before the steps, which were copied too
        scale = None if scale is None else scale.contiguous()
        factors = rows.parameters.packed(rows.built, rows.network)
        return [self.steps, rows.x, following, self.scores, scale, hidden.contiguous(), factors]

    def energies(
        self,
        hidden: Tensor,
        scale: Tensor | None,
        parameters: Sequence[Tensor],
        kept: Tensor | None = None,
        by_outputs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Energies and squares [B, L]; what the way back needs is written to the last two, if given."""
        rows = self.rows(hidden, parameters)
        read = self.read(rows, hidden, scale)
        energy, back = self.states.new_empty(2, *self.states[:, 1:, 0].shape)
        tensors = [*read, kept, by_outputs, energy, back]

        def part(begin: int, end: int) -> None:
            shape, head = ctypes.byref(rows.network), ctypes.byref(self.head)
            check_memory(rows.built.energy(shape, head, begin, end, *map(place, tensors)))

        in_parts(rows.network.rows, part)
        return energy, back

    def by_scale(self, rows: NativeRows, scale: Tensor, by_outputs: Tensor, factors: Tensor) -> Tensor:
        """The energies' gradient by the score's factors, like `scale`, each energy's times its number in `factors`."""

        def part(begin: int, end: int) -> Tensor:
            by = torch.zeros(scale.shape, dtype=torch.float64, device=scale.device)
            rows.built.by_scale(
                ctypes.byref(rows.network),
                ctypes.byref(self.head),
                begin,
                end,
                self.steps.data_ptr(),
                place(self.scores),
                by_outputs.data_ptr(),
                factors.data_ptr(),
                by.data_ptr(),
            )
            return by

        return torch.stack(in_parts(rows.network.rows, part)).sum(0).to(scale.dtype)

    def of_torch(self, hidden: Tensor, scale: Tensor | None, weight: Tensor, *parameters: Tensor) -> Tensor:
        """The energies [B, L] by torch's operations."""
        x, embedding = self.states[:, :-1], TimeEmbedding(hidden, scale, self.units)
        out = network_of(self.policy.inputs(x, embedding), hidden, weight, pairs(parameters))
        drift, log_var = self.policy.drift(x, out, embedding, self.scores)
        keep, gain, variance = self.steps[..., 2:5].unbind(-1)
        return step_energy(self.states[:, 1:] - keep.unsqueeze(-1) * x, drift, gain, variance, log_var)


class _NativeEnergies(torch.autograd.Function):
    """`native_energies` and the energies' gradient, by torch's operations where that is batched."""

    @staticmethod
    def forward(
        ctx: Any, given: GivenSteps, hidden: Tensor, scale: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows = given.states[:, 1:, 0].numel()
        kept = hidden.new_empty(len(parameters) // 2, rows, hidden.shape[-1])
        by_outputs = hidden.new_empty(rows, len(parameters[-1]))
        energy, back = given.energies(hidden, scale, parameters, kept, by_outputs)
        ctx.given = given
        # States and scores are read again on the way back: saved, as torch notices then what was written to them since.
        ctx.save_for_backward(kept, by_outputs, given.states, given.scores, scale, hidden, *parameters)
        ctx.mark_non_differentiable(back)
        return energy, back

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        kept, by_outputs, _states, _scores, scale, *inputs = ctx.saved_tensors
        given, needed = ctx.given, ctx.needs_input_grad[1:]
        by_scale: Tensor | None = None
        if needs_torch(gradient):
            return None, *gradients_by_torch(given.of_torch, [inputs[0], scale, *inputs[1:]], needed, gradient)
        hidden, *parameters = inputs
        rows, factors = given.rows(hidden, parameters), gradient.contiguous()
        by_hidden, others = rows.backward(by_outputs, kept, by_states=False, factors=factors)[1:]
        if scale is not None:
            by_scale = given.by_scale(rows, scale, by_outputs, factors)
        return None, by_hidden.view(hidden.shape), by_scale, *others


def policy_parameters(policy: DiffusionPolicy) -> list[Tensor]:
    """The parameters of the forward network, as native code takes them."""
    network = policy.forward_net
    return [network.state_net.weight, *(parameter for layer in network.layers for parameter in layer)]


def _head(policy: DiffusionPolicy) -> _Head:
    config = policy.config
    scales = 0 if not policy.langevin else policy.dim if config.langevin_scale == "dimension" else 1
    limits = config.score_clip, config.drift_clip, config.log_var_range
    return _Head(config.precondition, policy.learned_variance, scales, REACH, *limits)


def _width(embedding: TimeEmbedding) -> float:
    return 0.0 if embedding.units is None else embedding.units.width


def _units(embedding: TimeEmbedding, steps: int) -> Tensor:
    """Reach and rate of every step, [steps, 2]; ones where there are none."""
    units = embedding.units
    if units is None:
        return torch.ones(steps, 2, dtype=embedding.hidden.dtype, device=embedding.hidden.device)
    return torch.cat([units.reach.reshape(-1, 1), units.drift.reshape(-1, 1)], 1)


__all__ = ["GivenSteps", "NativeSteps", "is_native", "native_energies", "policy_parameters"]
