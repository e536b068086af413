"""Clocks that jump: nothing waits, times out or beats by a clock that somebody can set."""

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from driftstream.eval.monitor import MonitorConfig
from driftstream.launch.config import RunConfig, resolve, to_toml
from driftstream.launch.plan import SupervisorConfig
from driftstream.launch.run_directory import RunDirectory

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]
LAYERS = ("envs", "buffers", "actors", "learner", "eval", "launch")
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
WALL_CLOCK = {"time", "time_ns", "localtime", "gmtime"}
DATES = {"launch/progress.py", "launch/run_directory.py"}
"""Who shows the time of day: beside an event, and in a run directory's name."""
ROLES = ROOT / "tests" / "launch_roles.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_reads_the_wall_clock(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            assert not {alias.name for alias in node.names} & WALL_CLOCK, f"line {node.lineno}"
        if isinstance(node, ast.ImportFrom) and node.module == "datetime":
            assert str(path.relative_to(ROOT)) in DATES, f"line {node.lineno}"
        if isinstance(node, ast.Import):
            assert "datetime" not in {alias.name for alias in node.names}, f"line {node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
            assert node.attr not in WALL_CLOCK, f"line {node.lineno}"


CLOCK = """
import time

real, start = time.time, time.monotonic()
time.time = lambda: real() + 3600.0 * ({hours})
"""
QUARTERS = "int((time.monotonic() - start) * 4)"


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[[str], tuple[Path, subprocess.Popen[str]]]]:
    """Starts a supervisor and its roles, each with a clock that is wrong by so many hours; none is left behind.

    The heartbeat time-out is two seconds. Gives the run directory and the supervisor, once its roles are at work.
    """
    started: list[subprocess.Popen[str]] = []

    def start(hours: str) -> tuple[Path, subprocess.Popen[str]]:
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(CLOCK.format(hours=hours))
        directory = RunDirectory.create(tmp_path / "run")
        config = resolve(RunConfig(monitor=MonitorConfig(wandb="disabled")))
        directory.write_config(to_toml(replace(config, supervisor=SupervisorConfig(heartbeat_timeout_s=2.0))))
        root = directory.root
        script = [sys.executable, str(ROLES), str(root), f"{ROLES}:obey"]
        environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True))
        wait_for(lambda: (root / "metrics.jsonl").exists() and len(list((root / "logs").iterdir())) == 4, 40.0)
        return root, started[-1]

    yield start
    for supervisor in started:
        if supervisor.poll() is None:
            for process in psutil.Process(supervisor.pid).children(recursive=True):
                process.kill()
        with supervisor:
            supervisor.kill()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def finish(root: Path, supervisor: "subprocess.Popen[str]") -> str:
    """Let the run end; what was said on the screen."""
    (root / "enough").touch()
    output, _ = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 0, output
    return output


def test_a_clock_that_jumps_raises_no_alarm(supervise: Callable[[str], Any]) -> None:
    """An hour back or on, four times a second."""
    root, supervisor = supervise(f"({QUARTERS} % 3 - 1)")
    time.sleep(4.0)
    assert "ended" not in finish(root, supervisor)


def test_a_clock_that_is_set_back_again_and_again_delays_no_replacement(supervise: Callable[[str], Any]) -> None:
    """An hour back, four times a second: no time that was waited for would ever come."""
    root, supervisor = supervise(f"-{QUARTERS}")

    def starts() -> list[str]:
        return re.findall(r"actor-0: process (\d+)", (root / "logs" / "actor-0.log").read_text())

    for number in (signal.SIGKILL, signal.SIGSTOP):
        time.sleep(1.0)  # it must have spoken once: before that it may be starting
        before = starts()
        os.kill(int(before[-1]), number)
        wait_for(lambda before=before: starts() > before, 8.0)  # type: ignore[misc]
    output = finish(root, supervisor)
    assert output.count("ended") == 2, output
    assert "actor-0 ended: killed by SIGKILL; restarted" in output
    assert re.search(r"actor-0 ended: stopped for \d\.\d s; killed; restarted", output), output
