"""Clocks that jump: nothing waits, times out or beats by a clock that somebody can set."""

import ast
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

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


JUMPING = """
import sys, time
from pathlib import Path

real = time.time
time.time = lambda: real() + 3600.0 * (int(time.monotonic() * 4) % 3 - 1)  # an hour back or on, four times a second
"""


def test_a_clock_that_jumps_raises_no_alarm(tmp_path: Path) -> None:
    """A supervisor and its roles, each with a clock that jumps by hours, at a heartbeat time-out of two seconds."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(JUMPING)
    directory = RunDirectory.create(tmp_path / "run")
    config = resolve(RunConfig(monitor=MonitorConfig(wandb="disabled")))
    directory.write_config(to_toml(replace(config, supervisor=SupervisorConfig(heartbeat_timeout_s=2.0))))
    root = directory.root
    script = [sys.executable, str(ROLES), str(root), f"{ROLES}:obey"]
    environment = {"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(script, env=environment, stdout=subprocess.PIPE, text=True) as supervisor:
        try:
            end = time.monotonic() + 40.0
            while not (root / "metrics.jsonl").exists() or len(list((root / "logs").iterdir())) < 4:
                assert time.monotonic() < end
                time.sleep(0.05)
            time.sleep(4.0)
            (root / "enough").touch()
            output, _ = supervisor.communicate(timeout=30)
        finally:
            supervisor.kill()
    assert supervisor.returncode == 0, output
    assert "ended" not in output
