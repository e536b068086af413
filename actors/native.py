"""The network of `fused` in the processor's own vectors (network.cpp), faster than torch's operations.

It is built when the package is installed, if there is a C++ compiler, and used for single precision on the processor.
Everything else runs on torch's operations, as all does with `DRIFTSTREAM_NATIVE=0` in the environment.
"""

import ctypes
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import gelu, linear

T = TypeVar("T")
Layer = tuple[Tensor, Tensor]
"""Weight [O, I] and bias [O]."""
SWITCH = "DRIFTSTREAM_NATIVE"
BUILDS = ("network_avx2", "network_generic")
"""Extensions that are built from network.cpp, each where the compiler knows how."""
VERSION = 8
"""`network_version` of network.cpp; a build of another one is not used."""
PART_ROWS = 1024
"""Threads get at least so many rows each: what a part takes is then twenty times what handing it over takes."""


class Network(ctypes.Structure):
    """`Network` of network.cpp."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("inputs", "hidden", "layers", "outputs", "rows", "period", "group_stride", "step_stride")
        ),
        ("width", ctypes.c_float),
    )


class Library:
    """A build of network.cpp. Raises OSError or AttributeError where it cannot be loaded."""

    def __init__(self, name: str) -> None:
        spec = importlib.util.find_spec(f"driftstream.actors.{name}")
        if spec is None or spec.origin is None:
            raise OSError(f"{name}: not built")
        library = ctypes.CDLL(spec.origin)
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self.name = name
        self.version = int(library.network_version())
        self.lanes = int(library.network_lanes())

        def function(name: str, arguments: Sequence[Any], result: Any = ctypes.c_int32) -> Any:
            found = getattr(library, name)
            found.argtypes, found.restype = arguments, result
            return found

        part = [pointer, integer, integer]
        self.pack = function("network_pack", [pointer] * 3, None)
        self.factors = function("network_factors", [pointer], integer)
        self.forward = function("network_forward", [*part, *[pointer] * 5])
        self.backward = function("network_backward", [*part, *[pointer] * 8])
        self.times_forward = function("times_forward", [pointer] * 9)
        self.times_backward = function("times_backward", [pointer] * 9)
        self.energy = function("policy_energy", [pointer, *part, *[pointer] * 11])
        self.by_scale = function("policy_by_scale", [pointer, *part, *[pointer] * 5], None)
        self.balance = function("policy_balance", [pointer, *part, *[pointer] * 9, ctypes.c_float, *[pointer] * 4])
        self.step = function("policy_step", [pointer, integer, integer, integer, *[pointer] * 4])


@cache
def library() -> Library | None:
    """The build that fits this processor; None where there is none, or where it is switched off."""
    machine = platform.machine().lower()
    if os.environ.get(SWITCH, "1") == "0":
        return None
    if machine in ("x86_64", "amd64"):
        # torch asks the processor; without these vectors its own products are faster.
        name = "network_avx2" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None
    else:
        name = "network_generic" if machine in ("arm64", "aarch64") else None
    try:
        found = None if name is None else Library(name)
    except (OSError, AttributeError):
        return None
    return found if found is not None and found.version == VERSION else None


def describe() -> str:
    """What evaluates policies on the processor, for people: the build, or why there is none."""
    built = library()
    if built is not None:
        return f"native ({built.name.removeprefix('network_')})"
    if os.environ.get(SWITCH, "1") == "0":
        return f"torch's operations ({SWITCH}=0)"
    return "torch's operations (no native build for this processor: was there a C++ compiler when this was installed?)"


def serves(tensor: Tensor) -> bool:
    """Whether there is a build for a tensor's type and device, and nothing follows torch's operations."""
    return tensor.dtype == torch.float32 and tensor.is_cpu and library() is not None and not _is_followed()


def fits(tensors: Sequence[Tensor], weight: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether a build can evaluate the network of this first weight and these layers, which come with `tensors`.

    Not so where something follows torch's operations, or where torch would raise.
    """
    built = library()
    if built is None or _is_followed():
        return False
    (hidden, inputs), outputs = weight.shape, layers[-1][0].shape[0]
    if hidden % built.lanes or not min(hidden, inputs, outputs):
        return False
    widths = [*[hidden] * (len(layers) - 1), outputs]
    if any(w.shape != (width, hidden) or b.shape != (width,) for (w, b), width in zip(layers, widths, strict=True)):
        return False
    every = (*tensors, weight, *(tensor for layer in layers for tensor in layer))
    # Other types may have no memory of their own.
    return all(
        type(t) in (Tensor, Parameter) and t.dtype == torch.float32 and t.is_cpu and not t.is_neg() for t in every
    )


