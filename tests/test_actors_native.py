"""The native network against the same equations in float64, for every build that this processor can run."""

import ctypes
import math
import platform
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from driftstream.actors import native
from driftstream.actors.fused import joint_network, step_network
from driftstream.actors.native import BUILDS, Library, network_of

SIZES = [  # leading dimensions, those of the embedding, inputs, hidden, layers, outputs
    ((7, 5), (5,), 3, 16, 2, 5),
    ((300,), (), 2, 64, 2, 4),
    ((1, 1), (1,), 1, 8, 0, 1),
    ((3, 20), (3, 20), 32, 64, 2, 32),
    ((2, 3, 4), (4,), 9, 24, 1, 17),
    ((0, 4), (4,), 2, 8, 2, 2),
    ((100, 13), (13,), 10, 64, 2, 30),
]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)
Size = tuple[tuple[int, ...], tuple[int, ...], int, int, int, int]
Leaves = tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]


def make_leaves(size: Size, seed: int = 0) -> Leaves:
    """States, embedding, first weight and layers, of which all require gradients."""
    leading, embedded, inputs, hidden, count, outputs = size
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).requires_grad_()

    widths = [hidden] * count + [outputs]
    layers = [(draw(width, hidden, scale=hidden**-0.5), draw(width)) for width in widths]
    return draw(*leading, inputs), draw(*embedded, hidden), draw(hidden, inputs, scale=inputs**-0.5), layers


def flat(leaves: Leaves) -> list[Tensor]:
    x, embedding, weight, layers = leaves
    return [x, embedding, weight, *(tensor for layer in layers for tensor in layer)]


def in_double(leaves: Leaves) -> Leaves:
    x, embedding, weight, *parameters = (tensor.detach().double().requires_grad_() for tensor in flat(leaves))
    return x, embedding, weight, list(zip(parameters[::2], parameters[1::2], strict=True))


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


@every_size
def test_outputs_and_gradients_are_those_of_the_equation(build: Library, size: Size) -> None:
    leaves = make_leaves(size)
    exact = in_double(leaves)
    out, expected = joint_network(*leaves), network_of(*exact)
    assert out.grad_fn is not None
    assert "Native" in type(out.grad_fn).__name__
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(joint_network(*leaves), out, rtol=0.0, atol=0.0)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(out, flat(leaves), weights)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, flat(exact), weights.double()), strict=True):
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) < 1e-5


def test_states_between_others_are_used_where_they_stand(build: Library) -> None:
    _, embedding, weight, layers = make_leaves(((6, 5), (5,), 3, 16, 2, 4))
    states = torch.randn(6, 7, 3)
    torch.testing.assert_close(
        joint_network(states[:, 1:-1], embedding, weight, layers),
        network_of(states[:, 1:-1], embedding, weight, layers),
        rtol=1e-5,
        atol=1e-5,
    )
    columns = torch.randn(6, 3, 5).transpose(1, 2)
    torch.testing.assert_close(
        joint_network(columns, embedding, weight, layers),
        network_of(columns, embedding, weight, layers),
        rtol=1e-5,
        atol=1e-5,
    )


def test_gelu_is_accurate_in_its_tails_too(build: Library) -> None:
    z = torch.cat([torch.linspace(-11.0, 11.0, 100_001), torch.tensor([-0.0, 0.0, 1e-30, -1e-30, 30.0, 1e6])])
    z = torch.cat([z, z.new_zeros(-len(z) % 8)]).view(-1, 8)
    eye, zero = torch.eye(8), torch.zeros(8)
    embedding = z.clone().requires_grad_()
    value = joint_network(torch.zeros(len(z), 1), embedding, torch.zeros(8, 1), [(eye, zero)])
    (slope,) = torch.autograd.grad(value.sum(), embedding)
    value = value.detach()
    exact = z.double()
    below = 0.5 * torch.erfc(-exact / math.sqrt(2.0))
    density = (-0.5 * exact.square()).exp() / math.sqrt(2.0 * math.pi)
    # Far out the rounding of z in exp(-z^2/2) counts: 6e-8 z^2.
    bound = 5e-7 + 1.2e-7 * exact.square().clamp_max(130.0)
    assert bool(((value - exact * below).abs() <= bound * (exact * below).abs()).all())
    assert float((slope - (below + exact * density)).abs().max()) < 5e-7


