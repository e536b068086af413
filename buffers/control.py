"""Control between the supervisor and its roles, all of it JSON: heartbeats and reports up, commands down.

A command must survive a role that connects late or again, so it is a state, not an event: the supervisor
keeps each role's latest command under a number, every heartbeat says which number the role has seen, and a
heartbeat that is behind is answered with the command. Reports queue in the role while there is no connection,
up to a bound.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import zmq

from driftstream.buffers import sockets
from driftstream.buffers.checks import is_integer, is_name
from driftstream.buffers.keys import GUEST, read_client_keys

LINK = "join@"
"""What the names of joined hosts start with, each of which has one connection for all its roles."""
MAX_REPORT_BYTES = 2**20
MAX_QUEUED_REPORTS = 10_000
PAUSE_S = 1.0
"""A heartbeat that is later than this was held up by a pause of the process."""
_MAX_PER_POLL = 1_000
_SINGLE_ROLES = ("learner", "evaluator")


@dataclass(frozen=True)
class Report:
    """What a role says: `kind` is "heartbeat" (payload: `pid`, and `turn_s`, the seconds since its work last came
    round, and `doing`, what it is at), "metrics", or another that both ends know."""

    role: str
    kind: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Endpoints:
    """Where a role finds the others: the learner's stream, weights and averaged weights, the supervisor."""

    stream: str
    weights: str
    ema_weights: str
    control: str


