"""From the command to the first learner step, beside what no run can do without: importing torch and TorchRL."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from driftstream.eval.bench_rounds import Comparison, compare
from driftstream.eval.bench_run import bench_run

FLOOR = "import torch, tensordict, torchrl.data"
PATIENCE_S = 120.0


def bench_start(command: Callable[[Path], Sequence[str]], stages: Sequence[str], repeats: int) -> Comparison:
    """Seconds from the command to each of the stages (the last is the first step), in rounds with the floor.

    `command` trains into the run directory that it is given.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("imports", *stages)}
    _import()  # from here on everything is in the page cache
    for index in range(repeats):
        turns: list[Callable[[], dict[str, float]]] = [_import, lambda: _start(command, stages)]
        for turn in turns if index % 2 else reversed(turns):
            for name, value in turn().items():
                seconds[name].append(value)
    measured = {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}
    return compare("start", "start", "imports", measured)


def _import() -> dict[str, float]:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", FLOOR], check=True, timeout=PATIENCE_S)
    return {"imports": time.perf_counter() - start}


def _start(command: Callable[[Path], Sequence[str]], stages: Sequence[str]) -> dict[str, float]:
    names = {stage: f"start/{stage}_s" for stage in stages}
    last = names[stages[-1]]
    with tempfile.TemporaryDirectory(prefix="driftstream-") as folder:
        root = Path(folder) / "run"
        with bench_run(command(root), root) as run:
            rows = run.wait(lambda rows: any(last in row for row in rows), PATIENCE_S)
    (row,) = (row for row in rows if last in row)
    return {stage: row[name] for stage, name in names.items()}
