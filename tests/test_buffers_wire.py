"""The wire format: what is sent arrives bit for bit, and nothing but a well-formed message gets through."""

import contextlib
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from driftstream.buffers import weights_wire
from driftstream.buffers.checksum import checksum
from driftstream.buffers.weights_wire import WeightSnapshot, decode_weights, encode_weights
from driftstream.buffers.wire import Message, WireError, WireLimits, decode, encode
from driftstream.envs.errors import ConfigError
from driftstream.envs.finiteness import is_finite

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("error")]

dtypes = st.sampled_from([torch.float32, torch.float64])
counters = st.dictionaries(
    st.from_regex(r"[a-z][a-z_/]{0,20}", fullmatch=True),
    st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    max_size=5,
)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    kind = draw(st.sampled_from(["hello", "credit", "seed_request", "trajectories", "terminals", "seeds"]))
    b, t, d = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def tensor(*shape: int) -> torch.Tensor:
        dtype = draw(dtypes)
        some = torch.randn(shape, generator=generator, dtype=dtype)
        limits = torch.finfo(dtype)
        extreme = draw(st.sampled_from([-0.0, limits.max, limits.min, limits.tiny, -limits.smallest_normal / 2]))
        return torch.where(some > 1.0, extreme, some)

    tensors: dict[str, torch.Tensor] = {}
    if kind == "trajectories":
        tensors = {"states": tensor(b, t + 1, d), "times": tensor(t + 1), "log_reward": tensor(b)}
        if draw(st.booleans()):
            tensors["scores"] = tensor(b, t, d)
    elif kind in ("terminals", "seeds"):
        n = draw(st.integers(0, 5))
        tensors = {"terminal": tensor(n, d), "log_reward": tensor(n)}
    numbers = st.integers(0, 2**63 - 1)
    return Message(kind, "actor-0", draw(numbers), draw(numbers), draw(numbers), draw(counters), tensors)


def assert_same(received: Message, sent: Message) -> None:
    for name in ("kind", "sender", "epoch", "sequence", "policy_version", "counters"):
        assert getattr(received, name) == getattr(sent, name)
    assert received.tensors.keys() == sent.tensors.keys()
    for name, tensor in sent.tensors.items():
        assert received.tensors[name].dtype == tensor.dtype
        assert torch.equal(received.tensors[name], tensor)
        assert torch.equal(received.tensors[name].signbit(), tensor.signbit())


def trajectories() -> Message:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "states": torch.randn(3, 5, 2, generator=generator),
        "times": torch.linspace(0, 1, 5),
        "log_reward": torch.randn(3, generator=generator),
        "scores": torch.randn(3, 4, 2, generator=generator),
    }
    return Message("trajectories", "actor-0", 1, 2, 3, {"energy_evaluations": 12, "rate": 0.5}, tensors)


@settings(deadline=None)
@given(messages())
def test_a_message_arrives_bit_for_bit(message: Message) -> None:
    assert_same(decode([bytes(frame) for frame in encode(message)]), message)


@settings(max_examples=25, deadline=None)
@given(messages())
def test_a_message_arrives_over_a_socket(message: Message) -> None:
    # Small frames arrive unaligned in a shared buffer, large ones in their own: both must become tensors.
    with zmq.Context() as context, context.socket(zmq.PAIR) as left, context.socket(zmq.PAIR) as right:
        port = left.bind_to_random_port("tcp://127.0.0.1")
        right.connect(f"tcp://127.0.0.1:{port}")
        right.send_multipart(encode(message), copy=False)
        received = decode(left.recv_multipart(copy=False))
        assert_same(received, message)
        for tensor in received.tensors.values():
            assert tensor.data_ptr() % tensor.element_size() == 0


def test_tensors_are_not_copied(tmp_path: Path) -> None:
    states = torch.randn(300, 51, 32)
    large = {"states": states, "times": torch.linspace(0, 1, 51), "log_reward": torch.randn(300)}
    frames = encode(Message("trajectories", "a", tensors=large))
    states[0, 0, 0] = 7.0
    assert struct.unpack_from("<f", frames[1])[0] == 7.0
    with zmq.Context() as context, context.socket(zmq.PAIR) as left, context.socket(zmq.PAIR) as right:
        left.bind(f"ipc://{tmp_path}/s")
        right.connect(f"ipc://{tmp_path}/s")
        right.send_multipart(encode(Message("trajectories", "a", tensors=large)), copy=False)
        received = left.recv_multipart(copy=False)
        tensor = decode(received).tensors["states"]
        assert tensor.data_ptr() == torch.frombuffer(received[1].buffer, dtype=torch.float32).data_ptr()
        del received
        assert torch.equal(tensor, states)


