"""How long it takes from the command to the first learner step, and where the time goes."""

import os
import time
from pathlib import Path

STAGES = ("configured", "launched", "training", "first_step")
"""The roles' imports are there, and the configuration; roles are being started; the first weights are published and
training begins; the learner has made a step."""


class StartUp:
    """The stages that a run has reached, in seconds since the command; each is told once, as `start/<stage>_s`."""

    def __init__(self) -> None:
        self._command = _process_start()
        self._reached: dict[str, float] = {}
        self._told = False

    def reached(self, stage: str) -> None:
        """Note that a stage is reached now."""
        self._reached.setdefault(f"start/{stage}_s", time.monotonic() - self._command)

    def first_step(self, wall_s: float) -> dict[str, float]:
        """All stages, the first time that the learner tells of a step, `wall_s` after training began; then nothing.

        A resumed run, which has trained for longer, does not say when it began again.
        """
        if self._told:
            return {}
        self._told = True
        self.reached("first_step")
        reached = self._reached
        training = reached["start/first_step_s"] - wall_s
        began = {"start/training_s": training} if training > reached.get("start/launched_s", 0.0) else {}
        return reached | began


def _process_start() -> float:
    """When this process began, on the monotonic clock; now, where the system does not say (other than Linux)."""
    now = time.monotonic()
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return now


__all__ = ["STAGES", "StartUp"]
