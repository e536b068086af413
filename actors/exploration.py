"""Exploration actors: who makes the trajectories that the learner trains on. Plug-ins derive from these.

TB-type objectives accept trajectories of any origin, as the learner scores them anew. So an actor only decides
where to look; it says nothing of how likely its choices were.
"""

from typing import Any, ClassVar

from tensordict import TensorDict

from driftstream.actors.context import ActorContext
from driftstream.actors.policy import DiffusionPolicy
from driftstream.envs.errors import PluginError


class ExplorationActor:
    """Rolls the student out with Gaussian exploration that decays with the learner's progress.

    The base class of every actor. A plug-in overrides a hook (`exploration_std`, `behaviour`), or `generate` as a
    whole. `Options` is a frozen dataclass whose fields become flags, or None; its values are `self.options`.
    """

    Options: ClassVar[type | None] = None

    def __init__(self, options: Any = None) -> None:
        self.options = options

    def state(self) -> dict[str, float]:
        """Numbers that adapt from batch to batch, with which a resumed `--sync` run goes on exactly."""
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from `state`."""

    def exploration_std(self, context: ActorContext) -> float:
        """Rate of the extra noise: a step's variance gains its square times dt."""
        return context.exploration.std_at(context.progress)

    def behaviour(self, context: ActorContext) -> DiffusionPolicy:
        """The policy that is rolled out."""
        return context.policy

    def generate(self, context: ActorContext) -> TensorDict:
        """A batch of trajectories (`envs.trajectory`): of `context.batch_size` rows, or fewer."""
        return context.rollout(self.behaviour(context), self.exploration_std(context))


class TeacherActor(ExplorationActor):
    """Rolls the teacher out, which is trained to end where the student's residuals are large; with the same noise.

    Where the teacher guides only a part of training, the student is rolled out in the rest.

    Source: Kim et al. 2024 (adaptive teachers, arXiv 2410.01432).
    """

    def behaviour(self, context: ActorContext) -> DiffusionPolicy:
        if context.teacher is None:
            raise PluginError("actor teacher: the run has no teacher (--actors explore:2,teacher:1 makes one)")
        return context.teacher if context.progress < context.teacher_until else context.policy
