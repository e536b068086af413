"""The learner's pace in a run: beside that of the same learner fed from memory, and beside steps of one process."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.actor import Actor
from driftstream.actors.refiner import Refiner
from driftstream.eval.bench_rounds import time_rounds
from driftstream.eval.bench_run import BenchRun, Pace, Rows, bench_run, delay_s, learner_reports, pace
from driftstream.learner.checkpoint import CheckpointConfig, Checkpointer
from driftstream.learner.learner import Learner
from driftstream.learner.limits import Budget, LimitsConfig
from driftstream.learner.loop import TrainingLoop
from driftstream.learner.sources import DrawSeeds, FreshBatch, LocalSource

BATCHES, CYCLES = 16, 2
"""What is made in advance, and used in turn."""
WARM_UP_S = 3.0
YARDSTICK_STEPS = 4
START_S = 120.0


@dataclass(frozen=True)
class Round:
    """One round: the learner's pace in the run and from memory, and cores that every role of the run kept busy.

    `stream_cpu_s` and `memory_cpu_s` are the processor's seconds that an update takes the learner's process, `…_delay`
    the share of the time for which it had work and no processor.
    """

    stream: Pace
    memory: Pace
    stream_cpu_s: float
    memory_cpu_s: float
    stream_delay: float
    memory_delay: float
    cores: dict[str, float]

    @property
    def rate(self) -> float:
        """Updates a second in the run as a share of those from memory."""
        return self.stream.updates_per_s / self.memory.updates_per_s

    @property
    def undelayed_rate(self) -> float:
        """The same without the time that either learner waited for a processor.

        That is what other programs take; but also what the run's other roles take, so that only `rate`, on a machine
        that does nothing else, says what a run reaches.
        """
        return self.rate * (1.0 - self.memory_delay) / (1.0 - self.stream_delay)


@dataclass(frozen=True)
class StepRound:
    """One round: the learner's pace in a run, and the seconds of a step of every yardstick."""

    stream: Pace
    yardsticks: dict[str, float]

    @property
    def step_s(self) -> float:
        """Seconds from one update of the run to the next."""
        return 1.0 / self.stream.updates_per_s

    def speed_up(self, yardstick: str) -> float:
        """How many steps the run makes in the time of one of the yardstick's."""
        return self.yardsticks[yardstick] / self.step_s


class MemorySource(LocalSource):
    """Batches and refined states that were made in advance by the roles of this process, given in turn at no cost."""

    def __init__(self, actor: Actor, refiners: Sequence[Refiner], draw: DrawSeeds) -> None:
        super().__init__([actor], list(refiners))
        self._batches: list[TensorDict] = [actor.generate(0.0) for _ in range(BATCHES)]
        self._kind = actor.kind
        self._cycles: list[tuple[Tensor, Tensor]] = []
        self._chains = refiners[0].chains if refiners else 0
        for _ in range(CYCLES if refiners else 0):
            cycle = refiners[0].run_cycle(self._batches[0]["states"][:, -1])
            self._cycles.append((cycle.terminal, cycle.log_reward))
        self._used = 0

    def fresh(self, timeout_s: float, step: int, progress: float) -> FreshBatch | None:
        """The next batch, at once."""
        self._used += 1
        return FreshBatch(self._batches[self._used % BATCHES], step, self._kind)

    def offer_seeds(self, draw: DrawSeeds, step: int) -> bool:
        """Draw seeds as for a refiner, and have what one has made already."""
        if not self._cycles or draw(self._chains) is None:
            return False
        self._refined.append(self._cycles[step % CYCLES])
        return True


