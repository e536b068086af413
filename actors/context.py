"""What an exploration actor works with: the samplers, the target, the learner's progress, and its replay."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.rollout import roll_forward, rollout, rollout_backward
from driftstream.buffers.checks import is_integer
from driftstream.buffers.wire import WireLimits
from driftstream.envs.errors import require
from driftstream.envs.grids import GridConfig, make_grid
from driftstream.envs.processes import DiffusionProcess
from driftstream.envs.targets import CountedTarget
from driftstream.envs.trajectory import make_trajectories

AskReplayed = Callable[[int], tuple[Tensor, Tensor] | None]
"""Replayed states [n, D] and their log rewards [n], or None while there are none."""


@dataclass(frozen=True)
class ExplorationConfig:
    """Extra noise of the actors. `std` is a rate: the behaviour policy's variance gains std^2 dt.

    `std = None` is resolved to the diffusion's own rate (the square root of a constant diffusion's variance).
    """

    std: float | None = None
    decay: Literal["linear", "constant"] = "linear"
    decay_until: float = 0.5

    def __post_init__(self) -> None:
        require(self.std is None or self.std >= 0, "exploration.std", self.std, "a number >= 0")
        require(self.decay in ("linear", "constant"), "exploration.decay", self.decay, "'linear' or 'constant'")
        require(0 < self.decay_until <= 1, "exploration.decay_until", self.decay_until, "a fraction in (0, 1]")

    def std_at(self, progress: float) -> float:
        """Exploration rate when the learner has done the fraction `progress` of its training."""
        std = self.std or 0.0
        if self.decay == "constant":
            return std
        return std * max(0.0, 1.0 - progress / self.decay_until)


MAX_REPLAYED = WireLimits().max_rows


def no_replay(n: int) -> None:
    """What `replayed` gives where there is no learner to ask."""
    del n


@dataclass
class ActorContext:
    """Everything that an actor may use.

    `policy` is the student with the newest weights, and `teacher` the teacher where the run has one, which guides up to
    the fraction `teacher_until` of training; both are updated in place between batches. `progress` is the fraction of
    training done. All randomness shall come from `generator`, so that a run repeats from its seed.
    """

    policy: DiffusionPolicy
    process: DiffusionProcess
    target: CountedTarget
    grid: GridConfig
    exploration: ExplorationConfig
    batch_size: int
    generator: torch.Generator
    teacher: DiffusionPolicy | None = None
    teacher_until: float = 1.0
    progress: float = 0.0
    ask_replayed: AskReplayed = no_replay

    def draw_times(self) -> Tensor:
        """The grid `[T+1]` of the next batch: the run's at its present progress, newly drawn where it is random."""
        return make_grid(self.grid, self.generator, self.generator.device, progress=self.progress)

    def noise(self, *shape: int) -> Tensor:
        """Standard normal numbers of the given shape."""
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def rollout(
        self,
        policy: DiffusionPolicy | None = None,
        exploration_std: float = 0.0,
        batch_size: int | None = None,
        times: Tensor | None = None,
    ) -> TensorDict:
        """Trajectories of a policy (by default the student's), with extra noise of rate `exploration_std`."""
        return rollout(
            policy or self.policy,
            self.process,
            self.target,
            self.draw_times() if times is None else times,
            self.batch_size if batch_size is None else batch_size,
            exploration_std=exploration_std,
            generator=self.generator,
        )

    def sample_prior(self) -> Tensor:
        """States `[B, D]` at which a batch of rollouts starts."""
        generator = self.generator
        return self.process.sample_prior(self.batch_size, self.policy.dim, generator, generator.device)

    def roll_forward(
        self,
        start: Tensor,
        times: Tensor,
        exploration_std: float = 0.0,
        drift_scale: float = 1.0,
        noise_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The student's paths from `start [B, D]` at `times[0]`, of any grid: `rollout.roll_forward`."""
        scales = (exploration_std, drift_scale, noise_scale)
        return roll_forward(self.policy, self.process, self.target, start, times, *scales, self.generator)

    def paths_to(self, terminal: Tensor, log_reward: Tensor | None = None, times: Tensor | None = None) -> TensorDict:
        """Trajectories of P_B that end in `terminal [B, D]`; the target is asked for log rewards not given."""
        times = self.draw_times() if times is None else times
        states = rollout_backward(self.policy, self.process, terminal, times, self.generator)
        return self.as_trajectories(states, times, log_reward)

    def as_trajectories(self, states: Tensor, times: Tensor, log_reward: Tensor | None = None) -> TensorDict:
        """A batch in the trajectory schema from `states [B, T+1, D]` on the grid `times [T+1]`, however made.

        The target is asked for log rewards that are not given, and for scores where the policy needs them.
        """
        if log_reward is None:
            log_reward = self.target.log_reward(states[:, -1])
        scores = self.target.score(states[:, :-1]) if self.policy.langevin else None
        return make_trajectories(states, times, log_reward, scores=scores)

    def replayed(self, n: int) -> tuple[Tensor, Tensor] | None:
        """Terminal states `[n, D]` of the learner's replay with log rewards `[n]`; None while it holds none.

        Raises ValueError unless n is an integer from 1 to a million.
        """
        if not is_integer(n, least=1) or n > MAX_REPLAYED:
            raise ValueError(f"replayed({n!r}): expected an integer from 1 to {MAX_REPLAYED:,}")
        drawn = self.ask_replayed(n)
        if drawn is None:
            return None
        terminal, log_reward = drawn
        return terminal.to(self.generator.device), log_reward.to(self.generator.device)
