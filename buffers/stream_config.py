"""Configuration of the data stream, and what its two ends share."""

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from driftstream.buffers.sockets import check_endpoint, is_loopback, with_keys
from driftstream.envs.errors import require

Transport = Literal["ipc", "tcp"]
Product = Literal["trajectories", "terminals"]
Pacing = Literal["window", "ahead", "lock_step"]

HELLO_INTERVAL_S = 1.0


class StreamError(RuntimeError):
    """The stream cannot go on; the text names the sender and the cause."""


@dataclass(frozen=True)
class StreamConfig:
    """How data travels to the learner. Raises `ConfigError` at construction for what cannot work.

    `credits` is how many unacknowledged batches a sender may have. `max_staleness` is in learner steps; 0 is
    lock-step: one batch at a time, made with the newest weights. A sender of which `reject_threshold`
    messages in a row are refused is dropped, and a role of the run started again.

    A `host` that other machines reach takes the transport tcp, and connections that are `encrypted` with keys made
    for the run; None is that where it must be, and plain connections on this machine.
    """

    transport: Transport = "ipc"
    host: str = "127.0.0.1"
    credits: int = 2
    max_staleness: int = 64
    max_message_bytes: int = 256 * 2**20
    reject_threshold: int = 10
    encrypted: bool | None = None

    def __post_init__(self) -> None:
        require(self.transport in get_args(Transport), "stream.transport", self.transport, "ipc or tcp")
        self._check_host()
        bounds = {
            "credits": (1, 64),
            "max_staleness": (0, 2**31),
            "max_message_bytes": (2**16, 2**40),
            "reject_threshold": (1, 2**31),
        }
        for name, (least, most) in bounds.items():
            value = getattr(self, name)
            allowed = f"an integer from {least} to {most}"
            require(type(value) is int and least <= value <= most, f"stream.{name}", value, allowed)

    def _check_host(self) -> None:
        local = is_loopback(self.host)
        require(local or _is_own_address(self.host), "stream.host", self.host, "an IPv4 address of this machine")
        allowed = "a loopback address, or the transport tcp (--stream.transport tcp)"
        require(local or self.transport == "tcp", "stream.host", self.host, allowed)
        allowed = f"true or nothing, as other machines reach stream.host = {self.host}"
        require(local or self.encrypted is not False, "stream.encrypted", self.encrypted, allowed)
        allowed = "the transport tcp (--stream.transport tcp); ipc is this user's own"
        require(not self.encrypted or self.transport == "tcp", "stream.encrypted", self.encrypted, allowed)

    @property
    def uses_keys(self) -> bool:
        """Whether connections are encrypted, and only the run's own clients are let in."""
        return bool(self.encrypted) or not is_loopback(self.host)

    def endpoint(self, directory: Path, name: str) -> str:
        """Endpoint to bind the socket `name` to: a path in `directory`, or any free port of `host`.

        The keys, if there are any, are in `directory/keys`.
        """
        if self.transport == "ipc":
            return check_endpoint(f"ipc://{directory / name}", "endpoint")
        address = f"tcp://{self.host}:*"
        return with_keys(address, directory / "keys") if self.uses_keys else address

    def pacing(self, steps_per_batch: int = 1, publish_every: int = 1) -> Pacing:
        """How `max_staleness` is held: by a window of tickets, or with one batch under way.

        That one is begun when the one before it has been used ("ahead"), and ages by the replayed steps until it is
        wanted, or only when it is wanted ("lock_step"). Arguments as in `max_outstanding`.
        """
        if self.max_outstanding(steps_per_batch, publish_every):
            return "window"
        return "ahead" if self.max_staleness >= steps_per_batch - 1 else "lock_step"

    def max_outstanding(self, steps_per_batch: int = 1, publish_every: int = 1) -> int:
        """Width of the ticket window that holds `max_staleness`; 0 where only a single batch under way does.

        `steps_per_batch` is the most learner steps from one fresh batch to the next. Weights are published every
        `publish_every` steps, so a ticket's batch starts that much behind; from then on at most 2 (width - 1) other
        fresh batches are consumed before it, each with the replayed ones that follow it.
        """
        spare = self.max_staleness - publish_every - (steps_per_batch - 1)
        return 0 if spare < 0 else 1 + spare // (2 * steps_per_batch)


def _is_own_address(host: str) -> bool:
    """Whether one machine may have the address: other hosts are told to connect to it."""
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_multicast)


@dataclass(frozen=True)
class SeedRequest:
    """A sender's wish for `n` terminal states to start its chains from; `sequence` numbers its requests."""

    sender: str
    n: int
    epoch: int = 0
    sequence: int = 0
    from_actor: bool = False
    """Whether an actor asks, whose batch waits for the answer, and not a refiner."""
