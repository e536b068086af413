"""An actor on another host that the network cuts off: it comes back, and nothing is lost or arrives twice."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from driftstream.buffers.channels import StreamClient, StreamConfig, StreamServer

pytestmark = pytest.mark.timeout(120)
SCRIPT = Path(__file__).with_name("partition.py")
NAMESPACE = ["unshare", "--user", "--map-root-user", "--net"]
RECONNECT_S = 5.0
CUT_OFF_S = 30.0


def permitted() -> bool:
    veth = "ip link add a0 type veth peer name a1 && unshare --net true"
    try:
        return subprocess.run([*NAMESPACE, "sh", "-c", veth], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not permitted(), reason="network namespaces are not permitted here")
def test_an_actor_on_another_host_comes_back_after_thirty_seconds(tmp_path: Path) -> None:
    command = [*NAMESPACE, sys.executable, str(SCRIPT), str(tmp_path), str(CUT_OFF_S)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["taken"] > found["before"] > 0
    assert found["in_order"], "each batch once, in its order"
    assert found["acknowledged"] == found["taken"]
    assert found["rejected"] == 0
    assert found["reconnected_s"] < RECONNECT_S


class Network:
    """What lies between an actor and the learner: forwards both ways, or nothing at all."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        self._target = (host, int(port))
        self._up = threading.Event()
        self._up.set()
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def partition(self) -> None:
        self._up.clear()

    def heal(self, forgets_connections: bool) -> None:
        if forgets_connections:
            self._hang_up()
        self._up.set()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.heal(forgets_connections=True)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def _hang_up(self) -> None:
        for end in self._ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._ends += [near, far]
            for ends in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._forward, args=ends))
                self._threads[-1].start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while content := source.recv(2**16):
                self._up.wait()
                sink.sendall(content)
            sink.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


def test_a_handshake_that_nobody_answers_is_begun_again() -> None:
    """The learner's host is lost between taking a connection and its first word, and is there again."""
    config = StreamConfig(transport="tcp")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        client = StreamClient(endpoint, "actor-0", 0, config)
        silent, _ = listener.accept()
    with silent, client, StreamServer(endpoint, config):
        assert client.wait_for_credit(2 * RECONNECT_S) is not None


def test_a_connection_that_nobody_answers_is_asked_for_again_soon() -> None:
    """A network that drops every packet: the system by itself asks after 11 seconds (Linux), and then after 19."""
    config = StreamConfig(transport="tcp")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        host, port = listener.getsockname()
        with socket.create_connection((host, port)):  # its queue is full, so that the listener drops who comes next
            client = StreamClient(f"tcp://{host}:{port}", "actor-0", 0, config)
            assert client.wait_for_credit(11.5) is None
    with client, StreamServer(f"tcp://{host}:{port}", config):
        assert client.wait_for_credit(RECONNECT_S) is not None


@pytest.fixture
def server() -> Iterator[StreamServer]:
    with StreamServer("tcp://127.0.0.1:*", StreamConfig(transport="tcp")) as server:
        yield server


@pytest.mark.parametrize("forgets_connections", [False, True])
def test_a_short_partition_costs_nothing(server: StreamServer, forgets_connections: bool) -> None:
    network, done, acknowledged = Network(server.endpoint), threading.Event(), []
    sending = threading.Event()
    sending.set()

    def produce() -> None:
        made = 0
        with StreamClient(network.endpoint, "actor-0", 0, StreamConfig(transport="tcp")) as client:
            while not done.is_set():
                sending.wait()
                if client.wait_for_credit(0.2) is not None:
                    log_reward = torch.full((500,), float(made))
                    states, times = torch.zeros(500, 11, 2), torch.linspace(0, 1, 11)
                    client.send("trajectories", {"states": states, "times": times, "log_reward": log_reward}, 0)
                    made += 1
            assert client.flush(10.0)
            acknowledged.append(made)

    producer, taken = threading.Thread(target=produce), []

    def take_until(end: float) -> None:
        while time.monotonic() < end:
            message = server.take(0.02)
            if message is not None:
                taken.append(int(message.tensors["log_reward"][0]))
                server.release(message, 0)

    producer.start()
    try:
        while len(taken) < 10:
            take_until(time.monotonic() + 0.1)
        # It has credits when the network goes, and sends into the void.
        sending.clear()
        take_until(time.monotonic() + 0.5)
        network.partition()
        sending.set()
        take_until(time.monotonic() + 3.0)
        before, healed = len(taken), time.monotonic()
        network.heal(forgets_connections)
        while len(taken) == before:
            assert time.monotonic() - healed < RECONNECT_S
            take_until(time.monotonic() + 0.05)
        take_until(time.monotonic() + 1.0)
    finally:
        done.set()
        sending.set()
        while producer.is_alive():
            take_until(time.monotonic() + 0.05)
        take_until(time.monotonic() + 0.2)
        network.close()
    assert acknowledged == [len(taken)]
    assert taken == list(range(len(taken)))
    assert server.counters()["rejected"] == 0
