"""The learner's end of the stream (protocol: see `channels`)."""

import logging
import threading
import time
from collections import deque
from itertools import islice
from typing import Self

import zmq
from torch import Tensor

from driftstream.buffers import sockets
from driftstream.buffers.checks import is_integer
from driftstream.buffers.credits import Arrival, CreditLedger
from driftstream.buffers.shared_memory import MappedMemories
from driftstream.buffers.stream_config import SeedRequest, StreamConfig, StreamError
from driftstream.buffers.wire import Message, WireError, WireLimits, decode, encode
from driftstream.envs.errors import require

logger = logging.getLogger(__name__)

IDLE_S = 0.05
"""After so long without being served by a call the senders are served by a thread of the server's."""
_RECENT_S = 0.005  # what nobody waits for may wait as long to be received
_LOOK_S = 0.5
"""How often it is looked which senders are gone."""
_MESSAGES_PER_TURN = 64
_MAX_SENDERS = 4096
_MAX_SEQUENCE = 2**53
_LOGGED_REJECTIONS = 10


class StreamServer:
    """Receives batches; the learner takes and releases them.

    Whoever calls receives and answers on the way: a thread would compete with the learner's updates for the
    interpreter, and answer late. One steps in only after `IDLE_S` without a call, as in a long update.

    `max_outstanding` is the width of the ticket window over all actors (default: what `config.max_staleness`
    allows at one fresh batch a step). `version` is the policy version that the first batches may be made
    with. All methods are thread-safe. Nothing that a sender sends raises here: one whose messages are refused
    `config.reject_threshold` times in a row is dropped, and nothing more is read from that connection.
    """

    def __init__(
        self,
        endpoint: str,
        config: StreamConfig,
        limits: WireLimits | None = None,
        max_outstanding: int | None = None,
        version: int = 0,
    ) -> None:
        window = max(1, config.max_outstanding()) if max_outstanding is None else max_outstanding
        require(type(window) is int and window >= 1, "max_outstanding", window, "an integer of at least 1")
        self._config = config
        self._limits = limits or WireLimits(max_message_bytes=config.max_message_bytes)
        self._ledger = CreditLedger(config.credits, window)
        self._version = version
        self._trajectories: deque[Message] = deque()
        self._terminals: deque[Message] = deque()
        self._requests: dict[str, SeedRequest] = {}
        self._identities: dict[str, bytes] = {}
        self._memories = MappedMemories()
        self._hellos: dict[str, int] = {}
        self._refused_in_a_row: dict[bytes, int] = {}
        self._dropped: dict[str, str] = {}
        self._due: set[str] = set()
        self._outbox: deque[tuple[str, list[bytes | memoryview]]] = deque()
        self._counters = dict.fromkeys(
            ("rejected", "duplicates", "out_of_order", "received_batches", "received_bytes"), 0
        )
        self._failure: str | None = None
        self._lock = threading.Lock()
        self._serving = threading.Lock()  # taken before the other one; its holder alone touches the sockets
        self._served_at = self._looked_at = time.monotonic()
        self._leave = threading.Event()
        self._context: zmq.Context = zmq.Context()
        self._router = sockets.make_socket(self._context, zmq.ROUTER, self._limits.max_message_bytes)
        self._router.router_mandatory = 1  # a send to a connection that is gone says so
        self._router.rcvhwm = config.credits + 8
        self._waker = sockets.Waker(self._context)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._waker.socket, zmq.POLLIN)
        try:
            self._gate = sockets.bind(self._router, endpoint)
        except Exception:
            self._close_sockets()
            raise
        self.endpoint = self._gate.endpoint
        self._thread = threading.Thread(target=self._stand_in, name="stream-server", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float) -> Message | None:
        """The oldest batch of trajectories, or None at the time-out; `release` it when it is used.

        Its tensors may be memory that the sender writes to again once the batch is released: use or copy them before.
        None too, early, when an actor asks for states: its batch may be the next one.
        Raises `StreamError` when nothing more is to be expected: receiving failed.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if not self._trajectories:  # the release of one that is there serves
                self._serve(deadline)
            with self._lock:
                self._raise_failure()
                if self._trajectories:
                    return self._trajectories.popleft()
                if self._awaited() or time.monotonic() >= deadline:
                    return None

    def take_terminals(self) -> list[Message]:
        """All batches of terminal states received (shortly) before, oldest first; `release` each once stored."""
        if time.monotonic() - self._served_at >= _RECENT_S:
            self._serve()
        with self._lock:
            self._raise_failure()
            taken = list(self._terminals)
            self._terminals.clear()
            return taken

    def release(self, message: Message, version: int, refused: str = "") -> None:
        """Acknowledge a batch that was taken, and let its place go to a next one.

        `refused` says why it was of no use, where it was of none: that counts against its sender.

        `version` is the newest *published* policy version: batches begun from now on are made with it or a
        newer one. In lock-step (`max_staleness` 0) publish the weights that this batch led to first.
        """
        with self._lock:
            self._version = version
            self._ledger.consume(message.sender, message.epoch, message.sequence)
            self._due.add(message.sender)
            identity = self._identities.get(message.sender)
            if identity is not None and self._ledger.senders[message.sender].epoch == message.epoch:
                if refused:
                    self._strike(identity, refused)
                else:
                    self._refused_in_a_row.pop(identity, None)
        self._serve()

    def seed_requests(self) -> list[SeedRequest]:
        """The requests that `send_seeds` has not answered yet, at most one (the latest) per sender."""
        with self._lock:
            return list(self._requests.values())

    def send_seeds(self, request: SeedRequest, terminal: Tensor, log_reward: Tensor, version: int) -> None:
        """Answer a request with `terminal [N,D]`, `log_reward [N]`, any N; do not write to them later."""
        tensors = {"terminal": terminal, "log_reward": log_reward}
        message = Message("seeds", request.sender, request.epoch, request.sequence, version, {}, tensors)
        frames = encode(message, self._limits)
        with self._lock:
            if self._requests.get(request.sender) == request:
                del self._requests[request.sender]
            self._outbox.append((request.sender, frames))
        self._serve()

    def dropped(self) -> dict[str, str]:
        """The senders dropped since last asked, and why."""
        with self._lock:
            dropped, self._dropped = self._dropped, {}
            return dropped

    def forget(self, sender: str) -> None:
        """Give a sender's unused tickets to others, as if its connection were lost; what arrived remains."""
        with self._lock:
            self._disconnect(sender, self._identities.get(sender))
        self._serve()

    def counters(self) -> dict[str, int]:
        """Totals since the start (`rejected`, `duplicates`, `out_of_order`, `received_*`), present depths."""
        self._serve()
        with self._lock:
            return {
                **self._counters,
                "queue_depth": len(self._trajectories),
                "terminals_depth": len(self._terminals),
                "outstanding": self._ledger.outstanding,
                "refused_peers": self._gate.refused_peers,
                "senders": sum(sender.connected for sender in self._ledger.senders.values()),
            }

    def close(self) -> None:
        """End the thread and close the sockets, within about a second; waiting `take` calls return None."""
        with self._lock:
            if self._leave.is_set():
                return
            self._leave.set()
            self._waker.wake()
        self._thread.join()
        self._serve(time.monotonic() + IDLE_S)  # whatever was released before is still answered
        with self._serving:
            self._close_sockets()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_sockets(self) -> None:
        self._waker.close()
        sockets.close(self._context, self._router)

    def _awaited(self) -> bool:
        """Whether there is something that a call of `take` waits for; under the lock."""
        asked = any(request.from_actor for request in self._requests.values())
        return bool(self._trajectories or self._failure or self._leave.is_set() or asked)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise StreamError(self._failure)

    def _serve(self, until: float = 0.0) -> None:
        """Receive and answer, or wake the thread that does already; with nothing to take, wait for it until then."""
        if not self._serving.acquire(timeout=max(0.0, until - time.monotonic())):
            with self._lock:
                if not self._leave.is_set():
                    self._waker.wake()
            return
        try:
            if self._router.closed or self._failure is not None:
                return
            self._turn()
            with self._lock:
                waits = not self._awaited()
            if waits and time.monotonic() < until:
                self._poller.poll(sockets.remaining_ms(min(until, self._looked_at + _LOOK_S)))
                self._waker.clear()
                self._turn()
        except Exception as error:
            logger.exception("receiving failed")
            self._failure = f"receiving failed: {error!r}"
        finally:
            self._serving.release()
        with self._lock:
            left = bool(self._due or self._outbox) and not (self._leave.is_set() or self._failure)
        if left:  # by another thread's call, after the last answer
            self._serve()

    def _stand_in(self) -> None:
        """Serve while nobody calls."""
        while not self._leave.wait(IDLE_S):
            if not self._serving.locked() and time.monotonic() - self._served_at >= IDLE_S:
                self._serve()

    # From here on: by the holder of `_serving`, or under `_lock`.

    def _turn(self) -> None:
        """Receive, and answer."""
        for frames in islice(sockets.drain(self._router), _MESSAGES_PER_TURN):
            self._take_in(frames[0].bytes, frames[1:])
        self._served_at = time.monotonic()
        if self._served_at >= self._looked_at + _LOOK_S:
            self._looked_at = self._served_at
            with self._lock:
                self._due.update(self._ledger.blocking())
        self._answer()

    def _take_in(self, identity: bytes, frames: list[zmq.Frame]) -> None:
        if self._refused_in_a_row.get(identity, 0) >= self._config.reject_threshold:
            with self._lock:
                self._counters["rejected"] += 1
            return
        try:
            located = self._memories.locate(identity, frames)
            if located is None:
                # The sender says hello and sends it again.
                with self._lock:
                    self._counters["out_of_order"] += 1
                return
            message = decode(located, self._limits)
            with self._lock:
                match message.kind:
                    case "hello":
                        self._take_hello(identity, message)
                    case "seed_request":
                        self._take_seed_request(message)
                    case "trajectories" | "terminals":
                        self._take_batch(message)
                        self._counters["received_bytes"] += sum(len(frame) for frame in located)
                    case _:
                        raise WireError(f"{message.kind} is not for the learner")
        except WireError as error:
            with self._lock:
                self._refuse(identity, str(error))

    def _take_hello(self, identity: bytes, hello: Message) -> None:
        position = [hello.counters.get(name) for name in ("paced", "acknowledged", "sent", "granted")]
        paced, acknowledged, sent, granted = (n if is_integer(n) else -1 for n in position)
        if paced not in (0, 1) or not 0 <= acknowledged <= sent <= granted <= _MAX_SEQUENCE:
            raise WireError("hello without a position in its stream")
        if len(self._ledger.senders) >= _MAX_SENDERS and hello.sender not in self._ledger.senders:
            forgotten = self._ledger.forget_one()
            if forgotten is None:
                self._due.update(self._identities)  # an answer tells which of them are gone
                self._counters["rejected"] += 1
                return  # there may be room at its next hello
            self._hellos.pop(forgotten, None)
        sender = self._ledger.greet(hello.sender, hello.epoch, bool(paced), acknowledged, sent, granted)
        if sender is None:
            raise WireError(f"{hello.sender} contradicts its stream of epoch {hello.epoch}; a restart needs a new one")
        former = self._identities.get(hello.sender)
        if former is not None and former != identity:
            self._memories.forget(former)
        self._identities[hello.sender] = identity
        self._hellos[hello.sender] = hello.sequence
        if self.endpoint.startswith("ipc:"):
            self._memories.share(identity, hello.counters)
        self._due.add(hello.sender)

    def _take_batch(self, batch: Message) -> None:
        sender = self._ledger.senders.get(batch.sender)
        if sender is None or sender.epoch != batch.epoch:
            # A sender that this server does not know (any more) says hello and sends its batch again.
            self._counters["out_of_order"] += 1
            return
        if sender.paced != (batch.kind == "trajectories"):
            raise WireError(f"{batch.sender} sends {batch.kind}, but said that it produces something else")
        arrival = self._ledger.receive(sender, batch.sequence)
        if arrival is Arrival.NEW:
            (self._trajectories if sender.paced else self._terminals).append(batch)
            self._counters["received_batches"] += 1
        else:
            self._counters["duplicates" if arrival is Arrival.DUPLICATE else "out_of_order"] += 1

    def _take_seed_request(self, request: Message) -> None:
        n = request.counters.get("n")
        if not is_integer(n, least=1) or n > self._limits.max_rows:
            raise WireError(f"seed request for {n} rows: expected 1 to {self._limits.max_rows}")
        sender = self._ledger.senders.get(request.sender)
        if sender is not None and sender.epoch == request.epoch:
            self._requests[request.sender] = SeedRequest(
                request.sender, n, request.epoch, request.sequence, from_actor=sender.paced
            )

    def _refuse(self, identity: bytes, reason: str) -> None:
        self._counters["rejected"] += 1
        name = self._name(identity)
        if self._counters["rejected"] <= _LOGGED_REJECTIONS:
            logger.warning("message from %s refused: %s", name or "an unknown sender", reason)
        self._strike(identity, reason)

    def _strike(self, identity: bytes, reason: str) -> None:
        """Count a refusal, and drop the sender at the threshold: its tickets go to others."""
        count = self._refused_in_a_row.pop(identity, 0) + 1
        self._refused_in_a_row[identity] = count  # the latest last
        if len(self._refused_in_a_row) > _MAX_SENDERS:
            del self._refused_in_a_row[next(iter(self._refused_in_a_row))]
        name = self._name(identity)
        if count >= self._config.reject_threshold and name is not None:
            self._dropped[name] = f"{count} messages in a row refused; the last: {reason}"
            self._disconnect(name, identity)

    def _name(self, identity: bytes) -> str | None:
        return next((name for name, known in self._identities.items() if known == identity), None)

    def _answer(self) -> None:
        """Send what is due: credits to senders whose position changed, and seeds."""
        while True:
            with self._lock:
                due = (self._due | self._ledger.grant()) & self._identities.keys()
                outgoing = [*self._outbox, *((name, self._credit(name)) for name in due)]
                routes = {name: self._identities[name] for name, _ in outgoing if name in self._identities}
                self._due.clear()
                self._outbox.clear()
            gone = {name for name, frames in outgoing if name in routes and not self._send(routes[name], frames)}
            if not gone:
                return
            with self._lock:
                for name in gone:
                    self._disconnect(name, routes[name])

    def _credit(self, name: str) -> list[bytes | memoryview]:
        sender = self._ledger.senders[name]
        position = {
            "acknowledged": sender.acknowledged,
            "received": sender.received,
            "granted": sender.granted,
            "shares": int(self._identities.get(name) in self._memories),
        }
        return encode(Message("credit", name, sender.epoch, self._hellos[name], self._version, position))

    def _send(self, identity: bytes, frames: list[bytes | memoryview]) -> bool:
        """Whether the connection is still there; a full one loses the message, which is then asked for."""
        try:
            sockets.send_now(self._router, [identity, *frames])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def _disconnect(self, name: str, identity: bytes | None) -> None:
        if identity is not None and self._identities.get(name) == identity:
            del self._identities[name]
            self._memories.forget(identity)
            self._requests.pop(name, None)
            self._ledger.disconnect(name)
