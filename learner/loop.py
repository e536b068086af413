"""The training loop: the same for a stream of actor processes, for `--sync` and for on-policy methods."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from driftstream.learner.checkpoint import Checkpointer, CheckpointState
from driftstream.learner.learner import Learner, Metrics
from driftstream.learner.limits import Budget
from driftstream.learner.publisher import Publisher
from driftstream.learner.sources import DataSource

WAIT_S = 0.1


class Report(Protocol):
    """Where the loop's figures go: the control channel, or the monitor of this process."""

    def __call__(
        self, metrics: dict[str, float], /, step: int, wall_s: float, energy_evaluations: int, progress: float
    ) -> None: ...


@dataclass
class Window:
    """What happened since the last report."""

    since: float = field(default_factory=time.monotonic)
    newest: Metrics = field(default_factory=dict)
    steps: int = 0
    waited_s: float = 0.0
    staleness: list[int] = field(default_factory=list)

    def metrics(self) -> dict[str, float]:
        seconds = max(time.monotonic() - self.since, 1e-9)
        metrics = {name: float(value) for name, value in self.newest.items()}
        if self.steps or self.waited_s:
            metrics["learner/updates_per_s"] = self.steps / seconds
            metrics["learner/wait_fraction"] = self.waited_s / seconds
        if self.staleness:
            metrics["stream/staleness_mean"] = sum(self.staleness) / len(self.staleness)
            metrics["stream/staleness_max"] = max(self.staleness)
        return metrics


class TrainingLoop:
    """Feeds a learner from a data source until a limit is reached or it is told to stop.

    Weights are published every `publish_every` steps; None leaves that to the source, after a first time.
    `record_clock = False` keeps wall-clock time out of checkpoints, so that equal runs write equal bytes.
    """

    def __init__(
        self,
        learner: Learner,
        source: DataSource,
        budget: Budget,
        checkpointer: Checkpointer,
        report: Report,
        should_stop: Callable[[], bool],
        refine_every: int,
        publisher: Publisher | None = None,
        publish_every: int | None = None,
        record_clock: bool = True,
    ) -> None:
        self.learner = learner
        self.source = source
        self.budget = budget
        self.checkpointer = checkpointer
        self.report = report
        self.should_stop = should_stop
        self.refine_every = refine_every
        self.publisher = publisher
        self.publish_every = publish_every
        self.record_clock = record_clock
        self._refine_at = 0
        self._window = Window()
        self._begun = False

    def run(self) -> str:
        """Train; the last act is a checkpoint. Returns the limit that was reached, or "stopped"."""
        if self.publisher is not None:
            self.publisher.publish()
        self.budget.start()
        while (reason := self._ending()) is None:
            if metrics := self._step():
                # Some figures are not of every step; the newest of each are reported.
                self._window.newest |= metrics
                self._window.steps += 1
            if self._report_due():
                self._send()
            if self.checkpointer.due():
                self.checkpointer.save(self.state())
        self.source.discard()
        self.learner.actor_calls += self.source.spent()
        self._send()
        self.checkpointer.save(self.state())
        self.checkpointer.wait()
        return reason

    def _report_due(self) -> bool:
        """Whether it is time for a report: at intervals, and at the first step, from which start-up is timed."""
        first = not self._begun and self._window.steps > 0
        self._begun |= first
        return first or time.monotonic() - self._window.since >= self.learner.config.report_every_s

    def _ending(self) -> str | None:
        """Why training ends now, or None."""
        if self.should_stop():
            return "stopped"
        return self.budget.reached(self.learner.step, self.learner.energy_evaluations)

    def state(self) -> CheckpointState:
        """Everything that an exact resume needs."""
        groups, numbers = self.learner.state()
        groups["random"].update(self.source.random_state())
        numbers["refine_at"] = self._refine_at
        if self.record_clock:
            numbers["elapsed_s"] = self.budget.elapsed_s
        return CheckpointState(self.learner.step, groups, numbers)

    def load_state(self, state: CheckpointState) -> None:
        """Go on from a checkpoint."""
        self.learner.load_state(state.groups, state.numbers)
        self.source.load_random_state(state.groups["random"])
        self._refine_at = state.numbers["refine_at"]
        self.budget.earlier_s = state.numbers.get("elapsed_s", 0.0)

    def _step(self) -> Metrics | None:
        """One update; None if no data came in time for it."""
        learner, source = self.learner, self.source
        if self.publisher is not None and self.publish_every and learner.step % self.publish_every == 0:
            self.publisher.publish()
        self._refine()
        if learner.objective.pathwise:
            return learner.learn_pathwise(self.progress)
        replay_size = len(learner.replay)
        kind = learner.limiter.next(replay_size)
        if kind == "replay":
            metrics: Metrics | None = learner.learn_replayed(self.progress)
        else:
            start = time.monotonic()
            batch = source.fresh(WAIT_S, learner.step, self.progress)
            self._window.waited_s += time.monotonic() - start
            learner.actor_calls += source.spent()
            if batch is None:
                return None
            self._window.staleness.append(learner.step - batch.policy_version)
            metrics = learner.learn_fresh(batch.trajectories, self.progress, batch.kind)
            source.consumed(batch)
        learner.limiter.used(kind, replay_size)
        return metrics

    def _refine(self) -> None:
        """Hand out seeds when a cycle is due, and take in what refiners sent."""
        learner, source = self.learner, self.source
        # What is trained on replay alone makes no step, and no cycle falls due, until there is enough of it.
        due = learner.step >= self._refine_at or learner.needs_replay(self.progress)
        if due and source.offer_seeds(learner.draw_seeds, learner.step):
            self._refine_at = learner.step + self.refine_every
        for terminal, log_reward in source.refined():
            learner.refined.add(terminal, log_reward)
            learner.actor_calls += source.spent()

    @property
    def progress(self) -> float:
        """Fraction of training done."""
        return self.budget.progress(self.learner.step, self.learner.energy_evaluations)

    def _send(self) -> None:
        """Report the newest update and the window since the last report, and start a new window."""
        learner, source_metrics = self.learner, self.source.metrics()
        source_metrics["stream/rejected"] += learner.rejected
        self.report(
            {
                **self._window.metrics(),
                **learner.statistics.metrics(),
                **source_metrics,
                "train/skipped": learner.skipped,
                "replay/size": len(learner.replay),
                "replay/samples_per_insert": learner.replay.samples_per_insert,
            },
            step=learner.step,
            wall_s=self.budget.elapsed_s,
            energy_evaluations=learner.energy_evaluations,
            progress=self.progress,
        )
        self._window = Window()
