"""Configuration of the data stream, and what its two ends share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from driftstream.buffers.sockets import check_endpoint, check_host
from driftstream.envs.errors import require

Transport = Literal["ipc", "tcp"]
Product = Literal["trajectories", "terminals"]

HELLO_INTERVAL_S = 1.0


class StreamError(RuntimeError):
    """The stream cannot go on; the text names the sender and the cause."""


@dataclass(frozen=True)
class StreamConfig:
    """How data travels to the learner. Raises `ConfigError` at construction for what cannot work.

    `credits` is how many unacknowledged batches a sender may have. `max_staleness` is in learner steps; 0 is
    lock-step: one batch at a time, made with the newest weights. A sender of which `reject_threshold`
    messages in a row are refused ends the run.
    """

    transport: Transport = "ipc"
    host: str = "127.0.0.1"
    credits: int = 2
    max_staleness: int = 64
    max_message_bytes: int = 256 * 2**20
    reject_threshold: int = 10

    def __post_init__(self) -> None:
        require(self.transport in get_args(Transport), "stream.transport", self.transport, "ipc or tcp")
        check_host(self.host, "stream.host")
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

    def endpoint(self, directory: Path, name: str) -> str:
        """Endpoint to bind the socket `name` to: a path in `directory`, or any free port of `host`."""
        if self.transport == "ipc":
            return check_endpoint(f"ipc://{directory / name}", "endpoint")
        return f"tcp://{self.host}:*"

    def max_outstanding(self, steps_per_batch: int = 1, publish_every: int = 1) -> int:
        """Width of the ticket window that holds `max_staleness`; 0 where only lock-step does.

        `steps_per_batch` is the most learner steps from one fresh batch to the next. Weights are published every
        `publish_every` steps, so a ticket's batch starts that much behind; from then on at most 2 (width - 1) other
        fresh batches are consumed before it, each with the replayed ones that follow it.
        """
        spare = self.max_staleness - publish_every - (steps_per_batch - 1)
        return 0 if spare < 0 else 1 + spare // (2 * steps_per_batch)


@dataclass(frozen=True)
class SeedRequest:
    """A sender's wish for `n` terminal states to start its chains from; `sequence` numbers its requests."""

    sender: str
    n: int
    epoch: int = 0
    sequence: int = 0
    from_actor: bool = False
    """Whether an actor asks, whose batch waits for the answer, and not a refiner."""
