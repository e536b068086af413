"""The actor: generates batches of exploratory trajectories, as a component and as a process."""

import time
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.exploration import ExplorationConfig
from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.rollout import rollout
from driftstream.actors.weights import PolicySubscriber
from driftstream.buffers.channels import StreamClient, StreamConfig
from driftstream.buffers.control import RoleContext
from driftstream.envs.errors import TargetError, require
from driftstream.envs.grids import GridConfig, make_grid, uniform_grid
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import CountedTarget

POLL_S = 0.2
REPORT_S = 2.0
HOPELESS_BATCHES = 100
"""After so many batches in a row without one usable trajectory the target is taken to be undefined everywhere."""


@dataclass(frozen=True)
class ActorConfig:
    """How many actors stream trajectories, and the threads of each."""

    count: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        require(self.count >= 0, "actor.count", self.count, "0 or more")
        require(self.threads >= 1, "actor.threads", self.threads, "at least 1")


class ExplorationActor:
    """Rolls the policy out with Gaussian exploration that decays with the learner's progress."""

    def __init__(
        self,
        policy: DiffusionPolicy,
        process: DiffusionProcess,
        target: CountedTarget,
        grid: GridConfig,
        exploration: ExplorationConfig,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        self.policy = policy
        self.process = process
        self.target = target
        self.grid = grid
        self.exploration = exploration
        self.batch_size = batch_size
        self.generator = generator
        self.rejected = 0
        self._empty_in_a_row = 0

    def generate(self, progress: float) -> TensorDict:
        """A batch of trajectories `[B]` for the learner's `progress` in [0, 1].

        Trajectories whose reward or states are not finite are left out and counted in `rejected`, so that the
        batch may be smaller than asked for, down to empty.

        Raises:
            TargetError: the target raises, or many batches in a row were empty.
        """
        times = make_grid(self.grid, generator=self.generator, device=self.generator.device)
        batch = rollout(
            self.policy,
            self.process,
            self.target,
            times,
            self.batch_size,
            exploration_std=self.exploration.std_at(progress),
            generator=self.generator,
        )
        finite = batch["log_reward"].isfinite() & batch["states"].isfinite().all(-1).all(-1)
        if not bool(finite.all()):
            self.rejected += int((~finite).sum())
            batch = batch[finite]
        self._empty_in_a_row = 0 if len(batch) else self._empty_in_a_row + 1
        if self._empty_in_a_row == HOPELESS_BATCHES:
            raise TargetError(
                f"target {self.target.name!r}: every trajectory has an undefined log reward "
                f"({HOPELESS_BATCHES} batches of {self.batch_size} in a row)"
            )
        return batch


def as_message(batch: TensorDict) -> dict[str, Tensor]:
    """Tensors of a trajectories message: as in the batch, but the shared grid once, `times [T+1]`."""
    tensors = {key: batch[key] for key in ("states", "log_reward", "scores") if key in batch}
    # Without a row there is no grid to share, and any of its length will do.
    times = batch["times"][0] if len(batch) else uniform_grid(batch["times"].shape[1] - 1)
    return {**tensors, "times": times}


class CallMeter:
    """Differences of a target's running counts: what was spent since the last reading."""

    def __init__(self, target: CountedTarget) -> None:
        self._target = target
        self._seen = target.calls

    def spent(self) -> int:
        """Energy and gradient evaluations since the last call."""
        seen, self._seen = self._seen, self._target.calls
        return self._seen - seen


def run_actor(context: RoleContext, actor: ExplorationActor, stream: StreamConfig) -> None:
    """Stream batches to the learner until the run stops: newest weights, one batch for each credit.

    Weights change only between trajectories. A credit names the oldest policy version that may be used, so that
    a lock-step run (`max_staleness = 0`) waits here for the weights.
    """
    client = StreamClient(context.endpoints.stream, context.name, context.epoch, stream)
    weights = PolicySubscriber(context.endpoints.weights, actor.policy)
    meter = CallMeter(actor.target)
    made, reported_rejects, since = 0, 0, time.monotonic()
    prefix = f"actor/{context.index}"
    try:
        while not context.should_stop:
            version = client.wait_for_credit(POLL_S)
            if version is None or not weights.update(POLL_S, min_version=version):
                continue
            batch = actor.generate(weights.progress)
            counters = {
                "energy_evaluations": meter.spent(),
                "rejected": actor.rejected - reported_rejects,
            }
            reported_rejects = actor.rejected
            made += len(batch)
            client.send("trajectories", as_message(batch), weights.version, counters)
            now = time.monotonic()
            if now - since >= REPORT_S:
                context.report_metrics(
                    {
                        f"{prefix}/trajectories_per_s": made / (now - since),
                        f"{prefix}/rejected": actor.rejected,
                    }
                )
                made, since = 0, now
    finally:
        weights.close()
        client.close()
