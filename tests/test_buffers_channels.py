"""The stream over real sockets: order, credits, tickets, lost connections, hostile senders, and bounded closing."""

import random
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from driftstream.buffers import stream_client, stream_server
from driftstream.buffers.channels import SeedRequest, StreamClient, StreamConfig, StreamError, StreamServer
from driftstream.buffers.credits import Arrival, CreditLedger
from driftstream.buffers.wire import Message, WireError, WireLimits, decode, encode
from driftstream.envs.errors import ConfigError

pytestmark = pytest.mark.timeout(60)

SOON_S = 20.0  # a time-out that only a failing test reaches


def batch(value: float = 0.0, rows: int = 3) -> dict[str, torch.Tensor]:
    """A batch that can be told apart by its value."""
    log_reward = torch.full((rows,), float(value))
    return {"states": torch.zeros(rows, 5, 2), "times": torch.linspace(0, 1, 5), "log_reward": log_reward}


def terminals(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"terminal": torch.zeros(3, 2), "log_reward": torch.full((3,), float(value))}


def value_of(message: Message | None) -> float:
    assert message is not None
    return float(message.tensors["log_reward"][0])


class Stream:
    """Makes servers and clients, and closes whatever a test leaves open."""

    def __init__(self, directory: Path, transport: str) -> None:
        self.config = StreamConfig(transport=transport)  # type: ignore[arg-type]
        self.directory = directory
        self.opened: list[Any] = []

    def server(self, endpoint: str | None = None, **options: Any) -> StreamServer:
        config = options.pop("config", self.config)
        return self.keep(StreamServer(endpoint or config.endpoint(self.directory, "stream"), config, **options))

    def client(
        self, server: StreamServer | str, sender: str = "actor-0", epoch: int = 0, **options: Any
    ) -> StreamClient:
        endpoint = server if isinstance(server, str) else server.endpoint
        return self.keep(StreamClient(endpoint, sender, epoch, options.pop("config", self.config), **options))

    def raw(self, server: StreamServer) -> "RawSender":
        return self.keep(RawSender(server.endpoint))

    def proxy(self, server: StreamServer) -> "TcpProxy":
        return self.keep(TcpProxy(server.endpoint))

    def keep(self, thing: Any) -> Any:
        self.opened.append(thing)
        return thing


@pytest.fixture(params=["ipc", "shared memory", "tcp"])
def stream(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    if request.param == "shared memory":
        monkeypatch.setattr(stream_client, "SHARED_FROM_BYTES", 0)  # even of these small batches
    made = Stream(tmp_path, "tcp" if request.param == "tcp" else "ipc")
    yield made
    for thing in reversed(made.opened):
        thing.close()


@pytest.fixture
def tcp_stream(tmp_path: Path) -> Iterator[Stream]:
    made = Stream(tmp_path, "tcp")
    yield made
    for thing in reversed(made.opened):
        thing.close()


class RawSender:
    """A DEALER that follows no protocol."""

    def __init__(self, endpoint: str) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.connect(endpoint)

    def hello(self, sender: str = "raw", epoch: int = 0, number: int = 1, **position: int) -> None:
        counters = {"paced": 1, "acknowledged": 0, "sent": 0, "granted": 0} | position
        self.send(Message("hello", sender, epoch, number, counters=counters))
        self.socket.recv_multipart()

    def data(self, sequence: int, sender: str = "raw", epoch: int = 0) -> None:
        self.send(Message("trajectories", sender, epoch, sequence, tensors=batch(sequence)))

    def send(self, message: Message) -> None:
        self.socket.send_multipart(encode(message))

    def close(self) -> None:
        self.context.destroy(linger=0)


class TcpProxy:
    """Forwards connections to a server, and can swallow what a client sends or cut all connections."""

    def __init__(self, endpoint: str) -> None:
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        self.target = (host, int(port))
        self.swallow = False
        self.closed = False
        self.swallowed = 0
        self.pairs: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.threads = [threading.Thread(target=self._accept)]
        self.threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
                server = socket.create_connection(self.target)
            except OSError:
                return
            self.pairs += [client, server]
            for source, sink in ((client, server), (server, client)):
                self.threads.append(threading.Thread(target=self._pump, args=(source, sink, sink is server)))
                self.threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, upward: bool) -> None:
        try:
            while content := source.recv(2**16):
                if self.swallow and upward:
                    self.swallowed += len(content)
                else:
                    sink.sendall(content)
        except OSError:
            pass
        for end in (source, sink):
            shut(end)

    def cut(self) -> None:
        for end in self.pairs:
            shut(end)

    def close(self) -> None:
        self.closed = True
        shut(self.listener)
        self.listener.close()
        self.threads[0].join()
        self.cut()
        for thread in self.threads:
            thread.join()
        for end in self.pairs:
            end.close()


