"""A training run as a soak sees it from outside: its lines and when they came, its processes, its figures."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from driftstream.launch.run_directory import RunDirectory
from driftstream.learner.checkpoint import MANIFEST, checkpoint_paths

POLL_S = 0.02
TRAIN = "import sys; from driftstream.launch.cli import main; sys.exit(main(sys.argv[1:]))"


class SoakedRun:
    """One run directory, and the `driftstream train` that works in it at present."""

    def __init__(self, root: Path, arguments: Sequence[str]) -> None:
        self.directory = RunDirectory(root)
        self.lines: list[tuple[float, str]] = []
        """What was printed, and when (`time.monotonic`)."""
        self._arguments = tuple(arguments)
        self._shown = root.with_name(f"{root.name}.soak.log")
        self._rows: list[dict[str, Any]] = []
        self._read_bytes = 0
        self.start("--out", str(root))

    def start(self, *arguments: str) -> None:
        """Train, or with `--resume` go on."""
        command = [sys.executable, "-c", TRAIN, "train", *arguments, *self._arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        threading.Thread(target=self._read_lines, args=(self.process,), daemon=True).start()

    def resume(self) -> None:
        """Go on with the run after its end."""
        self.start("--resume", str(self.directory.root))

    def _read_lines(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with self._shown.open("a") as file:
            for line in process.stdout:
                self.lines.append((time.monotonic(), line.rstrip()))
                file.write(line)
                file.flush()

    def seconds_to_line(self, pattern: str, since: float, limit_s: float) -> float | None:
        """Seconds from `since` to the first line that matches; None if there is none in time."""

        def found() -> float | None:
            return next((at - since for at, line in self.lines[::-1] if at >= since and re.search(pattern, line)), None)

        return wait(found, limit_s - (time.monotonic() - since))

    def processes(self) -> dict[str, int]:
        """Process id of the supervisor and of every role, by name, as their titles have it."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            words = _read(folder / "cmdline").replace("\0", " ").split()
            if len(words) == 3 and words[0] == "driftstream" and words[2] == str(self.directory.root):
                found[words[1]] = int(folder.name)
        return found

    def family(self) -> set[tuple[int, str]]:
        """The train process and all that descend from it, each by its id and the time it was started."""
        parents = {}
        for folder in Path("/proc").glob("[0-9]*"):
            fields = _read(folder / "stat").rpartition(") ")[2].split()
            if fields and fields[0] != "Z":
                parents[int(folder.name)] = (int(fields[1]), fields[19])
        family = {self.process.pid}
        while more := {pid for pid, (parent, _) in parents.items() if parent in family} - family:
            family |= more
        return {(pid, parents[pid][1]) for pid in family if pid in parents}

    def rows(self) -> list[dict[str, Any]]:
        """Every whole line of metrics.jsonl."""
        if self.directory.metrics.exists():
            with self.directory.metrics.open("rb") as file:
                file.seek(self._read_bytes)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._read_bytes += len(whole)
            self._rows += [json.loads(line) for line in whole.splitlines()]
        return self._rows

    def latest(self, name: str) -> float:
        """The newest value of a figure; 0 where there is none."""
        return next((row[name] for row in reversed(self.rows()) if row.get(name) is not None), 0.0)

    def saved(self) -> tuple[int, float]:
        """Step and seconds of training of the newest checkpoint; zeros where there is none."""
        for path in reversed(checkpoint_paths(self.directory.checkpoints)):
            manifest = json.loads((path / MANIFEST).read_text())
            return manifest["step"], manifest["numbers"]["elapsed_s"]
        return 0, 0.0

    def epoch(self, name: str) -> int:
        """How often a role was started before its present process."""
        found = re.findall(r"epoch (\d+), seed", _read(self.directory.log(name)))
        return int(found[-1]) if found else 0

    def goes_on(self, limit_s: float = 120.0) -> float | None:
        """Seconds until an update is reported; None if none is in time."""
        start, rows = time.monotonic(), len(self.rows())

        def updated() -> bool:
            return any(row.get("learner/updates_per_s") for row in self.rows()[rows:])

        return time.monotonic() - start if wait(updated, limit_s) else None

    def kill(self) -> None:
        """SIGKILL whatever is left of the run."""
        for pid, _ in self.family():
            send(pid, signal.SIGKILL)
        for pid in self.processes().values():
            send(pid, signal.SIGKILL)
        self.process.wait()


def wait(condition: Callable[[], Any], limit_s: float) -> Any:
    """The condition's first true value, or None after `limit_s`."""
    end = time.monotonic() + limit_s
    while not (value := condition()):
        if time.monotonic() > end:
            return None
        time.sleep(POLL_S)
    return value


def alive(family: set[tuple[int, str]]) -> int:
    """How many of these processes are left, and are no longer only waited for."""
    left = 0
    for pid, started in family:
        fields = _read(Path(f"/proc/{pid}/stat")).rpartition(") ")[2].split()
        left += bool(fields) and fields[19] == started and fields[0] != "Z"
    return left


def send(pid: int, number: signal.Signals) -> None:
    """Send a signal to a process, if it is still there."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""
