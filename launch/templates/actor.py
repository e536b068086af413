"""An exploration actor to start from: noisier than the student, and never without noise.

An actor decides where to look. The learner scores every trajectory anew, so that any choice is sound; it pays to end
where the student does not, and where the target is high.

- Check it: driftstream check my_actor.py:MyActor
- Run it: driftstream train gmm9 --actors explore:1,my_actor.py:MyActor:1
"""

from dataclasses import dataclass

from driftstream.actors.context import ActorContext
from driftstream.actors.exploration import ExplorationActor
from driftstream.envs.errors import require


class MyActor(ExplorationActor):
    """Rolls the student out with `factor` times the run's exploration noise, and at least with `floor`."""

    @dataclass(frozen=True)
    class Options:
        """What a run can set, as --MyActor.factor 3: plain values with defaults. It may be left out."""

        factor: float = 2.0
        floor: float = 0.5

        def __post_init__(self) -> None:
            require(self.factor > 0, "factor", self.factor, "a positive number")

    def exploration_std(self, context: ActorContext) -> float:
        return max(self.options.floor, self.options.factor * super().exploration_std(context))

    # The other hook is `behaviour`, the policy that is rolled out. Or write all of it; draw every random number
    # from the context, so that a run repeats from its seed:
    #
    # def generate(self, context: ActorContext) -> TensorDict:
    #     drawn = context.replayed(context.batch_size)  # states [B, D] of the learner's replay, log rewards [B]
    #     if drawn is None:  # there are none yet
    #         return context.rollout(exploration_std=self.exploration_std(context))
    #     moved = drawn[0] + 0.1 * context.noise(*drawn[0].shape)
    #     return context.paths_to(moved)
