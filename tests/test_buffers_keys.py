"""Keys and encrypted sockets: what may be read, who is let in, and what both sides say to the others."""

import logging
import os
import socket as system
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from driftstream.buffers import guard
from driftstream.buffers.channels import StreamClient, StreamConfig, StreamError, StreamServer
from driftstream.buffers.control import MAX_REPORT_BYTES, ControlClient, ControlServer
from driftstream.buffers.keys import (
    CLIENT,
    GUEST,
    SERVER,
    ClientKeys,
    make_keys,
    read_client_keys,
    read_private,
    read_server_keys,
    write_client_keys,
    write_private,
)
from driftstream.buffers.sockets import check_endpoint, split_keys, with_keys
from driftstream.buffers.weight_channel import WeightPublisher, WeightSubscriber
from driftstream.buffers.weights_wire import WeightSnapshot
from driftstream.envs.errors import ConfigError

pytestmark = pytest.mark.timeout(60)
SOON_S = 20.0
CONFIG = StreamConfig(transport="tcp", encrypted=True)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    directory = tmp_path / "keys"
    make_keys(directory)
    return directory


@pytest.fixture
def opened() -> Iterator[list[Any]]:
    things: list[Any] = []
    yield things
    for thing in reversed(things):
        thing.close()


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + SOON_S
    while not (value := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


# Files


def test_keys_are_private_and_belong_together(keys: Path) -> None:
    assert keys.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in keys.iterdir()} == {SERVER, CLIENT, GUEST}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in keys.iterdir())
    server = read_server_keys(keys)
    clients = [read_client_keys(keys, name) for name in (CLIENT, GUEST)]
    assert {client.public for client in clients} == server.clients
    assert all(client.server == server.public for client in clients)
    assert len({server.secret, *(client.secret for client in clients)}) == 3
    assert list(keys.parent.iterdir()) == [keys]


def test_secrets_do_not_show_in_what_is_printed(keys: Path) -> None:
    for pair in (read_server_keys(keys), read_client_keys(keys)):
        assert pair.secret not in repr(pair)


def test_keys_of_a_run_stay_and_those_of_two_runs_differ(keys: Path, tmp_path: Path) -> None:
    before = read_server_keys(keys)
    make_keys(keys)
    assert read_server_keys(keys) == before
    make_keys(tmp_path / "other")
    assert read_server_keys(tmp_path / "other").public != before.public


def test_the_mask_of_the_user_does_not_open_keys(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        make_keys(tmp_path / "keys")
    finally:
        os.umask(mask)
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "keys").iterdir())


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601])
@pytest.mark.parametrize("name", [SERVER, CLIENT, GUEST])
def test_an_open_file_is_refused(keys: Path, name: str, mode: int) -> None:
    (keys / name).chmod(mode)
    with pytest.raises(ConfigError, match=rf"{name}.*mode 0600, not {mode:04o} \(chmod 600"):
        make_keys(keys)


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o770, 0o701])
def test_an_open_directory_is_refused(keys: Path, mode: int) -> None:
    keys.chmod(mode)
    for use in (make_keys, read_server_keys, read_client_keys):
        with pytest.raises(ConfigError, match=rf"keys.*mode 0700, not {mode:04o}"):
            use(keys)


def test_links_are_refused(keys: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(keys)
    with pytest.raises(ConfigError, match="not a link"):
        make_keys(link)
    (keys / SERVER).rename(tmp_path / "elsewhere")
    (keys / SERVER).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="not a link"):
        read_server_keys(keys)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="not a link"):
        make_keys(tmp_path / "dangling")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", SERVER, CLIENT])
def test_somebody_elses_keys_are_refused(keys: Path, name: str) -> None:
    os.chown(keys / name, 12345, -1)
    with pytest.raises(ConfigError, match=r"of user 0 \(it is user 12345's\)"):
        make_keys(keys)


def test_what_is_no_file_of_keys_is_refused_without_quoting_it(keys: Path) -> None:
    secret = read_client_keys(keys).secret
    for text in (f'public = "{secret}', f'secret = "{secret}"', "", 'server = "short"', "\0", "x" * 2_000_000):
        (keys / CLIENT).write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_client_keys(keys)
        assert secret not in str(caught.value)
    (keys / CLIENT).unlink()
    with pytest.raises(ConfigError, match="No such file"):
        read_client_keys(keys)
    os.mkfifo(keys / CLIENT, 0o600)
    with pytest.raises(ConfigError, match="a file"):
        read_client_keys(keys)


