"""The pickle-free wire format of everything but weights (those are in `weights_wire`).

One message is a JSON header frame followed by one raw, little-endian, C-ordered frame per tensor. The header
names the kind, who sent it and where it stands in the sender's stream, and the name, dtype and shape of every
tensor frame, with one checksum over all of them. `KINDS` says what each kind carries; a message that is not in
the table cannot be built, sent or received.

A decoder faces bytes that anybody may have written. It therefore checks the header against limits, the table
and the frames' lengths before a tensor is made, never allocates by a length that the header claims, and
raises nothing but `WireError`.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import zmq
from torch import Tensor

from driftstream.buffers.checks import MAX_INTEGER, is_integer, is_name
from driftstream.buffers.checksum import checksum
from driftstream.envs.errors import require
from driftstream.envs.finiteness import is_finite

Buffer = bytes | bytearray | memoryview | zmq.Frame

MAGIC = "driftstream"
SCHEMA = 2
DTYPES = {"float32": torch.float32, "float64": torch.float64}
MAX_COUNTERS = 64

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("driftstream's wire format is little-endian; this machine is not")


class WireError(ValueError):
    """A message that breaks the wire format; the text says what was found and what was expected."""


@dataclass(frozen=True)
class WireLimits:
    """What a decoder takes at most: bytes of a message and its header, rows (B, N), steps T, dimension D."""

    max_message_bytes: int = 256 * 2**20
    max_header_bytes: int = 16 * 2**10
    max_rows: int = 1_000_000
    max_steps: int = 10_000
    max_dim: int = 100_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            require(type(value) is int and value >= 1, f"limits.{name}", value, "an integer of at least 1")


@dataclass(frozen=True)
class Layout:
    """Shape of one tensor of a kind, in sizes that the tensors of a message share ("T+1" binds T)."""

    sizes: tuple[str, ...]
    required: bool = True


_PAIRS = {"terminal": Layout(("N", "D")), "log_reward": Layout(("N",))}

KINDS: Mapping[str, Mapping[str, Layout]] = {
    "hello": {},
    "credit": {},
    "seed_request": {},
    "trajectories": {
        "states": Layout(("B", "T+1", "D")),
        "times": Layout(("T+1",)),
        "log_reward": Layout(("B",)),
        "scores": Layout(("B", "T", "D"), required=False),
    },
    "terminals": _PAIRS,
    "seeds": _PAIRS,
}


@dataclass(frozen=True)
class Message:
    """One message: `tensors` as `KINDS[kind]` lays them out, and finite numbers in `counters`.

    `sequence` numbers a sender's data from 1 within one `epoch` (a sender's restart count); control kinds use
    it as `channels` says. `policy_version` is the version of the weights that made the data.
    """

    kind: str
    sender: str
    epoch: int = 0
    sequence: int = 0
    policy_version: int = 0
    counters: Mapping[str, int | float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of rows (trajectories, or terminal states) that the message carries."""
        log_reward = self.tensors.get("log_reward")
        return 0 if log_reward is None else len(log_reward)


def encode(message: Message, limits: WireLimits | None = None) -> list[bytes | memoryview]:
    """Frames of a message: the header, then views of its tensors (zero-copy where contiguous and on the CPU).

    The views share the tensors' memory: do not write to a tensor while its message may still be sent.
    Gradients are cut. Raises `WireError` for all that `decode` would refuse, so that a fault shows at its
    source.
    """
    limits = limits or WireLimits()
    tensors = {name: value.detach().cpu().contiguous() for name, value in message.tensors.items()}
    payload = [tensor_bytes(value) for value in tensors.values()]
    header = {
        "magic": MAGIC,
        "schema": SCHEMA,
        "kind": message.kind,
        "sender": message.sender,
        "epoch": message.epoch,
        "sequence": message.sequence,
        "policy_version": message.policy_version,
        "counters": dict(message.counters),
        "tensors": [[k, str(v.dtype).removeprefix("torch."), list(v.shape)] for k, v in tensors.items()],
        "checksum": checksum(payload),
    }
    try:
        frames: list[bytes | memoryview] = [json.dumps(header, allow_nan=False).encode(), *payload]
    except (TypeError, ValueError) as error:
        raise WireError(f"header cannot be written as JSON: {error}") from None
    _check_header_length(len(frames[0]), limits)
    _read_header(header, [len(frame) for frame in frames], limits)
    _check_finite(tensors)
    return frames


def decode(frames: Sequence[Buffer], limits: WireLimits | None = None) -> Message:
    """The message that `frames` hold; its tensors are views of the frames, which they keep alive.

    Raises `WireError`, and nothing else, for whatever the format, the table of kinds or the limits do not
    allow, for a wrong checksum, and for a tensor that holds a value that is not finite.
    """
    limits = limits or WireLimits()
    if not frames:
        raise WireError("message without frames")
    views = [byte_view(frame) for frame in frames]
    _check_header_length(len(views[0]), limits)
    header = _parse_json(views[0])
    dtypes_and_shapes = _read_header(header, [len(view) for view in views], limits)
    if header["checksum"] != checksum(views[1:]):
        raise WireError("checksum of the tensor frames does not match the header")
    tensors = {
        name: view_tensor(view, DTYPES[dtype], shape)
        for (name, (dtype, shape)), view in zip(dtypes_and_shapes.items(), views[1:], strict=True)
    }
    _check_finite(tensors)
    keys = ("kind", "sender", "epoch", "sequence", "policy_version", "counters")
    return Message(**{key: header[key] for key in keys}, tensors=tensors)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def byte_view(frame: Buffer) -> memoryview:
    """Bytes of a frame, sharing its memory."""
    return frame.buffer if isinstance(frame, zmq.Frame) else memoryview(frame)


