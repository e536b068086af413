"""The network of `fused` in the processor's own vectors (network.cpp): twice as fast as torch's operations.

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
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

T = TypeVar("T")
Layer = tuple[Tensor, Tensor]
"""Weight [O, I] and bias [O]."""
SWITCH = "DRIFTSTREAM_NATIVE"
BUILDS = ("network_avx2", "network_generic")
"""Extensions that are built from network.cpp, each where the compiler knows how."""
VERSION = 1
"""`network_version` of network.cpp; a build of another one is not used."""
PART_ROWS = 1024
"""Threads get at least so many rows each: what a part takes is then twenty times what handing it over takes."""


class _Shape(ctypes.Structure):
    """`Network` of network.cpp."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in ("inputs", "hidden", "layers", "outputs", "rows", "period", "group_stride", "step_stride")
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
        self.forward = library.network_forward
        self.forward.argtypes = [pointer, integer, integer, *[pointer] * 5]
        self.backward = library.network_backward
        self.backward.argtypes = [pointer, integer, integer, *[pointer] * 6]


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


def fits(tensors: Sequence[Tensor], weight: Tensor, layers: Sequence[Layer]) -> bool:
    """Whether a build can evaluate the network of this first weight and these layers on `tensors`."""
    built, hidden = library(), len(weight)
    if built is None or hidden % built.lanes or any(layer.shape != (hidden, hidden) for layer, _ in layers[:-1]):
        return False
    every = (*tensors, weight, *(tensor for layer in layers for tensor in layer))
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in every)


def is_per_step(x: Tensor, embedding: Tensor) -> bool:
    """Whether the embedding is only the same for all of the leading dimensions of x that it does not have."""
    leading = embedding.shape[:-1]
    return leading == x.shape[x.dim() - 1 - len(leading) : -1]


def native_network(x: Tensor, embedding: Tensor, weight: Tensor, layers: Sequence[Layer]) -> Tensor:
    """`fused.joint_network` of what `fits`, with an embedding that `is_per_step`."""
    parameters = [parameter for layer in layers for parameter in layer]
    if torch.is_grad_enabled():
        return _NativeNetwork.apply(x, embedding, weight, *parameters)
    return _Rows(x, embedding, weight, parameters).forward(embedding, None)