def test_what_is_far_out_is_nothing_and_what_is_not_finite_stays_in_its_row(build: Library) -> None:
    hidden, x = 8, torch.zeros(5, 1)
    embedding = torch.ones(5, hidden)
    embedding[1], embedding[2], embedding[3] = torch.nan, torch.inf, -100.0
    layers = [(torch.eye(hidden), torch.zeros(hidden))]
    out = joint_network(x, embedding, torch.zeros(hidden, 1), layers)
    assert bool(out[1].isnan().all())
    assert not bool(out[2].isfinite().any())
    assert float(out[3].abs().max()) < 1e-25
    torch.testing.assert_close(out[[0, 4]], torch.nn.functional.gelu(embedding[[0, 4]]))


def test_second_derivatives_are_autograds(build: Library) -> None:
    leaves = make_leaves(((4, 3), (3,), 2, 8, 2, 3))
    exact = in_double(leaves)

    def penalty(leaves: Leaves, network: Callable[..., Tensor]) -> list[Tensor]:
        gradients = torch.autograd.grad(network(*leaves).square().sum(), flat(leaves)[:3], create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in gradients), flat(leaves)))  # type: ignore[arg-type]

    for found, wanted in zip(penalty(leaves, joint_network), penalty(exact, network_of), strict=True):
        assert relative_error(found, wanted) < 1e-4


def test_gradients_of_gradients_follow_every_path_once(build: Library) -> None:
    """States of a later step depend on the parameters too, and a parameter may be used twice."""
    x, embedding, weight, layers = make_leaves(((4, 3), (3,), 8, 8, 1, 8))
    (inner, bias), (outer, last) = layers
    layers = [(inner, bias), (inner, bias), (outer, last)]

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        out = joint_network(joint_network(x, embedding, weight, layers), embedding, weight, layers)
        return torch.autograd.grad(out.square().sum(), [x, weight, inner, last], create_graph=create_graph)

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert relative_error(found, expected) < 1e-5


def test_only_the_gradients_that_are_wanted_are_given(build: Library) -> None:
    x, embedding, weight, layers = make_leaves(((4, 3), (3,), 2, 8, 2, 3))
    x, weight = x.detach(), weight.detach()
    out = joint_network(x, embedding, weight, layers)
    (found,) = torch.autograd.grad(out.sum(), embedding, create_graph=True)
    (expected,) = torch.autograd.grad(network_of(x, embedding, weight, layers).sum(), embedding)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_steps_are_rows_of_the_whole(build: Library) -> None:
    x, embedding, weight, layers = make_leaves(((50, 6), (6,), 5, 16, 2, 7))
    steps = step_network(embedding, weight, layers, 50)
    assert isinstance(steps, native.NativeStepNetwork)
    with torch.no_grad():
        expected = joint_network(x, embedding, weight, layers)
        for n in (3, 0, 5):
            assert torch.equal(steps(x[:, n], n), expected[:, n])


def test_threads_share_the_rows(build: Library, two_threads: None) -> None:
    leaves = make_leaves(((700, 5), (5,), 3, 16, 2, 4))

    def gradients() -> list[Tensor]:
        out = joint_network(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), flat(leaves))]

    found, again = gradients(), gradients()
    assert all(map(torch.equal, found, again))
    torch.set_num_threads(1)
    alone = gradients()
    assert torch.equal(found[0], alone[0])
    for one, other in zip(found, alone, strict=True):
        assert relative_error(one, other) < 1e-5


def test_a_part_of_the_rows_changes_no_other(build: Library) -> None:
    """What `in_parts` counts on, over the edges of blocks."""
    x, embedding, weight, layers = make_leaves(((211,), (), 3, 16, 1, 2))
    rows = native.NativeRows(x.detach(), embedding, flat((x, embedding, weight, layers))[2:])
    whole = rows.forward(embedding, None)
    factors, out = rows.parameters.packed(build, rows.network), torch.full((211, 2), math.nan)
    pointers = rows.x.data_ptr(), embedding.data_ptr(), factors.data_ptr(), None, out.data_ptr()
    assert build.forward(ctypes.byref(rows.network), 50, 200, *pointers) == 0
    assert torch.equal(out[50:200], whole[50:200])
    assert bool(out[:50].isnan().all())
    assert bool(out[200:].isnan().all())


