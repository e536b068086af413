"""What an actor's batches are checked for, and whose fault it is where they are wrong."""

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict

from driftstream.actors.actor import HOPELESS_BATCHES, Actor
from driftstream.actors.context import ActorContext, ExplorationConfig
from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.kinds import expand_kinds, parse_kinds, settle_kinds, short_name
from driftstream.actors.mala import Refinement
from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.refiner import Refiner
from driftstream.envs.errors import ConfigError, PluginError, TargetError
from driftstream.envs.grids import GridConfig
from driftstream.envs.processes import BrownianProcess
from driftstream.envs.targets import CountedTarget, make_target

Change = Callable[[TensorDict, ActorContext], object]


def make_context() -> ActorContext:
    policy = DiffusionPolicy(2, PolicyConfig(hidden=4, harmonics=2))
    target = CountedTarget(make_target("gmm9"))
    grid, exploration = GridConfig(sampling_steps=3), ExplorationConfig(std=1.0)
    generator = torch.Generator().manual_seed(0)
    return ActorContext(policy, BrownianProcess(4.0), target, grid, exploration, 5, generator)


def actor_that(change: Change) -> Actor:
    """A plug-in that does something to the batches of the built-in actor."""

    class Changes(ExplorationActor):
        def generate(self, context: ActorContext) -> TensorDict:
            batch = super().generate(context)
            changed = change(batch, context)
            return batch if changed is None else changed  # type: ignore[return-value]

    return Actor("Changes", Changes(), make_context())


def shift_start(batch: TensorDict, context: ActorContext) -> None:
    batch["states"][:, 0] = 1.0


def vary_grids(batch: TensorDict, context: ActorContext) -> None:
    times = batch["times"].clone()
    times[1, 1] += 0.1
    batch["times"] = times


def too_many(batch: TensorDict, context: ActorContext) -> TensorDict:
    return torch.cat([batch, batch])


def spoil_states(batch: TensorDict, context: ActorContext) -> None:
    batch["states"][:, 1:] = torch.nan


def raise_zero_division(batch: TensorDict, context: ActorContext) -> None:
    raise ZeroDivisionError("division by zero")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (shift_start, "do not start at 0"),
        (vary_grids, "expected one grid"),
        (too_many, "10 trajectories: expected at most 5"),
        (lambda batch, _: batch.exclude("log_reward"), "'log_reward' is missing"),
        (lambda batch, _: 3, "generate returned int"),
        (spoil_states, "not finite"),
        (raise_zero_division, "raised ZeroDivisionError: division by zero"),
        (lambda _, context: context.replayed(0), r"replayed\(0\): expected an integer"),
    ],
)
def test_a_plugins_mistake_is_named(change: Change, complaint: str) -> None:
    with pytest.raises(PluginError, match=f"^actor Changes.*{complaint}"):
        actor_that(change).generate(0.0)


def test_a_plugin_without_usable_rows_is_to_blame_itself() -> None:
    actor = actor_that(lambda batch, _: batch[:0])
    for _ in range(HOPELESS_BATCHES - 1):
        assert len(actor.generate(0.0)) == 0
    with pytest.raises(PluginError, match="actor Changes: every trajectory"):
        actor.generate(0.0)


def test_a_target_without_a_defined_reward_is_to_blame_for_built_in_actors() -> None:
    context = make_context()
    context.target.target.log_reward = lambda x: torch.full(x.shape[:-1], torch.nan)  # type: ignore[method-assign]
    actor = Actor("explore", ExplorationActor(), context)
    for _ in range(HOPELESS_BATCHES - 1):
        assert len(actor.generate(0.0)) == 0
    with pytest.raises(TargetError, match="gmm9"):
        actor.generate(0.0)
    assert actor.rejected == 5 * HOPELESS_BATCHES


def test_double_precision_is_the_policys_in_the_end() -> None:
    batch = actor_that(lambda batch, _: batch.to(torch.float64)).generate(0.0)
    assert batch["states"].dtype == torch.float32


def test_every_call_of_the_target_is_a_sign_of_life() -> None:
    context, calls = make_context(), []
    context.target.on_call = lambda: calls.append(1)
    Actor("explore", ExplorationActor(), context).generate(0.0)
    assert calls == [1]


@pytest.mark.parametrize(
    ("outcome", "complaint"),
    [
        (3, "expected a Refinement"),
        (Refinement([1.0], torch.zeros(1), 0.1, 0.5), "expected tensors"),  # type: ignore[arg-type]
        (Refinement(torch.zeros(2, 3), torch.zeros(2), 0.1, 0.5), r"expected \[N, 2\]"),
        (Refinement(torch.full((1, 2), torch.nan), torch.zeros(1), 0.1, 0.5), "not finite"),
        (None, "raised ConfigError"),
    ],
)
def test_a_refiners_mistake_is_named(outcome: object, complaint: str) -> None:
    class Mine(Refiner):
        def refine(self, seeds: torch.Tensor) -> Refinement:
            if outcome is None:
                raise ConfigError("mine.width", 3, "less")
            return outcome  # type: ignore[return-value]

    refiner = Mine(make_context().target, None, torch.Generator())
    with pytest.raises(PluginError, match=f"^refiner Mine.*{complaint}"):
        refiner.run_cycle(torch.zeros(2, 2))


def test_kinds_are_counted() -> None:
    kinds = parse_kinds("explore:2, teacher ,./mine.py:Mine:3,package.module:Class", "--actors")
    assert kinds == {"explore": 2, "teacher": 1, "./mine.py:Mine": 3, "package.module:Class": 1}
    assert [short_name(kind) for kind in expand_kinds(kinds)][2:4] == ["teacher", "Mine"]
    assert settle_kinds({"teacher": 1}, 4, "explore", "actor") == {"teacher": 4}
    assert settle_kinds({}, 2, "explore", "actor") == {"explore": 2}
    with pytest.raises(ConfigError, match=r"actor\.count = 4: expected counts by kind"):
        settle_kinds({"teacher": 1, "explore": 1}, 4, "explore", "actor")


@pytest.mark.parametrize("text", ["", "explore:0", "explore:-1", "explore:1,explore:2", "a:X,b:X", ","])
def test_bad_counts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_kinds(text, "--actors")
