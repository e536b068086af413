"""A disk that is full, and a run directory that is removed, under real runs: training goes on, and it is said."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from driftstream.learner.checkpoint import checkpoint_paths, load_checkpoint, load_latest

pytestmark = pytest.mark.timeout(120)
DRIFTSTREAM = str(Path(sys.executable).with_name("driftstream"))
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
SMALL_DISK = 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"'


def permitted(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(
    not permitted(*NAMESPACE, "sh", "-c", "mount -t tmpfs tmpfs /mnt"), reason="mounting a tmpfs is not permitted here"
)
def test_training_goes_on_over_a_full_disk_and_saves_when_there_is_room(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    root = disk / "run"
    prefix = (*NAMESPACE, "sh", "-c", SMALL_DISK, str(disk))
    arguments = (
        "gmm9",
        "--minutes",
        "10",
        "--checkpoint.every-s",
        "1",
        "--replay.capacity",
        "2000",
        "--out",
        str(root),
    )
    run = train(*arguments, root=root, prefix=prefix)
    # The run's own view of the disk: nobody else sees it.
    seen = Path(f"/proc/{run.process.pid}/root{root}")
    rows = lambda: [json.loads(line) for line in (seen / "metrics.jsonl").read_text().splitlines()]  # noqa: E731
    run.wait_for(lambda: checkpoint_paths(seen / "checkpoints"))
    for size in (2**16, 1):
        with (seen / "filler").open("ab", buffering=0) as filler:
            try:
                while filler.write(bytes(size)):
                    pass
            except OSError:
                pass
    run.wait_for(lambda: "checkpoint not written, [Errno 28] No space left on device" in run.text())
    run.wait_for(lambda: "metrics.jsonl is not written (No space left on device)" in run.text())
    whole, damaged = load_latest(seen / "checkpoints")
    assert not damaged
    time.sleep(2.0)
    assert set(run.processes()) >= {"learner", "actor-0", "refiner-0", "evaluator"}
    assert "ended" not in run.text()
    (seen / "filler").unlink()
    run.wait_for(lambda: load_latest(seen / "checkpoints")[0].step > whole.step)
    run.wait_for(lambda: rows()[-1]["step"] > whole.step)
    assert max(row.get("checkpoint/failures", 0) for row in rows()) > 0
    assert max(row.get("monitor/unwritten", 0) for row in rows()) > 0
    steps = [row["step"] for row in rows() if "train/loss" in row]
    assert steps == sorted(steps), "the rows that waited are there, in order"
    run.process.send_signal(signal.SIGINT)
    assert run.end(12) == 130


def test_training_goes_on_without_its_run_directory_and_writes_it_anew(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    run = train("gmm9", "--minutes", "10", "--checkpoint.every-s", "1", "--out", str(root), root=root)
    run.wait_for(lambda: checkpoint_paths(root / "checkpoints"))
    shutil.rmtree(root, ignore_errors=True)
    run.wait_for(lambda: "metrics.jsonl was removed: its rows go on in a new file" in run.text())
    run.wait_for(lambda: (root / "config.toml").exists() and checkpoint_paths(root / "checkpoints"))
    step = run.step()
    run.wait_for(lambda: run.step() > step)
    run.process.send_signal(signal.SIGINT)
    assert run.end(12) == 130
    assert root.stat().st_mode & 0o077 == 0, "private, like the one before"
    newest = checkpoint_paths(root / "checkpoints")[-1]
    assert load_checkpoint(newest).step >= step
    command = [DRIFTSTREAM, "sample", str(root), "-n", "8", "-o", str(tmp_path / "draws.npz")]
    subprocess.run(command, check=True, timeout=60, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_checkpoints_that_cannot_be_written_fail_the_run_at_its_end_and_not_before(
    train: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    run = train("gmm9", "--minutes", "0.4", "--out", str(root), root=root)
    run.wait_for(lambda: checkpoint_paths(root / "checkpoints"))
    (root / "checkpoints").rename(tmp_path / "before")
    (root / "checkpoints").touch()
    run.wait_for(lambda: "learner: checkpoint not written, " in run.text())
    step = run.step()
    assert run.end(60) == 1
    assert run.step() > step
    assert max(row.get("checkpoint/failures", 0) for row in run.rows()) > 0
    last = run.text().splitlines()[-1]
    assert "learner ended: OSError: the last checkpoint was not written: " in last
    assert last.endswith(f"driftstream train --resume {root}")
