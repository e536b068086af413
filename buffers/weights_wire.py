"""The weights frame: versioned weights in one frame, so that a conflating socket can keep just the newest.

A fixed header (magic, schema, checksum of all after it, version, progress, seconds, energy evaluations, length of the
description), the description with every tensor's name, dtype and shape, and the raw little-endian data: that of one
dtype together, dtypes in the order of `DTYPES` and tensors in that of the description. What has one dtype begins at a
multiple of 8 bytes, as does the description.

So a snapshot is copied and checked in one pass for each dtype, and a description, which is that of all versions of a
policy, is written and read but once.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

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
SCHEMA = 3
ALIGNMENT = 8
MAX_RANK = 8
MAX_DESCRIPTION_BYTES = 2**16
MAX_TENSOR_NAME_LENGTH = 4 * MAX_NAME_LENGTH

CHECKED = struct.Struct("<4sII")  # magic, schema, checksum of all that follows
HEADER = struct.Struct("<qddqI")  # version, progress, wall_s, energy_evaluations, bytes of the description
TENSOR = struct.Struct("<HBB")  # bytes of the name, dtype code, rank; then the name and the sizes as uint64
START = CHECKED.size + HEADER.size
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32)

Entry = tuple[str, int, tuple[int, ...]]
"""A tensor's name, the place of its dtype in `DTYPES`, and its shape."""


@dataclass(frozen=True)
class WeightSnapshot:
    """Weights at learner step `version`, with what travels beside them.

    `progress` is the share of training done, in [0, 1]; `wall_s` and `energy_evaluations` are the run's
    position when the snapshot was taken. `tensors` holds parameters and buffers by name, all on one device.
    """

    version: int
    progress: float
    wall_s: float
    energy_evaluations: int
    tensors: Mapping[str, Tensor]


