"""The learner's pace in a run: beside that of the same learner fed from memory, and beside steps of one process."""

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.actor import Actor
from driftstream.actors.refiner import Refiner
from driftstream.eval.bench_rounds import time_rounds
from driftstream.eval.bench_run import BenchRun, Pace, Rows, bench_run, delay_s, learner_reports, pace
from driftstream.learner.checkpoint import CheckpointConfig, Checkpointer, CheckpointState
from driftstream.learner.learner import Learner
from driftstream.learner.limits import Budget, LimitsConfig
from driftstream.learner.loop import TrainingLoop
from driftstream.learner.sources import DrawSeeds, FreshBatch, LocalSource

BATCHES, CYCLES = 16, 2
"""What is made in advance, and used in turn."""
WARM_UP_S = 3.0
START_S = 120.0
TURN_S = 2.5
"""Run and reference take turns as short as that: a machine's pace may change within seconds, and then stay for many."""


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

    They take turns: while one is measured, the other stands still.
    """
    memory = FromMemory(learner, actor, refiners, refine_every)
    memory.turn(WARM_UP_S)
    in_run: list[_Turn] = []
    from_memory: list[_Turn] = []
    with tempfile.TemporaryDirectory(prefix="driftstream-") as folder:
        root = Path(folder) / "run"
        with bench_run(command(root), root) as run:
            _warmed_up(run)
            for length in _turns(seconds):
                in_run.append(_turn_of_run(run, length))
                with run.paused():
                    from_memory.append(memory.turn(length))
    stream, reference = _Turn.sum(in_run), _Turn.sum(from_memory)
    stream_pace, memory_pace = pace(*(turn.rows for turn in in_run)), pace(*(turn.rows for turn in from_memory))
    return Round(
        stream=stream_pace,
        memory=memory_pace,
        stream_cpu_s=stream.cores["learner"] / stream_pace.updates_per_s,
        memory_cpu_s=reference.cores["learner"] / memory_pace.updates_per_s,
        stream_delay=stream.delay,
        memory_delay=reference.delay,
        cores=stream.cores,
    )


def bench_step(
    command: Callable[[Path], Sequence[str]], yardsticks: Mapping[str, Callable[[], object]], seconds: float
) -> StepRound:
    """Measure for so many seconds in the run that `command` starts; the yardsticks in turns with it."""
    found: list[Rows] = []
    times: list[Mapping[str, Tensor]] = []
    with tempfile.TemporaryDirectory(prefix="driftstream-") as folder:
        root = Path(folder) / "run"
        with bench_run(command(root), root) as run:
            _warmed_up(run)
            with run.paused():
                time_rounds(yardsticks, 1)
            for length in _turns(seconds):
                found.append(_turn_of_run(run, length).rows)
                with run.paused():
                    times.append(time_rounds(yardsticks, 2, warm_up=0))
    return StepRound(
        pace(*found), {name: float(torch.cat([each[name] for each in times]).mean()) for name in yardsticks}
    )


@dataclass(frozen=True)
class _Turn:
    """A learner's reports in some seconds, processor time of every role, and how long the learner waited for one."""

    rows: Rows
    seconds: float
    cpu_s: dict[str, float]
    delay_s: float

    @classmethod
    def sum(cls, turns: Sequence["_Turn"]) -> "_Turn":
        """All of them together, without their reports."""
        cpu_s = {name: math.fsum(turn.cpu_s.get(name, 0.0) for turn in turns) for name in turns[-1].cpu_s}
        return cls([], math.fsum(turn.seconds for turn in turns), cpu_s, math.fsum(turn.delay_s for turn in turns))

    @property
    def cores(self) -> dict[str, float]:
        """How many processors every role kept busy."""
        return {name: spent / self.seconds for name, spent in self.cpu_s.items()}

    @property
    def delay(self) -> float:
        """Share of the time for which the learner had work and no processor."""
        return self.delay_s / self.seconds


def _turns(seconds: float) -> list[float]:
    """Lengths of the turns that make so many seconds."""
    count = max(1, round(seconds / TURN_S))
    return [seconds / count] * count


def _turn_of_run(run: BenchRun, seconds: float) -> _Turn:
    # A report that was under way when the run was stopped is of before.
    known, pid = len(run.rows()) + 1, run.roles()["learner"]
    before, delayed, since = run.cpu_s(), delay_s(pid), time.monotonic()
    rows = run.wait(lambda rows: _elapsed_s(rows[known:]) >= seconds, START_S + 4 * seconds)[known:]
    after, delayed, elapsed_s = run.cpu_s(), delay_s(pid) - delayed, time.monotonic() - since
    return _Turn(rows, elapsed_s, {name: after[name] - before[name] for name in before if name in after}, delayed)


def _warmed_up(run: BenchRun) -> None:
    """Wait until a run's start is over: replay fills, and W&B and the evaluator come up."""
    run.wait(lambda rows: _elapsed_s(rows) > WARM_UP_S, START_S)


class FromMemory:
    """The same learner, fed with data that is there, in this process."""

    def __init__(self, learner: Learner, actor: Actor, refiners: Sequence[Refiner], refine_every: int) -> None:
        self._rows: Rows = []
        self._seconds = 0.0
        source = MemorySource(actor, refiners, learner.draw_seeds)
        # No limit comes near, so that progress, and with it the work of a step, stays where it begins.
        budget = Budget(LimitsConfig(minutes=24 * 60.0))
        checkpointer = _NoCheckpoints(Path(os.devnull), CheckpointConfig())
        self._loop = TrainingLoop(learner, source, budget, checkpointer, self._report, self._enough, refine_every)

    def turn(self, seconds: float) -> _Turn:
        """Train for so many seconds, counted from the first report on."""
        self._rows, self._seconds = [], seconds
        cpu_s, delayed, since = time.process_time(), delay_s(os.getpid()), time.monotonic()
        self._loop.run()
        cpu_s, delayed = time.process_time() - cpu_s, delay_s(os.getpid()) - delayed
        # The last report comes with the end, right after another.
        return _Turn(self._rows[:-1], time.monotonic() - since, {"learner": cpu_s}, delayed)

    def _report(
        self, metrics: dict[str, float], /, step: int, wall_s: float, energy_evaluations: int, progress: float
    ) -> None:
        self._rows.append({**metrics, "step": step, "wall_s": wall_s})

    def _enough(self) -> bool:
        return _elapsed_s(self._rows) >= self._seconds


class _NoCheckpoints(Checkpointer):
    """As a run has none within a turn."""

    def save(self, state: CheckpointState) -> None:
        del state


def _elapsed_s(rows: Rows) -> float:
    """Training time between the first and the last report of the learner."""
    reports = learner_reports(rows)
    return reports[-1]["wall_s"] - reports[0]["wall_s"] if reports else 0.0
