"""The learner: parameters, optimiser, log Z, replay, and one update from one batch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import rollout_backward, score_trajectories
from driftstream.actors.weights import published_tensors
from driftstream.buffers.rate_limiter import RateLimiter
from driftstream.buffers.replay import ReplayConfig, TerminalReplay
from driftstream.envs.errors import require
from driftstream.envs.grids import GridConfig, make_grid
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import CountedTarget
from driftstream.learner.losses import Paths, draw_segments, path_loss
from driftstream.learner.objectives import ObjectiveConfig, log_weights
from driftstream.learner.on_policy import RolloutConfig, pathwise_log_weight
from driftstream.learner.optim import OptimConfig, Optimizer, WeightAverage
from driftstream.learner.statistics import KindStatistics
from driftstream.learner.teacher import Teacher, TeacherConfig, teacher_policy

Metrics = dict[str, Tensor | float]
STUDENT = "explore"
"""The kind of actor that rolls the student out."""
TEACHER = "teacher"
"""The kind of actor that rolls the teacher out while it guides."""
GUIDED_STEPS = 1000
"""Beside a teacher the student's own ends are not replayed, as they are seen anyway, unless for so many steps no other
actor has sent any."""


@dataclass(frozen=True)
class LearnerConfig:
    """The learner's batch (trajectories an update; the actors' too), threads and cadences.

    Every `grad_variance_every` steps (0 = never) the variance of the batch's loss gradient is measured, as that of
    the mean over `grad_variance_parts` equal parts. A pathwise objective simulates another batch for it.
    """

    batch_size: int = 300
    threads: int = 1
    publish_every: int = 2
    report_every_s: float = 1.0
    grad_variance_every: int = 0
    grad_variance_parts: int = 10

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, "learner.batch_size", self.batch_size, "at least 2")
        require(self.threads >= 1, "learner.threads", self.threads, "at least 1")
        require(self.publish_every >= 1, "learner.publish_every", self.publish_every, "at least 1 step")
        seconds = self.report_every_s
        require(seconds > 0, "learner.report_every_s", seconds, "a positive number of seconds")
        every, parts = self.grad_variance_every, self.grad_variance_parts
        require(every >= 0, "learner.grad_variance_every", every, "a number of steps, or 0 for never")
        allowed = f"2 to half of learner.batch_size = {self.batch_size}"
        enough = every == 0 or 2 <= parts <= self.batch_size // 2
        require(enough, "learner.grad_variance_parts", parts, allowed)


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
        process: DiffusionProcess,
        grid: GridConfig,
        policy: PolicyConfig,
        replay: ReplayConfig,
        objective: ObjectiveConfig,
        optim: OptimConfig,
        config: LearnerConfig,
        rollout: RolloutConfig,
        seed: int,
        device: torch.device | str = "cpu",
        teacher: TeacherConfig | None = None,
    ) -> None:
        self.target = target
        self.process = process
        self.grid = grid
        self.objective = objective
        self.config = config
        self.rollout = rollout
        self.generator = torch.Generator(device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = DiffusionPolicy(target.dim, policy).to(device)
            second = None if teacher is None else DiffusionPolicy(target.dim, teacher_policy(policy)).to(device)
        self.log_z = nn.Parameter(torch.zeros((), device=device))
        self.optimizer = Optimizer(self.policy, self.log_z, optim)
        self.average = WeightAverage(self.policy, optim.ema_decay)
        self.teacher = None
        if teacher is not None and second is not None:
            self.teacher = Teacher(second, process, teacher, optim)
        self.statistics = KindStatistics()
        only_seeds = replay.source == "refined"
        seeding = dataclasses.replace(replay, prioritization="rank") if only_seeds else replay
        self.terminals = TerminalReplay(target.dim, seeding, device, self.generator)
        self.refined = TerminalReplay(target.dim, replay, device, self.generator)
        self.replay = self.refined if only_seeds else self.terminals
        self.limiter = RateLimiter(replay.ratio, replay.minimum)
        self._log_z_started = False
        self._guided_at = 0
        self._lesson: Metrics = {}  # the teacher's figures from a batch that was no step of the student's
        self.step = 0
        self.skipped = 0
        self.rejected = 0
        self.actor_calls = 0

    @property
    def device(self) -> torch.device:
        """Where the parameters and replay are."""
        return self.generator.device

    @property
    def energy_evaluations(self) -> int:
        """Energy and gradient evaluations of the whole run so far: actors', refiners' and the learner's own."""
        return self.actor_calls + self.target.calls

    def learn_fresh(self, batch: TensorDict, progress: float, kind: str = STUDENT) -> Metrics | None:
        """Update from a batch of trajectories, and keep their terminal states for replay and seeding.

        `kind` says of which kind the actor is that made it. An objective that is trained on replay alone has no use for
        paths of the policy itself: they only give a rough level of log Z, for display, and the step does not count
        (None). Nor does a batch of a teacher's that is kept for its ends only.
        """
        states, log_reward = batch["states"], batch["log_reward"]
        known = self.replay if len(self.replay) else self.terminals
        novelty = self.statistics.novelty(kind, states[:, -1], known)
        paths = Paths(states, batch["times"][0], log_reward, batch.get("scores", None))
        if self.teacher is not None and kind == TEACHER and self._learns_ends(self.teacher, progress):
            metrics: Metrics | None = None
            residual: Tensor | None = self._teach(self.teacher, paths, progress)
        else:
            metrics, residual = self._learn_fresh(paths, progress)
        if kind != STUDENT:
            self._guided_at = self.step
        guided = (
            self.teacher is not None and self.replay is self.terminals and self.step - self._guided_at < GUIDED_STEPS
        )
        if kind != STUDENT or not guided:
            self.terminals.add(states[:, -1], log_reward, residual)
        self.statistics.add(kind, log_reward, residual, novelty, trained=metrics is not None)
        return metrics

    @staticmethod
    def _learns_ends(teacher: Teacher, progress: float) -> bool:
        return teacher.config.student_learns == "ends" and teacher.guides(progress)

    def needs_replay(self, progress: float) -> bool:
        """Whether fresh batches, or some, are not trained on, and there is not enough to replay yet."""
        ends = self.teacher is not None and self._learns_ends(self.teacher, progress)
        return (self.objective.replay_only or ends) and len(self.replay) < self.limiter.minimum

    def _teach(self, teacher: Teacher, paths: Paths, progress: float) -> Tensor:
        """Let the teacher learn from paths of its own, on which the student is not trained; the student's residuals."""
        log_weight = self.log_weight(paths)
        self.start_log_z(log_weight)
        residual = log_weight - self.log_z.detach()
        self._lesson |= teacher.take(paths, residual, progress)
        return residual

    def _learn_fresh(self, paths: Paths, progress: float) -> tuple[Metrics | None, Tensor | None]:
        """The update's metrics (None where it is none), and the residuals that it was made from."""
        if not self._log_z_started or self.objective.replay_only:
            log_weight = self.log_weight(paths)
            self.start_log_z(log_weight)
            if self.objective.replay_only:
                self._follow_log_z(log_weight.mean())
                return None, None
        return self._update(self._cut(paths), progress)

    def learn_replayed(self, progress: float) -> Metrics:
        """Update from replayed terminal states with freshly drawn backward paths."""
        terminal, log_reward = self.replay.sample(self.config.batch_size)
        times = self._draw_times(progress)
        states = rollout_backward(self.policy, self.process, terminal, times, self.generator)
        paths = self._cut(Paths(states, times, log_reward))
        if self.policy.langevin:
            paths = dataclasses.replace(paths, scores=self.target.score(paths.states[:, :-1]))
        metrics, residual = self._update(paths, progress)
        if residual is not None:
            self.replay.update_priority(residual)
        self.statistics.add("replay", log_reward, residual)
        return metrics

    def learn_pathwise(self, progress: float) -> Metrics:
        """Update from trajectories that the learner simulates itself, and differentiates through.

        Those whose log weight is not finite are counted as rejected and left out; without any the step is skipped.
        """
        loss, log_weight = self.pathwise_loss(self.config.batch_size, progress)
        self.rejected += self.config.batch_size - len(log_weight)
        self._follow_log_z(log_weight.mean())
        extra: Metrics = {}
        if self._measures_gradient():
            parts = self.config.grad_variance_parts
            share = self.config.batch_size // parts
            losses = (self.pathwise_loss(share, progress)[0] for _ in range(parts))
            extra["train/grad_variance"] = gradient_variance([self._gradient(part) for part in losses])
        return self._descend(loss, progress) | extra

    def pathwise_loss(self, batch_size: int, progress: float = 1.0) -> tuple[Tensor, Tensor]:
        """Reverse KL of new trajectories, differentiable in the policy, and their finite log weights, detached."""
        times = self._draw_times(progress)
        log_weight = pathwise_log_weight(
            self.policy, self.process, self.target, times, batch_size, self.rollout, self.generator
        )
        log_weight = log_weight[log_weight.detach().isfinite()]
        return -log_weight.mean(), log_weight.detach()

    def _draw_times(self, progress: float) -> Tensor:
        return make_grid(self.grid, self.generator, self.device, progress=progress)

    def draw_seeds(self, n: int) -> tuple[Tensor, Tensor] | None:
        """Terminal states `[n, D]` for a refiner, with their log rewards; None while there are none."""
        return self._draw(self.terminals, n)

    def draw_replayed(self, n: int) -> tuple[Tensor, Tensor] | None:
        """States `[n, D]` of what is replayed, or of the actors' where that is empty; None while there are none."""
        return self._draw(self.replay if len(self.replay) else self.terminals, n)

    @staticmethod
    def _draw(memory: TerminalReplay, n: int) -> tuple[Tensor, Tensor] | None:
        if not len(memory):
            return None
        drawn = memory.sample(n)
        memory.sampled -= n  # `samples_per_insert` is of what is trained on
        return drawn

    def _update(self, paths: Paths, progress: float) -> tuple[Metrics, Tensor | None]:
        """Metrics of one update, and the residuals [B] before it (None for segments)."""
        loss, log_weight = self._loss(paths)
        residual = None if log_weight is None else log_weight - self.log_z.detach()
        if log_weight is not None and not (self.objective.learns_log_z or self.objective.replay_only):
            self._follow_log_z(log_weight.mean())
        extra: Metrics = {}
        if self._measures_gradient():
            share = len(paths.states) // self.config.grad_variance_parts
            parts = [paths[start * share : (start + 1) * share] for start in range(self.config.grad_variance_parts)]
            if share:
                gradients = [self._gradient(self._loss(part)[0]) for part in parts]
                extra["train/grad_variance"] = gradient_variance(gradients)
        extra |= self._lesson
        self._lesson = {}
        if self.teacher is not None and residual is not None:
            extra |= self.teacher.take(paths, residual, progress)
        return self._descend(loss, progress) | extra, residual

    def _loss(self, paths: Paths) -> tuple[Tensor, Tensor | None]:
        return path_loss(self.objective, self.policy, self.process, self.target, paths, self.log_z)

    def _cut(self, paths: Paths) -> Paths:
        """Segments of the paths, where the objective is trained on them."""
        length = self.objective.segment_length
        return paths if length is None else draw_segments(paths, length, self.generator)

    @torch.no_grad()
    def log_weight(self, paths: Paths) -> Tensor:
        """Log weights [B] of whole trajectories under the current parameters."""
        scored = score_trajectories(self.policy, self.process, paths.states, paths.times, paths.scores)
        return log_weights(*scored, paths.log_reward)

    def start_log_z(self, log_weight: Tensor) -> None:
        """Set log Z to the level of the first log weights [B]; later calls do nothing.

        Adam at rate 0.1 would need some ten steps a nat to find it. It is their median, as a first batch may hold
        log weights of -10^3 (funnel, with exploration), which would spoil a mean.
        """
        log_weight = log_weight[log_weight.isfinite()] if log_weight.ndim else log_weight
        if not self._log_z_started and log_weight.numel():
            self._log_z_started = True
            self.log_z.data.copy_(log_weight.median())
            self._level_flow()

    def _level_flow(self) -> None:
        """Move the state flow along with log Z."""
        if self.policy.flow_level is not None:
            self.policy.flow_level.copy_(self.log_z.detach())

    def _follow_log_z(self, mean_log_weight: Tensor) -> None:
        """Let log Z follow the mean log weight, for display, where it is not learned."""
        if mean_log_weight.isfinite():
            self.start_log_z(mean_log_weight)
            self.log_z.data.lerp_(mean_log_weight, 0.1)

    def _measures_gradient(self) -> bool:
        every = self.config.grad_variance_every
        return every > 0 and self.step % every == 0

    def _gradient(self, loss: Tensor) -> Tensor:
        """The loss's gradient by all that is learned, flat."""
        parameters = [*self.policy.parameters(), self.log_z]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _descend(self, loss: Tensor, progress: float) -> Metrics:
        norm = self.optimizer.step(loss, progress)
        self.skipped += not math.isfinite(norm)
        self._level_flow()
        self.average.update()
        self.step += 1
        return {
            "train/loss": loss.detach(),
            "train/log_z": self.log_z.detach(),
            "train/grad_norm": norm,
            "train/learning_rate": self.optimizer.learning_rate,
        }

    def policy_tensors(self) -> dict[str, Tensor]:
        """The policy's current tensors."""
        return {name: value.detach() for name, value in self.policy.state_dict().items()}

    def published_tensors(self) -> dict[str, Tensor]:
        """What actors roll out: the policy's current tensors, and the teacher's."""
        tensors = published_tensors(self.policy, None if self.teacher is None else self.teacher.policy)
        return {name: value.detach() for name, value in tensors.items()}

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
        if self.teacher is not None:
            groups |= self.teacher.state()
        numbers = {
            "step": self.step,
            "skipped": self.skipped,
            "energy_evaluations": self.energy_evaluations,
            "average_updates": self.average.updates,
            "rate_limiter": self.limiter.state_dict(),
            "log_z_started": self._log_z_started,
            "guided_at": self._guided_at,
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
        if self.teacher is not None:
            self.teacher.load_state(groups)
        self.limiter.load_state_dict(numbers["rate_limiter"])
        self.generator.set_state(groups["random"]["learner"].cpu())
        self._log_z_started = numbers["log_z_started"]
        self._guided_at = numbers.get("guided_at", 0)
        self.step = numbers["step"]
        self.skipped = numbers["skipped"]
        self.actor_calls = numbers["energy_evaluations"] - self.target.calls


def gradient_variance(gradients: list[Tensor]) -> float:
    """Trace of the covariance of the mean of K >= 2 independent gradients [P]: that of all their data together."""
    return float(torch.stack(gradients).var(0).sum() / len(gradients))
