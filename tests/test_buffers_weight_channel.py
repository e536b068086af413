"""Weights over real sockets: the newest reaches everybody, whenever they join and however slow they are."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from zmq.utils import garbage

from driftstream.buffers.weight_channel import WeightPublisher, WeightSubscriber
from driftstream.buffers.weights_wire import WeightSnapshot, encode_weights
from driftstream.buffers.wire import WireError, WireLimits
from driftstream.envs.errors import ConfigError

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("error")]

SOON_S = 20.0


def snapshot(version: int, size: int = 4) -> WeightSnapshot:
    tensors = {"weight": torch.full((size, size), float(version)), "log_z": torch.tensor(float(version))}
    return WeightSnapshot(version, progress=0.5, wall_s=1.5, energy_evaluations=10 * version, tensors=tensors)


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/weights" if request.param == "ipc" else "tcp://127.0.0.1:*"


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    things: list[Any] = []
    yield things
    for thing in reversed(things):
        thing.close()


@pytest.fixture
def publisher(endpoint: str, opened: list[Any]) -> WeightPublisher:
    opened.append(WeightPublisher(endpoint))
    return opened[-1]


def subscribe(publisher: WeightPublisher, opened: list[Any]) -> WeightSubscriber:
    opened.append(WeightSubscriber(publisher.endpoint))
    return opened[-1]


def test_no_thread_takes_the_interpreter_for_what_was_sent(
    publisher: WeightPublisher, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyzmq's collector of buffers on their way is a thread that wakes for each, in the middle of an update."""
    stored: list[object] = []
    store = garbage.gc.store

    def watched(data: Any, event: Any = None) -> int:
        stored.append(data)
        return int(store(data, event))

    monkeypatch.setattr(garbage.gc, "store", watched)
    subscriber = subscribe(publisher, opened)
    publisher.publish(snapshot(1, size=256))
    assert subscriber.wait(SOON_S, min_version=1) is not None
    assert not stored


def test_weights_reach_every_subscriber(publisher: WeightPublisher, opened: list[Any]) -> None:
    subscribers = [subscribe(publisher, opened) for _ in range(3)]
    for version in (0, 1, 5):
        publisher.publish(snapshot(version))
        for subscriber in subscribers:
            received = subscriber.wait(SOON_S, min_version=version)
            assert received is not None
            assert (received.version, received.progress, received.wall_s) == (version, 0.5, 1.5)
            assert received.energy_evaluations == 10 * version
            assert torch.equal(received.tensors["weight"], torch.full((4, 4), float(version)))


def test_a_late_joiner_gets_the_newest_weights_without_a_further_publication(
    publisher: WeightPublisher, opened: list[Any]
) -> None:
    for version in range(4):
        publisher.publish(snapshot(version))
    for _ in range(3):
        received = subscribe(publisher, opened).wait(SOON_S)
        assert received is not None
        assert received.version == 3


def test_a_subscriber_before_the_first_publication_gets_nothing_yet(
    publisher: WeightPublisher, opened: list[Any]
) -> None:
    subscriber = subscribe(publisher, opened)
    assert subscriber.latest() is None
    assert subscriber.wait(0.2) is None
    publisher.publish(snapshot(0))
    assert subscriber.wait(SOON_S) is not None


def test_a_slow_subscriber_finds_only_the_newest(publisher: WeightPublisher, opened: list[Any]) -> None:
    slow, quick = subscribe(publisher, opened), subscribe(publisher, opened)
    publisher.publish(snapshot(0))
    assert slow.wait(SOON_S) is not None
    for version in range(1, 200):
        publisher.publish(snapshot(version, size=64))
    assert quick.wait(SOON_S, min_version=199) is not None
    received = slow.wait(SOON_S, min_version=199)
    assert received is not None
    assert received.version == 199
    assert slow.latest() is None


def test_latest_returns_each_snapshot_once_and_wait_counts_what_is_held(
    publisher: WeightPublisher, opened: list[Any]
) -> None:
    subscriber = subscribe(publisher, opened)
    publisher.publish(snapshot(3))
    first = subscriber.wait(SOON_S, min_version=3)
    assert first is not None
    assert subscriber.wait(0, min_version=3) is first
    # Another's joining brings the same version again, which is not news.
    assert subscribe(publisher, opened).wait(SOON_S) is not None
    assert subscriber.latest() is None
    assert subscriber.wait(0.1, min_version=4) is None
    publisher.publish(snapshot(4))
    tick = threading.Event()
    while (news := subscriber.latest()) is None:
        tick.wait(0.01)
    assert news.version == 4
    assert subscriber.latest() is None


