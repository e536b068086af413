"""What the supervisor knows of a configuration: plain values, read without importing what the roles need."""

import tomllib
from dataclasses import dataclass
from typing import Any, Literal

from driftstream.actors.kinds import expand_kinds, short_name
from driftstream.buffers.stream_config import StreamConfig
from driftstream.envs.errors import require
from driftstream.eval.monitor import MonitorConfig


@dataclass(frozen=True)
class SupervisorConfig:
    """How roles are watched: a silent or hung one is killed, a dead one (seen at once) restarted, within a budget.

    An actor or refiner hangs when for `hang_timeout_s` it neither ends a batch or cycle nor asks the target. A role
    that worked for `restart_reset_s` before it died has its whole budget again. `target_error` says what a target
    that raises does: `end` the run, or `restart` the role like any other failure.
    """

    heartbeat_s: float = 0.5
    heartbeat_timeout_s: float = 20.0
    hang_timeout_s: float = 120.0
    max_restarts: int = 5
    restart_delay_s: float = 0.2
    restart_reset_s: float = 300.0
    drain_s: float = 8.0
    target_error: Literal["end", "restart"] = "end"

    def __post_init__(self) -> None:
        for name in ("heartbeat_s", "hang_timeout_s", "restart_delay_s", "restart_reset_s", "drain_s"):
            value = getattr(self, name)
            require(value > 0, f"supervisor.{name}", value, "a positive number of seconds")
        allowed = f"more than twice heartbeat_s = {self.heartbeat_s}"
        timeout = self.heartbeat_timeout_s
        require(timeout > 2 * self.heartbeat_s, "supervisor.heartbeat_timeout_s", timeout, allowed)
        require(self.max_restarts >= 0, "supervisor.max_restarts", self.max_restarts, "0 or more")
        allowed = "'end' or 'restart'"
        require(self.target_error in ("end", "restart"), "supervisor.target_error", self.target_error, allowed)


@dataclass(frozen=True)
class RunPlan:
    """The part of a resolved configuration that starts and watches processes, and the whole of it as a table."""

    target: str
    method: str
    seed: int
    sync: bool
    actors: tuple[str, ...]
    """The kind of every actor, by index; refiners likewise."""
    refiners: tuple[str, ...]
    stream: StreamConfig
    supervisor: SupervisorConfig
    monitor: MonitorConfig
    resolved: dict[str, Any]

    @property
    def invites(self) -> bool:
        """Whether actors and refiners on other hosts may join."""
        return bool(self.actors) and not self.sync and self.stream.uses_keys

    @classmethod
    def from_toml(cls, text: str) -> "RunPlan":
        """Read the TOML of a configuration that `resolve` has checked."""
        table = tomllib.loads(text)
        monitor, streamed = table["monitor"], table["data"] == "stream"
        return cls(
            target=table["target"],
            method=table["method"],
            seed=table["seed"],
            sync=table["sync"],
            actors=_kinds(table["actor"]) if streamed else (),
            refiners=_kinds(table["refiner"]) if streamed else (),
            stream=StreamConfig(**table["stream"]),
            supervisor=SupervisorConfig(**table["supervisor"]),
            monitor=MonitorConfig(**monitor | {"tags": tuple(monitor["tags"])}),
            resolved=table,
        )


def _kinds(table: dict[str, Any]) -> tuple[str, ...]:
    return tuple(short_name(kind) for kind in expand_kinds(table["kinds"]))
