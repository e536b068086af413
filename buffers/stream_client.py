"""The sending end of the stream (protocol: see `channels`)."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Self

import zmq
from torch import Tensor

from driftstream.buffers import sockets
from driftstream.buffers.shared_memory import SHARED_FROM_BYTES, SlotMemory
from driftstream.buffers.stream_config import HELLO_INTERVAL_S, Product, StreamConfig, StreamError
from driftstream.buffers.wire import Message, WireError, WireLimits, decode, encode

logger = logging.getLogger(__name__)


class StreamClient:
    """Sends one role's batches to the learner; for use from one thread.

    `epoch` is the restart count of the role: a process that is started again must have a higher one. A sender
    that `produces` trajectories is paced by tickets over all actors, one that produces terminals by its
    credits only. Every wait ends at its time-out, whether or not the learner is there; it raises `StreamError`
    where the learner refuses this client's key.
    """

    def __init__(
        self,
        endpoint: str,
        sender: str,
        epoch: int,
        config: StreamConfig,
        limits: WireLimits | None = None,
        produces: Product = "trajectories",
    ) -> None:
        sockets.check_endpoint(endpoint)
        self._sender = sender
        self._epoch = epoch
        self._produces = produces
        self._limits = limits or WireLimits(max_message_bytes=config.max_message_bytes)
        self._sent = 0
        self._granted = 0
        self._acknowledged = 0
        self._version = 0
        self._unacknowledged: dict[int, list[bytes | memoryview]] = {}
        self._memory: SlotMemory | None = None
        self._in_memory: set[int] = set()
        self._shares = False  # whether the learner has the memory
        self._hello_number = 0
        self._hello_due = 0.0
        self._sent_before_hello: int | None = None  # None once the hello is answered
        self._seed_request: tuple[int, int] | None = None
        self._seed_request_number = 0
        self._seeds: Message | None = None
        self._context: zmq.Context = zmq.Context()
        self._socket = sockets.make_socket(self._context, zmq.DEALER, config.max_message_bytes)
        # Without a connection nothing is queued: what must arrive is sent again once the learner has
        # answered.
        self._socket.immediate = 1
        try:
            self._link = sockets.connect(self._socket, endpoint)
        except Exception:
            self.close()
            raise
        if endpoint.startswith("ipc:"):
            # Without such memory batches travel through the socket.
            with contextlib.suppress(OSError):
                self._memory = SlotMemory(config.credits, self._limits.max_message_bytes)

    @property
    def unacknowledged(self) -> int:
        """Batches sent and not yet known to be consumed."""
        self._receive()
        return len(self._unacknowledged)

    def wait_for_credit(self, timeout_s: float) -> int | None:
        """Wait for the right to produce one batch.

        Returns the oldest policy version that the batch may be made with, or None at the time-out. Weights of
        that version are published before the credit is given: wait for them before producing.
        """
        return self._version if self._wait(lambda: self._granted > self._sent, timeout_s) else None

    def send(
        self,
        kind: Product,
        tensors: Mapping[str, Tensor],
        policy_version: int,
        counters: Mapping[str, int | float] | None = None,
    ) -> None:
        """Send one batch without waiting, and keep it until it is acknowledged.

        Shapes as in `wire.KINDS`. The tensors are not copied: do not write to them afterwards. Raises
        `WireError` for what the learner would refuse, and `StreamError` without a credit; then nothing is
        sent.
        """
        if kind != self._produces:
            raise StreamError(f"{self._sender} sends {kind}, but said that it produces {self._produces}")
        if self._sent >= self._granted:
            raise StreamError(f"{self._sender} sends without a credit: call wait_for_credit first")
        message = self._message(kind, self._sent + 1, counters or {}, policy_version, tensors)
        frames = encode(message, self._limits)
        self._sent += 1
        self._unacknowledged[self._sent] = self._keep(frames)
        self._dispatch(self._sent)

    def request_seeds(self, n: int, timeout_s: float) -> Message | None:
        """Ask the learner for `n` terminal states to start chains from, and wait for them.

        Returns the message with `terminal [N,D]` and `log_reward [N]`, or None at the time-out; asked again
        for the same `n`, it goes on waiting for the same answer.
        """
        if self._seed_request is None or self._seed_request[1] != n:
            self._seed_request_number += 1
            self._seed_request, self._seeds = (self._seed_request_number, n), None
            self._hello_due = 0.0
        if not self._wait(lambda: self._seeds is not None, timeout_s):
            return None
        seeds, self._seeds, self._seed_request = self._seeds, None, None
        return seeds

    def flush(self, timeout_s: float) -> bool:
        """Wait until every batch is acknowledged; False if the time-out comes first."""
        return self._wait(lambda: not self._unacknowledged, timeout_s)

    def close(self) -> None:
        """Close the connection within half a second; `flush` first if what was sent must arrive."""
        if not self._socket.closed:
            sockets.close(self._context, self._socket)
            self._unacknowledged.clear()
            if self._memory is not None:
                self._memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, ready: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while True:
            self._receive()
            if ready():
                return True
            if self._link.refusal is not None:
                raise StreamError(self._link.refusal)
            if time.monotonic() >= deadline:
                return False
            events, until = zmq.POLLIN, deadline
            if time.monotonic() >= self._hello_due and not self._say_hello():
                events |= zmq.POLLOUT  # wakes as soon as there is a connection
            else:
                until = min(deadline, self._hello_due)
            self._socket.poll(sockets.remaining_ms(until), events)

    def _say_hello(self) -> bool:
        counters = {
            "acknowledged": self._acknowledged,
            "sent": self._sent,
            "granted": self._granted,
            "paced": int(self._produces == "trajectories"),
            **({} if self._memory is None else self._memory.address()),
        }
        hello = self._message("hello", self._hello_number + 1, counters)
        if not sockets.send_now(self._socket, encode(hello, self._limits)):
            return False
        self._hello_number += 1
        self._sent_before_hello = self._sent
        self._hello_due = time.monotonic() + HELLO_INTERVAL_S
        if self._seed_request is not None:
            number, n = self._seed_request
            request = self._message("seed_request", number, {"n": n})
            sockets.send_now(self._socket, encode(request, self._limits))
        return True

    def _message(
        self,
        kind: str,
        sequence: int,
        counters: Mapping[str, int | float],
        policy_version: int = 0,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Message:
        return Message(kind, self._sender, self._epoch, sequence, policy_version, counters, tensors or {})

    def _keep(self, frames: list[bytes | memoryview]) -> list[bytes | memoryview]:
        """The frames of the newest batch as they are kept: large tensors in the memory that the learner shares."""
        header, *payload = frames
        memory, large = self._memory, sum(len(data) for data in payload) >= SHARED_FROM_BYTES
        # With more credits than slots the place of the newest may not be free.
        if memory is None or not self._shares or not large or self._sent > self._acknowledged + memory.slots:
            return frames
        self._in_memory.add(self._sent)
        return [header, *memory.put(self._sent % memory.slots, payload)]

    def _dispatch(self, sequence: int) -> None:
        """Send a batch that is kept, by its locator where the learner has the memory that it is in."""
        frames = self._unacknowledged[sequence]
        if self._memory is not None and self._shares and sequence in self._in_memory:
            frames = [self._memory.locator(sequence % self._memory.slots, frames[1:]), frames[0]]
        sockets.send_now(self._socket, frames)

    def _receive(self) -> None:
        for frames in sockets.drain(self._socket):
            try:
                message = decode(frames, self._limits)
            except WireError as error:
                logger.warning("message from the learner dropped: %s", error)
                continue
            if message.epoch != self._epoch:
                continue
            if message.kind == "credit":
                self._take_credit(message)
            elif message.kind == "seeds" and self._seed_request and message.sequence == self._seed_request[0]:
                self._seeds = message

    def _take_credit(self, credit: Message) -> None:
        acknowledged, received, granted = (
            int(credit.counters.get(name, 0)) for name in ("acknowledged", "received", "granted")
        )
        self._version = credit.policy_version
        self._granted = max(self._granted, granted)
        self._acknowledged = max(self._acknowledged, acknowledged)
        self._shares = credit.counters.get("shares") == 1
        for sequence in [s for s in self._unacknowledged if s <= self._acknowledged]:
            del self._unacknowledged[sequence]
            self._in_memory.discard(sequence)
        if credit.sequence != self._hello_number or self._sent_before_hello is None:
            return
        lost = range(received + 1, self._sent_before_hello + 1)
        self._sent_before_hello = None
        for sequence in lost:
            if sequence in self._unacknowledged:
                self._dispatch(sequence)
