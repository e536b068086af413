"""Control over real sockets: heartbeats and reports arrive, commands reach roles that come late or come back."""

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from driftstream.buffers.control import (
    MAX_REPORT_BYTES,
    ControlClient,
    ControlServer,
    Endpoints,
    Report,
    RoleContext,
)
from driftstream.envs.errors import ConfigError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=["ipc", "tcp"])
def endpoint(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/control" if request.param == "ipc" else "tcp://127.0.0.1:*"


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    things: list[Any] = []
    yield things
    for thing in reversed(things):
        thing.close()


@pytest.fixture
def server(endpoint: str, opened: list[Any]) -> ControlServer:
    opened.append(ControlServer(endpoint))
    return opened[-1]


@pytest.fixture
def join(server: ControlServer, opened: list[Any]) -> Callable[..., ControlClient]:
    def make(role: str = "actor-0", heartbeat_s: float = 0.05) -> ControlClient:
        opened.append(ControlClient(server.endpoint, role, heartbeat_s))
        return opened[-1]

    return make


def collect(server: ControlServer, enough: Callable[[list[Report]], bool]) -> list[Report]:
    reports: list[Report] = []
    while not enough(reports):
        reports += server.poll(100)
    return reports


def others(reports: list[Report]) -> list[Report]:
    return [report for report in reports if report.kind != "heartbeat"]


def test_heartbeats_come_again_and_again_from_every_role(
    server: ControlServer, join: Callable[..., ControlClient]
) -> None:
    roles = ["learner", "actor-0", "actor-1"]
    for role in roles:
        join(role)
    reports = collect(server, lambda seen: all(sum(r.role == role for r in seen) >= 3 for role in roles))
    assert all(report.kind == "heartbeat" and report.payload == {"pid": os.getpid()} for report in reports)


def test_reports_arrive_in_order_from_any_thread(server: ControlServer, join: Callable[..., ControlClient]) -> None:
    client = join()

    def report(thread: int) -> None:
        for n in range(50):
            client.report("metrics", {"thread": thread, "n": n})

    threads = [threading.Thread(target=report, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    reports = others(collect(server, lambda seen: len(others(seen)) == 200))
    for i, thread in enumerate(threads):
        thread.join()
        assert [r.payload["n"] for r in reports if r.payload["thread"] == i] == list(range(50))


def test_numbers_that_are_not_finite_pass_through(server: ControlServer, join: Callable[..., ControlClient]) -> None:
    join().report("metrics", {"loss": float("nan"), "grad_norm": float("inf")})
    (report,) = others(collect(server, lambda seen: bool(others(seen))))
    assert math.isnan(report.payload["loss"])
    assert report.payload["grad_norm"] == math.inf


def test_what_cannot_be_reported_raises_where_it_is_said(join: Callable[..., ControlClient]) -> None:
    client = join()
    with pytest.raises(TypeError):
        client.report("metrics", {"x": object()})
    with pytest.raises(ValueError, match="at most"):
        client.report("log", {"text": "x" * MAX_REPORT_BYTES})


def test_commands_arrive_and_set_their_events(server: ControlServer, join: Callable[..., ControlClient]) -> None:
    client, other = join("actor-0"), join("actor-1")
    collect(server, lambda seen: {r.role for r in seen} == {"actor-0", "actor-1"})
    assert client.command() is None
    server.send("actor-0", "finish")
    assert client.finish.wait(20)
    assert client.command() == "finish"
    assert not client.stop.is_set()
    server.send("actor-0", "stop")
    assert client.stop.wait(20)
    assert client.command() == "stop"
    assert other.command() is None


def test_a_command_waits_for_a_role_that_comes_late(server: ControlServer, join: Callable[..., ControlClient]) -> None:
    server.send("actor-0", "finish")
    client = join("actor-0")
    collect(server, lambda _: client.finish.is_set())


def test_a_command_reaches_a_role_that_was_started_again_unless_withdrawn(
    server: ControlServer, join: Callable[..., ControlClient]
) -> None:
    first = join("actor-0")
    server.send("actor-0", "finish")
    collect(server, lambda _: first.finish.is_set())
    first.close()
    second = join("actor-0")
    collect(server, lambda _: second.finish.is_set())
    second.close()
    server.poll(0)
    server.forget("actor-0")
    third = join("actor-0")
    collect(server, lambda seen: len(seen) > 5)
    assert third.command() is None


def test_a_client_goes_on_with_a_restarted_server(
    server: ControlServer, join: Callable[..., ControlClient], opened: list[Any]
) -> None:
    client = join()
    collect(server, lambda seen: bool(seen))
    server.close()
    client.report("metrics", {"n": 1})
    successor = ControlServer(server.endpoint)
    opened.append(successor)
    collect(successor, lambda seen: bool(seen))
    successor.send("actor-0", "stop")
    collect(successor, lambda _: client.stop.is_set())


def test_closing_sends_the_reports_that_wait(server: ControlServer, join: Callable[..., ControlClient]) -> None:
    client = join(heartbeat_s=30)
    for n in range(100):
        client.report("done", {"n": n})
    client.close()
    client.close()
    client.report("done", {"n": -1})
    reports = others(collect(server, lambda seen: len(others(seen)) == 100))
    assert [report.payload["n"] for report in reports] == list(range(100))
    assert not [t for t in threading.enumerate() if t.name == "control"]


def test_a_client_without_a_server_neither_waits_nor_grows(tmp_path: Path) -> None:
    client = ControlClient(f"ipc://{tmp_path}/nobody", "actor-0")
    for n in range(12_000):
        client.report("metrics", {"n": n})
    client.close()
    assert len(client._outbox) <= 10_000


def test_hostile_messages_are_counted_and_dropped(server: ControlServer, join: Callable[..., ControlClient]) -> None:
    bad = [
        [b""],
        [b"junk"],
        [b"[]"],
        [b"\xff"],
        [b"[" * 100_000],
        [b"{}"],
        [b'{"role": 3, "kind": "metrics"}'],
        [b'{"role": "a", "kind": []}'],
        [b'{"role": "a", "kind": "metrics", "payload": [1]}'],
        [b'{"role": "", "kind": "metrics"}'],
        [json.dumps({"role": "a", "kind": "k"}).encode(), b"more"],
    ]
    with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
        raw.connect(server.endpoint)
        for frames in bad:
            raw.send_multipart(frames)
        reports = collect(server, lambda _: server.rejected == len(bad))
        raw.send(bytes(2 * MAX_REPORT_BYTES))
        raw.linger = 0
    assert reports == []
    join().report("metrics", {})
    assert others(collect(server, lambda seen: bool(others(seen))))[0].payload == {}


def test_a_hostile_command_changes_nothing(endpoint: str, opened: list[Any]) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as raw:
        raw.bind(endpoint)
        client = ControlClient(raw.last_endpoint.decode(), "actor-0", heartbeat_s=0.05)
        opened.append(client)
        identity = raw.recv_multipart()[0]
        for frame in (b"junk", b"[]", b'{"command": "stop"}', b'{"number": true, "command": "stop"}', b'{"number": 1}'):
            raw.send_multipart([identity, frame])
        raw.send_multipart([identity, b'{"number": 2, "command": "finish"}'])
        assert client.finish.wait(20)
        assert not client.stop.is_set()
        raw.linger = 0


def test_the_servers_socket_can_be_polled_with_others(
    server: ControlServer, join: Callable[..., ControlClient]
) -> None:
    poller = zmq.Poller()
    poller.register(server.socket, zmq.POLLIN)
    join()
    assert poller.poll(20_000)
    assert server.poll(0)


def test_a_roles_context_names_it_and_reports_for_it(
    server: ControlServer, join: Callable[..., ControlClient], tmp_path: Path
) -> None:
    endpoints = Endpoints("ipc://a", "ipc://b", "ipc://c", server.endpoint)

    def context(role: str, index: int, control: ControlClient) -> RoleContext:
        return RoleContext(role, index, 0, 0, tmp_path, endpoints, control)

    client = join("actor-3")
    actor = context("actor", 3, client)
    assert actor.name == "actor-3"
    assert context("refiner", 0, client).name == "refiner-0"
    assert context("learner", 0, client).name == "learner"
    assert context("evaluator", 0, client).name == "evaluator"
    assert actor.label == "3"
    joined = replace(actor, joined_as="actor-explore-3@node7")
    assert (joined.name, joined.label) == ("actor-explore-3@node7", "explore-3@node7")
    actor.report_metrics({"actor/3/trajectories_per_s": 12.5}, step=7, wall_s=1.5)
    (report,) = others(collect(server, lambda seen: bool(others(seen))))
    assert report == Report(
        "actor-3", "metrics", {"metrics": {"actor/3/trajectories_per_s": 12.5}, "step": 7, "wall_s": 1.5}
    )
    assert not actor.should_stop
    server.send("actor-3", "stop")
    collect(server, lambda _: actor.should_stop)


def test_endpoints_are_checked() -> None:
    for endpoint in ("tcp://0.0.0.0:*", "ipc:///" + "x" * 107, "nonsense"):
        with pytest.raises(ConfigError):
            ControlServer(endpoint)
        with pytest.raises(ConfigError):
            ControlClient(endpoint, "actor-0")