def test_a_pair_that_does_not_belong_together_is_refused(keys: Path, tmp_path: Path) -> None:
    make_keys(tmp_path / "other")
    mine, other = read_client_keys(keys), read_client_keys(tmp_path / "other")
    write_client_keys(tmp_path / "mixed", ClientKeys(mine.server, other.public, mine.secret))
    with pytest.raises(ConfigError, match="a pair of keys"):
        read_client_keys(tmp_path / "mixed")
    (keys / CLIENT).unlink()
    write_private(keys / CLIENT, (tmp_path / "other" / CLIENT).read_text())
    with pytest.raises(ConfigError, match=f"a key that {SERVER} beside it lists"):
        make_keys(keys)


def test_a_private_file_is_never_written_over(tmp_path: Path) -> None:
    write_private(tmp_path / "one", "a = 1")
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "one", "a = 2")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        write_private(tmp_path / "link", "a = 2")
    assert read_private(tmp_path / "one") == "a = 1"


# Configuration


def test_an_address_that_others_reach_always_has_keys(tmp_path: Path) -> None:
    config = StreamConfig(transport="tcp", host="10.0.0.5")
    assert config.uses_keys
    assert config.endpoint(tmp_path, "stream") == f"tcp://10.0.0.5:*?keys={tmp_path}/keys"
    assert not StreamConfig(transport="tcp").uses_keys
    assert not StreamConfig().uses_keys
    assert CONFIG.uses_keys


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"transport": "tcp", "host": "10.0.0.5", "encrypted": False}, "encrypted"),
        ({"transport": "ipc", "encrypted": True}, "encrypted"),
        ({"transport": "ipc", "host": "10.0.0.5"}, "host"),
        ({"transport": "tcp", "host": "0.0.0.0"}, "host"),
        ({"transport": "tcp", "host": "224.0.0.1"}, "host"),
        ({"transport": "tcp", "host": "node7"}, "host"),
        ({"transport": "tcp", "host": "10.0.0.5:80?keys=/x"}, "host"),
    ],
)
def test_settings_that_contradict_each_other_are_named(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"stream\.{field} = "):
        StreamConfig(**settings)


def test_every_socket_refuses_a_reachable_address_without_keys() -> None:
    endpoint = "tcp://10.0.0.5:5000"
    makers: list[Callable[[], Any]] = [
        lambda: StreamServer(endpoint, CONFIG),
        lambda: StreamClient(endpoint, "actor-0", 0, CONFIG),
        lambda: WeightPublisher(endpoint),
        lambda: WeightSubscriber(endpoint),
        lambda: ControlServer(endpoint),
        lambda: ControlClient(endpoint, "actor-0"),
    ]
    for make in makers:
        with pytest.raises(ConfigError, match="needs keys"):
            make()
    assert check_endpoint(f"{endpoint}?keys=/x") == f"{endpoint}?keys=/x"
    assert split_keys("ipc:///tmp/a?keys=b") == ("ipc:///tmp/a?keys=b", None)


def test_every_socket_refuses_keys_that_are_open(keys: Path) -> None:
    keys.chmod(0o755)
    endpoint = with_keys("tcp://127.0.0.1:5000", keys)
    for make in (
        lambda: StreamServer(endpoint, CONFIG),
        lambda: StreamClient(endpoint, "actor-0", 0, CONFIG),
        lambda: WeightPublisher(endpoint),
        lambda: WeightSubscriber(endpoint),
        lambda: ControlServer(endpoint),
        lambda: ControlClient(endpoint, "actor-0"),
    ):
        with pytest.raises(ConfigError, match="mode 0700, not 0755"):
            make()


# Sockets


def snapshot(version: int) -> WeightSnapshot:
    return WeightSnapshot(version, 0.5, 1.5, 10, {"weight": torch.ones(4)})


def tensors() -> dict[str, torch.Tensor]:
    return {"states": torch.zeros(3, 5, 2), "log_reward": torch.zeros(3), "times": torch.linspace(0, 1, 5)}


@pytest.fixture
def server(keys: Path, opened: list[Any]) -> StreamServer:
    opened.append(StreamServer(CONFIG.endpoint(keys.parent, "stream"), CONFIG))
    return opened[-1]


def intruder(keys: Path, how: str, tmp_path: Path) -> Path | None:
    """The key directory of somebody who should not get in: a wrong key of their own, or of the server's."""
    if how == "no key":
        return None
    make_keys(tmp_path / "other")
    mine, other = read_client_keys(keys), read_client_keys(tmp_path / "other")
    client = ClientKeys(mine.server, other.public, other.secret)
    if how == "another run's server":
        client = ClientKeys(other.server, mine.public, mine.secret)
    write_client_keys(tmp_path / "intruder", client)
    return tmp_path / "intruder"


INTRUDERS = pytest.mark.parametrize("how", ["a stranger's key", "another run's server", "no key"])


