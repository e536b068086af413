"""What a broken or hostile peer might send: valid messages, mutated field by field and byte by byte.

A mutation knows the structure that it breaks (a header's fields, a tensor's name, dtype and shape, the frames behind
them), so that its damage reaches every check of a decoder and not only the first. Every function draws from the
`Random` it is given. Half of the messages get a checksum that fits their damage.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from copy import deepcopy
from random import Random
from typing import Any

import torch
import zmq
from torch import Tensor

from driftstream.buffers import weights_wire, wire
from driftstream.buffers.checksum import checksum
from driftstream.buffers.wire import Buffer, Message, WireLimits

LIMITS = WireLimits(max_message_bytes=16_384, max_header_bytes=2048, max_rows=16, max_steps=8, max_dim=8)
"""Limits so low that small messages meet them."""

_HUGE = (2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
_SIZES: tuple[Any, ...] = (*range(-1, 4), 8, 9, *_HUGE, 2**64, 10**400, True, 3.0, "3", None, [3], {})
_FLOATS = (math.nan, math.inf, -math.inf, -0.0, 1e308, 5e-324)
_TEXTS = ("", "a", "a b", "a\n", "é", "\ud800", "a" * 64, "a" * 65, *wire.DTYPES, *wire.KINDS, "int64", "object")
_NESTED: tuple[Any, ...] = ([], [[]], [None] * 3, {"": 1}, {"a": {}}, [[[[[]]]]], ["a", "float32", [1]])
_ODDITIES: tuple[Any, ...] = (*_SIZES, *_FLOATS, *_TEXTS, *_NESTED, False)
_NUMBERS = ("epoch", "sequence", "policy_version", "checksum")
_FIELDS = ("magic", "schema", "kind", "sender", "counters", "tensors", *_NUMBERS)
_NO_HEADERS = (b"", b"null", b"[]", b"3", b'"driftstream"', b"{}", b"-Infinity", b"\x80\x04\x95")
_NOT_FINITE = tuple(struct.pack("<f", value) for value in (math.nan, math.inf, -math.inf))
_WRONG = (None, "head", "length", "fixed", "fixed", "name", "name", "shape", "size", "data")

Header = dict[str, Any]
Payload = list[bytes]
Entry = tuple[bytes, int, list[int], bytes]
"""Name, dtype code, shape and data of a tensor in a weights frame."""


def valid_messages(random: Random) -> list[tuple[Header, Payload]]:
    """Headers and tensor frames of small messages of every kind, of both dtypes, with and without rows."""
    bare = ("hello", "credit", "seed_request")
    messages = [Message(kind, "actor-0", 1, 2, 3, {"n": 3, "rate": 0.5}) for kind in bare]
    for dtype in wire.DTYPES.values():
        for b, t, d in ((3, 4, 2), (0, 1, 1), (1, 8, 8), (16, 2, 3)):
            shapes = {"states": (b, t + 1, d), "times": (t + 1,), "log_reward": (b,), "scores": (b, t, d)}
            tensors = {name: torch.full(shape, random.gauss(), dtype=dtype) for name, shape in shapes.items()}
            messages.append(Message("trajectories", "actor-0", 1, 2, 3, {"calls": 12}, tensors))
            rest = {name: tensor for name, tensor in tensors.items() if name != "scores"}
            messages.append(Message("trajectories", "actor-1", 0, 1, 0, {}, rest))
            pairs = {"terminal": tensors["states"][:, -1], "log_reward": tensors["log_reward"]}
            messages += [Message(kind, "refiner-0", 0, 1, 0, {}, pairs) for kind in ("terminals", "seeds")]
    # More than one row of the checksum.
    long = torch.zeros(16, 9, 8, dtype=torch.float64)
    tensors = {"states": long, "times": torch.zeros(9), "log_reward": torch.zeros(16)}
    messages.append(Message("trajectories", "actor-2", tensors=tensors))
    # A sum of these overflows, although each is finite.
    largest = torch.full((4, 1), torch.finfo(torch.float32).max)
    messages.append(Message("seeds", "learner", tensors={"terminal": largest, "log_reward": torch.zeros(4)}))
    encoded = [wire.encode(message, LIMITS) for message in messages]
    return [(json.loads(bytes(head)), [bytes(frame) for frame in rest]) for head, *rest in encoded]


def mutate_message(random: Random, header: Header, payload: Payload) -> list[Buffer]:
    """The frames of a message after one mutation or more, which may leave it valid."""
    header = header | {"counters": dict(header["counters"])}
    header["tensors"] = [[name, dtype, list(shape)] for name, dtype, shape in header["tensors"]]
    payload = list(payload)
    for _ in range(random.choice((1, 1, 1, 2, 2, 3))):
        random.choice(_MESSAGE_MUTATIONS)(random, header, payload)
    if random.random() < 0.5:
        header["checksum"] = checksum(payload)
    head = json.dumps(header).encode()
    if random.random() < 0.1:
        head = random.choice(_HEAD_MUTATIONS)(random, head)
    frames = [_as_received(random, frame) for frame in (head, *payload)]
    return frames[: random.randrange(len(frames))] if random.random() < 0.01 else frames


def _as_received(random: Random, frame: bytes) -> Buffer:
    """The same bytes as read-only memory, in memory of their own, within other memory, or as a socket's frame."""
    kind = random.randrange(8)
    if kind == 0:
        return zmq.Frame(frame)
    if kind < 4:
        return bytearray(frame)
    return memoryview(bytearray(b"\0" + frame))[1:] if kind == 4 else frame


