"""The learner's end of the stream against what it must not take: bad and replayed messages, and too many of them."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import zmq

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.buffers.channels import StreamClient, StreamConfig, StreamServer
from driftstream.buffers.wire import Message, encode
from driftstream.launch.soak_frames import bad_frames
from driftstream.learner.sources import StreamSource

pytestmark = pytest.mark.timeout(60)
DIM, STEPS = 2, 10
SOON_S = 20.0
FRAMES = bad_frames("actor-0", epoch=0, dim=DIM, oversized_bytes=2**17)
CONFIG = StreamConfig(reject_threshold=5, max_message_bytes=2**16)
"""Oversized is what is above the limit here, so that a test need not send 256 MB."""


class Weights:
    """The part of a publisher that a source asks for."""

    version = 0

    def publish(self) -> int:
        return 0


def until(condition: Callable[[], Any], what: str = "") -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StreamServer]:
    with StreamServer(f"ipc://{tmp_path}/stream", CONFIG) as server:
        yield server


@pytest.fixture
def source(server: StreamServer) -> StreamSource:
    policy = DiffusionPolicy(DIM, PolicyConfig(hidden=8))
    return StreamSource(server, Weights(), policy, "window", {}, lambda n: None)  # type: ignore[arg-type]


@pytest.fixture
def sender(server: StreamServer) -> Iterator[Any]:
    """A socket that has said hello as actor-0, and may send two batches."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(server.endpoint)
    position = {"paced": 1, "acknowledged": 0, "sent": 0, "granted": 0}
    socket.send_multipart(encode(Message("hello", "actor-0", 0, 1, counters=position)))
    socket.recv_multipart()
    yield socket
    context.destroy(linger=0)


def good(sequence: int = 1, rows: int = 5) -> dict[str, Any]:
    states = torch.zeros(rows, STEPS + 1, DIM)
    tensors = {"states": states, "times": torch.linspace(0, 1, STEPS + 1), "log_reward": torch.zeros(rows)}
    return {"kind": "trajectories", "sender": "actor-0", "sequence": sequence, "tensors": tensors}


def rejected(source: StreamSource) -> float:
    return source.metrics()["stream/rejected"]


@pytest.mark.parametrize("what", [name for name in FRAMES if name not in ("oversized header", "replayed")])
def test_a_bad_message_is_rejected_and_counted_and_nothing_is_trained_on(
    what: str, server: StreamServer, source: StreamSource, sender: Any
) -> None:
    sender.send_multipart(FRAMES[what])
    assert source.fresh(0.3, 0, 0.0) is None
    assert rejected(source) > 0
    # Of another target, and else in order: that only the learner can tell. The rest must not get as far.
    assert server.counters()["rejected"] == int(what != "wrong shape")


def test_a_frame_above_the_limit_ends_the_connection_unread(server: StreamServer, source: StreamSource) -> None:
    context = zmq.Context()
    stranger = context.socket(zmq.DEALER)
    stranger.connect(server.endpoint)
    hung_up = stranger.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    stranger.send_multipart(FRAMES["oversized header"])
    assert hung_up.poll(1000 * SOON_S)
    stranger.disable_monitor()
    context.destroy(linger=0)
    assert source.fresh(0.1, 0, 0.0) is None


def test_a_replayed_batch_is_a_duplicate_used_once(server: StreamServer, source: StreamSource, sender: Any) -> None:
    frames = encode(Message(**good()))
    for _ in range(4):
        sender.send_multipart(frames)
    batch = source.fresh(SOON_S, 0, 0.0)
    assert batch is not None
    source.consumed(batch)
    sender.send_multipart(frames)
    until(lambda: source.metrics()["stream/duplicates"] == 4)
    assert source.fresh(0.1, 0, 0.0) is None


@pytest.mark.parametrize("what", ["nan", "wrong shape"])
def test_a_sender_is_dropped_at_the_threshold_and_only_in_a_row(
    what: str, server: StreamServer, source: StreamSource, sender: Any
) -> None:
    """`nan` is refused by the decoder; `wrong shape` only by the learner, as its form is in order."""
    sequence = 1
    for _ in range(2):
        for _ in range(CONFIG.reject_threshold - 1):
            sequence += send_bad(server, source, sender, what, sequence)
        arrives(server, sender, encode(Message(**good(sequence))))
        batch = source.fresh(SOON_S, 0, 0.0)
        assert batch is not None, "one good batch, and the count starts again"
        source.consumed(batch)
        sequence += 1
    assert server.dropped() == {}
    for _ in range(CONFIG.reject_threshold):
        sequence += send_bad(server, source, sender, what, sequence)
    until(lambda: server.counters()["senders"] == 0)
    (reason,) = server.dropped().values()
    assert reason.startswith(f"{CONFIG.reject_threshold} messages in a row refused; the last: ")
    sender.send_multipart(encode(Message(**good(sequence))))
    assert source.fresh(0.3, 0, 0.0) is None, "nothing more is read from that connection"


