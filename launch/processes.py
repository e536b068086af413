"""Role processes as the supervisor holds them: started by a fork server, watched, killed."""

import contextlib
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from driftstream.launch.heap import heap_variables
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.seeding import derive_seed
from driftstream.launch.worker import DUMP_STACK, ROLE_FUNCTION, role_name, worker_main

STARTS_A_LAUNCH = 1000
"""Epochs are counted on from here in each later launch of a run, so that a resumed run repeats none."""
FIRST_REPORT_S = 20.0
"""A new process may import and compile for this long before it counts as silent."""
DUMP_S = 0.1
"""What a process that hangs may take to write down where."""
FORK_SERVER_GONE = 255
"""The exit code that `multiprocessing` makes up for children of a fork server that has died."""


@contextlib.contextmanager
def fork_server(preload: Sequence[str]) -> Iterator[ForkServerContext]:
    """A fork server that imports the modules `preload` in the background; killed and reaped at the end.

    Children fork from it in milliseconds, as what they need is imported already. The context is asked for by
    name, because torchrl changes the global start method.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _inherited_settings():
        forkserver.ensure_running()
    try:
        yield context
    finally:
        # The standard library leaves both to end some time after this process, and after their imports.
        server: Any = forkserver._forkserver
        if server._forkserver_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(server._forkserver_pid, signal.SIGKILL)
            server._stop()
        tracker: Any = resource_tracker._resource_tracker
        tracker._stop()


@contextlib.contextmanager
def _inherited_settings() -> Iterator[None]:
    """What the fork server and all its children shall start with."""
    # A Ctrl-C reaches the whole process group, and the supervisor alone acts on it.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The resource tracker would speak last on the screen, about semaphores of roles that were killed.
    warnings = os.environ.get("PYTHONWARNINGS")
    settings = {"PYTHONWARNINGS": ",".join(filter(None, (warnings, "ignore:resource_tracker:UserWarning")))}
    settings |= heap_variables()
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class RoleProcess:
    """One role of a run: its present process, and what the supervisor knows of it."""

    def __init__(
        self,
        role: str,
        index: int,
        *,
        run: RunDirectory,
        context: ForkServerContext,
        seed: int,
        restarts: int,
        launch: int = 0,
        role_function: str = ROLE_FUNCTION,
        kind: str = "",
        joined_as: str = "",
    ) -> None:
        self.role, self.index, self.name = role, index, joined_as or role_name(role, index)
        self.title = f"{self.name} ({kind})" if kind else self.name
        self.log = run.log(self.name)
        self.starts, self.attempts, self.restarts_left = 0, 0, restarts
        self.restart_at: float | None = None
        self.command: str | None = None
        self.deadline: float | None = None
        self.error: dict[str, Any] = {}
        self.turn_s, self.doing = 0.0, ""
        """How long its work has taken since it last came round, and what it is at, as it said last."""
        self._restarts, self._started = restarts, 0.0
        self._run, self._context, self._seed = run, context, seed
        self._launch, self._role_function, self._joined_as = launch, role_function, joined_as
        self._process: ForkServerProcess | None = None
        self._killed_as = ""
        self._silent_from = 0.0

    def start(self) -> None:
        """Start a process for the role; it has a new epoch and a random stream of its own."""
        epoch = self._launch * STARTS_A_LAUNCH + self.starts
        seed = derive_seed(self._seed, self.role, self.index, epoch)
        arguments = (str(self._run.root), self.role, self.index, epoch, seed, self._role_function, self._joined_as)
        process = self._context.Process(target=worker_main, args=arguments, name=self.name)
        process.start()
        self._process = process
        self.starts += 1
        self.attempts += 1
        self._started = time.monotonic()
        self.restart_at, self.error, self._killed_as = None, {}, ""
        self._silent_from = self._started + FIRST_REPORT_S
        self.turn_s, self.doing = 0.0, ""

    @property
    def alive(self) -> bool:
        """Whether the role has a process that runs."""
        return self._process is not None and self._process.exitcode is None

    @property
    def in_use(self) -> bool:
        """Whether the role runs or is about to."""
        return self.alive or self.restart_at is not None

    @property
    def sentinel(self) -> int | None:
        """File descriptor that becomes readable when the process ends; None where there is no process."""
        return None if self._process is None else self._process.sentinel

    @property
    def pid(self) -> int | None:
        """Process id, where a process runs."""
        return self._process.pid if self._process is not None and self.alive else None

    @property
    def stopped(self) -> bool:
        """Whether the process is stopped (SIGSTOP), where the system says so (Linux)."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_bytes().rpartition(b") ")[2][:1] == b"T"
        except OSError:
            return False

    def forgive(self, now: float, after_s: float) -> None:
        """Give the whole budget of restarts back to a role that worked for `after_s` before it ended."""
        if now - self._started - self.turn_s >= after_s:
            self.attempts, self.restarts_left = 1, self._restarts

    def heard(self, now: float) -> None:
        """Note a sign of life."""
        self._silent_from = now

    def silence_s(self, now: float) -> float:
        """Seconds since the last sign of life; negative while the process may still be starting."""
        return now - self._silent_from

    def excuse(self, seconds: float) -> None:
        """Leave a time in which nobody listened out of the role's silence, and out of what it has to stop."""
        self._silent_from += seconds
        if self.deadline is not None:
            self.deadline += seconds

    def kill(self, reason: str) -> None:
        """SIGKILL the process, and remember why."""
        if self._process is not None and self.alive:
            self._killed_as = reason
            self._process.kill()

    def dump_stack(self) -> None:
        """Let the process write to its log what it is at."""
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, DUMP_STACK)
            time.sleep(DUMP_S)

    def join(self, timeout_s: float = 5.0) -> None:
        """Wait for the end of a process that was killed."""
        if self._process is not None:
            self._process.join(timeout_s)

    def collect(self) -> int | None:
        """Exit code of a process that has ended, once; None otherwise."""
        if self._process is None or self._process.exitcode is None:
            return None
        code, pid = self._process.exitcode, self._process.pid
        if code == FORK_SERVER_GONE and pid is not None:
            # It cannot say whether the process has ended.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.close()
        self._process = None
        return code

    def cause(self, code: int) -> str:
        """Why a process that ended with exit code `code` did so, in a few words."""
        if self._killed_as:
            return f"{self._killed_as}; killed"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if self.error:
            return f"{self.error['type']}: {self.error['message']}"
        last = tail(self.log, 1)
        return f"exit code {code}" + (f" ({last[0]})" if code and last else "")


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a text file that are not blank, without colours; [] where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_384))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    return [line for line in plain.splitlines() if line.strip()][-lines:]
