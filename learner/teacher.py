"""The adaptive teacher: a second sampler, drawn to where the student's residuals and the target's rewards are high."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import score_trajectories
from driftstream.envs.errors import require
from driftstream.envs.processes import DiffusionProcess
from driftstream.learner.losses import Paths
from driftstream.learner.objectives import log_weights, teacher_log_reward, trajectory_balance
from driftstream.learner.optim import OptimConfig, Optimizer

Metrics = dict[str, Tensor | float]
Lesson = Literal["paths", "ends"]


@dataclass(frozen=True)
class TeacherConfig:
    """What the teacher is rewarded for, and how fast it learns.

    Its log reward is log R_T + `alpha` log R, where R_T grows with the student's squared residual, `weight` times as
    much where the student samples too little. It learns from every `every`-th batch of the learner's (which should
    share no factor with the turns of fresh and replayed batches, or it sees one of them only), and `rate_factor`
    multiplies the student's learning rate. It guides up to the fraction `until` of training: from there on it learns
    no more, and its actors roll the student out.

    `student_learns` says whether the student is trained on the teacher's `paths`, as published, or only on what is
    replayed, or refined before, from their `ends`. Beside local search the ends are enough, and cost it nothing;
    trained on the paths it learns more slowly for good.
    """

    alpha: float = 0.5
    weight: float = 20.0
    rate_factor: float = 5.0
    log_z_learning_rate: float = 1e-1
    clip_grad_norm: float = 100.0
    every: int = 1
    until: float = 1.0
    student_learns: Lesson = "paths"

    def __post_init__(self) -> None:
        require(self.every >= 1, "teacher.every", self.every, "at least 1 batch")
        require(0 < self.until <= 1, "teacher.until", self.until, "a fraction of training in (0, 1]")
        lesson, lessons = self.student_learns, get_args(Lesson)
        require(lesson in lessons, "teacher.student_learns", lesson, f"one of {', '.join(lessons)}")
        for name in ("alpha", "clip_grad_norm"):
            require(getattr(self, name) >= 0, f"teacher.{name}", getattr(self, name), "a number >= 0")
        for name in ("weight", "rate_factor", "log_z_learning_rate"):
            require(getattr(self, name) > 0, f"teacher.{name}", getattr(self, name), "a positive number")


class Teacher:
    """The teacher's policy, log Z and optimiser, and its update from the student's residuals.

    It is trained by trajectory balance on the same paths as the student: rollouts of either, and bridges to replayed
    states. Its P_B is the process's own, even where the student learns one.

    Source: Kim et al. 2024 (adaptive teachers, arXiv 2410.01432), sections 3 and 4.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        process: DiffusionProcess,
        config: TeacherConfig,
        optim: OptimConfig,
    ) -> None:
        self.policy = policy
        self.process = process
        self.config = config
        self.log_z = nn.Parameter(torch.zeros((), device=next(policy.parameters()).device))
        self.optimizer = Optimizer(policy, self.log_z, teacher_optim(config, optim))
        self.started = False
        self.seen = 0
        self.skipped = 0

    def guides(self, progress: float) -> bool:
        """Whether its actors roll it out, when the fraction `progress` of training is done."""
        return progress < self.config.until

    def take(self, paths: Paths, residual: Tensor, progress: float) -> Metrics:
        """Learn from a batch of the learner's if it is its turn: the metrics of `learn` then, none otherwise."""
        due = self.seen % self.config.every == 0 and self.guides(progress)
        self.seen += 1
        return self.learn(paths, residual, progress) if due else {}

    def learn(self, paths: Paths, residual: Tensor, progress: float) -> Metrics:
        """Update from whole trajectories [B] with the student's residual on each, [B], as a constant."""
        target = teacher_log_reward(residual, paths.log_reward, self.config.alpha, self.config.weight)
        log_pf, log_pb = score_trajectories(self.policy, self.process, paths.states, paths.times, paths.scores)
        if not self.started:
            log_weight = log_weights(log_pf, log_pb, target).detach()
            log_weight = log_weight[log_weight.isfinite()]
            if len(log_weight):
                self.started = True
                self.log_z.data.copy_(log_weight.median())
        loss = trajectory_balance(log_pf, log_pb, target, self.log_z)
        norm = self.optimizer.step(loss, progress)
        self.skipped += not math.isfinite(norm)
        return {
            "teacher/skipped": self.skipped,
            "teacher/loss": loss.detach(),
            "teacher/log_z": self.log_z.detach(),
            "teacher/grad_norm": norm,
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Groups of tensors from which `load_state` goes on exactly."""
        started, seen = torch.tensor(self.started), torch.tensor(self.seen)
        return {
            "teacher": {name: value.detach() for name, value in self.policy.state_dict().items()},
            "teacher_optimizer": {
                **self.optimizer.state_dict(),
                "log_z": self.log_z.detach(),
                "started": started,
                "seen": seen,
            },
        }

    def load_state(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what `state` gave."""
        self.policy.load_state_dict(groups["teacher"])
        optimizer = dict(groups["teacher_optimizer"])
        self.log_z.data.copy_(optimizer.pop("log_z"))
        self.started = bool(optimizer.pop("started"))
        self.seen = int(optimizer.pop("seen", torch.tensor(0)))
        self.optimizer.load_state_dict(optimizer)


def teacher_policy(config: PolicyConfig) -> PolicyConfig:
    """The teacher's networks: the student's, but for a learned P_B and a state flow."""
    return replace(config, learned_backward=False, state_flow="none")


def teacher_optim(config: TeacherConfig, optim: OptimConfig) -> OptimConfig:
    """The teacher's optimiser: the student's schedule at its own rates and clipping."""
    return replace(
        optim,
        learning_rate=config.rate_factor * optim.learning_rate,
        log_z_learning_rate=config.log_z_learning_rate,
        clip_grad_norm=config.clip_grad_norm,
    )
