"""Where the learner's data comes from: the stream of actor processes, or the same roles in this process."""

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.actor import Actor
from driftstream.actors.meter import CallMeter
from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.refiner import Refiner
from driftstream.buffers.channels import StreamError, StreamServer
from driftstream.buffers.checks import is_integer
from driftstream.buffers.stream_config import Pacing
from driftstream.buffers.wire import Message
from driftstream.envs.trajectory import TrajectoryError, make_trajectories, validate_trajectories
from driftstream.learner.publisher import Publisher

logger = logging.getLogger(__name__)

MAX_COUNT = 2**40
"""No batch costs or loses more than this; a larger counter is nonsense, and their sum must stay an int64."""

DrawSeeds = Callable[[int], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class FreshBatch:
    """Trajectories `[B]` by an actor of some kind with the weights `policy_version`; used once, then `consumed`."""

    trajectories: TensorDict
    policy_version: int
    kind: str
    message: Message | None = None


class DataSource(Protocol):
    """The learner's side of the data path; one implementation for each way of running the same roles."""

    def fresh(self, timeout_s: float, step: int, progress: float) -> FreshBatch | None:
        """The next batch in order of arrival, or None if none came in time. `step` is the learner's."""

    def consumed(self, batch: FreshBatch) -> None:
        """The batch was used: its sender may make another."""

    def refined(self) -> list[tuple[Tensor, Tensor]]:
        """Terminal states `[N, D]` and log rewards `[N]` that refiners sent since last asked."""

    def offer_seeds(self, draw: DrawSeeds, step: int) -> bool:
        """Give one waiting refiner its seeds; whether one took them."""

    def spent(self) -> int:
        """Energy evaluations of the other roles since last asked."""

    def discard(self) -> None:
        """Give up what was sent and not taken, at the end of a run; what it cost still counts as spent."""

    def metrics(self) -> dict[str, float]:
        """The stream's counters, under their metric names."""

    def random_state(self) -> dict[str, Tensor]:
        """What an exact resume needs of the roles in this process (empty for other processes)."""

    def load_random_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `random_state`."""


class StreamSource:
    """Data from actor and refiner processes.

    `kinds` says of every actor, by its name in the stream, of which kind it is; `draw_replayed` answers actors that
    ask for replayed states. Unless `pacing` is by a window, the weights are published here, as a batch is let begin.
    """

    def __init__(
        self,
        server: StreamServer,
        publisher: Publisher,
        policy: DiffusionPolicy,
        pacing: Pacing,
        kinds: Mapping[str, str],
        draw_replayed: DrawSeeds,
    ) -> None:
        self._server = server
        self._publisher = publisher
        self._policy = policy
        self._kinds = kinds
        self._draw_replayed = draw_replayed
        self._like = next(policy.parameters())
        self._pacing = pacing
        self._held: list[tuple[Message, str]] = []
        self._spent = 0
        self._rejected = 0
        self._reason = self._last_reason = ""
        """Why the latest batch was refused (empty if it was not), and the last refusal."""

    def fresh(self, timeout_s: float, step: int, progress: float) -> FreshBatch | None:
        """See `DataSource`. In lock-step the next batch is asked for here, with the weights of this step."""
        while self._held:
            used, refused = self._held.pop()
            self._server.release(used, self._publisher.publish(), refused)
        deadline = time.monotonic() + timeout_s
        while True:
            self._answer_actors()
            message = self._server.take(max(0.0, deadline - time.monotonic()))
            if message is not None:
                break
            if time.monotonic() >= deadline:
                return None
        batch = self._accept(message)
        if batch is None:
            self._release(message, refused=self._reason)
            return None
        kind = self._kinds.get(message.sender, message.sender)
        return FreshBatch(batch.to(self._like.device), message.policy_version, kind, message)

    def consumed(self, batch: FreshBatch) -> None:
        assert batch.message is not None
        self._release(batch.message)

    def _answer_actors(self) -> None:
        """Give every actor that asks for replayed states what there is, at once: its batch waits for them."""
        for request in self._server.seed_requests():
            if request.from_actor:
                terminal, log_reward = self._draw_replayed(request.n) or self._nothing()
                self._server.send_seeds(request, terminal.cpu(), log_reward.cpu(), self._publisher.version)

    def _nothing(self) -> tuple[Tensor, Tensor]:
        return torch.empty(0, self._policy.dim), torch.empty(0)

    def _release(self, message: Message, refused: str = "") -> None:
        """Let its sender make another batch: at once, or in lock-step when the learner next asks for one."""
        if self._pacing == "lock_step":
            self._held.append((message, refused))
            return
        version = self._publisher.publish() if self._pacing == "ahead" else self._publisher.version
        self._server.release(message, version, refused)

    def refined(self) -> list[tuple[Tensor, Tensor]]:
        batches = []
        for message in self._server.take_terminals():
            batch = self._accept(message)
            if batch is not None:
                # What is released may be written to: copies.
                batches.append((batch["terminal"].clone(), batch["log_reward"].clone()))
            self._server.release(message, self._publisher.version, self._reason)
        return batches

    def offer_seeds(self, draw: DrawSeeds, step: int) -> bool:
        for request in self._server.seed_requests():
            if request.from_actor:
                continue
            seeds = draw(request.n)
            if seeds is not None:
                terminal, log_reward = seeds
                self._server.send_seeds(request, terminal.cpu(), log_reward.cpu(), step)
                return True
        return False

    def spent(self) -> int:
        spent, self._spent = self._spent, 0
        return spent

    def discard(self) -> None:
        # A broken sender is no reason for a run to fail at its very end.
        with contextlib.suppress(StreamError):
            while (batch := self._server.take(0.0)) is not None:
                self._accept(batch)
            for refined in self._server.take_terminals():  # those that were received on the way, too
                self._accept(refined)

    def metrics(self) -> dict[str, float]:
        counters = self._server.counters()
        return {
            "stream/queue_depth": counters["queue_depth"],
            "stream/rejected": counters["rejected"] + self._rejected,
            "stream/duplicates": counters["duplicates"],
            "stream/refused_peers": counters["refused_peers"],
        }

    def random_state(self) -> dict[str, Tensor]:
        return {}

    def load_random_state(self, state: dict[str, Tensor]) -> None:
        del state

    def _accept(self, message: Message) -> TensorDict | None:
        """Count a message's counters; its tensors in the learner's dtype, or None where it has no rows.

        What does not fit this learner is counted as rejected and gives None too: a sender must not end the run.
        """
        self._reason = ""
        counts = [message.counters.get(name, 0) for name in ("energy_evaluations", "rejected")]
        spent, rejected = (count if is_integer(count) and count <= MAX_COUNT else -1 for count in counts)
        tensors = {name: value.to(self._like.dtype) for name, value in message.tensors.items()}
        try:
            if min(spent, rejected) < 0:
                raise TrajectoryError(f"counters {counts}: expected integers of at least 0")
            self._spent += spent
            self._rejected += rejected
            if not message.rows:
                return None
            if message.kind == "terminals":
                return self._terminals(**tensors)
            if ("scores" in tensors) != self._policy.langevin:
                raise TrajectoryError("'scores' are for policies that use them, and needed there")
            trajectories = make_trajectories(**tensors)
            # All values were finite when they arrived.
            converted = [name for name, value in message.tensors.items() if value.dtype != self._like.dtype]
            validate_trajectories(trajectories, self._policy.dim, finite=converted)
            return trajectories
        except TrajectoryError as error:
            self._reason = str(error)
            if self._reason != self._last_reason:
                logger.warning("batch from %s rejected: %s", message.sender, error)
            self._last_reason = self._reason
            self._rejected += max(1, message.rows)
            return None

    def _terminals(self, terminal: Tensor, log_reward: Tensor) -> TensorDict:
        if terminal.shape[1] != self._policy.dim:
            raise TrajectoryError(f"'terminal' has shape {list(terminal.shape)}: expected [N, {self._policy.dim}]")
        return TensorDict({"terminal": terminal, "log_reward": log_reward}, batch_size=[len(terminal)])


class LocalSource:
    """The same actors and refiners as components of this process, run in a fixed order when asked.

    Actors share the learner's policy, hence are never stale; with no refiner `offer_seeds` does nothing. This is
    `--sync` for off-policy runs, and on-policy training for methods that train on their own rollouts.
    """

    def __init__(self, actors: list[Actor], refiners: list[Refiner]) -> None:
        self._actors = actors
        self._refiners = refiners
        targets = [actor.target for actor in actors] + [refiner.target for refiner in refiners]
        self._meters = [CallMeter(target) for target in targets]
        self._turn = 0
        self._cycle = 0
        self._refined: list[tuple[Tensor, Tensor]] = []

    def fresh(self, timeout_s: float, step: int, progress: float) -> FreshBatch | None:
        actor = self._actors[self._turn % len(self._actors)]
        self._turn += 1
        trajectories = actor.generate(progress)
        return FreshBatch(trajectories, step, actor.kind) if len(trajectories) else None

    def consumed(self, batch: FreshBatch) -> None:
        del batch

    def refined(self) -> list[tuple[Tensor, Tensor]]:
        refined, self._refined = self._refined, []
        return refined

    def offer_seeds(self, draw: DrawSeeds, step: int) -> bool:
        if not self._refiners:
            return False
        refiner = self._refiners[self._cycle % len(self._refiners)]
        seeds = draw(refiner.chains)
        if seeds is None:
            return False
        self._cycle += 1
        refinement = refiner.run_cycle(seeds[0].to(refiner.generator.device))
        self._refined.append((refinement.terminal, refinement.log_reward))
        return True

    def spent(self) -> int:
        return sum(meter.spent() for meter in self._meters)

    def discard(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        rejected = sum(actor.rejected for actor in self._actors)
        return {"stream/queue_depth": 0, "stream/rejected": rejected, "stream/duplicates": 0}

    def random_state(self) -> dict[str, Tensor]:
        state = {"turns": torch.tensor([self._turn, self._cycle])}
        for index, actor in enumerate(self._actors):
            state[f"actor.{index}"] = actor.generator.get_state()
            for name, value in actor.explorer.state().items():
                state[f"actor.{index}.{name}"] = torch.tensor(value, dtype=torch.float64)
        for index, refiner in enumerate(self._refiners):
            state[f"refiner.{index}"] = refiner.generator.get_state()
            state[f"refiner.{index}.step_size"] = torch.tensor(refiner.step_size, dtype=torch.float64)
        return state

    def load_random_state(self, state: dict[str, Tensor]) -> None:
        self._turn, self._cycle = state["turns"].tolist()
        for index, actor in enumerate(self._actors):
            actor.generator.set_state(state[f"actor.{index}"].cpu())
            prefix = f"actor.{index}."
            adapted = {k.removeprefix(prefix): float(v) for k, v in state.items() if k.startswith(prefix)}
            if adapted:
                actor.explorer.load_state(adapted)
        for index, refiner in enumerate(self._refiners):
            refiner.generator.set_state(state[f"refiner.{index}"].cpu())
            refiner.step_size = float(state[f"refiner.{index}.step_size"])
