"""The process that a user starts: it starts every role, watches them, and ends them in bounded time."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import FrameType
from typing import Any

import tomli_w
import zmq

from driftstream.buffers.control import ControlServer, Report
from driftstream.eval.monitor import Monitor
from driftstream.launch.hosts import JoinedHosts
from driftstream.launch.plan import RunPlan
from driftstream.launch.processes import RoleProcess, tail
from driftstream.launch.progress import Progress
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.start_up import StartUp
from driftstream.launch.worker import FAILED_FOR_GOOD, ROLE_FUNCTION

DONE, FAILED, INTERRUPTED = 0, 1, 130
TICK_MS = 100
PAUSE_S = 1.0
"""A turn of the loop that takes longer was a pause of this process (Ctrl-Z, a suspended machine)."""
STOPPED_S = 1.5
"""A role that was stopped (SIGSTOP) is silent for this long before it is killed."""
LONGEST_DELAY_S = 30.0
LAST_LINES, LAST_LINES_OF_A_RUN = 3, 8
"""Shown of the log of a role that died, and of one that ends the run with it."""
ORDINARY_KINDS = ("explore", "mala")
"""Kinds that go without saying."""
FINAL_EVALUATION_S = 600.0
"""A final evaluation that takes longer is given up."""
ROLES_STOP_S, MONITOR_STOPS_S = 8.0, 9.0
"""From a Ctrl-C or a failure to the end of the roles, and of the monitor, so that all have ended within ten seconds."""
MONITOR_CLOSE_S, LEAST_PATIENCE_S = 10.0, 0.5
HOSTS_LEAVE_S = 5.0
"""What joined hosts have to end after this run's own processes."""
LAST_WORDS_S = 2.0
"""What the last report of a process that has ended may take to arrive on a busy machine."""


class Phase(Enum):
    """What the run is doing."""

    TRAINING = "training"
    FINISHING = "finishing"
    """The learner has met a limit: it ends, and then the evaluator scores the last checkpoint."""
    STOPPING = "stopping"
    """Interrupted or failed: every role has been told to stop."""