def _oddity(random: Random, among: Sequence[Any] = _ODDITIES) -> Any:
    """A value that is wrong in most places; a container of its own, as a later mutation may write to it."""
    value = random.choice(among)
    return deepcopy(value) if isinstance(value, list | dict) else value


def _field(random: Random, header: Header, payload: Payload) -> None:
    header[random.choice(_FIELDS)] = _oddity(random)


def _no_field(random: Random, header: Header, payload: Payload) -> None:
    header.pop(random.choice(_FIELDS), None)


def _other_kind(random: Random, header: Header, payload: Payload) -> None:
    header["kind"] = random.choice(tuple(wire.KINDS))


def _counter(random: Random, header: Header, payload: Payload) -> None:
    counters = header.get("counters")
    if isinstance(counters, dict):
        counters[random.choice(("x", *_TEXTS))] = _oddity(random)


def _many_counters(random: Random, header: Header, payload: Payload) -> None:
    header["counters"] = dict.fromkeys(map(str, range(random.choice((63, 64, 65)))), 0)


def _tensor_field(random: Random, header: Header, payload: Payload) -> None:
    if entry := _entry(random, header):
        entry[random.randrange(len(entry))] = _oddity(random)


def _name(random: Random, header: Header, payload: Payload) -> None:
    if entry := _entry(random, header):
        entry[0] = random.choice(("states", "times", "log_reward", "scores", "terminal", "velocity"))


def _dtype(random: Random, header: Header, payload: Payload) -> None:
    if entry := _entry(random, header):
        entry[1:2] = [random.choice(tuple(wire.DTYPES))]


def _axis(random: Random, header: Header, payload: Payload) -> None:
    entry = _entry(random, header)
    if entry and isinstance(entry[-1], list) and entry[-1]:
        entry[-1][random.randrange(len(entry[-1]))] = _oddity(random, _SIZES)


def _shape(random: Random, header: Header, payload: Payload) -> None:
    """Another shape, and a frame of the length that goes with it."""
    entry = _entry(random, header)
    if entry and payload:
        shape = [random.randrange(10) for _ in range(random.randrange(4))]
        entry[2:] = [shape]
        index = min(header["tensors"].index(entry), len(payload) - 1)
        payload[index] = bytes(random.choice((4, 8)) * math.prod(shape))


def _entries(random: Random, header: Header, payload: Payload) -> None:
    """Tensor entries in another order, one missing, one twice, one cut or one too many."""
    entries = header.get("tensors")
    if isinstance(entries, list) and entries:
        index = random.randrange(len(entries))
        match random.randrange(5):
            case 0:
                random.shuffle(entries)
            case 1:
                del entries[index]
            case 2:
                entries[random.randrange(len(entries))] = entries[index]
            case 3:
                entries[index] = random.choice((entries[0:1], ["states", "float32"], "abc", None, {}))
            case _:
                entries.append(entries[index])


def _without(random: Random, header: Header, payload: Payload) -> None:
    """One tensor less, of header and payload alike."""
    entries = header.get("tensors")
    if isinstance(entries, list) and entries and len(entries) == len(payload):
        index = random.randrange(len(entries))
        del entries[index], payload[index]