def bench_round(
    command: Callable[[Path], Sequence[str]],
    learner: Learner,
    actor: Actor,
    refiners: Sequence[Refiner],
    refine_every: int,
    seconds: float,
) -> Round:
    """Measure for so many seconds in the run that `command` starts, and from memory, in this process.

    Half of the time from memory comes before the run and half after it, as a machine's pace drifts.
    """
    halves = [pace_from_memory(learner, actor, refiners, refine_every, seconds / 2)]
    with tempfile.TemporaryDirectory(prefix="driftstream-") as folder:
        root = Path(folder) / "run"
        with bench_run(command(root), root) as run:
            # As from memory, the start is not counted.
            rows = _warmed_up(run)
            pid = run.roles()["learner"]
            first, before, delayed, since = len(rows) - 1, run.cpu_s(), delay_s(pid), time.monotonic()
            rows = run.wait(lambda rows: _elapsed_s(rows[first:]) > seconds, START_S + 4 * seconds)[first:]
            after, delayed, elapsed_s = run.cpu_s(), delay_s(pid) - delayed, time.monotonic() - since
    halves.append(pace_from_memory(learner, actor, refiners, refine_every, seconds / 2))
    paces, *figures = zip(*halves, strict=True)
    memory = Pace(fmean(each.updates_per_s for each in paces), fmean(each.wait_fraction for each in paces))
    memory_cpu_s, memory_delay = map(fmean, figures)
    stream = pace(rows)
    reports = learner_reports(rows)
    cores = {name: (after[name] - before[name]) / elapsed_s for name in before if name in after}
    updates = reports[-1]["step"] - reports[0]["step"]
    stream_cpu_s = cores["learner"] * elapsed_s / updates
    return Round(stream, memory, stream_cpu_s, memory_cpu_s, delayed / elapsed_s, memory_delay, cores)


def bench_step(
    command: Callable[[Path], Sequence[str]], yardsticks: Mapping[str, Callable[[], object]], seconds: float
) -> StepRound:
    """Measure for so many seconds in the run that `command` starts; the yardsticks before it, and again after it."""
    halves = [time_rounds(yardsticks, YARDSTICK_STEPS)]
    with tempfile.TemporaryDirectory(prefix="driftstream-") as folder:
        root = Path(folder) / "run"
        with bench_run(command(root), root) as run:
            first = len(_warmed_up(run)) - 1
            rows = run.wait(lambda rows: _elapsed_s(rows[first:]) > seconds, START_S + 4 * seconds)[first:]
    halves.append(time_rounds(yardsticks, YARDSTICK_STEPS))
    return StepRound(
        pace(rows), {name: float(torch.cat([half[name] for half in halves]).mean()) for name in yardsticks}
    )


def _warmed_up(run: BenchRun) -> Rows:
    """The rows of a run whose start is over: replay fills, and W&B and the evaluator come up."""
    return run.wait(lambda rows: _elapsed_s(rows) > WARM_UP_S, START_S)


def pace_from_memory(
    learner: Learner, actor: Actor, refiners: Sequence[Refiner], refine_every: int, seconds: float
) -> tuple[Pace, float, float]:
    """The learner's pace with data that is there; processor's seconds of an update; share of waiting for one."""
    rows: Rows = []
    spent: list[tuple[float, float]] = []
    source = MemorySource(actor, refiners, learner.draw_seeds)

    def report(metrics: dict[str, float], step: int, wall_s: float, energy_evaluations: int, progress: float) -> None:
        rows.append({**metrics, "step": step, "wall_s": wall_s})
        spent.append((time.process_time(), delay_s(os.getpid())))

    def enough() -> bool:
        return _elapsed_s(rows[_warm(rows) :]) >= seconds

    with tempfile.TemporaryDirectory(prefix="driftstream-") as folder:
        # No limit comes near, so that progress, and with it the work of a step, stays where it begins.
        budget = Budget(LimitsConfig(minutes=24 * 60.0))
        checkpointer = Checkpointer(Path(folder), CheckpointConfig())
        TrainingLoop(learner, source, budget, checkpointer, report, enough, refine_every).run()
    warm = _warm(rows)
    counted, spent = rows[warm:-1], spent[warm:-1]  # the last report comes with the end, right after another
    cpu, delayed = (last - first for first, last in zip(spent[0], spent[-1], strict=True))
    elapsed_s = counted[-1]["wall_s"] - counted[0]["wall_s"]
    return pace(counted), cpu / (counted[-1]["step"] - counted[0]["step"]), delayed / elapsed_s


def _warm(rows: Rows) -> int:
    """How many reports came before training had lasted for so long."""
    return sum(row["wall_s"] < WARM_UP_S for row in rows)


def _elapsed_s(rows: Rows) -> float:
    """Training time between the first and the last report of the learner."""
    reports = learner_reports(rows)
    return reports[-1]["wall_s"] - reports[0]["wall_s"] if reports else 0.0
