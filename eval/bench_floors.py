"""Floors of rollout and update: their matrix products, activations and random numbers, and nothing else.

Everything is written into buffers that are there already; biases, Euler steps and densities are left out.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.targets import Target


class Chain:
    """Products of a multilayer perceptron of `widths` on so many rows, with GELU between them.

    `input_gradient` says whether the way back reaches the input.
    """

    def __init__(
        self, rows: int, widths: Sequence[int], generator: torch.Generator, input_gradient: bool = False
    ) -> None:
        self.rows = rows
        self.widths = list(widths)
        self.input_gradient = input_gradient
        pairs = list(pairwise(widths))
        self._weights = [torch.randn(o, i, generator=generator) / i**0.5 for i, o in pairs]
        self._values = [torch.randn(rows, width, generator=generator) for width in widths[:-1]]
        self._products = [torch.randn(rows, width, generator=generator) for width in widths[1:]]
        self._weight_gradients: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._generator = generator

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the products of one `forward`: a multiplication and an addition each."""
        return 2 * self.rows * sum(i * o for i, o in pairwise(self.widths))

    @property
    def backward_flops(self) -> int:
        """The same of one `backward`."""
        first = 0 if self.input_gradient else 2 * self.rows * self.widths[0] * self.widths[1]
        return 2 * self.forward_flops - first

    def forward(self) -> None:
        """Every layer's product, and the activations between."""
        last = len(self._weights) - 1
        for layer, weight in enumerate(self._weights):
            torch.mm(self._values[layer], weight.t(), out=self._products[layer])
            if layer < last:
                torch.ops.aten.gelu.out(self._products[layer], out=self._values[layer + 1])

    def backward(self) -> None:
        """Gradients by the weights and by what enters every layer, from some gradient by the output."""
        if not self._gradients:
            self._weight_gradients = [torch.empty_like(weight) for weight in self._weights]
            self._gradients = [torch.randn(self.rows, width, generator=self._generator) for width in self.widths]
        for layer in reversed(range(len(self._weights))):
            gradient = self._gradients[layer + 1]
            torch.mm(gradient.t(), self._values[layer], out=self._weight_gradients[layer])
            if layer or self.input_gradient:
                torch.mm(gradient, self._weights[layer], out=self._gradients[layer])
            if layer:
                below, product = self._gradients[layer], self._products[layer - 1]
                torch.ops.aten.gelu_backward.grad_input(below, product, grad_input=below)


class RolloutFloor:
    """What a rollout [B, T, D] cannot do without: the policy's products at every step, and the noise.

    With `score_of` (Langevin policies) also that target's gradient, once a step.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        batch_size: int,
        sampling_steps: int,
        generator: torch.Generator,
        score_of: Target | None = None,
    ) -> None:
        self.sampling_steps = sampling_steps
        self.state = Chain(batch_size, state_widths(policy), generator)
        self.times = time_chains(policy, sampling_steps, generator)
        self._x = torch.randn(batch_size, policy.dim, generator=generator)
        self._noise = torch.empty_like(self._x)
        self._score_of = score_of
        self._generator = generator

    @property
    def flops(self) -> int:
        """Floating-point operations of the products."""
        return self.sampling_steps * self.state.forward_flops + sum(chain.forward_flops for chain in self.times)

    @torch.no_grad()
    def __call__(self) -> None:
        for chain in self.times:
            chain.forward()
        for _ in range(self.sampling_steps):
            if self._score_of is not None:
                self._score_of.score(self._x)
            self.state.forward()
            self._noise.normal_(generator=self._generator)


class UpdateFloor:
    """What an update from trajectories [B, T, D] cannot do without: the policy's products, there and back."""

    def __init__(
        self, policy: DiffusionPolicy, batch_size: int, sampling_steps: int, generator: torch.Generator
    ) -> None:
        state = Chain(batch_size * sampling_steps, state_widths(policy), generator)
        self.chains = [*time_chains(policy, sampling_steps, generator), state]

    @property
    def flops(self) -> int:
        """Floating-point operations of the products."""
        return sum(chain.forward_flops + chain.backward_flops for chain in self.chains)

    @torch.no_grad()
    def __call__(self) -> None:
        for chain in self.chains:
            chain.forward()
        for chain in reversed(self.chains):
            chain.backward()


class RolloutNetwork:
    """The products, activations, noise and scores of `RolloutFloor`, by what evaluates the policy."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        batch_size: int,
        times: Tensor,
        generator: torch.Generator,
        score_of: Target | None = None,
    ) -> None:
        self._policy, self._times, self._generator, self._score_of = policy, times, generator, score_of
        self._x = torch.randn(batch_size, policy.dim, generator=generator)
        self._noise = torch.empty_like(self._x)

    @torch.no_grad()
    def __call__(self) -> None:
        network = self._policy.forward_net.by_steps(self._policy.embed_times(self._times[:-1]).hidden, len(self._x))
        for n in range(len(self._times) - 1):
            if self._score_of is not None:
                self._score_of.score(self._x)
            network(self._x, n)
            self._noise.normal_(generator=self._generator)


class UpdateNetwork:
    """The products and activations of `UpdateFloor`, there and back, by what evaluates the policy."""

    def __init__(self, policy: DiffusionPolicy, batch_size: int, times: Tensor, generator: torch.Generator) -> None:
        self._policy, self._times = policy, times
        self._x = torch.randn(batch_size, len(times) - 1, policy.dim, generator=generator)
        outputs = state_widths(policy)[-1]
        self._gradient = torch.randn(batch_size, len(times) - 1, outputs, generator=generator)

    def __call__(self) -> None:
        embedding = self._policy.embed_times(self._times[:-1])
        outputs = [self._policy.forward_net(self._x, embedding.hidden)]
        gradients = [self._gradient]
        if embedding.langevin_scale is not None:
            outputs.append(embedding.langevin_scale)
            gradients.append(torch.ones_like(embedding.langevin_scale))
        parameters = [parameter for parameter in self._policy.parameters() if parameter.requires_grad]
        torch.autograd.grad(outputs, parameters, gradients, allow_unused=True)


def state_widths(policy: DiffusionPolicy) -> list[int]:
    """Widths of the layers that every state goes through."""
    net = policy.forward_net
    return [policy.dim, net.state_net.out_features, *_outputs(net.joint_net)]


def time_chains(policy: DiffusionPolicy, sampling_steps: int, generator: torch.Generator) -> list[Chain]:
    """The layers that only the T times of a grid go through, down to their learned phases."""
    nets = [policy.forward_net.time_net, *([policy.langevin_net] if policy.langevin else [])]
    widths = [[_linears(net)[0].in_features, *_outputs(net)] for net in nets]
    return [Chain(sampling_steps, row, generator, input_gradient=True) for row in widths]


def _linears(net: nn.Sequential) -> list[nn.Linear]:
    return [layer for layer in net if isinstance(layer, nn.Linear)]


def _outputs(net: nn.Sequential) -> list[int]:
    return [layer.out_features for layer in _linears(net)]
