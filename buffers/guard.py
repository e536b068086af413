"""Who may connect, and what became of a connection: the two ends of an encrypted socket, each watched by a thread.

CURVE by itself lets any client in that knows the server's public key. The list of keys is ours to hold, behind
ZeroMQ's authentication protocol (ZAP, RFC 27), and a socket without that list must let nobody in: with
`ZAP_ENFORCE_DOMAIN` it does. The threads end with their socket's context.
"""

import logging
import socket as system
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from driftstream.buffers.keys import ClientKeys, ServerKeys

logger = logging.getLogger(__name__)

ZAP_ENDPOINT, ZAP_DOMAIN = "inproc://zeromq.zap.01", b"driftstream"
CURVE_OVERHEAD_BYTES = 33
"""What encryption adds to a frame."""
MAX_NOTED_PEERS = 1_000
FAILURES = 3
"""Handshakes that fail one after another before it is said: a single one may be a peer that died."""
_BROKEN_OFF, _MISUNDERSTOOD = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
_UNKNOWN = "an unknown address"


class Gate:
    """The listening side: lets the run's clients in, and notes whom it refuses.

    Make it before the socket binds, one for a context. Without keys it does nothing.
    """

    def __init__(self, socket: Any, address: str, keys: ServerKeys | None) -> None:
        self.endpoint = address
        self._noted: set[tuple[str, str]] = set()
        if keys is None:
            return
        self._clients = keys.clients
        self._peers: dict[int, str] = {}
        self._failure = ""
        socket.curve_server = 1
        socket.curve_secretkey = keys.secret.encode()
        socket.zap_domain = ZAP_DOMAIN
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        _allow_overhead(socket)
        zap = socket.context.socket(zmq.REP)
        zap.bind(ZAP_ENDPOINT)
        events = _BROKEN_OFF | _MISUNDERSTOOD | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        monitor = socket.get_monitor_socket(events)
        handlers = {zap: lambda: self._answer(zap), monitor: lambda: self._note(parse(monitor))}
        _serve("gate", handlers)

    @property
    def refused_peers(self) -> int:
        """Addresses from which somebody without one of the run's keys has tried to connect."""
        return len({address for address, _ in self._noted.copy()})

    def _answer(self, zap: Any) -> None:
        version, request, _, address, _, mechanism, *credentials = zap.recv_multipart()
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" else b""
        welcome = key.decode() in self._clients
        if not welcome:
            self._refuse(address.decode(errors="replace"), "its key is not one of this run's")
        status = (b"200", b"OK") if welcome else (b"400", b"unknown key")
        # What comes over the connection carries the key, so that its reader can tell guests from the run's own.
        zap.send_multipart([version, request, *status, key if welcome else b"", b""])

    def _note(self, event: Mapping[str, int]) -> None:
        """Follow connections from their acceptance, which has the address, to a handshake that failed before ZAP."""
        kind, value = event["event"], event["value"]
        if kind == zmq.EVENT_ACCEPTED:
            self._peers[value] = _peer_address(value)
        elif kind in (_BROKEN_OFF, _MISUNDERSTOOD):
            self._failure = "it has no key, or does not know this run's"
        else:  # the end of a connection, which follows its own failure
            address = self._peers.pop(value, _UNKNOWN)
            if self._failure:
                self._refuse(address, self._failure)
            self._failure = ""

    def _refuse(self, address: str, reason: str) -> None:
        if (address, reason) not in self._noted and len(self._noted) < MAX_NOTED_PEERS:
            self._noted.add((address, reason))
            own = self.endpoint.partition("?")[0]
            logger.warning("%s: a connection from %s is refused: %s", own, address, reason)


class Link:
    """The connecting side: whether there is a connection, and why there is none."""

    def __init__(self, socket: Any, address: str, keys: ClientKeys | None) -> None:
        self.refusal: str | None = None
        """Why the server will never let this client in."""
        self.trouble: str | None = None
        """Why the last attempts to connect failed; it may pass, unless it is a refusal."""
        self._address = address
        self._failures = 0
        self._gone_since: float | None = time.monotonic()
        if keys is not None:
            socket.curve_serverkey = keys.server.encode()
            socket.curve_publickey = keys.public.encode()
            socket.curve_secretkey = keys.secret.encode()
            _allow_overhead(socket)
        if address.startswith("tcp:"):
            events = _BROKEN_OFF | _MISUNDERSTOOD | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            events |= zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
            monitor = socket.get_monitor_socket(events)
            _serve("link", {monitor: lambda: self._note(parse(monitor))})

    @property
    def gone_s(self) -> float:
        """Seconds without a connection (of tcp): since the last one, or since the start; 0 while there is one."""
        since = self._gone_since
        return 0.0 if since is None else time.monotonic() - since

    def _note(self, event: Mapping[str, int]) -> None:
        match event["event"]:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._failures, self.trouble, self._gone_since = 0, None, None
            case zmq.EVENT_DISCONNECTED:
                if self._gone_since is None:
                    self._gone_since = time.monotonic()
            # After either of these ZeroMQ does not try again.
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._refused("refuses the key of this client: it is not one of the run's")
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._refused("wants a key, or no key, or is no driftstream")
            case _:
                self._failures += 1
                if self._failures == FAILURES:
                    self.trouble = f"{self._address} breaks off every handshake: it is another run's, or wants a key"
                    logger.warning("%s", self.trouble)

    def _refused(self, reason: str) -> None:
        self.refusal = self.trouble = f"{self._address} {reason}"
        logger.warning("%s", self.refusal)


def parse(monitor: Any) -> dict[str, int]:
    """The next event of a monitor socket."""
    return parse_monitor_message(monitor.recv_multipart())  # type: ignore[return-value]


def _allow_overhead(socket: Any) -> None:
    socket.maxmsgsize += CURVE_OVERHEAD_BYTES


def _peer_address(descriptor: int) -> str:
    """The address at the other end of a connection that this process has; it may be gone by now."""
    try:
        connection = system.socket(fileno=descriptor)
        try:
            return str(connection.getpeername()[0])
        finally:
            connection.detach()  # it is ZeroMQ's
    except (OSError, IndexError):
        return _UNKNOWN


def _serve(name: str, handlers: Mapping[Any, Callable[[], None]]) -> None:
    """A thread that calls a socket's handler whenever it can be read, until the context ends."""

    def run() -> None:
        poller = zmq.Poller()
        for socket in handlers:
            poller.register(socket, zmq.POLLIN)
        try:
            while True:
                for socket, _ in poller.poll():
                    handlers[socket]()
        except zmq.ContextTerminated:
            for socket in handlers:
                socket.close(linger=0)

    threading.Thread(target=run, name=name, daemon=True).start()