def test_views_are_sent_as_what_they_show() -> None:
    tensors = {"terminal": torch.randn(3, 8).T[::2], "log_reward": torch.randn(8)[::2]}
    assert_same(decode(encode(Message("seeds", "a", tensors=tensors))), Message("seeds", "a", tensors=tensors))


def test_gradients_are_cut() -> None:
    message = Message(
        "seeds", "a", tensors={"terminal": torch.ones(2, 3, requires_grad=True), "log_reward": torch.ones(2)}
    )
    assert not decode(encode(message)).tensors["terminal"].requires_grad


def naive_checksum(buffers: list[bytes]) -> int:
    """The definition, word by word."""
    crc = 0
    for buffer in buffers:
        whole = len(buffer) // 8192 * 8192
        words = struct.unpack(f"<{whole // 8}Q", buffer[:whole])
        columns = [sum(words[column::1024]) % 2**64 for column in range(1024 if whole else 0)]
        rows = [sum(words[row : row + 1024]) % 2**64 for row in range(0, len(words), 1024)]
        for part in (struct.pack("<Q", len(buffer)), struct.pack(f"<{len(columns)}Q", *columns)):
            crc = zlib.crc32(part, crc)
        crc = zlib.crc32(buffer[whole:], zlib.crc32(struct.pack(f"<{len(rows)}Q", *rows), crc))
    return crc


@pytest.mark.parametrize("length", [0, 1, 8, 8191, 8192, 8193, 16384, 100_003])
def test_the_checksum_is_its_definition(length: int) -> None:
    data = Random(length).randbytes(length)
    assert checksum([data]) == naive_checksum([data])
    assert checksum([bytearray(data), memoryview(b"\0" + data)[1:], b""]) == naive_checksum([data, data, b""])


