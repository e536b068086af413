"""`driftstream join`: actors and refiners on this host for a run whose learner is on another."""

import contextlib
import json
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from typing import Any

import setproctitle

from driftstream.actors.kinds import parse_kinds, settle_kinds
from driftstream.buffers.control import LINK, ControlClient
from driftstream.buffers.keys import write_client_keys
from driftstream.envs.errors import ConfigError, require
from driftstream.launch.child import compute_in_child
from driftstream.launch.flags import CommandError, JoinFlags, UsageError, complain, parse
from driftstream.launch.hosts import RESTART, joined_name
from driftstream.launch.invitation import Invitation, read_invitation
from driftstream.launch.plan import RunPlan
from driftstream.launch.processes import RoleProcess, fork_server
from driftstream.launch.progress import Progress
from driftstream.launch.run_directory import RunDirectory, default_root
from driftstream.launch.seeding import derive_seed
from driftstream.launch.supervisor import DONE, FAILED, INTERRUPTED, Phase, Supervisor
from driftstream.launch.worker import ROLE_FUNCTION

PRELOAD = ("driftstream.launch.preload",)
FIRST_ANSWER_S = 15.0
"""A run that has not answered by then is not there."""
SILENCE_S = 90.0
"""A run that has been silent for this long is taken to have ended: longer than a network's bad moment."""


def run(arguments: list[str], prog: str) -> int:
    """Make data for a run until it ends; returns the exit code: 0 it ended, 1 failed, 130 interrupted."""
    flags = parse(JoinFlags, arguments, prog)
    invitation = read_invitation(flags.file)
    choose_kinds(flags, invitation)
    with fork_server(PRELOAD) as context:
        toml, code = compute_in_child(context, _configure, (arguments, prog), "configure")
        if toml is None:
            return code
        plan = RunPlan.from_toml(toml)
        here = RunDirectory.create(flags.out or default_root(plan.target, f"{plan.method}-joined"))
        write_client_keys(here.keys, invitation.keys)
        try:
            endpoints = invitation.endpoints(here.keys)
            control = endpoints.pop("control")
            with here.hold(elsewhere=endpoints):
                here.write_config(toml)
                setproctitle.setproctitle(f"driftstream join {here.root}")
                return join(plan, here, context, control)
        finally:
            shutil.rmtree(here.keys, ignore_errors=True)  # every `join` brings them along


def choose_kinds(flags: JoinFlags, invitation: Invitation) -> dict[str, dict[str, int]]:
    """How many roles of which kinds this host shall run: the run's kinds where only a number is given.

    Raises:
        UsageError: no role at all.
        ConfigError: a run that streams nothing, counts that are none, or a number where the run has several kinds.
    """
    config = invitation.config
    require(config.get("data") == "stream", "join", invitation.run, "a run whose actors stream (data = 'stream')")
    actors, refiners = flags.actors, flags.refiners
    if actors is None:
        actors = "1" if refiners is None else "0"
    chosen = {}
    for role, text, ordinary in (("actor", actors, "explore"), ("refiner", refiners or "0", "mala")):
        if not re.fullmatch(r"[0-9]{1,6}", text, re.ASCII):
            chosen[role] = parse_kinds(text, f"--{role}s")
        elif int(text):
            of_run = config.get(role, {}).get("kinds") or {ordinary: 1}
            chosen[role] = settle_kinds(of_run, int(text), ordinary, role)
        else:
            chosen[role] = {}
    if not any(chosen.values()):
        raise UsageError("--actors 0 without refiners: there is nothing to run")
    return chosen


def _configure(arguments: list[str], prog: str) -> str:
    """The configuration of this host's roles, once every one of them has been made here to see that it can be."""
    from driftstream.launch.config import RunConfig, from_dict, has_teacher, to_toml
    from driftstream.launch.configure import placed
    from driftstream.launch.roles import build_actor, build_refiner

    flags = parse(JoinFlags, arguments, prog)
    invitation = read_invitation(flags.file)
    config = from_dict(RunConfig(), invitation.config)
    kinds = choose_kinds(flags, invitation)
    teaches = has_teacher(config) or "teacher" not in kinds["actor"]
    require(teaches, "--actors", flags.actors, "no teacher, as the run has none")
    config = placed(
        replace(
            config,
            device="cpu",
            monitor=replace(config.monitor, wandb="disabled"),
            actor=replace(config.actor, kinds=kinds["actor"], count=sum(kinds["actor"].values())),
            refiner=replace(config.refiner, kinds=kinds["refiner"], count=sum(kinds["refiner"].values())),
        )
    )
    try:
        for role, build in (("actor", build_actor), ("refiner", build_refiner)):
            first = 0
            for count in getattr(config, role).kinds.values():
                build(config, 0, first)
                first += count
    except ConfigError as error:
        allowed = f"{error.allowed}; targets and plug-ins of the run must be on this host, at the same place"
        raise ConfigError(error.field, error.value, allowed) from error
    return to_toml(config)