def shut(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        end.close()


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do (the test's time limit ends a vain wait)."""
    tick = threading.Event()
    while not condition():
        tick.wait(0.01)


# Order, credits and acknowledgement


def test_batches_arrive_once_in_order_and_are_acknowledged(stream: Stream) -> None:
    server = stream.server()
    client = stream.client(server)
    for n in range(20):
        assert client.wait_for_credit(SOON_S) is not None
        client.send("trajectories", batch(n), policy_version=n, counters={"energy_evaluations": 3 * n})
        message = server.take(SOON_S)
        assert message is not None
        assert (message.sender, message.sequence, message.policy_version) == ("actor-0", n + 1, n)
        assert message.counters == {"energy_evaluations": 3 * n}
        assert value_of(message) == n
        server.release(message, n)
    assert client.flush(SOON_S)
    assert client.unacknowledged == 0
    counters = server.counters()
    assert counters["received_batches"] == 20
    assert counters["received_bytes"] > 20 * 100
    assert counters["rejected"] == counters["duplicates"] == counters["queue_depth"] == 0
    assert counters["senders"] == 1


def test_a_sender_may_have_only_its_credits_unacknowledged(stream: Stream) -> None:
    server = stream.server(config=StreamConfig(transport=stream.config.transport, credits=3))
    client = stream.client(server)
    for n in range(3):
        assert client.wait_for_credit(SOON_S) is not None
        client.send("trajectories", batch(n), 0)
    assert client.wait_for_credit(0.3) is None
    with pytest.raises(StreamError, match="without a credit"):
        client.send("trajectories", batch(), 0)
    assert client.unacknowledged == 3
    assert not client.flush(0.1)
    first = server.take(SOON_S)
    assert client.wait_for_credit(0.3) is None, "taken is not yet consumed"
    assert first is not None
    server.release(first, 5)
    assert client.wait_for_credit(SOON_S) == 5
    assert client.unacknowledged == 2


def test_the_server_drops_what_it_did_not_grant(stream: Stream) -> None:
    server = stream.server()
    raw = stream.raw(server)
    raw.hello()
    for n in range(1, 51):
        raw.data(n)
    until(lambda: server.counters()["out_of_order"] == 48)
    assert server.counters()["queue_depth"] == 2


def test_take_is_first_in_first_out_over_senders(stream: Stream) -> None:
    server = stream.server()
    clients = [stream.client(server, f"actor-{i}") for i in range(3)]
    for n in range(6):
        client = clients[n % 3]
        assert client.wait_for_credit(SOON_S) is not None
        client.send("trajectories", batch(n), 0)
        until(lambda n=n: server.counters()["received_batches"] == n + 1)
    assert [value_of(server.take(SOON_S)) for _ in range(6)] == list(range(6))
    assert server.take(0) is None


def test_a_batch_released_out_of_order_is_acknowledged_with_those_before_it(stream: Stream) -> None:
    server = stream.server()
    client = stream.client(server)
    for n in range(2):
        assert client.wait_for_credit(SOON_S) is not None
        client.send("trajectories", batch(n), 0)
    first, second = server.take(SOON_S), server.take(SOON_S)
    assert first is not None
    assert second is not None
    server.release(second, 0)
    assert client.wait_for_credit(0.3) is None
    assert client.unacknowledged == 2
    server.release(first, 0)
    server.release(first, 0)
    assert client.flush(SOON_S)


def test_sending_what_the_learner_would_refuse_raises_at_the_sender(stream: Stream) -> None:
    server = stream.server()
    client = stream.client(server)
    assert client.wait_for_credit(SOON_S) is not None
    with pytest.raises(WireError, match="not finite"):
        client.send("trajectories", batch(float("nan")), 0)
    with pytest.raises(StreamError, match="said that it produces trajectories"):
        client.send("terminals", terminals(), 0)
    client.send("trajectories", batch(1), 0)
    assert value_of(server.take(SOON_S)) == 1


def test_a_server_may_come_later_than_its_clients(stream: Stream) -> None:
    endpoint = stream.server().endpoint
    stream.opened[0].close()
    client = stream.client(endpoint)
    assert client.wait_for_credit(0.1) is None
    server = stream.server(endpoint)
    assert client.wait_for_credit(SOON_S) == 0
    client.send("trajectories", batch(1), 0)
    assert value_of(server.take(SOON_S)) == 1


# Tickets


def test_lock_step_alternates_and_asks_for_the_newest_weights(stream: Stream) -> None:
    config = StreamConfig(transport=stream.config.transport, max_staleness=0)
    server = stream.server(config=config, version=7)
    clients = [stream.client(server, f"actor-{i}", config=config) for i in range(2)]
    assert clients[0].wait_for_credit(SOON_S) == 7
    assert clients[1].wait_for_credit(0.3) is None, "one ticket at a time"
    version = 7
    for n in range(8):
        client = clients[n % 2]
        assert client.wait_for_credit(SOON_S) == version
        assert clients[1 - n % 2].wait_for_credit(0) is None
        client.send("trajectories", batch(n), version)
        message = server.take(SOON_S)
        assert message is not None
        version += 1
        server.release(message, version)


def test_outstanding_batches_never_exceed_the_window_and_nobody_starves(stream: Stream) -> None:
    server = stream.server(max_outstanding=3)
    clients = [stream.client(server, f"actor-{i}") for i in range(5)]
    sent = defaultdict(int)
    for _ in range(100):
        while (message := server.take(0)) is None:
            for i, client in enumerate(clients):
                if client.wait_for_credit(0.002) is not None:
                    client.send("trajectories", batch(i), 0)
                    sent[i] += 1
            assert server.counters()["outstanding"] <= 3
        server.release(message, 0)
    assert min(sent.values()) >= 0.5 * max(sent.values())
    assert len(sent) == 5


def test_a_dead_senders_ticket_goes_to_another(stream: Stream) -> None:
    server = stream.server(max_outstanding=1)
    holder = stream.client(server, "actor-0")
    assert holder.wait_for_credit(SOON_S) is not None
    other = stream.client(server, "actor-1")
    assert other.wait_for_credit(0.7) is None, "a holder that lives keeps its ticket"
    holder.close()
    assert other.wait_for_credit(SOON_S) is not None


def test_forget_gives_a_ticket_to_another_without_taking_data_twice(stream: Stream) -> None:
    server = stream.server(max_outstanding=3)
    holder, other = stream.client(server, "actor-0"), stream.client(server, "actor-1")
    assert holder.wait_for_credit(SOON_S) is not None
    holder.send("trajectories", batch(1), 0)
    until(lambda: server.counters()["queue_depth"] == 1)
    server.forget("actor-0")
    server.forget("nobody")
    assert other.wait_for_credit(SOON_S) is not None
    message = server.take(SOON_S)
    assert message is not None
    server.release(message, 0)
    assert holder.flush(SOON_S), "a sender that was forgotten but lives comes back"
    assert server.take(0) is None
    assert server.counters()["received_batches"] == 1


def test_a_killed_process_does_not_hold_up_the_stream(stream: Stream) -> None:
    server = stream.server(max_outstanding=1)
    code = (
        "import sys\n"
        "from driftstream.buffers.channels import StreamClient, StreamConfig\n"
        "client = StreamClient(sys.argv[1], 'actor-0', 0, StreamConfig())\n"
        "print(client.wait_for_credit(60), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, server.endpoint]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGKILL)
    survivor = stream.client(server, "actor-1")
    assert survivor.wait_for_credit(SOON_S) is not None


@given(
    window=st.integers(1, 6),
    credits=st.integers(1, 3),
    actions=st.lists(
        st.tuples(st.sampled_from(["produce", "lose", "return", "restart", "consume"]), st.integers(0, 3))
    ),
)
def test_ledger_keeps_its_windows(window: int, credits: int, actions: list[tuple[str, int]]) -> None:
    ledger = CreditLedger(credits, window)
    epochs = dict.fromkeys("abcd", 0)
    queue: list[tuple[str, int, int]] = []
    consumed: list[tuple[str, int, int]] = []
    for name in epochs:
        ledger.greet(name, 0, name != "d", 0, 0, 0)
    for action, index in actions:
        name = "abcd"[index]
        sender = ledger.senders[name]
        if action == "produce" and sender.received < sender.granted:
            sequence = sender.received + 1
            assert ledger.receive(sender, sequence + 1) is Arrival.OUT_OF_ORDER
            assert ledger.receive(sender, sequence) is Arrival.NEW
            assert ledger.receive(sender, sequence) is Arrival.DUPLICATE
            queue.append((name, sender.epoch, sequence))
        elif action == "lose":
            ledger.disconnect(name)
        elif action == "return":
            assert ledger.greet(name, sender.epoch, sender.paced, 0, sender.received, sender.granted) is sender
        elif action == "restart":
            epochs[name] += 1
            assert ledger.greet(name, epochs[name], name != "d", 0, 0, 0) is not None
            assert ledger.greet(name, epochs[name] - 1, name != "d", 0, 0, 0) is None
        elif action == "consume" and queue:
            consumed.append(queue.pop(0))
            ledger.consume(*consumed[-1])
        ledger.grant()
        for sender in ledger.senders.values():
            assert sender.acknowledged <= sender.received <= sender.granted <= sender.acknowledged + credits
        held = sum(s.granted - s.received for s in ledger.senders.values() if s.paced and s.connected)
        assert ledger.outstanding == held + sum(name != "d" for name, _, _ in queue)
        if not any(action in ("lose", "return", "restart") for action, _ in actions):
            assert ledger.outstanding <= window
    assert len(set(consumed)) == len(consumed)
    for entry in queue:
        ledger.consume(*entry)
    ledger.grant()
    waiting = [s for s in ledger.senders.values() if s.paced and s.connected]
    assert not waiting or any(s.granted > s.acknowledged for s in waiting)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(2, 5), st.randoms(use_true_random=False))
def test_at_most_two_windows_pass_between_ticket_and_use(window: int, credits: int, n: int, rng: random.Random) -> None:
    ledger = CreditLedger(credits, window)
    speeds = [10.0**-i for i in range(n)]
    handed_out: dict[tuple[str, int], int] = {}
    queue: list[tuple[str, int]] = []
    used = 0
    senders = [ledger.greet(f"actor-{i}", 0, True, 0, 0, 0) for i in range(n)]
    for _ in range(300):
        before = {s.name: s.granted for s in senders if s}
        for name in ledger.grant():
            for sequence in range(before[name] + 1, ledger.senders[name].granted + 1):
                handed_out[name, sequence] = used
        busy = [s for s in senders if s and s.received < s.granted]
        if busy and (not queue or rng.random() < 0.5):
            sender = rng.choices(busy, [speeds[int(s.name[-1])] for s in busy])[0]
            assert ledger.receive(sender, sender.received + 1) is Arrival.NEW
            queue.append((sender.name, sender.received))
        elif queue:
            entry = queue.pop(0)
            ledger.consume(entry[0], 0, entry[1])
            assert used - handed_out[entry] <= 2 * (window - 1)
            used += 1
    assert used > 30


def test_only_senders_that_are_gone_and_whose_batches_are_used_are_forgotten() -> None:
    ledger = CreditLedger(credits=2, window=4)
    for name in ("here", "in-use", "gone"):
        assert ledger.greet(name, 0, True, 0, 0, 0)
    ledger.grant()
    assert ledger.receive(ledger.senders["in-use"], 1) is Arrival.NEW
    for name in ("in-use", "gone"):
        ledger.disconnect(name)
    assert [ledger.forget_one(), ledger.forget_one()] == ["gone", None]
    ledger.consume("in-use", 0, 1)
    assert [ledger.forget_one(), ledger.forget_one()] == ["in-use", None]
    assert list(ledger.senders) == ["here"]


def test_the_sender_that_has_been_gone_for_longest_is_forgotten() -> None:
    ledger = CreditLedger(credits=2, window=4)
    for name in ("late", "early"):
        ledger.greet(name, 0, True, 0, 0, 0)
    for name in ("early", "late"):
        ledger.disconnect(name)
    assert [ledger.forget_one(), ledger.forget_one()] == ["early", "late"]


def test_a_full_table_of_senders_makes_room_for_a_new_one(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("driftstream.buffers.stream_server._MAX_SENDERS", 2)
    server = stream.server(max_outstanding=8)
    stays, goes = stream.client(server, "actor-0"), stream.client(server, "actor-1")
    for client in (stays, goes):
        assert client.wait_for_credit(SOON_S) is not None
    assert stream.client(server, "actor-2").wait_for_credit(0.5) is None
    goes.close()
    assert stream.client(server, "actor-3").wait_for_credit(SOON_S) is not None
    stays.send("trajectories", batch(3.0), 0)
    assert value_of(server.take(SOON_S)) == 3.0


def test_the_window_follows_from_the_staleness() -> None:
    for staleness in range(40):
        for steps in (1, 2, 3):
            for publish_every in (1, 2, 5):
                config = StreamConfig(max_staleness=staleness)
                window = config.max_outstanding(steps, publish_every)
                least = publish_every + steps - 1
                assert (window == 0) == (staleness < least)
                assert window == 0 or least + 2 * (window - 1) * steps <= staleness
                one = "ahead" if staleness >= steps - 1 else "lock_step"
                assert config.pacing(steps, publish_every) == ("window" if window else one)


# Terminal states and seeds


def test_terminals_need_no_ticket(stream: Stream) -> None:
    server = stream.server(max_outstanding=1)
    actor = stream.client(server)
    refiner = stream.client(server, "refiner-0", produces="terminals")
    assert actor.wait_for_credit(SOON_S) is not None
    for n in range(2):
        assert refiner.wait_for_credit(SOON_S) is not None
        refiner.send("terminals", terminals(n), 0)
    assert refiner.wait_for_credit(0.3) is None, "its own credits bind it"
    until(lambda: server.counters()["terminals_depth"] == 2)
    taken = server.take_terminals()
    assert [value_of(message) for message in taken] == [0, 1]
    assert server.take_terminals() == []
    for message in taken:
        server.release(message, 0)
    assert refiner.flush(SOON_S)


def test_a_refiner_without_accepted_states_reports_its_counters(stream: Stream) -> None:
    server = stream.server()
    refiner = stream.client(server, "refiner-0", produces="terminals")
    assert refiner.wait_for_credit(SOON_S) is not None
    refiner.send(
        "terminals", {"terminal": torch.empty(0, 2), "log_reward": torch.empty(0)}, 0, {"energy_evaluations": 9}
    )
    until(lambda: server.counters()["terminals_depth"] == 1)
    (message,) = server.take_terminals()
    assert message.rows == 0
    assert message.tensors["terminal"].shape == (0, 2)
    assert message.counters == {"energy_evaluations": 9}


def test_seeds_are_asked_for_and_answered(stream: Stream) -> None:
    server = stream.server()
    refiner = stream.client(server, "refiner-0", produces="terminals")
    assert server.seed_requests() == []
    for n in (3, 3, 5):
        assert refiner.request_seeds(n, 0.1) is None
        until(lambda n=n: [r.n for r in server.seed_requests()] == [n] or refiner.request_seeds(n, 0.01) is not None)
        assert refiner.request_seeds(n, 0) is None
        (request,) = server.seed_requests()
        assert (request.sender, request.n) == ("refiner-0", n)
        server.send_seeds(request, torch.full((n, 2), float(n)), torch.zeros(n), version=n)
        seeds = refiner.request_seeds(n, SOON_S)
        assert seeds is not None
        assert seeds.policy_version == n
        assert torch.equal(seeds.tensors["terminal"], torch.full((n, 2), float(n)))
        until(lambda: server.seed_requests() == [])


def test_an_answer_to_a_former_request_is_not_taken_for_the_present_one(stream: Stream) -> None:
    server = stream.server()
    refiner = stream.client(server, "refiner-0", produces="terminals")
    until(lambda: refiner.request_seeds(3, 0.05) is not None or len(server.seed_requests()) == 1)
    (old,) = server.seed_requests()
    until(lambda: refiner.request_seeds(5, 0.05) is not None or server.seed_requests()[0].n == 5)
    (new,) = server.seed_requests()
    server.send_seeds(old, torch.zeros(3, 2), torch.zeros(3), 0)
    assert server.seed_requests() == [new]
    server.send_seeds(new, torch.zeros(5, 2), torch.zeros(5), 0)
    seeds = refiner.request_seeds(5, SOON_S)
    assert seeds is not None
    assert seeds.rows == 5


def test_seeds_for_a_sender_that_is_gone_are_dropped(stream: Stream) -> None:
    server = stream.server()
    server.send_seeds(SeedRequest("refiner-9", 2), torch.zeros(2, 2), torch.zeros(2), 0)
    with pytest.raises(WireError):
        server.send_seeds(SeedRequest("refiner-9", 2), torch.full((2, 2), float("nan")), torch.zeros(2), 0)
    assert stream.client(server).wait_for_credit(SOON_S) is not None


# Lost connections and restarts


def test_what_a_broken_connection_swallowed_is_sent_again(tcp_stream: Stream) -> None:
    server = tcp_stream.server()
    proxy = tcp_stream.proxy(server)
    client = tcp_stream.client(proxy.endpoint)
    assert client.wait_for_credit(SOON_S) is not None
    client.send("trajectories", batch(1), 0)
    assert client.wait_for_credit(SOON_S) is not None
    until(lambda: server.counters()["received_batches"] == 1)
    proxy.swallow = True
    client.send("trajectories", batch(2), 0)
    until(lambda: proxy.swallowed > 200)
    proxy.cut()
    proxy.swallow = False
    first = server.take(SOON_S)
    assert value_of(first) == 1
    assert first is not None
    server.release(first, 0)
    until(lambda: client.flush(0.1) or server.counters()["queue_depth"] == 1)
    second = server.take(0)
    assert value_of(second) == 2
    assert second is not None
    server.release(second, 0)
    assert client.flush(SOON_S)
    assert server.counters()["received_batches"] == 2


def test_a_batch_sent_twice_is_taken_once(stream: Stream) -> None:
    server = stream.server()
    for connection in range(3):
        raw = stream.raw(server)
        raw.hello(number=connection + 1, granted=2 if connection else 0, sent=2 if connection else 0)
        for n in (1, 2):
            raw.data(n)
        until(lambda connection=connection: server.counters()["duplicates"] == 2 * connection)
        until(lambda: server.counters()["received_batches"] == 2)
    assert [value_of(server.take(SOON_S)) for _ in range(2)] == [1, 2]
    assert server.take(0) is None


@pytest.mark.timeout(120)
def test_every_batch_arrives_exactly_once_over_connections_that_break(tcp_stream: Stream) -> None:
    server = tcp_stream.server(max_outstanding=3)
    proxy = tcp_stream.proxy(server)
    batches, rng, done = 25, random.Random(0), threading.Event()

    def produce(index: int) -> None:
        with StreamClient(proxy.endpoint, f"actor-{index}", 0, tcp_stream.config) as client:
            for n in range(batches):
                while client.wait_for_credit(1.0) is None:
                    pass
                client.send("trajectories", batch(n, rows=2000), n)
            while not client.flush(1.0):
                pass

    def disturb() -> None:
        while not done.wait(rng.uniform(0.05, 0.4)):
            proxy.swallow = rng.random() < 0.5
            done.wait(rng.uniform(0, 0.1))
            proxy.cut()
            proxy.swallow = False

    producers = [threading.Thread(target=produce, args=(i,)) for i in range(3)]
    disturber = threading.Thread(target=disturb)
    for thread in (*producers, disturber):
        thread.start()
    taken = defaultdict(list)
    for _ in range(3 * batches):
        message = server.take(60)
        assert message is not None
        taken[message.sender].append(value_of(message))
        server.release(message, 0)
    done.set()
    for thread in (*producers, disturber):
        thread.join()
    assert dict(taken) == {f"actor-{i}": list(range(batches)) for i in range(3)}
    assert server.take(0) is None
    assert server.counters()["rejected"] == 0


def test_a_new_epoch_starts_a_new_window(stream: Stream) -> None:
    server = stream.server(max_outstanding=2)
    first = stream.client(server, epoch=0)
    for n in range(2):
        assert first.wait_for_credit(SOON_S) is not None
        if n == 0:
            first.send("trajectories", batch(n), 0)
    until(lambda: server.counters()["queue_depth"] == 1)
    second = stream.client(server, epoch=1)
    assert second.wait_for_credit(SOON_S) is not None, "the unused ticket of the former epoch is free"
    second.send("trajectories", batch(10), 0)
    first.send("trajectories", batch(1), 0)
    assert second.wait_for_credit(0.3) is None, "a batch of the former epoch still waits"
    old, new = server.take(SOON_S), server.take(SOON_S)
    assert old is not None
    assert new is not None
    assert [(m.epoch, m.sequence, value_of(m)) for m in (old, new)] == [(0, 1, 0.0), (1, 1, 10.0)]
    server.release(old, 0)
    assert second.wait_for_credit(SOON_S) is not None
    server.release(new, 0)
    assert second.flush(SOON_S)
    assert server.take(0) is None, "what a former epoch sends now is not taken"
    assert not first.flush(1.5)


def test_a_restarted_sender_without_a_new_epoch_is_refused(stream: Stream) -> None:
    server = stream.server()
    first = stream.client(server)
    assert first.wait_for_credit(SOON_S) is not None
    first.send("trajectories", batch(1), 0)
    until(lambda: server.counters()["received_batches"] == 1)
    first.close()
    again = stream.client(server)
    assert again.wait_for_credit(0.5) is None
    assert server.counters()["rejected"] >= 1


def test_senders_go_on_with_a_restarted_server(stream: Stream) -> None:
    server = stream.server()
    client = stream.client(server)
    for n in range(3):
        assert client.wait_for_credit(SOON_S) is not None
        client.send("trajectories", batch(n), 0)
        if n == 0:
            message = server.take(SOON_S)
            assert message is not None
            server.release(message, 0)
    assert client.wait_for_credit(0.2) is None
    server.close()
    successor = stream.server(server.endpoint)
    until(lambda: client.flush(0.05) or successor.counters()["queue_depth"] == 2)
    for n in (1, 2):
        message = successor.take(SOON_S)
        assert message is not None
        assert value_of(message) == n
        successor.release(message, 0)
    assert client.flush(SOON_S)
    assert client.wait_for_credit(SOON_S) is not None


# Hostile and broken senders


def test_bad_messages_are_counted_and_change_nothing(stream: Stream) -> None:
    server = stream.server(config=StreamConfig(transport=stream.config.transport, reject_threshold=100))
    client, raw = stream.client(server), stream.raw(server)
    good = [bytes(frame) for frame in encode(Message("trajectories", "actor-0", 0, 1, tensors=batch(9)))]
    position = {"paced": 1, "acknowledged": 0, "sent": 0, "granted": 0}
    hellos = [
        {},
        position | {"paced": 2},
        position | {"sent": -1},
        position | {"granted": 3},
        position | {"acknowledged": 2**60, "sent": 2**60, "granted": 2**60},
        position | {"acknowledged": 1},
        position | {"granted": 0.5},
    ]
    bad = [
        [b""],
        [b"junk"],
        [b"{}"],
        [b"[" * 5000],
        good[:2],
        [*good[:1], good[1][:-4], *good[2:]],
        [*good[:1], bytes(len(good[1]) - 1) + b"\x01", *good[2:]],
        encode(Message("credit", "actor-0", 0, 1, counters={"granted": 99})),
        encode(Message("seeds", "actor-0", 0, 1, tensors=terminals())),
        encode(Message("seed_request", "actor-0", 0, 1)),
        encode(Message("seed_request", "actor-0", 0, 1, counters={"n": -3})),
        encode(Message("seed_request", "actor-0", 0, 1, counters={"n": 10**9})),
        *(encode(Message("hello", "raw", 0, 1, counters=counters)) for counters in hellos),
    ]
    for frames in bad:
        raw.socket.send_multipart(frames)
    until(lambda: server.counters()["rejected"] == len(bad))
    raw.data(1, sender="stranger")
    until(lambda: server.counters()["out_of_order"] == 1)
    assert server.counters()["queue_depth"] == 0
    assert client.wait_for_credit(SOON_S) is not None
    client.send("trajectories", batch(1), 0)
    assert value_of(server.take(SOON_S)) == 1


def test_a_frame_over_the_limit_does_not_reach_memory(stream: Stream) -> None:
    config = StreamConfig(transport=stream.config.transport, max_message_bytes=2**16)
    server = stream.server(config=config)
    raw = stream.raw(server)
    raw.socket.send(bytes(2**20))
    client = stream.client(server, config=config)
    assert client.wait_for_credit(SOON_S) is not None
    with pytest.raises(WireError, match="at most 65536"):
        client.send("trajectories", batch(rows=10_000), 0)
    assert server.counters()["received_batches"] == 0


def test_a_sender_that_is_refused_again_and_again_is_dropped_by_name(stream: Stream) -> None:
    config = StreamConfig(transport=stream.config.transport, reject_threshold=3)
    server = stream.server(config=config, limits=WireLimits(max_rows=2))
    raw = stream.raw(server)
    raw.hello(sender="actor-7")
    for _ in range(2):
        raw.data(1, sender="actor-7")
    until(lambda: server.counters()["rejected"] == 2)
    assert server.take(0) is None
    raw.data(1, sender="actor-7")
    until(lambda: server.counters()["senders"] == 0)
    (name, reason), *_ = server.dropped().items()
    assert (name, reason.split(":")[0]) == ("actor-7", "3 messages in a row refused; the last")
    assert server.dropped() == {}
    raw.send(Message("hello", "actor-7", 1, 1, counters={"paced": 1, "acknowledged": 0, "sent": 0, "granted": 0}))
    until(lambda: server.counters()["rejected"] == 4)
    assert server.counters()["senders"] == 0, "nothing more is read from that connection"
    again = stream.client(server, "actor-7", epoch=1)
    assert again.wait_for_credit(SOON_S) is not None, "a new process may try again"


# Who serves


@pytest.fixture
def unattended(monkeypatch: pytest.MonkeyPatch, stream: Stream) -> StreamServer:
    """A server that serves only in calls, as its own thread never steps in."""
    monkeypatch.setattr(stream_server, "IDLE_S", 1000.0)
    return stream.server()


def test_senders_are_served_while_nobody_calls(stream: Stream) -> None:
    server = stream.server()
    client = stream.client(server)
    assert client.wait_for_credit(SOON_S) is not None
    # This question serves nobody.
    until(lambda: client.request_seeds(3, 0.02) is None and bool(server.seed_requests()))


def test_calls_alone_serve(stream: Stream, unattended: StreamServer) -> None:
    client = stream.client(unattended)
    assert client.wait_for_credit(0.3) is None
    until(lambda: bool(unattended.counters()) and client.wait_for_credit(0.02) is not None)
    client.send("trajectories", batch(1), 0)
    message = unattended.take(SOON_S)
    assert value_of(message) == 1
    unattended.release(message, 1)  # type: ignore[arg-type]
    assert client.flush(SOON_S)
    assert client.wait_for_credit(SOON_S) == 1


def test_who_waits_answers_for_others(stream: Stream, unattended: StreamServer) -> None:
    client, refiner = stream.client(unattended), stream.client(unattended, "refiner-0", produces="terminals")
    taken: list[Message | None] = []
    waiting = threading.Thread(target=lambda: [taken.append(unattended.take(SOON_S)) for _ in range(2)])
    waiting.start()
    assert client.wait_for_credit(SOON_S) is not None
    client.send("trajectories", batch(1), 0)
    until(lambda: bool(taken))
    # The other thread waits for its second batch, and holds the sockets.
    unattended.release(taken[0], 1)  # type: ignore[arg-type]
    assert client.flush(SOON_S)
    until(lambda: refiner.request_seeds(2, 0.02) is None and bool(unattended.seed_requests()))
    unattended.send_seeds(unattended.seed_requests()[0], torch.zeros(2, 2), torch.zeros(2), 0)
    assert refiner.request_seeds(2, SOON_S) is not None
    client.send("trajectories", batch(2), 1)
    waiting.join()
    assert [value_of(message) for message in taken] == [1, 2]


def test_a_failure_of_receiving_reaches_who_takes(
    stream: Stream, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> Message:
        raise RuntimeError("broken")

    server = stream.server()
    monkeypatch.setattr(stream_server, "decode", fail)
    stream.raw(server).socket.send_multipart([b"anything"])
    with pytest.raises(StreamError, match=r"receiving failed: RuntimeError\('broken'\)"):
        server.take(SOON_S)
    with pytest.raises(StreamError, match="receiving failed"):
        server.take_terminals()
    assert "receiving failed" in caplog.text


# Closing


def test_nothing_hangs_on_closing(stream: Stream) -> None:
    server = stream.server()
    clients = [stream.client(server, f"actor-{i}") for i in range(3)]
    for client in clients:
        assert client.wait_for_credit(SOON_S) is not None
        client.send("trajectories", batch(rows=5000), 0)
    until(lambda: server.counters()["received_batches"] == 3)
    message = server.take(SOON_S)
    assert message is not None
    taken: list[Message | None] = []
    thread = threading.Thread(target=lambda: taken.extend(server.take(SOON_S) for _ in range(3)))
    thread.start()
    until(lambda: server.counters()["queue_depth"] == 0)
    server.close()
    server.close()
    thread.join()
    assert taken[-1] is None
    server.release(message, 1)
    server.forget("actor-0")
    server.send_seeds(SeedRequest("actor-0", 1), torch.zeros(1, 2), torch.zeros(1), 0)
    assert server.take(SOON_S) is None
    for client in clients:
        assert not client.flush(0)
        client.close()
        client.close()
    assert not [t for t in threading.enumerate() if t.name == "stream-server"]


def test_a_client_closes_without_a_server(stream: Stream) -> None:
    endpoint = stream.server().endpoint
    stream.opened[0].close()
    client = stream.client(endpoint)
    assert client.wait_for_credit(0.05) is None
    assert client.request_seeds(3, 0.05) is None
    client.close()


def test_what_was_released_before_closing_is_still_acknowledged(stream: Stream) -> None:
    server = stream.server()
    raw = stream.raw(server)
    raw.hello()
    raw.data(1)
    message = server.take(SOON_S)
    assert message is not None
    server.release(message, 1)
    server.close()
    credit = decode(raw.socket.recv_multipart())
    assert credit.counters["acknowledged"] == 1


# Configuration


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("transport", "inproc"),
        ("host", "0.0.0.0"),
        ("host", "192.168.0.1"),
        ("host", "example.org"),
        ("host", ""),
        ("credits", 0),
        ("credits", 2.0),
        ("credits", True),
        ("max_staleness", -1),
        ("max_message_bytes", 10),
        ("reject_threshold", 0),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"stream\.{field} = "):
        StreamConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "endpoint",
    [
        "ipc://" + "/x" * 60,
        "ipc://",
        "tcp://0.0.0.0:*",
        "tcp://10.0.0.1:5000",
        "tcp://*:5000",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:99999",
        "inproc://a",
        "/tmp/socket",
        "ipc:///no/such/directory/socket",
    ],
)
def test_a_wrong_endpoint_is_named(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="endpoint"):
        StreamServer(endpoint, StreamConfig())


def test_a_long_run_directory_is_refused_before_anything_is_bound(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        StreamConfig().endpoint(tmp_path / ("x" * 100), "stream")


def test_a_client_checks_its_endpoint() -> None:
    with pytest.raises(ConfigError):
        StreamClient("tcp://10.0.0.1:5000", "actor-0", 0, StreamConfig())


def test_a_window_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_outstanding"):
        StreamServer(f"ipc://{tmp_path}/s", StreamConfig(), max_outstanding=0)