class _Rows:
    """Where the states of x [..., D] stand, and the parameters in the order in which they are used."""

    def __init__(self, x: Tensor, embedding: Tensor, weight: Tensor, parameters: Sequence[Tensor]) -> None:
        self.library = _built()
        self.leading = x.shape[:-1]
        self.period = embedding.shape[:-1].numel()
        # States of trajectories are used where they stand, between those that are left out.
        in_place = x.dim() == 3 and embedding.dim() == 2 and x.stride(-1) == 1
        self.x = x if in_place else x.reshape(-1, self.period, x.shape[-1]).contiguous()
        self.weight = weight
        self.weights, self.biases = parameters[::2], parameters[1::2]
        self.shape = _Shape(
            inputs=x.shape[-1],
            hidden=weight.shape[0],
            layers=len(self.weights) - 1,
            outputs=self.weights[-1].shape[0],
            rows=self.leading.numel(),
            period=self.period,
            group_stride=self.x.stride(0),
            step_stride=self.x.stride(1),
        )

    def forward(self, embedding: Tensor, kept: Tensor | None) -> Tensor:
        """The outputs [..., outputs]; what enters each GELU is written to `kept` [layers, rows, hidden]."""
        shape, embedding = self.shape, embedding.contiguous()
        factors = packed(self.weight, list(zip(self.weights, self.biases, strict=True)), self.library.lanes)
        out = self.x.new_empty(*self.leading, shape.outputs)
        where = None if kept is None else kept.data_ptr()

        def part(begin: int, end: int) -> None:
            tensors = self.x.data_ptr(), embedding.data_ptr(), factors.data_ptr(), where, out.data_ptr()
            _check(self.library.forward(ctypes.byref(shape), begin, end, *tensors))

        _in_parts(shape.rows, part)
        return out

    def backward(self, gradient: Tensor, kept: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients by the embedding [period, hidden], and by the first weight and all other parameters."""
        shape, gradient = self.shape, gradient.contiguous()
        weights = torch.cat([weight.reshape(-1) for weight in self.weights])
        inputs = -(-shape.inputs // self.library.lanes) * self.library.lanes
        sizes = [(shape.hidden, inputs)]
        for weight in self.weights:
            sizes += [(len(weight),), tuple(weight.shape)]
        lengths = [self.period * shape.hidden, *(torch.Size(size).numel() for size in sizes)]

        def part(begin: int, end: int) -> Tensor:
            by = self.x.new_zeros(sum(lengths))
            tensors = self.x.data_ptr(), weights.data_ptr(), kept.data_ptr(), gradient.data_ptr()
            by_parameters = by.data_ptr() + lengths[0] * by.element_size()
            _check(self.library.backward(ctypes.byref(shape), begin, end, *tensors, by.data_ptr(), by_parameters))
            return by

        sums = _in_parts(shape.rows, part)
        total = sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)
        by_embedding, *flat = total.split(lengths)
        by_weight, *others = (part.view(size) for part, size in zip(flat, sizes, strict=True))
        in_order = [by for bias, weight in zip(others[::2], others[1::2], strict=True) for by in (weight, bias)]
        return by_embedding.view(self.period, shape.hidden), [by_weight[:, : shape.inputs], *in_order]


class _NativeNetwork(torch.autograd.Function):
    """`native_network` and its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, embedding: Tensor, weight: Tensor, *parameters: Tensor) -> Tensor:
        rows = _Rows(x, embedding, weight, parameters)
        kept = x.new_empty(len(parameters) // 2, rows.shape.rows, rows.shape.hidden)
        ctx.save_for_backward(x, embedding, weight, kept, *parameters)
        return rows.forward(embedding, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, embedding, weight, kept, *parameters = ctx.saved_tensors
        by_embedding, by_parameters = _Rows(x, embedding, weight, parameters).backward(gradient, kept)
        return None, by_embedding.view(embedding.shape), *by_parameters


class NativeStepNetwork:
    """`fused.StepNetwork` of what `fits`."""

    def __init__(self, embedding: Tensor, weight: Tensor, layers: Sequence[Layer], rows: int) -> None:
        built = _built()
        self._forward = built.forward
        self._embedding = embedding.detach().contiguous()
        self._factors = packed(weight.detach(), [(layer.detach(), bias.detach()) for layer, bias in layers], built.lanes)
        hidden, inputs = weight.shape
        self._out = weight.new_empty(rows, layers[-1][0].shape[0])
        self._shape = _Shape(inputs, hidden, len(layers) - 1, self._out.shape[1], rows, 1, inputs, inputs)
        self._row_bytes = hidden * weight.element_size()
        self._rows = rows

    def __call__(self, x: Tensor, n: int) -> Tensor:
        x = x.contiguous()
        row = self._embedding.data_ptr() + n * self._row_bytes
        tensors = x.data_ptr(), row, self._factors.data_ptr(), None, self._out.data_ptr()
        _check(self._forward(ctypes.byref(self._shape), 0, self._rows, *tensors))
        return self._out


def packed(weight: Tensor, layers: Sequence[Layer], lanes: int) -> Tensor:
    """Parameters as `network_forward` wants them, in one piece."""
    parts = [weight.t()]
    for layer_weight, bias in layers:
        missing = -len(bias) % lanes
        parts += [pad(bias, (0, missing)), pad(layer_weight.t(), (0, missing))]
    return torch.cat([part.reshape(-1) for part in parts])


def _built() -> Library:
    built = library()
    if built is None:
        raise RuntimeError("there is no native network: ask `fits` first")
    return built


def _check(status: int) -> None:
    if status:
        raise MemoryError("native network: no memory for its blocks")


def _in_parts(rows: int, call: Callable[[int, int], T]) -> list[T]:
    """What `call(begin, end)` gives for parts of the rows, in order, one a thread of torch's."""
    threads = min(torch.get_num_threads(), rows // PART_ROWS)
    if threads <= 1:
        return [call(0, rows)]
    bounds = [rows * i // threads for i in range(threads + 1)]
    return list(_pool(threads).map(call, bounds[:-1], bounds[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "driftstream-network")


__all__ = ["BUILDS", "NativeStepNetwork", "fits", "is_per_step", "library", "native_network"]