def arrives(server: StreamServer, sender: Any, frames: list[Any]) -> None:
    """Send a well-formed batch until it is taken in: before its credit it is dropped."""
    received = server.counters()["received_batches"]

    def sent() -> bool:
        sender.send_multipart(frames)
        time.sleep(0.05)
        return server.counters()["received_batches"] > received

    until(sent)


def send_bad(server: StreamServer, source: StreamSource, sender: Any, what: str, sequence: int) -> int:
    """Send one bad message, and wait until it is refused; how many sequence numbers it used up."""
    before = rejected(source)
    frames = list(FRAMES[what])
    frames[0] = frames[0].replace(b'"sequence": 1,', b'"sequence": %d,' % sequence)
    well_formed = what == "wrong shape"
    if well_formed:
        arrives(server, sender, frames)
    else:
        sender.send_multipart(frames)
    until(lambda: source.fresh(0.02, 0, 0.0) is None and rejected(source) > before, what)
    return int(well_formed)


SENDERS, BATCH_BYTES = 16, 2**20
SLOW_LEARNER = """
import sys, time
from driftstream.buffers.channels import StreamConfig, StreamServer
with StreamServer(sys.argv[1], StreamConfig(), max_outstanding=1000) as server:
    print("ready", flush=True)
    for _ in sys.stdin:
        counters = server.counters()
        print(counters["queue_depth"], counters["received_batches"], counters["out_of_order"], flush=True)
"""


class SlowLearner:
    """A process that receives the stream and uses nothing of it."""

    def __init__(self, endpoint: str) -> None:
        command = [sys.executable, "-c", SLOW_LEARNER, endpoint]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._answer() == "ready"
        self.rss = psutil.Process(self.process.pid).memory_info().rss

    def counters(self) -> tuple[int, int, int]:
        """Batches that wait, were received, were dropped."""
        assert self.process.stdin is not None
        print("?", file=self.process.stdin, flush=True)
        queued, received, dropped = (int(word) for word in self._answer().split())
        return queued, received, dropped

    def growth_bytes(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss - self.rss

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[tuple[str, SlowLearner]]:
    endpoint = f"ipc://{tmp_path}/flood"
    learner = SlowLearner(endpoint)
    yield endpoint, learner
    learner.process.kill()
    learner.process.communicate()


def large_batch() -> dict[str, torch.Tensor]:
    rows = BATCH_BYTES // (4 * (STEPS + 1) * DIM)
    return good(rows=rows)["tensors"]


def test_a_slow_learner_holds_the_credits_of_each_actor_and_no_more(learner: tuple[str, SlowLearner]) -> None:
    endpoint, process = learner
    config = StreamConfig()
    clients = [StreamClient(endpoint, f"actor-{i}", 0, config) for i in range(SENDERS)]
    try:
        for _ in range(config.credits):
            for client in clients:
                assert client.wait_for_credit(SOON_S) is not None
                client.send("trajectories", large_batch(), 0)
        until(lambda: process.counters()[0] == SENDERS * config.credits)
        assert all(client.wait_for_credit(0.02) is None for client in clients), "throttled"
        assert process.growth_bytes() < 1.5 * SENDERS * config.credits * BATCH_BYTES + 32 * 2**20
    finally:
        for client in clients:
            client.close()


def test_actors_that_flood_without_credit_fill_no_memory(learner: tuple[str, SlowLearner]) -> None:
    """24 batches of a MiB from each of 16, on their way to a learner that keeps 2 of each."""
    endpoint, process = learner
    context, per_sender = zmq.Context(), 24
    sockets = [context.socket(zmq.DEALER) for _ in range(SENDERS)]
    position = {"paced": 1, "acknowledged": 0, "sent": 0, "granted": 0}
    peak = 0
    for index, socket in enumerate(sockets):
        socket.connect(endpoint)
        socket.send_multipart(encode(Message("hello", f"actor-{index}", 0, 1, counters=position)))
    for socket in sockets:
        socket.recv_multipart()
    for sequence in range(1, per_sender + 1):
        for index, socket in enumerate(sockets):
            message = Message("trajectories", f"actor-{index}", 0, sequence, tensors=large_batch())
            socket.send_multipart(encode(message))
        peak = max(peak, process.growth_bytes())
    until(lambda: sum(process.counters()[1:]) == SENDERS * per_sender)
    context.destroy(linger=0)
    credits = StreamConfig().credits
    assert process.counters()[0] == SENDERS * credits
    # What is queued, and what each connection buffers on its way in (credits + 8).
    assert peak < SENDERS * (2 * credits + 8) * BATCH_BYTES + 32 * 2**20