def test_a_subscriber_follows_a_restarted_publisher_back_to_an_older_version(
    publisher: WeightPublisher, opened: list[Any]
) -> None:
    subscriber = subscribe(publisher, opened)
    publisher.publish(snapshot(9))
    assert subscriber.wait(SOON_S, min_version=9) is not None
    publisher.close()
    opened.append(WeightPublisher(publisher.endpoint))
    opened[-1].publish(snapshot(5))
    tick = threading.Event()
    while (received := subscriber.latest()) is None:
        tick.wait(0.01)
    assert received.version == 5


def test_publishing_copies_and_waits_for_nobody(publisher: WeightPublisher, opened: list[Any]) -> None:
    sent = snapshot(1, size=512)
    for _ in range(100):
        publisher.publish(sent)
    sent.tensors["weight"].zero_()
    stalled = zmq.Context()
    socket = stalled.socket(zmq.SUB)
    socket.rcvhwm = 1
    socket.subscribe(b"")
    socket.connect(publisher.endpoint)
    socket.poll(10_000)
    for _ in range(100):
        publisher.publish(snapshot(2, size=512))
    received = subscribe(publisher, opened).wait(SOON_S, min_version=2)
    assert received is not None
    assert torch.equal(received.tensors["weight"], torch.full((512, 512), 2.0))
    publisher.close()
    stalled.destroy(linger=0)


def test_weights_that_are_not_finite_are_not_published(publisher: WeightPublisher, opened: list[Any]) -> None:
    publisher.publish(snapshot(1))
    with pytest.raises(WireError, match="not finite"):
        publisher.publish(WeightSnapshot(2, 0.5, 1.0, 0, {"weight": torch.tensor(float("nan"))}))
    received = subscribe(publisher, opened).wait(SOON_S)
    assert received is not None
    assert received.version == 1


def test_damaged_frames_are_counted_and_dropped(endpoint: str, opened: list[Any]) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.XPUB)
    socket.bind(endpoint)
    subscriber = WeightSubscriber(socket.last_endpoint.decode(), WireLimits(max_message_bytes=10_000))
    opened.append(subscriber)
    assert socket.recv() == b"\x01"
    good = encode_weights(snapshot(1))
    for rejected, frame in enumerate([b"", b"junk", good[:-1], good[:-1] + b"\xff", bytes(500)], start=1):
        socket.send(frame)
        while subscriber.rejected < rejected:
            assert subscriber.wait(0.05) is None
    socket.send(good)
    assert subscriber.wait(SOON_S) is not None
    context.destroy(linger=0)


def test_closing_joins_the_thread_and_may_be_repeated(publisher: WeightPublisher, opened: list[Any]) -> None:
    subscriber = subscribe(publisher, opened)
    publisher.publish(snapshot(1))
    assert subscriber.wait(SOON_S) is not None
    for thing in (publisher, subscriber):
        thing.close()
        thing.close()
    publisher.publish(snapshot(2))
    assert not [t for t in threading.enumerate() if t.name == "weight-publisher"]


def test_endpoints_are_checked() -> None:
    for endpoint in ("tcp://0.0.0.0:*", "ipc:///" + "x" * 107, "nonsense"):
        with pytest.raises(ConfigError):
            WeightPublisher(endpoint)
        with pytest.raises(ConfigError):
            WeightSubscriber(endpoint)


FOLLOWER = """
import sys
from driftstream.buffers.weight_channel import WeightSubscriber

with WeightSubscriber(sys.argv[1]) as subscriber:
    for version in range(int(sys.argv[2])):
        while subscriber.wait(1.0, min_version=version) is None:
            pass
        print(version, flush=True)
"""


@pytest.mark.timeout(40)
def test_every_version_reaches_a_process_that_waits_for_it(tmp_path: Path) -> None:
    """Lock-step: each version is waited for before the next. A conflating socket alone hangs within thousands."""
    endpoint, versions = f"ipc://{tmp_path}/weights", 6000
    command = [sys.executable, "-c", FOLLOWER, endpoint, str(versions)]
    with (
        WeightPublisher(endpoint) as publisher,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower,
    ):
        assert follower.stdout is not None
        for version in range(versions):
            publisher.publish(snapshot(version, size=150))
            assert follower.stdout.readline() == f"{version}\n"
        assert follower.wait(10) == 0
