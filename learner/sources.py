"""Where the learner's data comes from: the stream of actor processes, or the same roles in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.actor import CallMeter, ExplorationActor
from driftstream.actors.refiner import Refiner
from driftstream.buffers.channels import StreamServer
from driftstream.buffers.wire import Message
from driftstream.envs.trajectory import TrajectoryError, make_trajectories, validate_trajectories
from driftstream.learner.publisher import Publisher

DrawSeeds = Callable[[int], tuple[Tensor, Tensor] | None]


@dataclass(frozen=True)
class FreshBatch:
    """Trajectories `[B]` made with the policy's version `policy_version`; used once, then `consumed`."""

    trajectories: TensorDict
    policy_version: int
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

    def metrics(self) -> dict[str, float]:
        """The stream's counters, under their metric names."""

    def random_state(self) -> dict[str, Tensor]:
        """What an exact resume needs of the roles in this process (empty for other processes)."""

    def load_random_state(self, state: dict[str, Tensor]) -> None:
        """Go on from `random_state`."""


class StreamSource:
    """Data from actor and refiner processes."""

    def __init__(
        self,
        server: StreamServer,
        publisher: Publisher,
        dim: int,
        device: torch.device,
        lock_step: bool,
    ) -> None:
        self._server = server
        self._publisher = publisher
        self._dim = dim
        self._device = device
        self._lock_step = lock_step
        self._held: list[Message] = []
        self._spent = 0
        self._rejected = 0

    def fresh(self, timeout_s: float, step: int, progress: float) -> FreshBatch | None:
        """See `DataSource`. In lock-step the next batch is asked for here, with the weights of this step."""
        while self._held:
            self._server.release(self._held.pop(), self._publisher.publish())
        message = self._server.take(timeout_s)
        if message is None:
            return None
        self._count(message)
        tensors = message.tensors
        trajectories = make_trajectories(
            tensors["states"], tensors["times"], tensors["log_reward"], scores=tensors.get("scores")
        )
        try:
            validate_trajectories(trajectories, self._dim)
        except TrajectoryError:
            self._rejected += len(trajectories)
            self._server.release(message, self._publisher.version)
            return None
        return FreshBatch(trajectories.to(self._device), message.policy_version, message)

    def consumed(self, batch: FreshBatch) -> None:
        assert batch.message is not None
        if self._lock_step:
            self._held.append(batch.message)
        else:
            self._server.release(batch.message, self._publisher.version)

    def refined(self) -> list[tuple[Tensor, Tensor]]:
        messages = self._server.take_terminals()
        for message in messages:
            self._count(message)
            self._server.release(message, self._publisher.version)
        return [(message.tensors["terminal"], message.tensors["log_reward"]) for message in messages]

    def offer_seeds(self, draw: DrawSeeds, step: int) -> bool:
        for request in self._server.seed_requests():
            seeds = draw(request.n)
            if seeds is not None:
                terminal, log_reward = seeds
                self._server.send_seeds(request, terminal.cpu(), log_reward.cpu(), step)
                return True
        return False

    def spent(self) -> int:
        spent, self._spent = self._spent, 0
        return spent

    def metrics(self) -> dict[str, float]:
        counters = self._server.counters()
        return {
            "stream/queue_depth": counters["queue_depth"],
            "stream/rejected": counters["rejected"] + self._rejected,
            "stream/duplicates": counters["duplicates"],
        }

    def random_state(self) -> dict[str, Tensor]:
        return {}

    def load_random_state(self, state: dict[str, Tensor]) -> None:
        del state

    def _count(self, message: Message) -> None:
        self._spent += int(message.counters.get("energy_evaluations", 0))
        self._rejected += int(message.counters.get("rejected", 0))


class LocalSource:
    """The same actors and refiners as components of this process, run in a fixed order when asked.

    Actors share the learner's policy, hence are never stale; with no refiner `offer_seeds` does nothing. This is
    `--sync` for off-policy runs, and on-policy training for methods that train on their own rollouts.
    """

    def __init__(self, actors: list[ExplorationActor], refiners: list[Refiner]) -> None:
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
        return FreshBatch(trajectories, step) if len(trajectories) else None

    def consumed(self, batch: FreshBatch) -> None:
        del batch

    def refined(self) -> list[tuple[Tensor, Tensor]]:
        refined, self._refined = self._refined, []
        return refined

    def offer_seeds(self, draw: DrawSeeds, step: int) -> bool:
        if not self._refiners:
            return False
        refiner = self._refiners[self._cycle % len(self._refiners)]
        seeds = draw(refiner.config.chains)
        if seeds is None:
            return False
        self._cycle += 1
        refinement = refiner.refine(seeds[0].to(refiner.generator.device))
        self._refined.append((refinement.terminal, refinement.log_reward))
        return True

    def spent(self) -> int:
        return sum(meter.spent() for meter in self._meters)

    def metrics(self) -> dict[str, float]:
        rejected = sum(actor.rejected for actor in self._actors)
        return {"stream/queue_depth": 0, "stream/rejected": rejected, "stream/duplicates": 0}

    def random_state(self) -> dict[str, Tensor]:
        state = {"turns": torch.tensor([self._turn, self._cycle])}
        for index, actor in enumerate(self._actors):
            state[f"actor.{index}"] = actor.generator.get_state()
        for index, refiner in enumerate(self._refiners):
            state[f"refiner.{index}"] = refiner.generator.get_state()
            state[f"refiner.{index}.step_size"] = torch.tensor(refiner.step_size, dtype=torch.float64)
        return state

    def load_random_state(self, state: dict[str, Tensor]) -> None:
        self._turn, self._cycle = state["turns"].tolist()
        for index, actor in enumerate(self._actors):
            actor.generator.set_state(state[f"actor.{index}"].cpu())
        for index, refiner in enumerate(self._refiners):
            refiner.generator.set_state(state[f"refiner.{index}"].cpu())
            refiner.step_size = float(state[f"refiner.{index}.step_size"])
