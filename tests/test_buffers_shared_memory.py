"""Batches in shared memory: what a locator may say, who may change what, and what is left when a process ends."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from driftstream.buffers import shared_memory, stream_client
from driftstream.buffers.channels import StreamClient, StreamConfig, StreamServer
from driftstream.buffers.shared_memory import MAGIC, MappedMemory, SlotMemory
from driftstream.buffers.wire import Message, WireError, encode

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no anonymous files"),
]

SOON_S = 20.0
SLOT_BYTES = 10_000


@pytest.fixture
def memory() -> Iterator[SlotMemory]:
    made = SlotMemory(3, SLOT_BYTES)
    yield made
    made.close()


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> StreamConfig:
    """Under which even the smallest batches are shared."""
    monkeypatch.setattr(stream_client, "SHARED_FROM_BYTES", 0)
    return StreamConfig(credits=2)


def batch(value: float, rows: int = 3) -> dict[str, torch.Tensor]:
    states = torch.full((rows, 5, 2), value)
    return {"states": states, "times": torch.linspace(0, 1, 5), "log_reward": torch.full((rows,), value)}


def send(client: StreamClient, value: float) -> None:
    assert client.wait_for_credit(SOON_S) is not None
    client.send("trajectories", batch(value), 0)


def is_shared(message: Message | None) -> bool:
    """Whether the states lie in one of this process's mappings of such a memory."""
    assert message is not None
    address = message.tensors["states"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        if start <= address < end:
            return "/memfd:driftstream-" in line
    return False


def test_a_payload_is_found_where_its_locator_says(memory: SlotMemory) -> None:
    mapped = MappedMemory(memory.address())
    payloads = {slot: [os.urandom(n) for n in (1, 0, 130, 4096)] for slot in range(3)}
    for slot, payload in payloads.items():
        assert memory.put(slot, payload) == payload
    for slot, payload in payloads.items():
        found = mapped.payload(memory.locator(slot, payload))
        assert found == payload
        assert all(not view.readonly for view in found)  # torch would copy them


def test_a_full_slot_does_not_reach_into_the_next(memory: SlotMemory) -> None:
    parts = [os.urandom(1)] * (shared_memory.MAX_TENSORS - 1)
    full = [*parts, os.urandom(SLOT_BYTES - len(parts))]
    for slot in (0, 1, 2, 1):
        memory.put(slot, full)
    mapped = MappedMemory(memory.address())
    assert [mapped.payload(memory.locator(slot, full)) for slot in range(3)] == 3 * [full]


def test_tensors_are_views_of_the_memory(memory: SlotMemory) -> None:
    mapped = MappedMemory(memory.address())
    copies = memory.put(0, [bytes(8)])
    (found,) = mapped.payload(memory.locator(0, [bytes(8)]))
    copies[0][:] = bytes(range(8))
    assert found == bytes(range(8))


def test_nobody_can_cut_the_memory(memory: SlotMemory) -> None:
    address = memory.address()
    with pytest.raises(PermissionError):
        os.truncate(f"/proc/self/fd/{address['memory_fd']}", 0)


def test_a_memory_too_large_to_map_is_refused() -> None:
    with pytest.raises(OSError, match="too large to map"):
        SlotMemory(64, 2**40)


@pytest.mark.parametrize(
    "change", [{"memory_token": 1}, {"memory_pid": 2**22 + 1}, {"memory_fd": 0}, {"memory_fd": 2.5}]
)
def test_another_file_is_not_mapped(memory: SlotMemory, change: dict[str, float]) -> None:
    with pytest.raises(OSError, match=r"\S"):
        MappedMemory(memory.address() | change)


@pytest.mark.parametrize(("size", "seals"), [(4096, 0), (0, fcntl.F_SEAL_SHRINK), (2**47, fcntl.F_SEAL_SHRINK)])
def test_a_memory_that_may_shrink_or_has_a_wrong_size_is_not_mapped(size: int, seals: int) -> None:
    descriptor = os.memfd_create("driftstream-7", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    with pytest.raises(OSError, match="may shrink, or has"):
        MappedMemory({"memory_pid": os.getpid(), "memory_fd": descriptor, "memory_token": 7})
    os.close(descriptor)


@given(body=st.binary(max_size=100))
def test_any_locator_gives_bytes_of_the_memory_or_a_wire_error(body: bytes) -> None:
    memory = SlotMemory(1, SLOT_BYTES)
    try:
        mapped = MappedMemory(memory.address())
        try:
            payload = mapped.payload(MAGIC + body)
        except WireError:
            return
        assert sum(len(data) for data in payload) <= shared_memory.MAX_TENSORS * 2 * SLOT_BYTES
    finally:
        memory.close()


@pytest.mark.parametrize("place", [(1, 8), (64, 2**64 - 1), (2**63, 8), (0, 2**20)])
def test_a_locator_cannot_point_elsewhere(memory: SlotMemory, place: tuple[int, int]) -> None:
    locator = MAGIC + b"".join(number.to_bytes(8, "little") for number in place)
    with pytest.raises(WireError, match="are not in"):
        MappedMemory(memory.address()).payload(locator)


# In the stream


def test_a_batch_stays_as_it_was_until_it_is_released(tmp_path: Path, config: StreamConfig) -> None:
    endpoint = config.endpoint(tmp_path, "stream")
    with StreamServer(endpoint, config, max_outstanding=8) as server, StreamClient(endpoint, "a", 0, config) as client:
        send(client, 0.0)
        held = server.take(SOON_S)
        assert is_shared(held)
        for value in range(1, 20):
            send(client, float(value))
            taken = server.take(SOON_S)
            assert taken is not None
            assert taken.tensors["states"].eq(value).all()
            assert held is not None
            assert held.tensors["states"].eq(value - 1).all()
            server.release(held, 0)
            held = taken


def test_large_batches_are_shared_and_small_ones_are_not(tmp_path: Path) -> None:
    config = StreamConfig()
    endpoint = config.endpoint(tmp_path, "stream")
    with StreamServer(endpoint, config) as server, StreamClient(endpoint, "a", 0, config) as client:
        for rows, shared in ((3, False), (3_000, True)):
            assert client.wait_for_credit(SOON_S) is not None
            client.send("trajectories", batch(float(rows), rows), 0)
            message = server.take(SOON_S)
            assert is_shared(message) == shared
            assert message is not None
            assert message.tensors["states"].eq(rows).all()
            server.release(message, 0)


def test_over_tcp_nothing_is_shared(tmp_path: Path, config: StreamConfig) -> None:
    server = StreamServer("tcp://127.0.0.1:*", config)
    with server, StreamClient(server.endpoint, "a", 0, config) as client:
        send(client, 1.0)
        assert not is_shared(server.take(SOON_S))


def test_without_shared_memory_batches_come_through_the_socket(
    tmp_path: Path, config: StreamConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = config.endpoint(tmp_path, "stream")
    with StreamServer(endpoint, config) as server, StreamClient(endpoint, "a", 0, config) as client:
        send(client, 1.0)
        assert is_shared(server.take(SOON_S))
    with monkeypatch.context() as patch:
        patch.setattr(stream_client, "SlotMemory", _refuse)
        with StreamServer(endpoint, config) as server, StreamClient(endpoint, "a", 0, config) as client:
            send(client, 2.0)
            assert not is_shared(server.take(SOON_S))


def _refuse(*_: object) -> None:
    raise OSError("not here")


def test_what_one_learner_had_in_memory_reaches_one_that_cannot_map_it(
    tmp_path: Path, config: StreamConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = config.endpoint(tmp_path, "stream")
    with StreamClient(endpoint, "a", 0, config) as client:
        with StreamServer(endpoint, config) as server:
            send(client, 1.0)
            assert is_shared(server.take(SOON_S))
        monkeypatch.setattr(shared_memory, "MappedMemory", _refuse)
        with StreamServer(endpoint, config) as server:
            message = None
            while message is None:
                assert not client.flush(0.01)
                message = server.take(0.01)
            assert not is_shared(message)
            assert message.tensors["states"].eq(1.0).all()
            assert server.counters()["rejected"] == 0
            server.release(message, 0)
            assert client.flush(SOON_S)


def test_a_locator_of_an_unknown_memory_counts_as_out_of_order(tmp_path: Path, config: StreamConfig) -> None:
    endpoint = config.endpoint(tmp_path, "stream")
    with StreamServer(endpoint, config) as server:
        header = encode(Message("trajectories", "a", 0, 1, tensors=batch(0.0)))[0]
        server._take_in(b"unknown", [MAGIC + bytes(16), header])  # type: ignore[list-item]
        assert server.counters()["out_of_order"] == 1
        assert server.counters()["rejected"] == 0


_SENDER = """
import sys, torch
from driftstream.buffers import stream_client
from driftstream.buffers.channels import StreamClient, StreamConfig
stream_client.SHARED_FROM_BYTES = 0
client = StreamClient(sys.argv[1], "a", 0, StreamConfig())
assert client.wait_for_credit(20.0) is not None
states = torch.full((3, 5, 2), 7.0)
client.send("trajectories", {"states": states, "times": torch.linspace(0, 1, 5), "log_reward": torch.zeros(3)}, 0)
print("sent", flush=True)
sys.stdin.read()
"""


def test_a_killed_sender_leaves_its_batch_and_no_memory(tmp_path: Path, config: StreamConfig) -> None:
    endpoint = config.endpoint(tmp_path, "stream")
    with StreamServer(endpoint, config) as server:
        command = [sys.executable, "-c", _SENDER, endpoint]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"sent\n"
            message = server.take(SOON_S)
            process.kill()
        assert is_shared(message)
        assert message is not None
        assert message.tensors["states"].eq(7.0).all()
        with StreamClient(endpoint, "a", 1, config) as successor:  # says hello in the dead one's name
            assert successor.wait_for_credit(SOON_S) is not None
            server.release(message, 0)
            del message
            send(successor, 8.0)
            assert is_shared(server.take(SOON_S))
            maps = Path("/proc/self/maps").read_text()
            assert len({line.split()[-2] for line in maps.splitlines() if "/memfd:driftstream-" in line}) == 1