def _is_followed() -> bool:
    """Whether tracing, forward-mode differentiation or a mode such as a counter of operations is at work."""
    return (
        torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_per_step(x: Tensor, embedding: Tensor, weight: Tensor) -> bool:
    """Whether x [..., D] and the embedding [..., H] fit that weight, and each other without broadcasting.

    The embedding's leading dimensions are the last ones of those of x then.
    """
    leading = embedding.shape[:-1]
    return (
        embedding.dim() > 0
        and weight.shape == (embedding.shape[-1], x.shape[-1])
        and leading == x.shape[x.dim() - 1 - len(leading) : -1]
    )


def network_of(x: Tensor, embedding: Tensor, weight: Tensor, layers: Sequence[Layer]) -> Tensor:
    """`fused.joint_network` on torch's operations, differentiable as often as they are."""
    value = linear(x, weight) + embedding
    for layer_weight, bias in layers:
        value = linear(gelu(value), layer_weight, bias)
    return value


def pairs(parameters: Sequence[Tensor]) -> list[Layer]:
    """Weight and bias of every layer, from one after the other."""
    return list(zip(parameters[::2], parameters[1::2], strict=True))


def needs_torch(gradient: Tensor) -> bool:
    """Whether a way back is differentiated itself, or `gradient` is several at once: native code does neither."""
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(gradient)


def gradients_by_torch(
    call: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients by the inputs that need one, from `gradient`, that by `call(*inputs)` on torch's operations.

    They are differentiable where gradients are enabled.
    """
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, at which the way back ends even where one of them depends on another.
        views = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        out = call(*views)
    wanted = [tensor for tensor, needs in zip(views, needed, strict=True) if tensor is not None and needs]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=differentiated))
    return tuple(next(found) if needs else None for needs in needed)


def native_network(x: Tensor, embedding: Tensor, weight: Tensor, layers: Sequence[Layer]) -> Tensor:
    """`fused.joint_network` of what `fits`, where embedding and states are as `is_per_step` says."""
    parameters = [parameter for layer in layers for parameter in layer]
    if torch.is_grad_enabled():
        return _NativeNetwork.apply(x, embedding, weight, *parameters)
    return NativeRows(x, embedding, (weight, *parameters)).forward(embedding, None)


class NativeParameters:
    """The first weight, then weight and bias of every layer, where native code finds them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [tensor.detach().contiguous() for tensor in tensors]
        self.pointers = (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in self.tensors))

    def network(self, rows: int, period: int, group_stride: int, step_stride: int, width: float = 0.0) -> Network:
        """The network on so many rows, where they stand, and what it sees of them."""
        hidden, inputs = self.tensors[0].shape
        layers, outputs = len(self.tensors) // 2 - 1, self.tensors[-1].shape[0]
        return Network(inputs, hidden, layers, outputs, rows, period, group_stride, step_stride, width)

    def packed(self, built: Library, network: Network) -> Tensor:
        """`factors` of network.cpp."""
        factors = self.tensors[0].new_empty(built.factors(ctypes.byref(network)))
        built.pack(ctypes.byref(network), self.pointers, factors.data_ptr())
        return factors


class GradientLayout:
    """Where gradients stand: that by the embedding, then those by the parameters as network.cpp adds to them."""

    def __init__(self, built: Library, network: Network, parameters: Sequence[Tensor]) -> None:
        self._inputs = network.inputs
        padded = -(-network.inputs // built.lanes) * built.lanes
        self._sizes = [torch.Size((network.hidden, padded))]
        for bias in parameters[2::2]:
            self._sizes += [bias.shape, torch.Size((len(bias), network.hidden))]
        self.embedding = network.period * network.hidden
        self.size = self.embedding + sum(size.numel() for size in self._sizes)

    def split(self, total: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradient by the embedding, flat, and those by all parameters in their order."""
        by_embedding, *flat = total.split([self.embedding, *(size.numel() for size in self._sizes)])
        by_weight, *others = (part.view(size) for part, size in zip(flat, self._sizes, strict=True))
        in_order = [by for bias, weight in zip(others[::2], others[1::2], strict=True) for by in (weight, bias)]
        return by_embedding, [by_weight[:, : self._inputs], *in_order]


class NativeRows:
    """The network on all rows of x [..., D]; with a `width` on what it sees of them (see network.cpp)."""

    def __init__(self, x: Tensor, embedding: Tensor, parameters: Sequence[Tensor], width: float = 0.0) -> None:
        self.built = built_library()
        self.parameters = NativeParameters(parameters)
        self.leading = x.shape[:-1]
        rows, period = self.leading.numel(), embedding.shape[:-1].numel()
        # States of trajectories are used where they stand, between those that are left out.
        in_place = x.dim() == 3 and embedding.dim() == 2 and x.stride(-1) == 1
        self.x = x if in_place else x.reshape(rows // max(1, period), period, x.shape[-1]).contiguous()
        self.network = self.parameters.network(rows, period, self.x.stride(0), self.x.stride(1), width)

    def forward(self, embedding: Tensor, kept: Tensor | None) -> Tensor:
        """The outputs [..., outputs]; what enters each GELU is written to `kept` [layers, rows, hidden]."""
        network, embedding = self.network, embedding.contiguous()
        factors = self.parameters.packed(self.built, network)
        out = self.x.new_empty(*self.leading, network.outputs)

        def part(begin: int, end: int) -> None:
            tensors = self.x.data_ptr(), embedding.data_ptr(), factors.data_ptr(), place(kept), out.data_ptr()
            check_memory(self.built.forward(ctypes.byref(network), begin, end, *tensors))

        in_parts(network.rows, part)
        return out

    def backward(
        self, gradient: Tensor, kept: Tensor, by_states: bool, factors: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor, list[Tensor]]:
        """Gradients by the states if asked for, by the embedding, and by all parameters in their order.

        `gradient` is that by the outputs, each row of it times its number in `factors`, if given.
        """
        network, gradient = self.network, gradient.contiguous()
        layout = GradientLayout(self.built, network, self.parameters.tensors)
        by_x = self.x.new_empty(*self.leading, network.inputs) if by_states else None

        def part(begin: int, end: int) -> Tensor:
            by = self.x.new_zeros(layout.size)
            x, outputs = self.x.data_ptr(), gradient.data_ptr()
            tensors = x, self.parameters.pointers, kept.data_ptr(), outputs, place(factors), place(by_x)
            by_parameters = by.data_ptr() + layout.embedding * by.element_size()
            check_memory(self.built.backward(ctypes.byref(network), begin, end, *tensors, by.data_ptr(), by_parameters))
            return by

        sums = in_parts(network.rows, part)
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        return by_x, *layout.split(total)


class _NativeNetwork(torch.autograd.Function):
    """`native_network` and its gradient, by torch's operations where that is itself differentiated or batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, embedding: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        rows = NativeRows(x, embedding, (weight, *parameters))
        kept = x.new_empty(len(parameters) // 2, rows.network.rows, rows.network.hidden)
        ctx.save_for_backward(kept, x, embedding, weight, *parameters)
        return rows.forward(embedding, kept)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kept, *inputs = ctx.saved_tensors
        if needs_torch(gradient):

            def call(x: Tensor, embedding: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
                return network_of(x, embedding, weight, pairs(parameters))

            return gradients_by_torch(call, inputs, ctx.needs_input_grad, gradient)
        x, embedding, weight, *parameters = inputs
        rows = NativeRows(x, embedding, (weight, *parameters))
        by_x, by_embedding, by_parameters = rows.backward(gradient, kept, ctx.needs_input_grad[0])
        return by_x, by_embedding.view(embedding.shape), *by_parameters


class NativeStepNetwork:
    """`fused.StepNetwork` of what `fits`."""

    def __init__(self, embedding: Tensor, weight: Tensor, layers: Sequence[Layer], rows: int) -> None:
        built, inputs = built_library(), weight.shape[1]
        parameters = NativeParameters([weight, *(tensor for layer in layers for tensor in layer)])
        self._forward = built.forward
        self._embeddings = embedding.detach().contiguous()
        self._network = parameters.network(rows, 1, inputs, inputs)
        self._factors = parameters.packed(built, self._network)
        self._out = weight.new_empty(rows, self._network.outputs)

    def __call__(self, x: Tensor, n: int) -> Tensor:
        network = self._network
        if x.shape != (network.rows, network.inputs) or x.dtype != torch.float32 or not x.is_cpu:
            expected = f"float32 {[network.rows, network.inputs]} on the processor"
            raise ValueError(f"x is {x.dtype} {list(x.shape)} on {x.device}: expected {expected}")
        x, embedding = x.contiguous(), self._embeddings[n]

        def part(begin: int, end: int) -> None:
            tensors = x.data_ptr(), embedding.data_ptr(), self._factors.data_ptr(), None, self._out.data_ptr()
            check_memory(self._forward(ctypes.byref(network), begin, end, *tensors))

        in_parts(network.rows, part)
        return self._out


def built_library() -> Library:
    """`library` where it is known to be there; RuntimeError otherwise."""
    built = library()
    if built is None:
        raise RuntimeError("there is no native network: ask `fits` first")
    return built


def place(tensor: Tensor | None) -> int | None:
    """Where a tensor's values stand, for native code; the tensor must stay until that has returned."""
    return None if tensor is None else tensor.data_ptr()


def check_memory(status: int) -> None:
    """MemoryError for the status of a native function that got no memory."""
    if status:
        raise MemoryError("native network: no memory for its blocks")


def in_parts(rows: int, call: Callable[[int, int], T], group: int = 1) -> list[T]:
    """What `call(begin, end)` gives for parts of the rows, in order, one a thread of torch's.

    Where so many rows are a `group` that is not to be divided, parts begin and end at numbers of groups.
    """
    threads = min(torch.get_num_threads(), rows // PART_ROWS, rows // group)
    if threads <= 1:
        return [call(0, rows // group)]
    bounds = [rows // group * i // threads for i in range(threads + 1)]
    return list(_pool(threads).map(call, bounds[:-1], bounds[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "driftstream-network")


if hasattr(os, "register_at_fork"):
    # A forked process has none of these threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


__all__ = [
    "BUILDS",
    "GradientLayout",
    "Library",
    "NativeParameters",
    "NativeRows",
    "NativeStepNetwork",
    "built_library",
    "check_memory",
    "describe",
    "fits",
    "gradients_by_torch",
    "in_parts",
    "is_per_step",
    "library",
    "native_network",
    "needs_torch",
    "network_of",
    "pairs",
    "place",
    "serves",
]
