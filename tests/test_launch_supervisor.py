"""The supervisor with real processes and tiny roles: deaths, silence, failures, interruption; no orphans."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from driftstream.eval.monitor import MonitorConfig
from driftstream.launch.config import RunConfig, resolve, to_toml
from driftstream.launch.plan import RunPlan, SupervisorConfig
from driftstream.launch.processes import fork_server
from driftstream.launch.progress import Progress
from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.supervisor import Supervisor

pytestmark = pytest.mark.timeout(60)
ROLES = Path(__file__).parent / "launch_roles.py"
PATIENCE_S = 10.0


@pytest.fixture(scope="module")
def context() -> Iterator[ForkServerContext]:
    with fork_server(["driftstream.launch.config"]) as context:
        yield context


class Run:
    """A run of tiny roles, supervised in this process while a script of actions plays in a thread."""

    def __init__(self, root: Path, context: ForkServerContext) -> None:
        self.directory = RunDirectory.create(root / "run")
        self.events: list[str] = []
        self._context = context

    def write_config(self, **supervisor: float) -> None:
        config = replace(resolve(RunConfig(monitor=MonitorConfig(wandb="disabled"))))
        table = to_toml(replace(config, supervisor=SupervisorConfig(**supervisor)))  # type: ignore[arg-type]
        self.directory.write_config(table)

    def supervise(
        self, role: str = "obey", script: Callable[[], None] = lambda: None, **supervisor: float
    ) -> tuple[int, str]:
        """(exit code, cause) of the run."""
        self.write_config(**supervisor)
        plan = RunPlan.from_toml(self.directory.config.read_text())
        progress = Progress("test", Console(file=io.StringIO()))
        progress.event = lambda text, style="": self.events.append(text)  # type: ignore[method-assign]
        thread = threading.Thread(target=script)
        with self.directory.hold() as launch:
            supervisor_ = Supervisor(plan, self.directory, launch, self._context, progress, f"{ROLES}:{role}")
            thread.start()
            code = supervisor_.run()
        thread.join()
        assert not processes(self.directory.root)
        return code, supervisor_.cause

    def pid(self, name: str, but: int = 0) -> int:
        """The process of a role, once it runs (not the one `but`)."""
        return wait_for(lambda: {**processes(self.directory.root), name: processes(self.directory.root).get(name, but)}[name] - but and processes(self.directory.root)[name])

    def finish(self) -> None:
        (self.directory.root / "enough").touch()
