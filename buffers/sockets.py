"""What every socket of the data plane shares: checked endpoints, bounded waits, a way to wake a thread.

Sockets bind to `ipc://` paths (in the run directory, mode 0700) or to loopback addresses. Whatever reaches
one of them is trusted to be on this machine; an address that others can reach needs keys. An endpoint names the
directory that holds them, `tcp://HOST:PORT?keys=DIRECTORY`, so that there is no such address without.
"""

import contextlib
import ipaddress
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from driftstream.buffers.guard import Gate, Link
from driftstream.buffers.keys import read_client_keys, read_server_keys
from driftstream.envs.errors import ConfigError, require

MAX_IPC_PATH_BYTES = 107
COPIED_BYTES = 2**20
"""Smaller frames are copied when they are sent.

Otherwise a thread of this process takes the interpreter as each of them has left, just when a learner goes on.
"""
_LINGER_MS = 500
_POLLIN = int(zmq.POLLIN)
_KEYS = "?keys="


def with_keys(address: str, directory: Path) -> str:
    """The endpoint at a tcp address whose connections are encrypted with the keys in `directory`."""
    return f"{address}{_KEYS}{directory}"


def split_keys(endpoint: str) -> tuple[str, Path | None]:
    """The address of an endpoint, and the directory of its keys, if it has some."""
    address, marked, directory = endpoint.partition(_KEYS) if endpoint.startswith("tcp:") else (endpoint, "", "")
    return address, Path(directory) if marked else None


def check_endpoint(endpoint: str, field: str = "endpoint") -> str:
    """The endpoint itself, if a socket may use it: `ipc://PATH`, or `tcp://ADDRESS:PORT` on loopback or with keys.

    Raises `ConfigError` for another transport, for an ipc path that the system would refuse, and for an
    address that other machines can reach where there are no keys.
    """
    plain, keys = split_keys(endpoint)
    transport, _, address = plain.partition("://")
    require(transport in ("ipc", "tcp") and address != "", field, endpoint, "ipc://PATH or tcp://HOST:PORT")
    if transport == "ipc":
        length = len(address.encode())
        allowed = f"an ipc path of at most {MAX_IPC_PATH_BYTES} bytes (it has {length}); use a shorter directory"
        require(length <= MAX_IPC_PATH_BYTES, field, endpoint, allowed)
        return endpoint
    host, _, port = address.rpartition(":")
    require(
        port == "*" or (port.isascii() and port.isdigit() and int(port) < 2**16),
        field,
        endpoint,
        "a port or *",
    )
    allowed = "a loopback address (one that other machines reach needs keys)"
    require(keys is not None or is_loopback(host.strip("[]")), field, host, allowed)
    return endpoint


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_socket(context: zmq.Context, kind: int, max_frame_bytes: int) -> Any:
    """A socket that closes in bounded time, drops too large frames unread, and notices a vanished peer."""
    socket = context.socket(kind)
    socket.linger = _LINGER_MS
    socket.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.copy_threshold = COPIED_BYTES
    socket.setsockopt(zmq.HEARTBEAT_IVL, 3_000)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
    # The system's own patience would outlast a broken network by minutes.
    socket.setsockopt(zmq.CONNECT_TIMEOUT, 2_000)
    socket.setsockopt(zmq.HANDSHAKE_IVL, 5_000)
    return socket


def bind(socket: Any, endpoint: str) -> Gate:
    """Bind; returns what stands at the door, with the endpoint and its port.

    Raises:
        ConfigError: an address that cannot be had, or keys that are missing or open to others.
    """
    address, directory = split_keys(check_endpoint(endpoint))
    gate = Gate(socket, address, None if directory is None else read_server_keys(directory))
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ConfigError("endpoint", endpoint, f"an address to bind to ({error.strerror})") from None
    gate.endpoint = socket.last_endpoint.decode()
    if directory is not None:
        gate.endpoint = with_keys(gate.endpoint, directory)
    return gate


def connect(socket: Any, endpoint: str) -> Link:
    """Connect, now or as soon as somebody listens; returns what tells of the connection.

    Raises:
        ConfigError: keys that are missing or open to others.
    """
    address, directory = split_keys(check_endpoint(endpoint))
    link = Link(socket, address, None if directory is None else read_client_keys(directory))
    socket.connect(address)
    return link


def close(context: zmq.Context, *sockets: Any) -> None:
    """Close the sockets and their context; what is still to be sent gets half a second."""
    for socket in sockets:
        socket.close()
    context.term()


def drain(socket: Any, copy: bool = False) -> Iterator[list[Any]]:
    """The messages that wait on a socket, without waiting for more."""
    # Asking is cheaper than an exception, which most calls would end with.
    while socket.getsockopt(zmq.EVENTS) & _POLLIN:
        try:
            message = socket.recv_multipart(zmq.NOBLOCK, copy=copy)
        except zmq.Again:
            return
        yield message


def send_now(socket: Any, frames: list[Any]) -> bool:
    """Send without waiting, large frames without a copy; False where no connection takes the message now."""
    try:
        socket.send_multipart(frames, zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return False
    return True


class Waker:
    """Wakes whoever polls `socket`; `wake` may be called under a lock from any thread."""

    def __init__(self, context: zmq.Context) -> None:
        self.socket = context.socket(zmq.PAIR)
        self._sender = context.socket(zmq.PAIR)
        name = f"inproc://waker-{id(self)}"
        self.socket.bind(name)
        self._sender.connect(name)

    def wake(self) -> None:
        """Make a poll return, the present one or the next; the caller holds the lock that guards this waker."""
        # A full pipe holds enough wake-ups already.
        with contextlib.suppress(zmq.Again):
            self._sender.send(b"", zmq.NOBLOCK)

    def clear(self) -> None:
        """Forget the wake-ups so far; for whoever polls."""
        for _ in drain(self.socket):
            pass

    def close(self) -> None:
        """Close both ends, once nobody polls."""
        self.socket.close(linger=0)
        self._sender.close(linger=0)


def remaining_ms(deadline: float) -> int:
    """Whole milliseconds until `deadline` (of `time.monotonic`), rounded up and not negative."""
    return max(0, math.ceil((deadline - time.monotonic()) * 1000))