def _frames(random: Random, header: Header, payload: Payload) -> None:
    """Tensor frames in another order, one missing, twice, cut, longer, empty or replaced."""
    if not payload:
        payload.append(random.randbytes(random.randrange(9)))
        return
    index = random.randrange(len(payload))
    frame = payload[index]
    match random.randrange(8):
        case 0:
            random.shuffle(payload)
        case 1:
            del payload[index]
        case 2:
            payload.append(frame)
        case 3:
            payload[index] = frame[: random.randrange(len(frame) + 1)]
        case 4:
            payload[index] = frame + random.randbytes(random.randrange(1, 9))
        case 5:
            payload[index] = b""
        case 6:
            payload[index] = random.randbytes(len(frame))
        case _:
            payload[index] = bytes(LIMITS.max_message_bytes)


def _bytes(random: Random, header: Header, payload: Payload) -> None:
    """Single bytes of a tensor frame, or one value that is not finite."""
    if payload:
        index = random.randrange(len(payload))
        new = random.choice(_NOT_FINITE) if random.random() < 0.5 else random.randbytes(random.randrange(1, 4))
        payload[index] = overwrite(random, payload[index], new, random.choice((1, 4)))


def _entry(random: Random, header: Header) -> list[Any]:
    """A tensor entry to change, or an empty list where there is none."""
    entries = header.get("tensors")
    entry = random.choice(entries) if isinstance(entries, list) and entries else None
    return entry if isinstance(entry, list) else []


_MESSAGE_MUTATIONS: Sequence[Callable[[Random, Header, Payload], None]] = (
    _field, _no_field, _other_kind, _counter, _many_counters, _tensor_field, _name, _dtype, _axis, _shape, _entries,
    _without, _frames, _bytes,
)  # fmt: skip


def overwrite(random: Random, data: bytes, new: bytes, step: int = 1) -> bytes:
    """`data` with `new` in place of as many bytes, at a multiple of `step`; as it is where it is shorter."""
    if len(data) < len(new):
        return data
    at = random.randrange(0, len(data) - len(new) + 1, step)
    return data[:at] + new + data[at + len(new) :]


def _deep(random: Random, head: bytes) -> bytes:
    return random.choice((b"[", b'{"a":', b'{"counters":[')) * random.choice((10, 300, 2000))


def _digits(random: Random, head: bytes) -> bytes:
    return head.replace(b"1", b"1" * random.choice((20, 400, 1500)), 1)


_HEAD_MUTATIONS: Sequence[Callable[[Random, bytes], bytes]] = (
    lambda random, head: head[: random.randrange(len(head))],
    lambda random, head: head + random.randbytes(random.randrange(1, 4)),
    lambda random, head: overwrite(random, head, random.randbytes(1)),
    lambda random, head: overwrite(random, head, random.choice((b"\xff", b"\xc3\x28", b"\0", b"NaN", b"}", b"1e999"))),
    lambda random, head: head + b" " * LIMITS.max_header_bytes,
    lambda random, head: random.randbytes(random.randrange(40)),
    lambda random, head: random.choice(_NO_HEADERS),
    lambda random, head: head.decode().encode(random.choice(("utf-16", "utf-32", "utf-8-sig"))),
    _deep,
    _digits,
)


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """A frame cut, longer, with bytes changed, or as it is."""
    match random.randrange(5):
        case 0:
            return data[: random.randrange(len(data) + 1)]
        case 1:
            return data + random.randbytes(random.randrange(1, 17))
        case 2:
            return overwrite(random, data, random.randbytes(random.choice((1, 2, 4, 8))))
        case 3:
            return overwrite(random, data, random.choice((b"\0" * 8, b"\xff" * 8, *_NOT_FINITE)), 4)
        case _:
            return data


def valid_weights(random: Random) -> list[list[Entry]]:
    """Tensors of small snapshots: none, of every dtype, of all ranks, empty, and such that their sum overflows."""
    snapshots: list[dict[str, Tensor]] = [{}, {"é": torch.tensor(1.5)}, {"none": torch.empty(0, 3), "w": torch.ones(1)}]
    snapshots += [{"w": torch.full((2, 3), random.gauss()).to(dtype)} for dtype in weights_wire.DTYPES]
    snapshots += [{"a": torch.zeros([1] * rank), "b": torch.ones(2, 2)} for rank in range(weights_wire.MAX_RANK + 1)]
    snapshots.append({"h": torch.ones(3).half(), "d": torch.ones(1).double(), "i": torch.arange(2).half()})
    snapshots.append({"largest": torch.full((4,), torch.finfo(torch.float32).max)})
    return [[_described(name, tensor) for name, tensor in snapshot.items()] for snapshot in snapshots]