def test_sums_over_many_rows_keep_their_digits(build: Library) -> None:
    embedding = torch.zeros(8, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    out = joint_network(torch.zeros(1_000_000, 1), embedding, torch.zeros(8, 1), [(torch.eye(8), bias)])
    weights = torch.rand(out.shape, generator=torch.Generator().manual_seed(0))
    by_embedding, by_bias = torch.autograd.grad(out, [embedding, bias], weights)
    exact = weights.double().sum(0)
    torch.testing.assert_close(by_bias.double(), exact, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(by_embedding.double(), 0.5 * exact, rtol=1e-5, atol=0.0)


def test_what_torch_refuses_is_refused(build: Library) -> None:
    x, embedding, weight, layers = make_leaves(((4, 3), (3,), 2, 8, 1, 3))
    (inner, bias), (outer, last) = layers
    for wrong in (
        (x[..., :1], embedding, weight, layers),
        (x, embedding[:2], weight, layers),
        (x, embedding, weight, [(inner, bias[:5]), (outer, last)]),
        (x, embedding, weight, [(inner, bias), (outer[:, :4], last)]),
        (x, embedding, weight.double(), layers),
    ):
        with pytest.raises(RuntimeError):
            joint_network(*wrong)
    one = embedding[:, :1]  # is broadcast
    torch.testing.assert_close(joint_network(x, one, weight, layers), network_of(x, one, weight, layers))
    steps = step_network(embedding, weight, layers, 4)
    for states in (x[:3, 0], x[:, 0, :1], x[:, 0].double(), x[:, 0].to("meta")):
        with pytest.raises(ValueError, match=r"expected float32 \[4, 2\]"):
            steps(states, 0)


@pytest.mark.parametrize("leading", [(0,), (2, 2, 0)])
def test_no_rows_give_no_rows(build: Library, leading: tuple[int, ...]) -> None:
    x, embedding, weight, layers = make_leaves((leading, leading[-1:], 2, 8, 1, 3))
    out = joint_network(x, embedding, weight, layers)
    assert out.shape == (*leading, 3)
    assert all(not gradient.any() for gradient in torch.autograd.grad(out.sum(), [embedding, weight]))


def test_what_follows_torchs_operations_sees_them(build: Library) -> None:
    x, embedding, weight, layers = make_leaves(((4, 3), (3,), 2, 8, 1, 3))
    expected = network_of(x, embedding, weight, layers).detach()
    with FlopCounterMode(display=False) as counter:
        joint_network(x, embedding, weight, layers)
    assert counter.get_total_flops() == 2 * 12 * (2 * 8 + 8 * 8 + 8 * 3)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert joint_network(mode.from_tensor(x.detach()), embedding, weight, layers).shape == (4, 3, 3)
    constants = embedding.detach(), weight.detach(), [(w.detach(), b.detach()) for w, b in layers]
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(lambda x: joint_network(x, *constants), x.detach())
    torch.testing.assert_close(traced(x.detach()), expected)
    tangent = torch.ones_like(x)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.unpack_dual(
            joint_network(forward_ad.make_dual(x.detach(), tangent), embedding, weight, layers)
        )
    assert dual.tangent is not None
    by_x = torch.autograd.grad(joint_network(x, embedding, weight, layers).sum(), x)[0]
    torch.testing.assert_close(dual.tangent.sum(), (by_x * tangent).sum())


def test_gradients_may_be_batched(build: Library) -> None:
    x, embedding, weight, layers = make_leaves(((4,), (), 2, 8, 1, 3))
    found = torch.autograd.functional.jacobian(lambda x: joint_network(x, embedding, weight, layers), x, vectorize=True)
    expected = torch.autograd.functional.jacobian(lambda x: network_of(x, embedding, weight, layers), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["double", "odd hidden", "hidden not constant", "embedding over more rows", "off"])
def test_what_does_not_fit_runs_on_torchs_operations(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = make_leaves(((4, 3), (3,), 2, 8, 2, 3))
    x, embedding, weight, layers = leaves
    if case == "double":
        x, embedding, weight, layers = in_double(leaves)
    elif case == "odd hidden":
        x, embedding, weight, layers = make_leaves(((4, 3), (3,), 2, 7, 2, 3))
    elif case == "hidden not constant":
        layers = [(torch.randn(16, 8), torch.randn(16)), (torch.randn(3, 16), torch.randn(3))]
    elif case == "embedding over more rows":
        embedding = torch.randn(4, 1, 8)
    else:
        monkeypatch.setenv(native.SWITCH, "0")
        monkeypatch.setattr(native, "library", native.library.__wrapped__)
        assert native.library() is None
    out = joint_network(x, embedding, weight, layers)
    assert "Native" not in type(out.grad_fn).__name__
    torch.testing.assert_close(out, network_of(x, embedding, weight, layers), rtol=1e-5, atol=1e-5)


def test_a_build_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert native.library.__wrapped__() is None


def test_what_is_built_is_what_is_looked_for() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    extensions = project["tool"]["setuptools"]["ext-modules"]
    assert [extension["name"] for extension in extensions] == [f"driftstream.actors.{name}" for name in BUILDS]
    # Without a compiler an install still succeeds.
    assert all(extension["optional"] for extension in extensions)
    machine = platform.machine().lower()
    found = native.library.__wrapped__()
    if found is not None:
        assert found.name == ("network_generic" if machine in ("arm64", "aarch64") else "network_avx2")