class ControlServer:
    """The supervisor's end; for use from one thread."""

    def __init__(self, endpoint: str) -> None:
        self.rejected = 0
        self._identities: dict[str, bytes] = {}
        self._commands: dict[str, tuple[int, str]] = {}
        self._number = 0
        self._context: zmq.Context = zmq.Context()
        self.socket = sockets.make_socket(self._context, zmq.ROUTER, MAX_REPORT_BYTES)
        try:
            keys = sockets.split_keys(endpoint)[1]
            self._guest = None if keys is None else read_client_keys(keys, GUEST).public
            self.endpoint = sockets.bind(self.socket, endpoint).endpoint
        except Exception:
            sockets.close(self._context, self.socket)
            raise

    def poll(self, timeout_ms: int) -> list[Report]:
        """Reports that have arrived, heartbeats among them, waiting up to `timeout_ms` for a first one."""
        self.socket.poll(timeout_ms)
        reports = []
        for identity, *frames in sockets.drain(self.socket):
            content = parse_content([frame.bytes for frame in frames]) or {}
            report = Report(content.get("role"), content.get("kind"), content.get("payload"))  # type: ignore[arg-type]
            fits = is_name(report.role) and is_name(report.kind) and isinstance(report.payload, dict)
            if not fits or (self._is_guest(frames) and not report.role.startswith(LINK)):
                self.rejected += 1
                continue
            self._identities[report.role] = identity.bytes
            self._repeat_command(report.role, content.get("seen"))
            reports.append(report)
            if len(reports) >= _MAX_PER_POLL:
                break
        return reports

    def send(self, role_name: str, command: str) -> None:
        """Make `command` the role's latest; it arrives now, or as soon as the role's heartbeat does."""
        self._number += 1
        self._commands[role_name] = (self._number, command)
        self._deliver(role_name)

    def forget(self, role_name: str) -> None:
        """Withdraw the role's command: a process that takes the role's name next starts without one."""
        self._commands.pop(role_name, None)
        self._identities.pop(role_name, None)

    def close(self) -> None:
        """Close the socket, within half a second."""
        if not self.socket.closed:
            sockets.close(self._context, self.socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _is_guest(self, frames: list[zmq.Frame]) -> bool:
        """Whether a message is that of an invited host, which may speak for itself and for none of the run's roles."""
        return self._guest is not None and any(frame.get("User-Id") == self._guest for frame in frames)

    def _repeat_command(self, role: str, seen: Any) -> None:
        if role in self._commands and seen != self._commands[role][0]:
            self._deliver(role)

    def _deliver(self, role: str) -> None:
        if role in self._identities:
            number, command = self._commands[role]
            frame = json.dumps({"number": number, "command": command}).encode()
            sockets.send_now(self.socket, [self._identities[role], frame])


class ControlClient:
    """A role's end: a thread sends heartbeats and reports, and keeps the latest command.

    `stop` is set by the command "stop" (end now), `finish` by "finish" (bring the work to its end). All
    methods are thread-safe and none waits for the supervisor. Heartbeats say when the role's own thread last came
    round (`turn`), as they come from another. `link` tells of the connection.
    """

    def __init__(self, endpoint: str, role: str, heartbeat_s: float = 0.5) -> None:
        sockets.check_endpoint(endpoint)
        self.stop = threading.Event()
        self.finish = threading.Event()
        self.doing: Callable[[], str] = str
        """What the role is at, in a few words, should it hang there."""
        self._role = role
        self._heartbeat_s = heartbeat_s
        self._outbox: deque[bytes] = deque(maxlen=MAX_QUEUED_REPORTS)
        self._latest: tuple[int, str] | None = None
        self._turned_at: float | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._context: zmq.Context = zmq.Context()
        self._socket = sockets.make_socket(self._context, zmq.DEALER, MAX_REPORT_BYTES)
        self._waker = sockets.Waker(self._context)
        try:
            self.link = sockets.connect(self._socket, endpoint)
        except Exception:
            self._close_sockets()
            raise
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def report(self, kind: str, payload: Mapping[str, Any]) -> None:
        """Send a report, or queue it (the oldest are lost beyond `MAX_QUEUED_REPORTS`).

        Numbers that are not finite pass through. Raises `TypeError` for what JSON cannot hold and
        `ValueError` for a report above `MAX_REPORT_BYTES`.
        """
        frame = self._frame(kind, payload)
        with self._lock:
            if not self._closed:
                self._outbox.append(frame)
                self._waker.wake()

    def turn(self) -> None:
        """Note that the role's work goes on; one that calls this once must go on calling it."""
        self._turned_at = time.monotonic()

    def command(self) -> str | None:
        """The supervisor's latest command, or None if there is none yet."""
        return None if self._latest is None else self._latest[1]

    def close(self) -> None:
        """Send the reports that wait, if that can be done within half a second, and end the thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._waker.wake()
        self._thread.join()
        self._close_sockets()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_sockets(self) -> None:
        self._waker.close()
        sockets.close(self._context, self._socket)

    def _frame(self, kind: str, payload: Mapping[str, Any]) -> bytes:
        seen = 0 if self._latest is None else self._latest[0]
        content = {"role": self._role, "kind": kind, "seen": seen, "payload": dict(payload)}
        frame = json.dumps(content).encode()
        if len(frame) > MAX_REPORT_BYTES:
            raise ValueError(f"report {kind!r} of {len(frame)} bytes: at most {MAX_REPORT_BYTES}")
        return frame

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._waker.socket, zmq.POLLIN)
        heartbeat_due = time.monotonic()
        while not self._closed:
            if time.monotonic() >= heartbeat_due:
                late = time.monotonic() - heartbeat_due
                if late > PAUSE_S and self._turned_at is not None:
                    # The whole process was stopped (Ctrl-Z, a suspended machine), and its work with it.
                    self._turned_at += late
                # Not queued behind reports: while there is no connection one heartbeat too many tells
                # nothing.
                sockets.send_now(self._socket, [self._frame("heartbeat", self._heartbeat())])
                heartbeat_due = time.monotonic() + self._heartbeat_s
            self._send_reports()
            poller.poll(sockets.remaining_ms(heartbeat_due))
            self._waker.clear()
            for frames in sockets.drain(self._socket, copy=True):
                self._take_command(parse_content(frames))
        self._send_reports()

    def _heartbeat(self) -> dict[str, float | str]:
        heartbeat: dict[str, float | str] = {"pid": os.getpid()}
        if self._turned_at is not None:
            heartbeat["turn_s"] = turn_s = max(0.0, time.monotonic() - self._turned_at)
            if turn_s > PAUSE_S:
                heartbeat["doing"] = self.doing()
        return heartbeat

    def _send_reports(self) -> None:
        with self._lock:
            while self._outbox and sockets.send_now(self._socket, [self._outbox[0]]):
                self._outbox.popleft()

    def _take_command(self, content: dict[str, Any] | None) -> None:
        if content is None or not is_integer(content.get("number")) or not isinstance(content.get("command"), str):
            return
        self._latest = (content["number"], content["command"])
        if content["command"] == "stop":
            self.stop.set()
        elif content["command"] == "finish":
            self.finish.set()


@dataclass
class RoleContext:
    """What a role is started with: who it is, its random stream's coordinates, and how to reach the others.

    `index` tells roles of one kind apart (actors, refiners); `epoch` is the number of restarts so far. A role on
    another host than the learner's is `joined_as` a name of its own.
    """

    role: str
    index: int
    seed: int
    epoch: int
    run_dir: Path
    endpoints: Endpoints
    control: ControlClient
    joined_as: str = ""

    @property
    def name(self) -> str:
        """The role's name in logs, process titles and the stream: "actor-0", but "learner"."""
        return self.joined_as or (self.role if self.role in _SINGLE_ROLES else f"{self.role}-{self.index}")

    @property
    def label(self) -> str:
        """What tells the role from others of its kind in the names of metrics: "0"."""
        return self.joined_as.removeprefix(f"{self.role}-") or str(self.index)

    @property
    def should_stop(self) -> bool:
        """Whether the supervisor wants this role to end now."""
        return self.control.stop.is_set()

    def turn(self) -> None:
        """Note that the role's work goes on: a role that stays in one turn for too long is taken to hang."""
        self.control.turn()

    def report_metrics(self, metrics: Mapping[str, float], **position: float) -> None:
        """Report metrics by their public names; `position` is `step`, `wall_s`, `energy_evaluations`."""
        self.control.report("metrics", {"metrics": dict(metrics), **position})


def parse_content(frames: list[bytes]) -> dict[str, Any] | None:
    """The JSON object of a one-frame message, or None if it is something else."""
    try:
        (frame,) = frames
        content = json.loads(frame)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
