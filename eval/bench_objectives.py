"""What an update costs under every objective: seconds, and bytes at the peak."""

import ctypes
import gc
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from driftstream.eval.bench_gradients import draw_paths, sampling_steps
from driftstream.eval.bench_rounds import quartiles, time_rounds
from driftstream.learner.learner import Learner
from driftstream.learner.losses import Paths, path_loss


@dataclass(frozen=True)
class UpdateTime:
    """Quartiles of the seconds that an update takes, and the transitions that its loss is computed from."""

    transitions: int
    lower_quartile_s: float
    median_s: float
    upper_quartile_s: float


class Update:
    """One objective's update on a fixed batch of trajectories: loss, backward and Adam's step.

    Segments are drawn once, one of each trajectory. An objective that differentiates through the simulation
    simulates anew in every update, as part of its loss.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.rows = learner.config.batch_size
        self.paths: Paths | None = None
        if not learner.objective.pathwise:
            self.paths = draw_paths(learner, learner.objective, self.rows)

    @property
    def transitions(self) -> int:
        """Transitions of the batch."""
        return self.rows * (self.learner.objective.segment_length or sampling_steps(self.learner))

    def __call__(self, rows: int | None = None) -> None:
        """Update once, from all rows of the batch or the first few."""
        learner, rows = self.learner, self.rows if rows is None else rows
        if self.paths is None:
            loss, _ = learner.pathwise_loss(rows)
        else:
            policy, process, target = learner.policy, learner.process, learner.target
            loss, _ = path_loss(learner.objective, policy, process, target, self.paths[:rows], learner.log_z)
        learner.optimizer.step(loss, 0.0)


def time_updates(updates: Mapping[str, Update], repeats: int) -> dict[str, UpdateTime]:
    """Time `repeats` rounds of one update each (`time_rounds`)."""
    seconds = time_rounds(updates, repeats)
    times = {}
    for name, update in updates.items():
        found = quartiles(seconds[name])
        times[name] = UpdateTime(update.transitions, found.lower, found.median, found.upper)
    return times


def peak_bytes(update: Update) -> int | None:
    """Bytes by which the resident memory of this process grows, at most, during one update.

    Model, optimiser, data and loaded code are there before (an update of two rows has run) and do not count. Meant
    for a fresh process: memory that was freed and not given back would be used again unseen. None where the system
    does not say (other than Linux).
    """
    update(rows=2)
    return peak_growth(update)


def peak_growth(action: Callable[[], object]) -> int | None:
    """Bytes by which the resident set exceeds its present size, at most, while `action` runs; None if unknown."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        # Sets the high-water mark back to the present size: proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _resident("VmRSS")
    action()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    (kilobytes,) = re.findall(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return 1024 * int(kilobytes)
