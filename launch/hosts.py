"""Hosts that have joined a run, as the run's supervisor sees them, and the names of their roles.

A host has one connection to the supervisor, under the name `join@HOST`: it watches and restarts its roles by itself,
and hands on what they report. So it is heard as one, and ordered as one.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from driftstream.buffers.checks import MAX_INTEGER, is_integer, is_name
from driftstream.buffers.control import LINK, Report
from driftstream.envs.errors import require

MAX_HOSTS = 1_000
MAX_FIGURES = 100
MAX_TEXT = 1_000
RESTART = "restart "
"""What the order to a host begins with that roles of its shall start afresh; their names follow, each with how often so
far, as a command is the latest state and not an event."""
_NAME = re.compile(r"(?:actor|refiner)-(?P<kind>.+)-\d+@.+")


def joined_name(role: str, kind: str, index: int, host: str) -> str:
    """The name of a role on another host: "actor-explore-0@node7-3f9c1a". ConfigError where it is too long."""
    name = f"{role}-{kind}-{index}@{host}"
    require(is_name(name), f"{role}.kinds", kind, f"a shorter kind, as its processes would be called {name}")
    return name


class RoleKinds(Mapping[str, str]):
    """The kind of every actor by its name: of the run's own from a table, of joined ones as their names have it."""

    def __init__(self, own: Mapping[str, str]) -> None:
        self._own = dict(own)

    def __getitem__(self, name: str) -> str:
        joined = _NAME.fullmatch(name)
        return self._own[name] if joined is None else joined["kind"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)


@dataclass
class _Host:
    roles: frozenset[str]
    heard: float
    restarts: dict[str, int] = field(default_factory=dict)
    silent: bool = False


class JoinedHosts:
    """Takes in what joined hosts report; what does not fit is ignored, as it comes from elsewhere.

    `send` gives a host a command, `log` takes metrics, `event` a line for the user and its style.
    """

    def __init__(
        self,
        send: Callable[[str, str], None],
        log: Callable[[dict[str, float]], None],
        event: Callable[[str, str], None],
        silence_s: float,
    ) -> None:
        self._send, self._log, self._event, self._silence_s = send, log, event, silence_s
        self._hosts: dict[str, _Host] = {}
        self._stopping = False

    @property
    def present(self) -> bool:
        """Whether a host that is heard of has not left yet."""
        return any(not host.silent for host in self._hosts.values())

    def take(self, report: Report, now: float) -> None:
        """Take in a report of a role that is not the run's own."""
        if not report.role.startswith(LINK):
            return
        name = report.role.removeprefix(LINK)
        if report.kind == "join":
            self._join(name, report.payload, now)
        host = self._hosts.get(name)
        if host is None:
            return
        host.heard = now
        if host.silent:
            host.silent = False
            self._event(f"{name} is back", "")
        match report.kind:
            case "metrics":
                self._log(_figures(report.payload.get("metrics"), name))
            case "event":
                self._event(f"{name}: {_text(report.payload)}", "")
            case "leave":
                del self._hosts[name]
                self._event(f"{name} left: {_text(report.payload)}", "")

    def check(self, now: float) -> None:
        """Note hosts that have fallen silent; they may come back."""
        for name, host in self._hosts.items():
            if not host.silent and now - host.heard > self._silence_s:
                host.silent = True
                self._event(f"{name}: silent for {now - host.heard:.0f} s", "yellow")

    def excuse(self, seconds: float) -> None:
        """Leave a time in which nobody listened out of the hosts' silence."""
        for host in self._hosts.values():
            host.heard += seconds

    def stop(self) -> None:
        """Tell every host to stop, and those that join later."""
        self._stopping = True
        for name in self._hosts:
            self._send(LINK + name, "stop")

    def restart(self, role: str) -> None:
        """Have the host of a role that the learner has dropped start it afresh."""
        name = role.partition("@")[2]
        host = self._hosts.get(name)
        if host is not None and role in host.roles and not self._stopping:
            host.restarts[role] = host.restarts.get(role, 0) + 1
            self._send(LINK + name, RESTART + json.dumps(host.restarts))

    def _join(self, name: str, payload: Mapping[str, Any], now: float) -> None:
        roles = payload.get("roles")
        valid = isinstance(roles, list) and all(is_name(role) and _NAME.fullmatch(role) for role in roles)
        if not valid or len(self._hosts) >= MAX_HOSTS or name in self._hosts:
            return
        assert isinstance(roles, list)
        self._hosts[name] = _Host(frozenset(roles), now)
        shown = ", ".join(role.partition("@")[0] for role in roles[:8]) + (", …" if len(roles) > 8 else "")
        self._event(f"{name} joined: {shown}", "green")
        if self._stopping:
            self._send(LINK + name, "stop")


def _figures(metrics: object, host: str) -> dict[str, float]:
    """Metrics of the host's own roles; it has no business with others."""
    if not isinstance(metrics, dict):
        return {}
    own = re.compile(rf"(actor|refiner)/[^/]+@{re.escape(host)}/\w+", re.ASCII)
    return {
        name: float(value)
        for name, value in list(metrics.items())[:MAX_FIGURES]
        if own.fullmatch(name) and (type(value) is float or is_integer(value, least=-MAX_INTEGER))
    }


def _text(payload: Mapping[str, Any]) -> str:
    text = str(payload.get("text", ""))[:MAX_TEXT]
    return "".join(c if c.isprintable() else " " for c in text)