def join(
    plan: RunPlan, here: RunDirectory, context: ForkServerContext, control: str, role_function: str = ROLE_FUNCTION
) -> int:
    """Run this host's roles under the run's control; returns the exit code."""
    host = host_name()
    with ControlClient(control, LINK + host, plan.supervisor.heartbeat_s) as link:
        progress = HostProgress(f"{plan.target} · joined as {host} · {here.shown}", link)
        with contextlib.closing(progress):
            progress.event(f"logs: {here.shown}/logs")
            wait_for_run(link, control)
            joined = JoinedHost(plan, here, context, progress, link, host, role_function)
            code = joined.run()
        reason = {DONE: "as the run ended", INTERRUPTED: "interrupted"}.get(code, joined.cause)
        link.report("leave", {"text": reason})
    return complain("driftstream", joined.cause, code) if code else 0


def host_name() -> str:
    """A name for this host in the run; every call makes another, as one host may join twice."""
    word = re.sub(r"[^a-z0-9]+", "-", socket.gethostname().lower())[:12].strip("-") or "host"
    return f"{word}-{secrets.token_hex(3)}"


def wait_for_run(link: ControlClient, control: str) -> None:
    """Wait for the connection to the run; CommandError where there is none, which says why."""
    deadline = time.monotonic() + FIRST_ANSWER_S
    while link.link.gone_s > 0:
        if link.link.trouble is not None:
            raise CommandError(link.link.trouble)
        if time.monotonic() > deadline:
            address = control.partition("?")[0]
            raise CommandError(f"no answer from {address} within {FIRST_ANSWER_S:g} s: is the run still going?")
        time.sleep(0.05)


class HostProgress(Progress):
    """What is to be seen of a joined host; warnings go to the run's own screen too."""

    def __init__(self, title: str, link: ControlClient) -> None:
        self._link = link
        super().__init__(title)

    def event(self, text: str, style: str = "") -> None:
        super().event(text, style)
        if style in ("yellow", "red"):
            self._link.report("event", {"text": text})

    def _position(self) -> str:
        return "joined"


class JoinedHost(Supervisor):
    """Runs actors and refiners alone, hands on what they report, and stops when the run does."""

    def __init__(
        self,
        plan: RunPlan,
        run: RunDirectory,
        context: ForkServerContext,
        progress: Progress,
        link: ControlClient,
        host: str,
        role_function: str = ROLE_FUNCTION,
    ) -> None:
        # Two hosts of a run, and a host that joins twice, have different random streams.
        plan = replace(plan, seed=derive_seed(plan.seed, host))
        super().__init__(plan, run, 0, context, progress, role_function)
        self._link, self._host = link, host
        self._dropped: dict[str, int] = {}

    def run(self) -> int:
        """Make data until the run ends: 0. See `Supervisor.run` for the other exit codes."""
        code = super().run()
        if code == DONE and self._phase is Phase.TRAINING:
            code, self.cause = FAILED, "every role has been given up"
        return code

    def _make_roles(self) -> Iterator[RoleProcess]:
        for role, kinds in (("actor", self.plan.actors), ("refiner", self.plan.refiners)):
            for index, kind in enumerate(kinds):
                yield self._make_role(role, index, kind, joined_name(role, kind, index, self._host))

    def _supervise(self) -> None:
        self._link.report("join", {"roles": list(self._roles)})
        super()._supervise()

    def _read_reports(self, timeout_ms: int = 0) -> None:
        super()._read_reports(timeout_ms)
        if self._phase is not Phase.TRAINING:
            return
        if self._link.stop.is_set():
            self.progress.event("the run has ended")
            self._stop(DONE, "")
        elif self._link.link.gone_s > SILENCE_S:
            self._stop(FAILED, f"the run has been silent for {SILENCE_S:g} s")
        else:
            self._restart_dropped(self._link.command() or "")

    def _restart_dropped(self, command: str) -> None:
        """Start afresh what the run wants started afresh more often than it was."""
        if not command.startswith(RESTART):
            return
        for name, count in json.loads(command.removeprefix(RESTART)).items():
            if name in self._roles and count > self._dropped.get(name, 0):
                self._dropped[name] = count
                self._on_drop(name, "dropped by the learner")

    def _log(self, role: RoleProcess, metrics: dict[str, float], position: Mapping[str, Any]) -> None:
        super()._log(role, metrics, position)
        self._link.report("metrics", {"metrics": metrics})

    def _interrupt(self) -> None:
        self.progress.event("interrupted: stopping (again to kill)")
        self._stop(INTERRUPTED, "interrupted")
