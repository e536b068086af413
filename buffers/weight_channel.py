"""Weights from the learner to all who need them: only the newest matters, and a late joiner gets it too.

Why a PUB socket, which may drop, is enough: a snapshot supersedes all before it, every subscription (a first one, or
one made again after a lost connection) is answered with the newest snapshot, and the publisher's queue is far from
full at one frame a publication. A subscriber conflates: it holds one frame, the newest, however slow it is. But a
conflating socket drops a frame that arrives in the very moment in which it is read (libzmq writes only if the lock
is free), so the newest snapshot is sent again whenever nothing was sent for a tenth of a second. Whoever is connected
ends up with the newest weights, and memory stays at one frame each.
"""

import threading
import time
from typing import Self

import zmq

from driftstream.buffers import sockets
from driftstream.buffers.weights_wire import WeightSnapshot, decode_weights, encode_weights
from driftstream.buffers.wire import WireError, WireLimits

JOIN_S = 0.05
"""How often late joiners are looked for."""
REPEAT_S = 0.1
"""After so long without a frame the newest is sent again."""
MAX_SUBSCRIPTION_BYTES = 1024


class WeightPublisher:
    """Publishes weight snapshots; a thread serves late joiners between publications."""

    def __init__(self, endpoint: str) -> None:
        self._newest: bytearray | None = None
        self._sent_at = 0.0
        self._leave = threading.Event()
        self._lock = threading.Lock()  # its holder alone touches the socket
        self._context: zmq.Context = zmq.Context()
        self._socket = sockets.make_socket(self._context, zmq.XPUB, MAX_SUBSCRIPTION_BYTES)
        # VERBOSE reports repeated subscriptions too. The high-water mark stays at its default: with 1 the
        # newest version is what gets dropped.
        self._socket.xpub_verbose = 1
        try:
            self.endpoint = sockets.bind(self._socket, endpoint).endpoint
        except Exception:
            sockets.close(self._context, self._socket)
            raise
        self._thread = threading.Thread(target=self._run, name="weight-publisher", daemon=True)
        self._thread.start()

    def publish(self, snapshot: WeightSnapshot) -> None:
        """Publish a copy of the snapshot; never waits for a subscriber.

        Raises `WireError` for weights that are not finite and for what a frame cannot hold; then the former
        snapshot stays the newest.
        """
        self.publish_frame(encode_weights(snapshot))

    def publish_frame(self, frame: bytearray) -> None:
        """Publish what `WeightEncoder` gave; never waits for a subscriber."""
        with self._lock:
            if not self._leave.is_set():
                self._newest = frame
                self._send(frame)

    def close(self) -> None:
        """End the thread and close the socket, within half a second."""
        with self._lock:
            if self._leave.is_set():
                return
            self._leave.set()
        self._thread.join()
        sockets.close(self._context, self._socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._leave.wait(JOIN_S):
            with self._lock:
                joined = [frames[0][:1] == b"\x01" for frames in sockets.drain(self._socket, copy=True)]
                quiet = time.monotonic() - self._sent_at >= REPEAT_S
                if self._newest is not None and (any(joined) or quiet):
                    self._send(self._newest)

    def _send(self, frame: bytearray) -> None:
        sockets.send_now(self._socket, [frame])
        self._sent_at = time.monotonic()


class WeightSubscriber:
    """Holds the newest weights; for use from one thread. Damaged frames are counted in `rejected`."""

    def __init__(self, endpoint: str, limits: WireLimits | None = None) -> None:
        sockets.check_endpoint(endpoint)
        self.rejected = 0
        self._limits = limits or WireLimits()
        self._snapshot: WeightSnapshot | None = None
        self._context: zmq.Context = zmq.Context()
        self._socket = sockets.make_socket(self._context, zmq.SUB, self._limits.max_message_bytes)
        self._socket.conflate = 1
        self._socket.linger = 0  # only subscriptions travel that way
        self._socket.subscribe(b"")
        try:
            sockets.connect(self._socket, endpoint)
        except Exception:
            self.close()
            raise

    def latest(self) -> WeightSnapshot | None:
        """The newest snapshot if it has not been returned yet, else None; does not wait.

        Its tensors are views of the received frame: copy them into a module, do not keep training on them.
        """
        before = self._snapshot
        for (frame,) in sockets.drain(self._socket):
            try:
                snapshot = decode_weights(frame, self._limits)
            except WireError:
                self.rejected += 1
                continue
            # The newest snapshot comes again whenever somebody joins.
            if self._snapshot is None or snapshot.version != self._snapshot.version:
                self._snapshot = snapshot
        return self._snapshot if self._snapshot is not before else None

    def wait(self, timeout_s: float, min_version: int = 0) -> WeightSnapshot | None:
        """The newest snapshot, once its version is at least `min_version`, or None at the time-out.

        One that has been returned before counts too: an actor that already holds the weights does not wait.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.latest()
            if self._snapshot is not None and self._snapshot.version >= min_version:
                return self._snapshot
            if time.monotonic() >= deadline:
                return None
            self._socket.poll(sockets.remaining_ms(deadline))

    def close(self) -> None:
        """Close the connection."""
        if not self._socket.closed:
            sockets.close(self._context, self._socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