def knock(endpoint: str, keys: Path | None) -> str:
    address, _ = split_keys(endpoint)
    return address if keys is None else with_keys(address, keys)


@pytest.mark.parametrize("name", [CLIENT, GUEST])
def test_the_runs_clients_stream_through_an_encrypted_socket(
    keys: Path, server: StreamServer, opened: list[Any], tmp_path: Path, name: str
) -> None:
    write_client_keys(tmp_path / "invited", read_client_keys(keys, name))
    client = StreamClient(knock(server.endpoint, tmp_path / "invited"), "actor-0", 0, CONFIG)
    opened.append(client)
    assert client.wait_for_credit(SOON_S) == 0
    client.send("trajectories", tensors(), 0)
    batch = server.take(SOON_S)
    assert batch is not None
    server.release(batch, 0)
    assert client.flush(SOON_S)
    assert server.counters()["refused_peers"] == 0


def test_nothing_can_be_read_on_the_wire(keys: Path, server: StreamServer, opened: list[Any]) -> None:
    """A listener between both ends sees neither a header's words nor a tensor's bytes."""
    address, _ = split_keys(server.endpoint)
    port = int(address.rpartition(":")[2])
    seen = bytearray()

    def forward(source: system.socket, sink: system.socket) -> None:
        while data := source.recv(65536):
            seen.extend(data)
            sink.sendall(data)

    with system.create_server(("127.0.0.1", 0)) as listener:
        endpoint = with_keys(f"tcp://127.0.0.1:{listener.getsockname()[1]}", keys)
        client = StreamClient(endpoint, "actor-0", 0, CONFIG)
        near, _ = listener.accept()
    far = system.create_connection(("127.0.0.1", port))
    for pair in ((near, far), (far, near)):
        threading.Thread(target=forward, args=pair, daemon=True).start()
    assert client.wait_for_credit(SOON_S) == 0
    marked = tensors() | {"log_reward": torch.full((3,), 1234.5678)}
    client.send("trajectories", marked, 0)
    assert server.take(SOON_S) is not None
    client.close()
    assert b"CURVE" in seen
    for secret in (b"trajectories", b"actor-0", marked["log_reward"].numpy().tobytes()):
        assert secret not in seen


