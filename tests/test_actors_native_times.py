"""Networks of time by native code against torch's operations."""

import itertools

import pytest
import torch
from torch import Tensor

from driftstream.actors import native
from driftstream.actors.native_times import time_network
from driftstream.actors.policy import TimeFeatures

Layers = list[tuple[Tensor, Tensor]]


def make_network(*widths: int) -> tuple[Tensor, Tensor, Layers]:
    """Frequencies, phases and layers of a network whose first layer has `widths[0]` inputs."""
    torch.manual_seed(0)
    features = TimeFeatures(widths[0] // 2)
    layers = [
        (torch.randn(outputs, inputs) / inputs**0.5, torch.randn(outputs))
        for inputs, outputs in itertools.pairwise(widths)
    ]
    return features.frequencies, features.phases.detach(), layers


def gradients(t: Tensor, frequencies: Tensor, phases: Tensor, layers: Layers) -> list[Tensor]:
    """The outputs, and the gradients of a sum of them by phases and layers."""
    leaves = [tensor.detach().requires_grad_() for tensor in (phases, *itertools.chain(*layers))]
    phases, *rest = leaves
    out = time_network(t, frequencies, phases, list(zip(rest[::2], rest[1::2], strict=True)))
    weights = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).view(out.shape)
    return [out.detach(), *torch.autograd.grad((weights * out).sum(), leaves)]


@pytest.mark.parametrize("rows", [0, 1, 10, 300])
@pytest.mark.parametrize("widths", [(8, 16, 16), (128, 64, 64, 2), (6, 8, 1)], ids=str)
def test_outputs_and_gradients_are_those_of_the_equation(
    rows: int, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    frequencies, phases, layers = make_network(*widths)
    t = torch.rand(rows)
    found = gradients(t, frequencies, phases, layers)
    monkeypatch.setattr(native, "library", lambda: None)
    single = gradients(t, frequencies, phases, layers)
    wide = [(weight.double(), bias.double()) for weight, bias in layers]
    exact = gradients(t.double(), frequencies.double(), phases.double(), wide)
    for ours, theirs, true in zip(found, single, exact, strict=True):
        assert ours.shape == true.shape
        scale = float(true.norm()) + 1e-30
        assert float((ours - true).norm()) / scale <= 3.0 * float((theirs - true).norm()) / scale + 1e-6


def test_without_gradients_the_outputs_are_the_same() -> None:
    frequencies, phases, layers = make_network(8, 16, 3)
    t = torch.rand(7)
    with torch.no_grad():
        found = time_network(t, frequencies, phases, layers)
    assert torch.equal(found, gradients(t, frequencies, phases, layers)[0])


def test_second_derivatives_and_batches_of_gradients_are_torchs() -> None:
    frequencies, phases, layers = make_network(8, 16, 3)
    t, phases = torch.rand(7), phases.clone().requires_grad_()
    out = time_network(t, frequencies, phases, layers)
    by = torch.randn(4, *out.shape)
    (batched,) = torch.autograd.grad(out, phases, by, retain_graph=True, is_grads_batched=True)
    for index, one in enumerate(by):
        (alone,) = torch.autograd.grad(out, phases, one, retain_graph=True)
        torch.testing.assert_close(batched[index], alone, rtol=1e-4, atol=1e-4)
    (first,) = torch.autograd.grad(out.sum(), phases, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), phases)
    wide = phases.detach().double().requires_grad_()
    layers = [(weight.double(), bias.double()) for weight, bias in layers]
    out = time_network(t.double(), frequencies.double(), wide, layers)
    (first,) = torch.autograd.grad(out.sum(), wide, create_graph=True)
    (expected,) = torch.autograd.grad(first.square().sum(), wide)
    torch.testing.assert_close(second.double(), expected, rtol=1e-3, atol=1e-3)


def test_times_that_are_followed_are_left_to_torch() -> None:
    frequencies, phases, layers = make_network(8, 16, 3)
    t = torch.rand(7).requires_grad_()
    (by_times,) = torch.autograd.grad(time_network(t, frequencies, phases, layers).sum(), t)
    assert bool(by_times.any())