def view_tensor(view: memoryview, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor over `view`, whose length must fit; a copy only where the bytes are read-only or unaligned."""
    if not len(view):
        return torch.empty(tuple(shape), dtype=dtype)
    tensor = torch.frombuffer(bytearray(view) if view.readonly else view, dtype=dtype).reshape(tuple(shape))
    return tensor.clone() if tensor.data_ptr() % dtype.itemsize else tensor


def _check_header_length(length: int, limits: WireLimits) -> None:
    if length > limits.max_header_bytes:
        raise WireError(f"header of {length} bytes: at most {limits.max_header_bytes}")


def _parse_json(view: memoryview) -> Any:
    try:
        return json.loads(str(view, "utf-8"))
    except (ValueError, RecursionError):
        raise WireError("header is not JSON") from None


def _read_header(header: Any, lengths: Sequence[int], limits: WireLimits) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Check a header against table, limits and the frames' lengths; returns dtype and shape by name."""
    if sum(lengths) > limits.max_message_bytes:
        raise WireError(f"message of {sum(lengths)} bytes: at most {limits.max_message_bytes}")
    if not isinstance(header, dict) or header.get("magic") != MAGIC:
        raise WireError("not a driftstream message")
    if type(header.get("schema")) is not int or header["schema"] != SCHEMA:
        raise WireError(f"schema version {_show(header.get('schema'))}: expected {SCHEMA}")
    kind = header.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise WireError(f"kind {_show(kind)}: expected one of {', '.join(KINDS)}")
    if not is_name(header.get("sender")):
        raise WireError(f"sender {_show(header.get('sender'))}: expected a short printable name")
    for key in ("epoch", "sequence", "policy_version", "checksum"):
        if not is_integer(header.get(key)):
            raise WireError(f"{key} {_show(header.get(key))}: expected an integer of at least 0")
    _check_counters(header.get("counters"))
    return _read_tensors(kind, header.get("tensors"), lengths[1:], limits)


def _check_counters(counters: Any) -> None:
    if not isinstance(counters, dict) or len(counters) > MAX_COUNTERS:
        raise WireError(f"counters: expected an object of at most {MAX_COUNTERS} numbers")
    for name, value in counters.items():
        number = is_integer(value, least=-MAX_INTEGER) or (type(value) is float and math.isfinite(value))
        if not is_name(name) or not number:
            raise WireError(f"counter {_show(name)} = {_show(value)}: expected a name and a finite number")


def _read_tensors(
    kind: str, entries: Any, lengths: Sequence[int], limits: WireLimits
) -> dict[str, tuple[str, tuple[int, ...]]]:
    layouts = KINDS[kind]
    if not isinstance(entries, list) or len(entries) != len(lengths):
        raise WireError(f"{len(lengths)} tensor frames, which the header does not describe one by one")
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    bound: dict[str, int] = {}
    most = {"B": limits.max_rows, "N": limits.max_rows, "T": limits.max_steps, "D": limits.max_dim}
    for entry, length in zip(entries, lengths, strict=True):
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[0], str)):
            raise WireError("tensor entry: expected [name, dtype, shape]")
        name, dtype, shape = entry
        if name not in layouts or name in found:
            raise WireError(f"tensor {_show(name)}: unknown to {kind}, or given twice")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise WireError(f"dtype {_show(dtype)} of {name}: expected one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) != len(layouts[name].sizes):
            raise WireError(f"shape {_show(shape)} of {name}: expected [{', '.join(layouts[name].sizes)}]")
        for size, value in zip(layouts[name].sizes, shape, strict=True):
            _bind(bound, most, name, size, value)
        if math.prod(shape) * DTYPES[dtype].itemsize != length:
            raise WireError(f"frame of {length} bytes for {name}: shape {shape} of {dtype} takes another length")
        found[name] = (dtype, tuple(shape))
    missing = [name for name, layout in layouts.items() if layout.required and name not in found]
    if missing:
        raise WireError(f"{kind} without {', '.join(missing)}")
    return found


def _bind(bound: dict[str, int], most: Mapping[str, int], tensor: str, size: str, value: Any) -> None:
    symbol, _, plus = size.partition("+")
    # Who has nothing to send but its counters (all rejected, none accepted) sends no rows.
    least = 0 if symbol in "BN" else 1
    if type(value) is not int or not least <= value - int(plus or 0) <= most[symbol]:
        raise WireError(f"{size} = {_show(value)} of {tensor}: {symbol} is an integer from {least} to {most[symbol]}")
    if bound.setdefault(symbol, value - int(plus or 0)) != value - int(plus or 0):
        raise WireError(f"{size} = {value} of {tensor}: other tensors have {symbol} = {bound[symbol]}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise WireError(f"{name} holds a value that is not finite")


def _show(value: object) -> str:
    """A hostile value, cut to what fits a log line; containers may be nested too deeply for `repr`."""
    text = repr(value) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