@INTRUDERS
def test_an_intruder_streams_nothing_and_both_sides_say_why(
    keys: Path, server: StreamServer, opened: list[Any], tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = StreamClient(knock(server.endpoint, intruder(keys, how, tmp_path)), "actor-0", 0, CONFIG)
    opened.append(client)

    def said(*reasons: str) -> bool:
        texts = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        return any(address in text and reason in text for text in texts for reason in reasons)

    address, _ = split_keys(server.endpoint)
    if how == "a stranger's key":
        with pytest.raises(StreamError, match="refuses the key"):
            wait_for(lambda: client.wait_for_credit(0.1))
        wait_for(lambda: said("a connection from 127.0.0.1 is refused: its key is not one of this run's"))
    elif how == "no key":
        with pytest.raises(StreamError, match="wants a key"):
            wait_for(lambda: client.wait_for_credit(0.1))
        wait_for(lambda: said("is refused: it has no key, or does not know this run's"))
    else:
        assert client.wait_for_credit(1.0) is None
        wait_for(lambda: said("breaks off every handshake: it is another run's"))
        wait_for(lambda: said("is refused: it has no key, or does not know this run's"))
    assert server.counters()["refused_peers"] > 0
    counters = server.counters()
    assert counters["received_batches"] == counters["rejected"] == counters["senders"] == 0


@INTRUDERS
def test_an_intruder_gets_no_weights(keys: Path, opened: list[Any], tmp_path: Path, how: str) -> None:
    publisher = WeightPublisher(with_keys("tcp://127.0.0.1:*", keys))
    opened.append(publisher)
    publisher.publish(snapshot(3))
    opened.append(WeightSubscriber(knock(publisher.endpoint, intruder(keys, how, tmp_path))))
    assert opened[-1].wait(1.5) is None
    opened.append(WeightSubscriber(publisher.endpoint))
    received = opened[-1].wait(SOON_S)
    assert received is not None
    assert received.version == 3


@INTRUDERS
def test_an_intruder_neither_reports_nor_hears_commands(
    keys: Path, opened: list[Any], tmp_path: Path, how: str
) -> None:
    server = ControlServer(with_keys("tcp://127.0.0.1:*", keys))
    opened.append(server)
    client = ControlClient(knock(server.endpoint, intruder(keys, how, tmp_path)), "learner", 0.05)
    opened.append(client)
    server.send("learner", "stop")
    wait_for(lambda: client.link.trouble)
    assert client.link.gone_s > 0
    for _ in range(10):
        assert server.poll(20) == []
    assert server.rejected == 0
    assert not client.stop.is_set()
    friend = ControlClient(server.endpoint, "learner", 0.05)
    opened.append(friend)
    wait_for(lambda: server.poll(20))
    wait_for(lambda: server.poll(20) and friend.stop.is_set())
    assert friend.link.gone_s == 0
    assert friend.link.trouble is None


def test_a_client_with_the_servers_public_key_alone_is_not_let_in(
    keys: Path, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its list of clients a socket lets nobody in, rather than everybody: the gate fails closed."""
    monkeypatch.setattr(guard, "ZAP_ENDPOINT", "inproc://nobody-asks-here")
    server = StreamServer(CONFIG.endpoint(keys.parent, "stream"), CONFIG)
    opened.append(server)
    opened.append(StreamClient(server.endpoint, "actor-0", 0, CONFIG))
    assert opened[-1].wait_for_credit(1.0) is None


def test_a_peer_is_warned_of_once(keys: Path, opened: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    server = StreamServer(CONFIG.endpoint(keys.parent, "stream"), CONFIG)
    opened.append(server)
    address, _ = split_keys(server.endpoint)
    with zmq.Context() as context:
        for _ in range(5):
            pair = zmq.curve_keypair()
            with context.socket(zmq.DEALER) as stranger:
                stranger.linger = 0
                stranger.curve_serverkey = read_server_keys(keys).public.encode()
                stranger.curve_publickey, stranger.curve_secretkey = pair
                with stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH) as refused:
                    stranger.connect(address)
                    assert refused.poll(1000 * SOON_S)
                    stranger.disable_monitor()
    wait_for(lambda: server.counters()["refused_peers"] == 1)
    assert len([r for r in caplog.records if "its key is not one" in r.getMessage()]) == 1


def test_the_largest_report_fits_through_an_encrypted_socket(keys: Path, opened: list[Any]) -> None:
    server = ControlServer(with_keys("tcp://127.0.0.1:*", keys))
    opened.append(server)
    client = ControlClient(server.endpoint, "actor-0", 30)
    opened.append(client)
    empty = len(client._frame("log", {"text": ""}))
    client.report("log", {"text": "x" * (MAX_REPORT_BYTES - empty)})
    reports = wait_for(lambda: [report for report in server.poll(50) if report.kind == "log"])
    assert len(reports[0].payload["text"]) == MAX_REPORT_BYTES - empty


def test_every_socket_has_a_largest_message(keys: Path, opened: list[Any]) -> None:
    endpoint = with_keys("tcp://127.0.0.1:*", keys)
    opened += [WeightPublisher(endpoint), ControlServer(endpoint), StreamServer(endpoint, CONFIG)]
    publisher, control, stream = opened
    opened += [WeightSubscriber(publisher.endpoint), ControlClient(control.endpoint, "actor-0")]
    opened.append(StreamClient(stream.endpoint, "actor-0", 0, CONFIG))
    found = [
        getattr(thing, name) for thing in opened for name in ("_socket", "socket", "_router") if hasattr(thing, name)
    ]
    assert len(found) == 6
    assert all(1_000 <= socket.maxmsgsize < 2**31 for socket in found)


def test_guards_end_with_their_sockets(keys: Path) -> None:
    with StreamServer(CONFIG.endpoint(keys.parent, "stream"), CONFIG) as server:
        client = StreamClient(server.endpoint, "actor-0", 0, CONFIG)
        assert client.wait_for_credit(SOON_S) == 0
        assert {"gate", "link"} <= {thread.name for thread in threading.enumerate()}
        start = time.monotonic()
        client.close()
    assert time.monotonic() - start < 5
    wait_for(lambda: not {"gate", "link"} & {thread.name for thread in threading.enumerate()})


def test_a_guest_cannot_speak_for_the_runs_own_roles(keys: Path, opened: list[Any]) -> None:
    server = ControlServer(CONFIG.endpoint(keys.parent, "control"))
    opened.append(server)
    guest = keys.parent / "guest"
    write_client_keys(guest, read_client_keys(keys, GUEST))
    address, _ = split_keys(server.endpoint)
    opened += [
        ControlClient(server.endpoint, "learner"),
        ControlClient(with_keys(address, guest), "refiner-0"),
        ControlClient(with_keys(address, guest), "join@node7"),
    ]
    heard: set[str] = set()

    def both() -> bool:
        heard.update(report.role for report in server.poll(10))
        return server.rejected > 0 and {"learner", "join@node7"} <= heard

    wait_for(both)
    assert "refiner-0" not in heard