def test_the_checksum_is_the_same_on_every_machine() -> None:
    assert checksum([bytes(range(256)) * 100, b"driftstream"]) == 0x84FAFF30


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 4), st.integers(0, 8191), st.data())
def test_a_change_and_a_swap_are_seen(rows: int, rest: int, data: st.DataObject) -> None:
    size = 8192 * rows + rest
    before = Random(size).randbytes(size)
    for width in (1, 4, 8):
        if size < 2 * width:
            continue
        places = st.integers(0, size // width - 1).map(lambda place, width=width: place * width)
        a, b = data.draw(places), data.draw(places)
        changed, swapped = bytearray(before), bytearray(before)
        changed[a] ^= data.draw(st.integers(1, 255))
        swapped[a : a + width], swapped[b : b + width] = before[b : b + width], before[a : a + width]
        assert checksum([changed]) != checksum([before])
        assert (checksum([swapped]) == checksum([before])) == (swapped == before)


def test_lengths_and_order_of_frames_are_seen() -> None:
    a, b = Random(0).randbytes(20_000), Random(1).randbytes(20_000)
    cases = [[a, b], [b, a], [a + b], [a], [b], [a, b, b""], [a[:8192], a[8192:] + b], [a[:-1], b], [a + b"\0", b]]
    assert len({checksum(case) for case in cases}) == len(cases)


def rewritten(change: Callable[[dict[str, Any]], object]) -> list[bytes]:
    frames = [bytes(frame) for frame in encode(trajectories())]
    header = json.loads(frames[0])
    change(header)
    return [json.dumps(header).encode(), *frames[1:]]


HOSTILE_SIZES = [-1, 0, 2**62, 2**64, 10**400, True, 3.0, "3", None, [3], {}, float("nan"), float("inf")]
HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "magic": lambda h: h.update(magic="flux"),
    "no magic": lambda h: h.pop("magic"),
    "schema": lambda h: h.update(schema=1),
    "schema bool": lambda h: h.update(schema=True),
    "no schema": lambda h: h.pop("schema"),
    "kind": lambda h: h.update(kind="weights"),
    "kind list": lambda h: h.update(kind=["trajectories"]),
    "other kind": lambda h: h.update(kind="terminals"),
    "sender number": lambda h: h.update(sender=3),
    "sender empty": lambda h: h.update(sender=""),
    "sender long": lambda h: h.update(sender="a" * 65),
    "sender control": lambda h: h.update(sender="a\nb"),
    "no counters": lambda h: h.pop("counters"),
    "counters list": lambda h: h.update(counters=[1]),
    "counters many": lambda h: h.update(counters={f"c{i}": i for i in range(65)}),
    "counter nan": lambda h: h.update(counters={"x": float("nan")}),
    "counter huge": lambda h: h.update(counters={"x": 2**63}),
    "counter bool": lambda h: h.update(counters={"x": True}),
    "counter string": lambda h: h.update(counters={"x": "1"}),
    "counter name": lambda h: h.update(counters={"": 1}),
    "checksum": lambda h: h.update(checksum=h["checksum"] ^ 1),
    "no checksum": lambda h: h.pop("checksum"),
    "tensors object": lambda h: h.update(tensors={}),
    "tensor missing": lambda h: h["tensors"].pop(),
    "tensor extra": lambda h: h["tensors"].append(["more", "float32", [1]]),
    "tensor twice": lambda h: h["tensors"].__setitem__(3, h["tensors"][0]),
    "tensor unknown": lambda h: h["tensors"][3].__setitem__(0, "velocity"),
    "tensor name list": lambda h: h["tensors"][3].__setitem__(0, []),
    "tensor entry short": lambda h: h["tensors"][0].pop(),
    "tensor entry string": lambda h: h["tensors"].__setitem__(0, "abc"),
    "dtype int": lambda h: h["tensors"][0].__setitem__(1, "int64"),
    "dtype object": lambda h: h["tensors"][0].__setitem__(1, "object"),
    "dtype other length": lambda h: h["tensors"][0].__setitem__(1, "float64"),
    "dtype list": lambda h: h["tensors"][0].__setitem__(1, ["float32"]),
    "shape string": lambda h: h["tensors"][0].__setitem__(2, "352"),
    "shape rank": lambda h: h["tensors"][0].__setitem__(2, [3, 10]),
    "shape product": lambda h: h["tensors"][0].__setitem__(2, [4, 5, 2]),
    "shape permuted": lambda h: h["tensors"][0].__setitem__(2, [5, 3, 2]),
    "shapes disagree in T": lambda h: h["tensors"][3].__setitem__(2, [3, 2, 4]),
    "shapes disagree in B": lambda h: h["tensors"][3].__setitem__(2, [4, 3, 2]),
} | {
    f"{key} {value!r:.20}": (lambda h, key=key, value=value: h.update({key: value}))
    for key in ("epoch", "sequence", "policy_version", "checksum")
    for value in HOSTILE_SIZES
    if value not in (0, 2**62)
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_a_wrong_header_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(WireError):
        decode(rewritten(change))


@pytest.mark.parametrize("value", HOSTILE_SIZES, ids=lambda value: f"{value!r:.20}")
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_hostile_size_is_refused(axis: int, value: object) -> None:
    with pytest.raises(WireError):
        decode(rewritten(lambda h: h["tensors"][0][2].__setitem__(axis, value)))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"3",
        b'"driftstream"',
        b"{",
        b"[" * 10_000,
        b'{"a":' * 2_000,
        b"1" * 10_000,
        b"\x80\x04\x95",
    ],
)
def test_a_frame_that_is_no_header_is_refused(header: bytes) -> None:
    with pytest.raises(WireError):
        decode([header])


def test_missing_cut_long_and_surplus_frames_are_refused() -> None:
    frames = [bytes(frame) for frame in encode(trajectories())]
    broken = [[], frames[:1], frames[:-1], [*frames, b""], [frames[0], frames[2], frames[1], *frames[3:]]]
    broken += [[*frames[:2], frames[2][:-1], *frames[3:]], [*frames[:2], frames[2] + b"\0", *frames[3:]]]
    for case in broken:
        with pytest.raises(WireError):
            decode(case)


@pytest.mark.parametrize(
    "limits",
    [
        WireLimits(max_message_bytes=400),
        WireLimits(max_header_bytes=100),
        WireLimits(max_rows=2),
        WireLimits(max_steps=3),
        WireLimits(max_dim=1),
    ],
)
def test_what_is_over_a_limit_is_refused_at_both_ends(limits: WireLimits) -> None:
    frames = encode(trajectories())
    with pytest.raises(WireError):
        decode(frames, limits)
    with pytest.raises(WireError):
        encode(trajectories(), limits)


