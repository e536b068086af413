"""A whole run of a bench: its own processes, started as a user would start them, and watched from outside."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driftstream.eval.monitor import METRICS_FILE

POLL_S = 0.25
"""Reading a run's rows takes time that the run has not."""
STOP_S = 30.0
"""From the request to stop to the end of every process."""

Rows = list[dict[str, Any]]


class RunBenchError(RuntimeError):
    """The run ended early, or has not come as far as it should in its time."""


class BenchRun:
    """A training run in processes of its own; `root` is its run directory."""

    def __init__(self, process: subprocess.Popen[bytes], root: Path, output: Path) -> None:
        self.root = root
        self._process, self._output = process, output

    def rows(self) -> Rows:
        """The whole lines of the run's metrics so far."""
        with contextlib.suppress(FileNotFoundError):
            *lines, _ = (self.root / METRICS_FILE).read_text().split("\n")
            return [json.loads(line) for line in lines]
        return []

    def wait(self, until: Callable[[Rows], bool], timeout_s: float) -> Rows:
        """The rows, as soon as they are what is waited for; RunBenchError if that does not come."""
        deadline = time.monotonic() + timeout_s
        while not until(rows := self.rows()):
            if self._process.poll() is not None:
                raise RunBenchError(f"the run ended: {self._last_words()}")
            if time.monotonic() > deadline:
                raise RunBenchError(f"the run has not come far enough within {timeout_s:g} s: {self._last_words()}")
            time.sleep(POLL_S)
        return rows

    def roles(self) -> dict[str, int]:
        """The process id of every role that has started, by its name."""
        started = {log.stem: re.findall(r": process (\d+),", log.read_text()) for log in self.root.glob("logs/*.log")}
        return {name: int(pids[-1]) for name, pids in sorted(started.items()) if pids}

    def cpu_s(self) -> dict[str, float]:
        """Seconds that every role has computed so far, and the `supervisor`."""
        return {name: cpu_s(pid) for name, pid in ({"supervisor": self._process.pid} | self.roles()).items()}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Every process of the run stands still meanwhile, so that something else can be measured."""
        # Sets everyone going when its input ends, so too if this process is killed. The supervisor comes last: it would
        # miss the others' signs of life.
        guard = ["sh", "-c", 'while read -r pid; do pids="$pid $pids"; done; kill -CONT $pids 2>/dev/null']
        stopped: list[int] = []
        with subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True, text=True, bufsize=1) as process:
            assert process.stdin is not None
            try:
                # Whoever was listed before its parent stood still may have started others.
                while new := [pid for pid in descendants(self._process.pid) if pid not in stopped]:
                    for pid in new:
                        process.stdin.write(f"{pid}\n")
                        _signal(pid, signal.SIGSTOP)
                    stopped += new
                yield
            finally:
                for pid in reversed(stopped):
                    _signal(pid, signal.SIGCONT)

    def pss_bytes(self) -> int:
        """Memory of all processes of the run, pages that several of them share counted once."""
        return sum(pss_bytes(pid) for pid in descendants(self._process.pid))

    def _last_words(self) -> str:
        lines = self._output.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def _stop(self) -> None:
        """End every process of the run."""
        everyone = descendants(self._process.pid)
        try:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        finally:
            if self._process.poll() is None:
                for pid in {*everyone, *descendants(self._process.pid)}:
                    _signal(pid, signal.SIGKILL)
            self._process.wait()
            deadline = time.monotonic() + STOP_S
            while any(runs(pid) for pid in everyone) and time.monotonic() < deadline:
                time.sleep(POLL_S)


@contextlib.contextmanager
def bench_run(command: Sequence[str], root: Path) -> Iterator[BenchRun]:
    """Start `command`, which trains into `root`; no process of it is left at the end."""
    output = root.with_suffix(".out")
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    run = BenchRun(process, root, output)
    try:
        yield run
    finally:
        run._stop()


@dataclass(frozen=True)
class Pace:
    """A learner's pace: updates a second, and the share of the time in which it waited for data."""

    updates_per_s: float
    wait_fraction: float

    @property
    def busy_s(self) -> float:
        """Seconds that one update takes when its data is there."""
        return (1.0 - self.wait_fraction) / self.updates_per_s


def pace(*turns: Rows) -> Pace:
    """The pace between the first and the last of a learner's reports, of all turns together.

    Raises RunBenchError where there are not two in one of them.
    """
    steps, seconds, waited = 0, 0.0, 0.0
    for reports in map(learner_reports, turns):
        spans = [row["wall_s"] - before["wall_s"] for before, row in itertools.pairwise(reports)]
        if not sum(spans) > 0.0:
            raise RunBenchError("the learner has not reported twice")
        steps += reports[-1]["step"] - reports[0]["step"]
        seconds += sum(spans)
        waited += sum(row["learner/wait_fraction"] * span for row, span in zip(reports[1:], spans, strict=True))
    return Pace(steps / seconds, min(1.0, waited / seconds))


def learner_reports(rows: Rows) -> Rows:
    """The rows that a learner which has made a step reported."""
    return [row for row in rows if row["step"] and "learner/updates_per_s" in row]


def cpu_s(pid: int) -> float:
    """Seconds that a process has computed; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return 0.0


def delay_s(pid: int) -> float:
    """Seconds for which a process's main thread had work and no processor; 0 where the system does not say."""
    with contextlib.suppress(OSError, IndexError):
        return 1e-9 * int(Path(f"/proc/{pid}/schedstat").read_text().split()[1])
    return 0.0


def pss_bytes(pid: int) -> int:
    """A process's memory, with its part of the pages that it shares; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return 1024 * sum(int(kilobytes) for kilobytes in re.findall(r"^Pss:\s+(\d+) kB", text, flags=re.MULTILINE))
    return 0


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def descendants(pid: int) -> list[int]:
    """A process and all that it and they have started and that still run."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in children.read_text().split()]
    return found
