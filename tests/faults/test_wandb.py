"""A W&B server that is down or silent costs the run next to nothing, and its figures are kept here."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from driftstream.eval.monitor import Monitor, MonitorConfig

pytestmark = pytest.mark.timeout(60)
ROWS = 300
ROWS_PER_S = 10
"""More than any run reports: the learner one a second, and each actor one every two."""


@pytest.mark.parametrize("server_is", ["down", "silent"])
def test_a_server_that_cannot_be_had_does_not_hold_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server_is: str
) -> None:
    """A real online run, against a port that refuses connections or takes them and never answers."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        if server_is == "down":
            server.close()
        start = time.monotonic()
        monitor = Monitor(tmp_path, MonitorConfig(), {})
        longest = made_s = time.monotonic() - start
        for step in range(ROWS):
            start = time.monotonic()
            monitor.log({"train/loss": 1.0}, step, 0.0, 0)
            spent = time.monotonic() - start
            made_s, longest = made_s + spent, max(longest, spent)
            time.sleep(0.005)
        start = time.monotonic()
        monitor.close(3.0)
        assert time.monotonic() - start < 5.0, "bounded by close(), not by the hanging call"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(ROWS)), "every figure is here"
    # The supervisor logs, and not the learner: this is what logging may take of a second of the run.
    assert made_s / ROWS * ROWS_PER_S < 0.01
    assert longest < 1.0
    left = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    assert not [child for child in left if "wandb-core" in child.name()]
    for thread in threading.enumerate():
        if thread.name == "wandb":
            thread.join(20.0)
            assert not thread.is_alive(), "its service is gone, so it ends by itself"


def test_an_interrupt_does_not_wait_for_a_silent_server(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        run = train("gmm9", "--minutes", "10", "--out", "{root}", wandb="online")
        run.wait_for(lambda: run.step() > 0)
        run.process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert run.end(20) == 130
    assert time.monotonic() - start < 13.0, "without a bound it takes more than 20"
    assert "W&B did not finish" in run.text()