def test_what_is_at_its_limit_passes() -> None:
    limits = WireLimits(max_rows=3, max_steps=4, max_dim=2)
    assert decode(encode(trajectories(), limits), limits).rows == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["states", "times", "log_reward", "scores"])
def test_a_value_that_is_not_finite_is_refused_at_both_ends(name: str, value: float) -> None:
    message = trajectories()
    frames = [bytearray(frame) for frame in encode(message)]
    index = 1 + list(message.tensors).index(name)
    struct.pack_into("<f", frames[index], len(frames[index]) - 4, value)
    header = json.loads(frames[0])
    header["checksum"] = checksum(frames[1:])
    with pytest.raises(WireError, match=f"{name} holds"):
        decode([json.dumps(header).encode(), *frames[1:]])
    message.tensors[name].view(-1)[0] = value
    with pytest.raises(WireError, match=f"{name} holds"):
        encode(message)


def test_a_tensor_may_be_finite_although_its_sum_is_not() -> None:
    assert is_finite(torch.full((4,), torch.finfo(torch.float32).max))
    assert not is_finite(torch.tensor([float("inf"), -float("inf")]))


@pytest.mark.parametrize(
    "message",
    [
        Message("weights", "a"),
        Message("hello", "a b"),
        Message("hello", "a", epoch=-1),
        Message("hello", "a", counters={"x": float("inf")}),
        Message("hello", "a", counters={"x": object()}),  # type: ignore[dict-item]
        Message("hello", "a", tensors={"terminal": torch.ones(1, 1)}),
        Message("seeds", "a", tensors={"terminal": torch.ones(1, 1)}),
        Message("seeds", "a", tensors={"terminal": torch.ones(2, 1), "log_reward": torch.ones(1)}),
        Message("seeds", "a", tensors={"terminal": torch.ones(2, 1).long(), "log_reward": torch.ones(2)}),
    ],
)
def test_what_a_decoder_would_refuse_is_not_sent(message: Message) -> None:
    with pytest.raises(WireError):
        encode(message)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=80), max_size=4))
def test_any_bytes_give_a_message_or_a_wire_error(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode(frames)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_message_is_refused_or_says_something_well_formed(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in encode(trajectories())]
    frame = frames[data.draw(st.integers(0, len(frames) - 1))]
    frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        message = decode(frames)
    except WireError:
        return
    encode(message)
    assert all(
        torch.equal(a, b) for a, b in zip(message.tensors.values(), decode(frames).tensors.values(), strict=True)
    )
    assert frame is frames[0], "a damaged tensor frame got through its checksum"


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    ),
    st.sampled_from(["magic", "schema", "kind", "sender", "epoch", "sequence", "counters", "tensors", "checksum"]),
)
def test_any_json_in_a_header_field_raises_nothing_else(value: object, key: str) -> None:
    with contextlib.suppress(WireError):
        decode(rewritten(lambda header: header.update({key: value})))


def test_limits_are_checked() -> None:
    for value in (0, -1, True, 1.5):
        with pytest.raises(ConfigError, match=r"limits\.max_rows"):
            WireLimits(max_rows=value)  # type: ignore[arg-type]


# Weights


def snapshot(**changes: Any) -> WeightSnapshot:
    tensors = {
        "net.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
        "log_z": torch.tensor(1.5, dtype=torch.float64),
        "steps": torch.arange(3),
        "half": torch.linspace(-1, 1, 5).bfloat16(),
        "none": torch.empty(0, 4),
    }
    values = {"version": 7, "progress": 0.25, "wall_s": 3.5, "energy_evaluations": 10**12, "tensors": tensors}
    return WeightSnapshot(**(values | changes))


def repaired(frame: bytes) -> bytes:
    """The frame with a checksum that fits, as a hostile publisher would write it."""
    return frame[:8] + struct.pack("<I", checksum([frame[12:]])) + frame[12:]


def test_weights_arrive_bit_for_bit() -> None:
    sent = snapshot()
    received = decode_weights(bytearray(encode_weights(sent)))
    assert received.tensors.keys() == sent.tensors.keys()
    for name, tensor in sent.tensors.items():
        assert received.tensors[name].dtype == tensor.dtype
        assert received.tensors[name].shape == tensor.shape
        assert torch.equal(received.tensors[name], tensor)
        assert received.tensors[name].data_ptr() % 8 == 0  # each has its dtype's data to itself
    assert (received.version, received.progress) == (sent.version, sent.progress)
    assert (received.wall_s, received.energy_evaluations) == (sent.wall_s, sent.energy_evaluations)