class WeightEncoder:
    """Encodes versions of the same tensors, whose values change where they stand.

    What all versions have in common is worked out once, which is most of the work for a policy's many small tensors.
    Raises `WireError` for tensors that `decode_weights` would refuse, whatever their values.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._groups: dict[int, dict[str, Tensor]] = {}
        entries: list[Entry] = []
        for name, value in tensors.items():
            if value.dtype not in DTYPES:
                raise WireError(f"tensor {name!r} of {value.dtype} has no place in a weights frame")
            code = DTYPES.index(value.dtype)
            # A view, where the values lie side by side; others are copied at every version.
            part = value.detach().view(-1) if value.is_contiguous() else value.detach()
            self._groups.setdefault(code, {})[name] = part
            entries.append((name, code, tuple(value.shape)))
        self._groups = dict(sorted(self._groups.items()))
        self._description = _description(tuple(entries))

    def encode(self, version: int, progress: float, wall_s: float, energy_evaluations: int) -> bytearray:
        """One frame with a copy of the present values (see `WeightSnapshot`).

        Raises `WireError` for a position or values that `decode_weights` would refuse.
        """
        _check_position(version, progress, wall_s, energy_evaluations)
        header = HEADER.pack(version, progress, wall_s, energy_evaluations, len(self._description))
        frame = bytearray(CHECKED.size) + header + self._description
        for parts in self._groups.values():
            data = torch.cat([part if part.dim() == 1 else part.reshape(-1) for part in parts.values()]).cpu()
            _check_finite(data, parts)
            frame += bytes(-len(frame) % ALIGNMENT)
            frame += tensor_bytes(data)
        CHECKED.pack_into(frame, 0, MAGIC, SCHEMA, checksum([memoryview(frame)[CHECKED.size :]]))
        return frame


def encode_weights(snapshot: WeightSnapshot) -> bytearray:
    """One frame with a copy of the snapshot: the weights may change as soon as this returns.

    Raises `WireError` for all that `decode_weights` would refuse.
    """
    encoder = WeightEncoder(snapshot.tensors)
    return encoder.encode(snapshot.version, snapshot.progress, snapshot.wall_s, snapshot.energy_evaluations)


def decode_weights(frame: Buffer, limits: WireLimits | None = None) -> WeightSnapshot:
    """The snapshot that a frame holds; its tensors are views of the frame, which each of them keeps alive.

    Raises `WireError`, and nothing else, for a frame that is cut, too long, damaged or not a weights frame.
    """
    limits = limits or WireLimits()
    view = byte_view(frame)
    if not START <= len(view) <= limits.max_message_bytes:
        raise WireError(f"weights frame of {len(view)} bytes: expected up to {limits.max_message_bytes}")
    magic, schema, expected = CHECKED.unpack_from(view)
    if magic != MAGIC or schema != SCHEMA:
        raise WireError(f"not a weights frame of schema version {SCHEMA}")
    if expected != checksum([view[CHECKED.size :]]):
        raise WireError("checksum of the weights frame does not match")
    version, progress, wall_s, energy_evaluations, length = HEADER.unpack_from(view, CHECKED.size)
    _check_position(version, progress, wall_s, energy_evaluations)
    if length > (most := min(MAX_DESCRIPTION_BYTES, len(view) - START)):
        raise WireError(f"description of {length} bytes in a weights frame: at most {most}")
    entries = _entries(bytes(view[START : START + length]))
    tensors = dict.fromkeys((name for name, _, _ in entries), torch.empty(0))
    offset = START + length
    for code in sorted({code for _, code, _ in entries}):
        offset += -offset % ALIGNMENT
        shapes = {name: shape for name, other, shape in entries if other == code}
        sizes = [math.prod(shape) for shape in shapes.values()]
        end = offset + sum(sizes) * DTYPES[code].itemsize
        if end > len(view):
            raise WireError(f"data of {DTYPES[code]} that reaches beyond its weights frame")
        data = view_tensor(view[offset:end], DTYPES[code], [sum(sizes)])
        parts = dict(zip(shapes, data.split(sizes), strict=True))
        _check_finite(data, parts)
        tensors |= {name: part.view(shapes[name]) for name, part in parts.items()}
        offset = end
    if offset != len(view):
        raise WireError(f"{len(view) - offset} bytes after the last tensor of a weights frame")
    return WeightSnapshot(version, progress, wall_s, energy_evaluations, tensors)


def _describe(entries: tuple[Entry, ...]) -> bytes:
    """The description of tensors, which `_read_entries` reads; raises `WireError` for what it would refuse."""
    parts = []
    for name, code, shape in entries:
        encoded = name.encode()
        if len(shape) > MAX_RANK or not 0 < len(encoded) <= MAX_TENSOR_NAME_LENGTH:
            raise WireError(f"tensor {name!r} of rank {len(shape)} has no place in a weights frame")
        parts += [TENSOR.pack(len(encoded), code, len(shape)), encoded, struct.pack(f"<{len(shape)}Q", *shape)]
    description = b"".join(parts)
    if len(description) > MAX_DESCRIPTION_BYTES:
        raise WireError(f"description of {len(description)} bytes in a weights frame: at most {MAX_DESCRIPTION_BYTES}")
    return description


def _read_entries(description: bytes) -> tuple[Entry, ...]:
    """The tensors that a description names, in its order."""
    entries: dict[str, Entry] = {}
    offset = 0
    while offset < len(description):
        try:
            name_length, code, rank = TENSOR.unpack_from(description, offset)
            offset += TENSOR.size
            if not 0 < name_length <= MAX_TENSOR_NAME_LENGTH or code >= len(DTYPES) or rank > MAX_RANK:
                raise WireError("tensor entry with a name, dtype or rank that is not allowed")
            name = str(description[offset : offset + name_length], "utf-8")
            shape = struct.unpack_from(f"<{rank}Q", description, offset + name_length)
        except (struct.error, UnicodeDecodeError):
            raise WireError("weights frame with a damaged tensor entry") from None
        if name in entries:
            raise WireError(f"tensor {name!r} twice in a weights frame")
        # The strides of an empty tensor must fit their integers too.
        if math.prod(max(size, 1) for size in shape) > MAX_INTEGER:
            raise WireError(f"tensor {name!r} of shape {shape} reaches beyond its weights frame")
        offset += name_length + 8 * rank
        entries[name] = (name, code, shape)
    return tuple(entries.values())


# Every version of a policy has the same description.
_description, _entries = lru_cache(maxsize=2)(_describe), lru_cache(maxsize=2)(_read_entries)


def _check_position(version: int, progress: float, wall_s: float, energy_evaluations: int) -> None:
    if not is_integer(version) or not is_integer(energy_evaluations):
        raise WireError(f"version and energy evaluations: expected integers from 0 to {MAX_INTEGER}")
    if not 0.0 <= progress <= 1.0 or not (math.isfinite(wall_s) and wall_s >= 0.0):
        raise WireError(f"progress {progress}, wall_s {wall_s}: expected [0, 1] and a finite time")


def _check_finite(data: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Raise for the first part that is not finite, if `data`, which is all of them, is not."""
    if data.is_floating_point() and not is_finite(data):
        name = next(name for name, part in parts.items() if not is_finite(part))
        raise WireError(f"weights {name!r} hold a value that is not finite")