def _described(name: str, tensor: Tensor) -> Entry:
    code = weights_wire.DTYPES.index(tensor.dtype)
    return name.encode(), code, list(tensor.shape), bytes(wire.tensor_bytes(tensor))


def mutate_weights(random: Random, entries: Sequence[Entry]) -> bytes:
    """A weights frame of tensors, written with up to one field that is not theirs, then damaged byte by byte or not."""
    wrong = random.choice(_WRONG)
    chosen = random.randrange(len(entries)) if entries else None
    described, groups = b"", dict[int, bytes]()
    for index, entry in enumerate(entries):
        description, data = _weights_entry(random, entry, wrong if index == chosen else None)
        described += description
        groups[entry[1]] = groups.get(entry[1], b"") + data
    head: list[Any] = [7, 0.25, 3.5, 10**12, len(described)]
    if wrong == "head":
        place = random.randrange(4)
        head[place] = random.choice((*_FLOATS, -0.1, 1.1) if place in (1, 2) else (-1, 0, 2**63 - 1, -(2**63)))
    elif wrong == "length":
        head[4] = random.choice((0, 1, head[4] + 1, 2**32 - 1))
    body = weights_wire.HEADER.pack(*head) + described
    for _, data in sorted(groups.items()):
        body += bytes(-(weights_wire.CHECKED.size + len(body)) % weights_wire.ALIGNMENT) + data
    if random.random() < 0.4:
        body = mutate_bytes(random, body)
    if random.random() < 0.02:
        body += bytes(LIMITS.max_message_bytes)
    found = checksum([body]) if random.random() < 0.5 else random.getrandbits(32)
    frame = weights_wire.CHECKED.pack(weights_wire.MAGIC, weights_wire.SCHEMA, found) + body
    return mutate_bytes(random, frame) if random.random() < 0.1 else frame


def _weights_entry(random: Random, entry: Entry, wrong: str | None) -> tuple[bytes, bytes]:
    """A tensor's description, and its data."""
    name, code, sizes, data = entry
    fixed = [len(name), code, len(sizes)]
    match wrong:
        case "fixed":
            place = random.randrange(3)
            fixed[place] = random.choice((0, 1, 2, 8, 9, 255, 300 if place == 0 else 7))
        case "name":
            name = random.choice((b"a", b"b", b"\xff", b"\xc3\x28"))
            fixed[0] = len(name)
        case "shape":
            sizes = [random.choice((0, 1, 2**8, 2**32)) for _ in range(random.randrange(9))]
            fixed[2] = len(sizes)
        case "size" if sizes:
            place = random.randrange(len(sizes))
            sizes = [*sizes[:place], random.choice((0, 2, *_HUGE)), *sizes[place + 1 :]]
        case "data":
            data = overwrite(random, data, random.choice((*_NOT_FINITE, b"\xff" * 8, b"\x7c", b"\x7f")))
    return weights_wire.TENSOR.pack(*fixed) + name + struct.pack(f"<{len(sizes)}Q", *sizes), data


def valid_reports() -> list[bytes]:
    """What a role sends to the supervisor, and a command that it is answered with."""
    reports = [
        {"role": "actor-0", "kind": "heartbeat", "seen": 0, "payload": {"pid": 3, "turn_s": 0.5}},
        {"role": "learner", "kind": "metrics", "seen": 1, "payload": {"metrics": {"loss": math.nan}, "step": 3}},
        {"number": 3, "command": "stop"},
    ]
    return [json.dumps(report).encode() for report in reports]


def mutate_report(random: Random, report: bytes) -> list[Buffer]:
    """A report with a field or with bytes changed; sometimes in two frames, or in none."""
    if random.random() < 0.5:
        content = json.loads(report)
        content[random.choice((*content, "more"))] = _oddity(random)
        report = json.dumps(content).encode()
    else:
        report = random.choice((*_HEAD_MUTATIONS, mutate_bytes))(random, report)
    return [report] * random.choice((0, 1, 1, 1, 1, 1, 2))