@settings(deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.floats(0, 1),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
        st.tuples(st.lists(st.integers(0, 4), max_size=4), st.integers(0, len(weights_wire.DTYPES) - 1)),
        max_size=5,
    ),
)
def test_any_weights_arrive(version: int, progress: float, layout: dict[str, tuple[list[int], int]]) -> None:
    tensors = {
        name: torch.full(shape, index, dtype=weights_wire.DTYPES[code])
        for index, (name, (shape, code)) in enumerate(layout.items())
    }
    received = decode_weights(encode_weights(snapshot(version=version, progress=progress, tensors=tensors)))
    assert list(received.tensors) == list(tensors)
    assert received.version == version
    assert received.progress == progress
    for name, tensor in tensors.items():
        assert received.tensors[name].dtype == tensor.dtype
        assert torch.equal(received.tensors[name], tensor)


def test_weights_are_a_copy() -> None:
    sent = snapshot()
    frame = encode_weights(sent)
    before = sent.tensors["net.weight"].clone()
    sent.tensors["net.weight"].zero_()
    assert torch.equal(decode_weights(frame).tensors["net.weight"], before)


def test_cut_and_damaged_weights_are_refused() -> None:
    frame = encode_weights(snapshot())
    for length in range(len(frame)):
        for broken in (frame[:length], repaired(frame[:length])):
            with pytest.raises(WireError):
                decode_weights(broken)
    for index in range(len(frame)):
        with pytest.raises(WireError):
            decode_weights(frame[:index] + bytes([frame[index] ^ 0x41]) + frame[index + 1 :])
    with pytest.raises(WireError):
        decode_weights(repaired(frame + bytes(8)))
    with pytest.raises(WireError):
        decode_weights(frame, WireLimits(max_message_bytes=len(frame) - 1))


@settings(deadline=None)
@given(st.data())
def test_any_change_to_weights_raises_nothing_but_a_wire_error(data: st.DataObject) -> None:
    frame = bytearray(encode_weights(snapshot()))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        decode_weights(repaired(bytes(frame)))


@pytest.mark.parametrize("sizes", [(2**64 - 1, 2**64 - 1), (2**63, 2), (0, 2**64 - 1), (2**63, 0)])
def test_hostile_sizes_of_weights_are_refused(sizes: tuple[int, int]) -> None:
    frame = encode_weights(snapshot(tensors={"w": torch.ones(3, 5)}))
    start = frame.index(b"w" + struct.pack("<QQ", 3, 5)) + 1
    with pytest.raises(WireError, match="beyond its weights frame"):
        decode_weights(repaired(frame[:start] + struct.pack("<QQ", *sizes) + frame[start + 16 :]))


def test_an_empty_tensor_has_any_shape_that_tensors_can_have() -> None:
    sent = torch.empty(2**31, 0, 2**31)
    assert decode_weights(encode_weights(snapshot(tensors={"w": sent}))).tensors["w"].shape == sent.shape
    frame = encode_weights(snapshot(tensors={"w": torch.empty(0, 3, 5)}))
    start = frame.index(struct.pack("<QQQ", 0, 3, 5))
    with pytest.raises(WireError, match="beyond its weights frame"):
        decode_weights(repaired(frame[: start + 8] + struct.pack("<QQ", 2**32, 2**32) + frame[start + 24 :]))


def test_a_name_twice_is_refused() -> None:
    frame = encode_weights(snapshot(tensors={"a": torch.ones(2), "b": torch.ones(2)}))
    with pytest.raises(WireError, match="twice"):
        decode_weights(repaired(frame.replace(b"b", b"a")))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": -1},
        {"version": True},
        {"version": 2**63},
        {"energy_evaluations": -1},
        {"progress": float("nan")},
        {"progress": 1.1},
        {"wall_s": float("inf")},
        {"tensors": {"w": torch.tensor([1.0, float("nan")])}},
        {"tensors": {"w": torch.ones(2, dtype=torch.complex64)}},
        {"tensors": {"w": torch.ones([1] * 9)}},
        {"tensors": {"": torch.ones(1)}},
        {"tensors": {"w" * 300: torch.ones(1)}},
        {"tensors": {f"{i:0200}": torch.ones(1) for i in range(1_300)}},
    ],
)
def test_weights_that_a_decoder_would_refuse_are_not_sent(changes: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        encode_weights(snapshot(**changes))
