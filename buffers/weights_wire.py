"""The weights frame: versioned weights in one frame, so that a conflating socket can keep just the newest.

A fixed header (magic, schema, tensor count, checksum of all after it, version, progress, seconds, energy
evaluations), then per tensor its name, dtype and shape, then zero bytes up to a multiple of 8, then its raw
little-endian data.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from driftstream.buffers.checks import MAX_INTEGER, MAX_NAME_LENGTH, is_integer
from driftstream.buffers.checksum import checksum
from driftstream.buffers.wire import (
    Buffer,
    WireError,
    WireLimits,
    byte_view,
    tensor_bytes,
    view_tensor,
)
from driftstream.envs.finiteness import is_finite

MAGIC = b"DSTW"
SCHEMA = 2
ALIGNMENT = 8
MAX_RANK = 8
MAX_TENSORS = 10_000
MAX_TENSOR_NAME_LENGTH = 4 * MAX_NAME_LENGTH

CHECKED = struct.Struct("<4sII")  # magic, schema, checksum of all that follows
HEADER = struct.Struct("<qddqI4x")  # version, progress, wall_s, energy_evaluations, tensor count
TENSOR = struct.Struct("<HBB")  # bytes of the name, dtype code, rank; then the name and the sizes as uint64
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)


@dataclass(frozen=True)
class WeightSnapshot:
    """Weights at learner step `version`, with what travels beside them.

    `progress` is the share of training done, in [0, 1]; `wall_s` and `energy_evaluations` are the run's
    position when the snapshot was taken. `tensors` holds parameters and buffers by name.
    """

    version: int
    progress: float
    wall_s: float
    energy_evaluations: int
    tensors: Mapping[str, Tensor]


def encode_weights(snapshot: WeightSnapshot) -> bytes:
    """One frame with a copy of the snapshot: the weights may change as soon as this returns.

    Raises `WireError` for all that `decode_weights` would refuse.
    """
    _check_position(snapshot.version, snapshot.progress, snapshot.wall_s, snapshot.energy_evaluations)
    parts: list[bytes | memoryview] = [
        HEADER.pack(
            snapshot.version,
            snapshot.progress,
            snapshot.wall_s,
            snapshot.energy_evaluations,
            len(snapshot.tensors),
        )
    ]
    offset = CHECKED.size + HEADER.size
    for name, value in snapshot.tensors.items():
        tensor = value.detach().cpu().contiguous()
        encoded = name.encode()
        if tensor.dtype not in DTYPES or tensor.dim() > MAX_RANK or not 0 < len(encoded) <= MAX_TENSOR_NAME_LENGTH:
            raise WireError(f"tensor {name!r} of {tensor.dtype}, rank {tensor.dim()} has no place in a weights frame")
        _check_finite(name, tensor)
        entry = TENSOR.pack(len(encoded), DTYPES.index(tensor.dtype), tensor.dim()) + encoded
        entry += struct.pack(f"<{tensor.dim()}Q", *tensor.shape)
        entry += bytes(-(offset + len(entry)) % ALIGNMENT)
        parts += [entry, tensor_bytes(tensor)]
        offset += len(entry) + tensor.nbytes
    body = b"".join(parts)
    return CHECKED.pack(MAGIC, SCHEMA, checksum([body])) + body


def decode_weights(frame: Buffer, limits: WireLimits | None = None) -> WeightSnapshot:
    """The snapshot that a frame holds; its tensors are views of the frame, which they keep alive.

    Raises `WireError`, and nothing else, for a frame that is cut, too long, damaged or not a weights frame.
    """
    limits = limits or WireLimits()
    view = byte_view(frame)
    if not CHECKED.size + HEADER.size <= len(view) <= limits.max_message_bytes:
        raise WireError(f"weights frame of {len(view)} bytes: expected up to {limits.max_message_bytes}")
    magic, schema, expected = CHECKED.unpack_from(view)
    if magic != MAGIC or schema != SCHEMA:
        raise WireError(f"not a weights frame of schema version {SCHEMA}")
    if expected != checksum([view[CHECKED.size :]]):
        raise WireError("checksum of the weights frame does not match")
    version, progress, wall_s, energy_evaluations, count = HEADER.unpack_from(view, CHECKED.size)
    _check_position(version, progress, wall_s, energy_evaluations)
    if count > MAX_TENSORS:
        raise WireError(f"{count} tensors in a weights frame: at most {MAX_TENSORS}")
    tensors: dict[str, Tensor] = {}
    offset = CHECKED.size + HEADER.size
    for _ in range(count):
        name, tensor, offset = _read_tensor(view, offset)
        if name in tensors:
            raise WireError(f"tensor {name!r} twice in a weights frame")
        tensors[name] = tensor
    if offset != len(view):
        raise WireError(f"{len(view) - offset} bytes after the last tensor of a weights frame")
    return WeightSnapshot(version, progress, wall_s, energy_evaluations, tensors)


def _read_tensor(view: memoryview, offset: int) -> tuple[str, Tensor, int]:
    """The tensor entry at `offset`: name, tensor, and the offset behind it."""
    try:
        name_length, code, rank = TENSOR.unpack_from(view, offset)
        offset += TENSOR.size
        if not 0 < name_length <= MAX_TENSOR_NAME_LENGTH or code >= len(DTYPES) or rank > MAX_RANK:
            raise WireError("tensor entry with a name, dtype or rank that is not allowed")
        name = str(view[offset : offset + name_length], "utf-8")
        shape = struct.unpack_from(f"<{rank}Q", view, offset + name_length)
    except (struct.error, UnicodeDecodeError):
        raise WireError("weights frame with a damaged tensor entry") from None
    offset += name_length + 8 * rank
    offset += -offset % ALIGNMENT
    end = offset + math.prod(shape) * DTYPES[code].itemsize
    # The strides of an empty tensor must fit their integers too.
    if end > len(view) or math.prod(max(size, 1) for size in shape) > MAX_INTEGER:
        raise WireError(f"tensor {name!r} of shape {shape} reaches beyond its weights frame")
    tensor = view_tensor(view[offset:end], DTYPES[code], shape)
    _check_finite(name, tensor)
    return name, tensor, end


def _check_position(version: int, progress: float, wall_s: float, energy_evaluations: int) -> None:
    if not is_integer(version) or not is_integer(energy_evaluations):
        raise WireError(f"version and energy evaluations: expected integers from 0 to {MAX_INTEGER}")
    if not 0.0 <= progress <= 1.0 or not (math.isfinite(wall_s) and wall_s >= 0.0):
        raise WireError(f"progress {progress}, wall_s {wall_s}: expected [0, 1] and a finite time")


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not is_finite(tensor):
        raise WireError(f"weights {name!r} hold a value that is not finite")
