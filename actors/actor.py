"""The actor: an exploration actor at work, as a component and as a process."""

import logging
import time
from dataclasses import dataclass, field

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.context import ActorContext
from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.kinds import Option, blaming, check_kinds, is_built_in
from driftstream.actors.meter import POLL_S, CallMeter
from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.weights import PolicySubscriber
from driftstream.buffers.channels import StreamClient, StreamConfig
from driftstream.buffers.control import RoleContext
from driftstream.envs.errors import PluginError, TargetError, require
from driftstream.envs.finiteness import is_finite
from driftstream.envs.grids import uniform_grid
from driftstream.envs.targets import CountedTarget, describe_point
from driftstream.envs.trajectory import TrajectoryError, validate_trajectories

logger = logging.getLogger(__name__)

REPORT_S = 2.0
HOPELESS_BATCHES = 100
"""After so many batches in a row without one usable trajectory the target is taken to be undefined everywhere."""


@dataclass(frozen=True)
class ActorConfig:
    """How many actors stream trajectories, of which kinds, and the threads of each.

    `kinds` counts actors by kind; without it all `count` of them `explore`. The learner's batches come in turn from
    all actors, so these counts are also the mixture that it trains on. `options` are those of kinds that have any,
    by the kind's short name.
    """

    count: int = 1
    threads: int = 1
    kinds: dict[str, int] = field(default_factory=dict)
    options: dict[str, dict[str, Option]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.count >= 0, "actor.count", self.count, "0 or more")
        require(self.threads >= 1, "actor.threads", self.threads, "at least 1")
        check_kinds(self.kinds, "actor.kinds")


class Actor:
    """An exploration actor with what it works on; what it returns is checked before anybody trains on it."""

    def __init__(self, kind: str, explorer: ExplorationActor, context: ActorContext) -> None:
        self.kind = kind
        self.explorer = explorer
        self.context = context
        self.rejected = 0
        parts = getattr(explorer, "parts", [explorer])  # a mixture is as trustworthy as what it holds
        self._own_code = all(is_built_in(part) for part in parts)
        self._empty_in_a_row = 0

    @property
    def policy(self) -> DiffusionPolicy:
        """The student."""
        return self.context.policy

    @property
    def target(self) -> CountedTarget:
        """The target, which counts this actor's evaluations."""
        return self.context.target

    @property
    def generator(self) -> torch.Generator:
        """The source of all randomness."""
        return self.context.generator

    def generate(self, progress: float) -> TensorDict:
        """A batch of trajectories `[B]` for the learner's `progress` in [0, 1].

        Trajectories whose reward or states are not finite are left out and counted in `rejected`, so that the
        batch may be smaller than asked for, down to empty.

        Raises:
            TargetError: the target raises, or many batches in a row were empty.
            PluginError: a plug-in raises, or its states are not finite or do not follow the trajectory schema.
        """
        self.context.progress = progress
        made = self._checked(self._generate())
        batch = self._usable(made)
        self._empty_in_a_row = 0 if len(batch) else self._empty_in_a_row + 1
        if self._empty_in_a_row == HOPELESS_BATCHES:
            self._empty_in_a_row = 0
            what = (
                f"every trajectory has an undefined log reward ({HOPELESS_BATCHES} batches in a row), "
                f"the last at {describe_point(made['states'][:, -1])}"
            )
            if self._own_code:
                raise TargetError(f"target {self.target.name!r}: {what}")
            raise PluginError(f"actor {self.kind}: {what}")
        return batch

    def _generate(self) -> TensorDict:
        with torch.no_grad(), blaming(f"actor {self.kind}", self._own_code):
            return self.explorer.generate(self.context)

    def _checked(self, batch: TensorDict) -> TensorDict:
        """The batch, if it follows the schema; undefined rewards are no fault of the actor."""
        if not isinstance(batch, TensorDict):
            kind = type(batch).__name__
            raise PluginError(f"actor {self.kind}: generate returned {kind}: expected a TensorDict of trajectories")
        try:
            validate_trajectories(batch, self.policy.dim, finite=() if self._own_code else ("states", "scores"))
            if len(batch) > self.context.batch_size:
                raise TrajectoryError(f"{len(batch)} trajectories: expected at most {self.context.batch_size}")
            if ("scores" in batch) != self.policy.langevin:
                raise TrajectoryError("'scores' are for policies with policy.langevin, and needed there")
            if not self._own_code and not self.context.process.prior_std and bool(batch["states"][:, 0].any()):
                raise TrajectoryError("'states' do not start at 0, as every path of this process does")
        except TrajectoryError as error:
            raise PluginError(f"actor {self.kind}: {error}") from None
        return batch if self._own_code else batch.to(next(self.policy.parameters()).dtype)

    def _usable(self, batch: TensorDict) -> TensorDict:
        if is_finite(batch["log_reward"]) and is_finite(batch["states"]):
            return batch
        finite = batch["log_reward"].isfinite() & batch["states"].isfinite().all(-1).all(-1)
        if not self.rejected:
            point = describe_point(batch["states"][~finite][:, -1])
            logger.warning("target %r: undefined log reward at %s; left out, and counted", self.target.name, point)
        self.rejected += int((~finite).sum())
        return batch[finite]


def as_message(batch: TensorDict) -> dict[str, Tensor]:
    """Tensors of a trajectories message: as in the batch, but the shared grid once, `times [T+1]`."""
    tensors = {key: batch[key] for key in ("states", "log_reward", "scores") if key in batch}
    # Without a row there is no grid to share, and any of its length will do.
    times = batch["times"][0] if len(batch) else uniform_grid(batch["times"].shape[1] - 1)
    return {**tensors, "times": times}


def run_actor(context: RoleContext, actor: Actor, stream: StreamConfig) -> None:
    """Stream batches to the learner until the run stops: newest weights, one batch for each credit.

    Weights change only between trajectories. A credit names the oldest policy version that may be used, so that
    a lock-step run (`max_staleness = 0`) waits here for the weights.
    """
    client = StreamClient(context.endpoints.stream, context.name, context.epoch, stream)
    weights = PolicySubscriber(context.endpoints.weights, actor.policy, actor.context.teacher)
    meter = CallMeter(actor.target)

    def ask_replayed(n: int) -> tuple[Tensor, Tensor] | None:
        seeds = None
        while seeds is None and not context.should_stop:
            seeds = client.request_seeds(n, POLL_S)
            if seeds is None:
                context.turn()  # the learner is busy, which is no fault of the actor
        if seeds is None or not seeds.rows:
            return None
        return seeds.tensors["terminal"], seeds.tensors["log_reward"]

    actor.context.ask_replayed = ask_replayed
    actor.target.on_call = context.turn
    context.control.doing = actor.target.doing
    made, reported_rejects, since = 0, 0, time.monotonic()
    prefix = f"actor/{context.label}"
    try:
        while not context.should_stop:
            context.turn()
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
