"""The learner: parameters, optimiser, log Z, replay, and one update from one batch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import score_trajectories
from driftstream.buffers.rate_limiter import RateLimiter
from driftstream.buffers.replay import ReplayConfig, TerminalReplay
from driftstream.envs.errors import require
from driftstream.envs.grids import GridConfig, make_grid
from driftstream.envs.processes import BrownianProcess
from driftstream.envs.targets import CountedTarget
from driftstream.learner.objectives import ObjectiveConfig, log_weights, trajectory_balance, vargrad
from driftstream.learner.optim import OptimConfig, Optimizer, WeightAverage


@dataclass(frozen=True)
class LearnerConfig:
    """The learner's batch (trajectories an update; the actors' too), threads and cadences."""

    batch_size: int = 300
    threads: int = 1
    publish_every: int = 2
    report_every_s: float = 1.0

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "learner.batch_size", self.batch_size, "at least 2")
        require(self.threads >= 1, "learner.threads", self.threads, "at least 1")
        require(self.publish_every >= 1, "learner.publish_every", self.publish_every, "at least 1 step")
        seconds = self.report_every_s
        require(seconds > 0, "learner.report_every_s", seconds, "a positive number of seconds")


class Learner:
    """Everything that learning changes, and the one update that changes it.

    It owns the policy, log Z, the optimiser, the moving average and both replay memories: `terminals` (end points
    of the actors' trajectories, from which refiners are seeded) and `refined` (what the refiners sent back).
    `replay` is the one of them that is trained on; `terminals` is drawn by rank unless it is that one and the
    configuration says otherwise. Where batches come from is the loop's business.
    """

    def __init__(
        self,
        target: CountedTarget,
        process: BrownianProcess,
        grid: GridConfig,
        policy: PolicyConfig,
        replay: ReplayConfig,
        objective: ObjectiveConfig,
        optim: OptimConfig,
        config: LearnerConfig,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.target = target
        self.process = process
        self.grid = grid
        self.objective = objective
        self.config = config
        self.generator = torch.Generator(device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = DiffusionPolicy(target.dim, policy).to(device)
        self.log_z = nn.Parameter(torch.zeros((), device=device))
        self.average = WeightAverage(self.policy, optim.ema_decay)
        self.optimizer = Optimizer(self.policy, self.log_z, optim)
        only_seeds = replay.source == "refined"
        seeding = dataclasses.replace(replay, prioritization="rank") if only_seeds else replay
        self.terminals = TerminalReplay(target.dim, seeding, device, self.generator)
        self.refined = TerminalReplay(target.dim, replay, device, self.generator)
        self.replay = self.refined if only_seeds else self.terminals
        self.limiter = RateLimiter(replay.ratio, replay.minimum)
        self.step = 0
        self.skipped = 0
        self.actor_calls = 0

    @property
    def device(self) -> torch.device:
        """Where the parameters and replay are."""
        return self.generator.device

    @property
    def energy_evaluations(self) -> int:
        """Energy and gradient evaluations of the whole run so far: actors', refiners' and the learner's own."""
        return self.actor_calls + self.target.calls

    def learn_fresh(self, batch: TensorDict, progress: float) -> dict[str, Tensor | float]:
        """Update from a batch of trajectories, and keep their terminal states for replay and seeding."""
        states, log_reward = batch["states"], batch["log_reward"]
        self.terminals.add(states[:, -1], log_reward)
        scores = batch.get("scores", None)
        return self._update(states, batch["times"][0], log_reward, scores, progress)

    def learn_replayed(self, progress: float) -> dict[str, Tensor | float]:
        """Update from replayed terminal states with freshly drawn backward paths."""
        terminal, log_reward = self.replay.sample(self.config.batch_size)
        times = make_grid(self.grid, generator=self.generator, device=self.device)
        states = self.process.sample_bridge(terminal, times, generator=self.generator)
        scores = self.target.score(states[:, :-1]) if self.policy.langevin else None
        return self._update(states, times, log_reward, scores, progress)

    def draw_seeds(self, n: int) -> tuple[Tensor, Tensor] | None:
        """Terminal states `[n, D]` for a refiner, with their log rewards; None while there are none."""
        if not len(self.terminals):
            return None
        seeds = self.terminals.sample(n)
        self.terminals.sampled -= n  # `samples_per_insert` is of what is trained on
        return seeds

    def _update(
        self, states: Tensor, times: Tensor, log_reward: Tensor, scores: Tensor | None, progress: float
    ) -> dict[str, Tensor | float]:
        log_pf, log_pb = score_trajectories(self.policy, self.process, states, times, scores)
        log_weight = log_weights(log_pf.detach(), log_pb, log_reward)
        if self.step == 0:
            # Adam at rate 0.1 would need some ten steps a nat to find the level of log Z.
            self.log_z.data.copy_(log_weight.mean())
        if self.objective.name == "vargrad":
            loss = vargrad(log_pf, log_pb, log_reward)
            self.log_z.data.lerp_(log_weight.mean(), 0.1)
        else:
            loss = trajectory_balance(log_pf, log_pb, log_reward, self.log_z)
        norm = self.optimizer.step(loss, progress)
        self.skipped += not math.isfinite(norm)
        self.average.update()
        self.step += 1
        return {
            "train/loss": loss.detach(),
            "train/log_z": self.log_z.detach(),
            "train/grad_norm": norm,
            "train/learning_rate": self.optimizer.learning_rate,
        }

    def policy_tensors(self) -> dict[str, Tensor]:
        """The policy's current tensors, to be published to actors."""
        return {name: value.detach() for name, value in self.policy.state_dict().items()}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Groups of tensors and a dictionary of numbers, from which `load_state` goes on exactly."""
        groups = {
            "policy": self.policy_tensors(),
            "ema": self.average.tensors,
            "optimizer": {**self.optimizer.state_dict(), "log_z": self.log_z.detach()},
            "terminals": self.terminals.state_dict(),
            "refined": self.refined.state_dict(),
            "random": {"learner": self.generator.get_state()},
        }
        numbers = {
            "step": self.step,
            "skipped": self.skipped,
            "energy_evaluations": self.energy_evaluations,
            "average_updates": self.average.updates,
            "rate_limiter": self.limiter.state_dict(),
        }
        return groups, numbers

    def load_state(self, groups: dict[str, dict[str, Tensor]], numbers: dict[str, Any]) -> None:
        """Go on from what `state` gave, in a learner made with the same configuration."""
        self.policy.load_state_dict(groups["policy"])
        self.average.load(groups["ema"].items(), numbers["average_updates"])
        optimizer = dict(groups["optimizer"])
        self.log_z.data.copy_(optimizer.pop("log_z"))
        self.optimizer.load_state_dict(optimizer)
        self.terminals.load_state_dict(groups["terminals"])
        self.refined.load_state_dict(groups["refined"])
        self.limiter.load_state_dict(numbers["rate_limiter"])
        self.generator.set_state(groups["random"]["learner"].cpu())
        self.step = numbers["step"]
        self.skipped = numbers["skipped"]
        self.actor_calls = numbers["energy_evaluations"] - self.target.calls