class Supervisor:
    """Runs the roles of one run.

    A role that dies or falls silent is started again within a budget, except for the learner: its death ends
    the run, which can be resumed. The caller holds the run directory; `launch` counts those who held it before.
    `role_function` is what each process runs (see `worker_main`).
    """

    def __init__(
        self,
        plan: RunPlan,
        run: RunDirectory,
        launch: int,
        context: ForkServerContext,
        progress: Progress,
        role_function: str = ROLE_FUNCTION,
        start_up: StartUp | None = None,
    ) -> None:
        self.plan, self.run_directory, self.progress = plan, run, progress
        self._launch = launch
        self.final: dict[str, float] = {}
        """Metrics of the final evaluation."""
        self.cause = ""
        """Why the run failed or was interrupted: one line."""
        self._context, self._role_function = context, role_function
        self._start_up = start_up or StartUp()
        self._phase = Phase.TRAINING
        self._exit_code = DONE
        self._roles: dict[str, RoleProcess] = {}
        self._signals = 0
        self._stopping_since: float | None = None
        self._position: dict[str, float] = {"step": 0, "wall_s": 0.0, "energy_evaluations": 0}

    def run(self) -> int:
        """Train to the end; returns the exit code: 0 done, 1 failed, 130 interrupted (`cause` says why).

        No process of a role is left when this returns or raises.
        """
        self._control = ControlServer(self.run_directory.addresses()["control"])
        self._monitor = Monitor(self.run_directory.root, self.plan.monitor, self.plan.resolved)
        self._roles = {role.name: role for role in self._make_roles()}
        silence_s = self.plan.supervisor.heartbeat_timeout_s
        self._hosts = JoinedHosts(self._control.send, self._log_joined, self.progress.event, silence_s)
        with self._handle_signals():
            try:
                self._supervise()
                self._see_off_hosts()
            except KeyboardInterrupt:
                self._exit_code, self.cause = INTERRUPTED, "killed"
            finally:
                self._kill_all()
                self._control.close()
                self._monitor.close(self._monitor_patience_s())
        return self._exit_code

    def _make_roles(self) -> Iterator[RoleProcess]:
        kinds = {
            "learner": ("",),
            "actor": self.plan.actors,
            "refiner": self.plan.refiners,
            "evaluator": ("",),
        }
        for role, of_role in kinds.items():
            for index, kind in enumerate(of_role):
                yield self._make_role(role, index, kind)

    def _make_role(self, role: str, index: int, kind: str, joined_as: str = "") -> RoleProcess:
        return RoleProcess(
            role,
            index,
            run=self.run_directory,
            context=self._context,
            seed=self.plan.seed,
            restarts=self.plan.supervisor.max_restarts,
            launch=self._launch,
            role_function=self._role_function,
            kind="" if kind in ORDINARY_KINDS else kind,
            joined_as=joined_as,
        )

    # The loop.

    def _supervise(self) -> None:
        self._start_up.reached("launched")
        for role in self._roles.values():
            role.start()
        now = time.monotonic()
        while any(role.in_use for role in self._roles.values()):
            before = now
            self._wait()
            now = time.monotonic()
            if now - before > PAUSE_S:
                for role in self._roles.values():
                    role.excuse(now - before)
                self._hosts.excuse(now - before)
            self._read_reports()
            # Before roles are looked at: one may have been told by the same signal.
            if self._signals and self._phase is not Phase.STOPPING:
                self._interrupt()
            for role in self._roles.values():
                self._check(role, now)
            self.progress.tick()

    def _interrupt(self) -> None:
        step = int(self._position["step"])
        self.progress.event("interrupted: saving and stopping (again to kill)", "yellow")
        self._stop(INTERRUPTED, f"interrupted at step {step:,}; resume with: {self.run_directory.resume_command}")

    def _wait(self) -> None:
        poller = zmq.Poller()
        poller.register(self._control.socket, zmq.POLLIN)
        for role in self._roles.values():
            if role.sentinel is not None:
                poller.register(role.sentinel, zmq.POLLIN)
        poller.poll(TICK_MS)

    def _check(self, role: RoleProcess, now: float) -> None:
        """Note a role's end, kill it where it is silent or late, and start it where that is due."""
        settings = self.plan.supervisor
        if role.alive:
            if role.deadline is not None and now > role.deadline:
                role.kill("did not stop in time")
            elif role.silence_s(now) > settings.heartbeat_timeout_s:
                role.kill(f"silent for {role.silence_s(now):.1f} s (--supervisor.heartbeat-timeout-s)")
            elif role.silence_s(now) > STOPPED_S and role.stopped:
                role.kill(f"stopped for {role.silence_s(now):.1f} s")
            elif role.turn_s > settings.hang_timeout_s:
                role.dump_stack()
                doing = f" in {role.doing}" if role.doing else ""
                role.kill(f"hung: no sign of work for {role.turn_s:.1f} s{doing} (--supervisor.hang-timeout-s)")
        code = role.collect()
        if code is not None:
            self._on_end(role, code, now)
        if role.restart_at is not None and now >= role.restart_at:
            role.start()

    # What roles report.

    def _read_reports(self, timeout_ms: int = 0) -> None:
        now = time.monotonic()
        for report in self._control.poll(timeout_ms):
            role = self._roles.get(report.role)
            if role is None:
                self._hosts.take(report, now)
                continue
            role.heard(now)
            if report.kind == "heartbeat":
                turn_s = report.payload.get("turn_s", 0.0)
                role.turn_s = turn_s if isinstance(turn_s, float) else 0.0
                role.doing = str(report.payload.get("doing", ""))
            self._take(role, report)
        self._hosts.check(now)

    def _take(self, role: RoleProcess, report: Report) -> None:
        payload = report.payload
        match report.kind:
            case "metrics":
                self._log(role, payload["metrics"], payload)
            case "status":
                self.progress.status(self._phase.value, int(payload["step"]), payload["progress"])
                if payload["phase"] == "finished" and payload["reason"] != "stopped":
                    self._finish(payload["reason"])
            case "event":
                self.progress.event(payload["text"])
            case "images":
                self._monitor.log_images({name: Path(path) for name, path in payload.items()})
            case "final":
                self.final = payload["metrics"]
                figures = {name: value for name, value in self.final.items() if "/" in name}
                self._log(role, figures, self.final)
                self._monitor.summary(figures)
            case "dropped":
                self._on_drop(str(payload["sender"]), f"dropped by the learner: {payload['reason']}")
            case "error":
                role.error = payload

    def _log(self, role: RoleProcess, metrics: dict[str, float], position: Mapping[str, Any]) -> None:
        """Hand metrics on; a role that does not know the learner's position is given the latest one."""
        known = {key: position[key] for key in self._position if key in position}
        if role.name == "learner":
            self._position.update(known)
            if self._position["step"]:
                metrics = metrics | self._start_up.first_step(self._position["wall_s"])
        where = self._position | known
        step = int(where["step"])
        self._monitor.log(metrics, step, where["wall_s"], int(where["energy_evaluations"]))
        self._keep_config()
        self.progress.update(metrics, step)

    def _keep_config(self) -> None:
        """Write the configuration anew where the run directory was removed: what is saved from now on can be used."""
        if not self.run_directory.config.exists():
            with contextlib.suppress(OSError):
                self.run_directory.lock_again()
                self.run_directory.write_config(tomli_w.dumps(self.plan.resolved))

    def _on_drop(self, sender: str, why: str) -> None:
        """The learner reads nothing more from a sender: a role of this run starts afresh."""
        if sender in self._roles:
            self._roles[sender].kill(why)
        else:
            self.progress.event(f"{sender} {why}", "yellow")
            self._hosts.restart(sender)

    def _log_joined(self, metrics: dict[str, float]) -> None:
        where = self._position
        self._monitor.log(metrics, int(where["step"]), where["wall_s"], int(where["energy_evaluations"]))
        self.progress.update(metrics)

    # How roles end.

    def _on_end(self, role: RoleProcess, code: int, now: float) -> None:
        self._read_reports()  # an error may have come together with the end
        cause = f"{role.title} ended: {role.cause(code)}"
        told_to_stop = self._phase is Phase.STOPPING or role.command == "stop"
        if code == FAILED_FOR_GOOD and not told_to_stop:
            self._fail(role, cause)
        elif told_to_stop:
            if code:
                self.progress.event(cause, "yellow")
        elif role.name == "learner":
            self._on_learner_end(role, code, cause)
        elif role.command == "finish" and code == 0:
            if not self._is_reported(lambda: bool(self.final)):
                self._fail(role, f"{role.name} ended without a final evaluation")
        else:
            self._restart(role, cause, now)

    def _is_reported(self, known: Callable[[], bool]) -> bool:
        """Whether a role that has ended well has said what makes it known; its last words may still be on their way."""
        deadline = time.monotonic() + LAST_WORDS_S
        while not known() and time.monotonic() < deadline:
            self._read_reports(TICK_MS)
        return known()

    def _on_learner_end(self, learner: RoleProcess, code: int, cause: str) -> None:
        finished = code == 0 and self._is_reported(lambda: self._phase is not Phase.TRAINING)
        if self._phase is Phase.TRAINING and not finished:
            self._fail(learner, f"{cause}; resume with: {self.run_directory.resume_command}")
            return
        if code:
            self.progress.event(cause, "yellow")
        evaluator = self._roles["evaluator"]
        evaluator.restarts_left = 1
        self._order(evaluator, "finish", FINAL_EVALUATION_S)
        if not evaluator.alive:
            evaluator.restart_at = time.monotonic()

    def _restart(self, role: RoleProcess, cause: str, now: float) -> None:
        settings = self.plan.supervisor
        if role.command is None:
            role.forgive(now, settings.restart_reset_s)
        if role.restarts_left == 0:
            peers = [peer for peer in self._roles.values() if peer.role == role.role and peer is not role]
            if role.command == "finish" or (role.role == "actor" and not any(peer.in_use for peer in peers)):
                self._fail(role, f"{cause}; given up after {role.attempts} starts")
            else:
                self.progress.event(f"{cause}; given up after {role.attempts} starts", "red")
                self._show_log(role, LAST_LINES)
            return
        role.restarts_left -= 1
        delay = min(settings.restart_delay_s * 2.0 ** min(role.attempts - 1, 30), LONGEST_DELAY_S)
        role.restart_at = now + delay
        count = f"{role.attempts} of {role.attempts + role.restarts_left}"
        self.progress.event(f"{cause}; restarted in {delay:.1f} s ({count})", "yellow")
        self._show_log(role, LAST_LINES)

    # How the run ends.

    def _finish(self, limit: str) -> None:
        """The learner has met its limit: let the makers of its data go."""
        if self._phase is not Phase.TRAINING:
            return
        self._phase = Phase.FINISHING
        self.progress.event(f"training finished (limit: {limit}); evaluating the last checkpoint")
        self._roles["learner"].deadline = time.monotonic() + self.plan.supervisor.drain_s
        for role in self._roles.values():
            if role.role in ("actor", "refiner"):
                self._order(role, "stop", self.plan.supervisor.drain_s)
        self._hosts.stop()

    def _fail(self, role: RoleProcess, cause: str) -> None:
        """End the run because of a role, with what it wrote last."""
        self._show_log(role, LAST_LINES_OF_A_RUN)
        self._stop(FAILED, cause)

    def _show_log(self, role: RoleProcess, lines: int) -> None:
        for line in tail(role.log, lines):
            self.progress.event(f"{role.name} | {line}", "dim")

    def _stop(self, exit_code: int, cause: str) -> None:
        """Tell every role to stop; the first cause is the one that counts."""
        if self._phase is Phase.STOPPING:
            return
        self._phase, self._exit_code, self.cause = Phase.STOPPING, exit_code, cause
        self._stopping_since = time.monotonic()
        for role in self._roles.values():
            self._order(role, "stop", min(self.plan.supervisor.drain_s, ROLES_STOP_S))
        self._hosts.stop()

    def _see_off_hosts(self) -> None:
        """Wait a while for joined hosts to leave, so that the run's record has how they ended."""
        deadline, signals = time.monotonic() + HOSTS_LEAVE_S, self._signals
        if self._stopping_since is not None:
            deadline = min(deadline, self._stopping_since + ROLES_STOP_S)
        while self._hosts.present and time.monotonic() < deadline and self._signals == signals:
            self._read_reports(TICK_MS)

    def _order(self, role: RoleProcess, command: str, within_s: float) -> None:
        role.command, role.deadline, role.restart_at = command, time.monotonic() + within_s, None
        self._control.send(role.name, command)

    def _kill_all(self) -> None:
        for role in self._roles.values():
            role.kill("the run ended")
        for role in self._roles.values():
            role.join()

    def _monitor_patience_s(self) -> float:
        if self._stopping_since is None:
            return MONITOR_CLOSE_S
        left = self._stopping_since + MONITOR_STOPS_S - time.monotonic()
        return LEAST_PATIENCE_S if self._signals > 1 else max(LEAST_PATIENCE_S, left)

    @contextlib.contextmanager
    def _handle_signals(self) -> Iterator[None]:
        def handle(number: int, frame: FrameType | None) -> None:
            self._signals += 1
            if self._signals == 2:
                raise KeyboardInterrupt

        # One that is ignored (nohup) stays so.
        handled = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
        previous = {number: signal.signal(number, handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
