"""Roles that are killed, stopped or suspended, and frames that nobody should send: one real run, ended by SIGTERM."""

import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import zmq

from driftstream.launch.run_directory import RunDirectory
from driftstream.launch.soak_frames import POISON, bad_frames
from driftstream.learner.checkpoint import checkpoint_paths

pytestmark = pytest.mark.timeout(120)
HEARTBEAT_TIMEOUT_S = 6.0
POLL_S = 0.01


@pytest.fixture(scope="module")
def run(train_once: Callable[..., Any]) -> Any:
    arguments = (
        "gmm9",
        "--minutes",
        "10",
        "--actors",
        "2",
        "--refiners",
        "mala",
        "--out",
        "{root}",
        "--learner.report-every-s",
        "0.2",
    )
    run = train_once(*arguments, "--supervisor.heartbeat-timeout-s", str(HEARTBEAT_TIMEOUT_S))
    run.wait_for(lambda: {"actor-0", "actor-1", "refiner-0", "evaluator", "learner"} <= run.processes().keys())
    run.wait_for(lambda: run.step() > 0)
    for name in ("actor-0", "actor-1", "refiner-0", "evaluator"):
        run.wait_for(lambda name=name: "epoch" in log_of(run, name))
    return run


def log_of(run: Any, name: str) -> str:
    path = run.root / "logs" / f"{name}.log"
    return path.read_text() if path.exists() else ""


def seconds_until(condition: Callable[[], Any], limit_s: float, what: str, run: Any) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s, f"{what}: not within {limit_s} s; output:\n{run.text()}"
        time.sleep(POLL_S)
    return time.monotonic() - start


def longest_stall_s(rows: list[dict[str, Any]]) -> float:
    """Seconds without an update, at most, between the learner's reports."""
    longest = stall = 0.0
    for row, later in pairwise(rows):
        stall = 0.0 if later["learner/updates_per_s"] else stall + later["wall_s"] - row["wall_s"]
        longest = max(longest, stall)
    return longest


def strike(run: Any, name: str, number: signal.Signals, cause: str, within_s: float, stall_s: float) -> None:
    """Send a role a signal: it is reported in time with its last log lines, then replaced, and training goes on."""
    before, pid, step, rows = len(run.text()), run.processes()[name], run.step(), len(run.rows())
    os.kill(pid, number)
    seconds_until(lambda: f"{name} ended: {cause}" in run.text()[before:], within_s, f"{name} reported", run)
    seconds_until(lambda: f"{name} | " in run.text()[before:], 0.5, f"last lines of {name}", run)
    # The title, not the fork: a process that takes it is at work.
    seconds_until(lambda: run.processes().get(name, pid) != pid, 5.0, f"{name} replaced", run)
    run.wait_for(lambda: run.step() > step)
    assert longest_stall_s([row for row in run.rows()[rows:] if "learner/updates_per_s" in row]) < stall_s


# The evaluator gives way to the others, at its end too.
@pytest.mark.parametrize(("name", "within_s"), [("actor-0", 1.0), ("refiner-0", 1.0), ("evaluator", 5.0)])
def test_a_killed_role_is_reported_and_replaced(run: Any, name: str, within_s: float) -> None:
    strike(run, name, signal.SIGKILL, "killed by SIGKILL; restarted", within_s, stall_s=1.0)


@pytest.mark.parametrize("name", ["actor-1", "refiner-0"])
def test_a_stopped_role_is_reported_and_replaced(run: Any, name: str) -> None:
    time.sleep(1.0)  # a successor must have spoken once: before that it may be starting
    # Its socket is still there, so that its place in the staleness window is free only when it is dead.
    strike(run, name, signal.SIGSTOP, "stopped for", within_s=5.0, stall_s=2.5)


def test_a_suspended_run_goes_on_without_an_alarm(run: Any) -> None:
    before, text = run.processes(), len(run.text())
    everybody = (*before.values(), run.process.pid)
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(HEARTBEAT_TIMEOUT_S + 1.0)
    step = run.step()
    for pid in everybody:
        os.kill(pid, signal.SIGCONT)
    run.wait_for(lambda: run.step() > step)
    time.sleep(2.0)  # an alarm would come at once
    assert "ended" not in run.text()[text:]
    assert run.processes() == before


def test_frames_of_strangers_are_counted_and_never_trained_on(run: Any) -> None:
    frames = bad_frames("actor-0", epoch=0, dim=2, oversized_bytes=2**20)
    rejected = max(row.get("stream/rejected", 0) for row in run.rows())
    context = zmq.Context()
    sockets = [context.socket(zmq.DEALER) for _ in range(3)]
    for socket in sockets:
        socket.connect(RunDirectory(run.root).addresses()["stream"])
        for message in frames.values():
            socket.send_multipart(message)
    # actor-0 lives in a later epoch: what is well formed is late, the rest is refused.
    expected = len(sockets) * (len(frames) - len({"wrong shape", "replayed"}))
    run.wait_for(lambda: max(row.get("stream/rejected", 0) for row in run.rows()) >= rejected + expected)
    context.destroy(linger=0)
    step = run.step()
    run.wait_for(lambda: run.step() > step + 50)
    assert max(row["train/loss"] for row in run.rows() if row.get("train/loss") is not None) < POISON**0.5


def test_sigterm_drains_and_checkpoints(run: Any) -> None:
    step = run.step()
    run.process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    assert run.end(12) == 130
    assert time.monotonic() - start < 10.0
    newest = checkpoint_paths(run.root / "checkpoints")[-1]
    assert int(newest.name.removeprefix("step-")) >= run.step() >= step, "the state at the end, not one before"
    assert not Path(run.root, "sockets").exists()
