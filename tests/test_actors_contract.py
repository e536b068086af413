"""What every actor in the box keeps to, whatever it does: the schema, its seed, its count of calls, the learner."""

import math
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.actor import Actor, ActorConfig
from driftstream.actors.policy import PolicyConfig
from driftstream.actors.refiner import RefinerConfig
from driftstream.actors.registry import actor_names
from driftstream.buffers.replay import ReplayConfig
from driftstream.envs.grids import GridConfig
from driftstream.envs.targets import CountedTarget, Target, make_target, unwrap
from driftstream.envs.trajectory import validate_trajectories
from driftstream.launch.config import RunConfig, resolve
from driftstream.launch.roles import build_learner, build_local_actors
from driftstream.learner.checkpoint import CheckpointConfig, Checkpointer
from driftstream.learner.learner import Learner, LearnerConfig
from driftstream.learner.limits import Budget, LimitsConfig
from driftstream.learner.loop import TrainingLoop
from driftstream.learner.sources import LocalSource

BATCH, STEPS = 8, 5

every_actor = pytest.mark.parametrize("name", actor_names())
every_target = pytest.mark.parametrize("target", ["gmm9", "funnel"])
every_policy = pytest.mark.parametrize("langevin", [False, True], ids=["plain", "langevin"])


def build(name: str, target: str, langevin: bool, seed: int = 2, grid: str = "random") -> tuple[Learner, Actor]:
    """A learner whose networks are no longer at their zeros, and one actor that shares its process."""
    config = RunConfig(
        target=target,
        policy=PolicyConfig(hidden=8, harmonics=4, langevin=langevin),
        grid=GridConfig(kind=grid, sampling_steps=STEPS),  # type: ignore[arg-type]
        replay=ReplayConfig(capacity=1000, minimum=BATCH),
        learner=LearnerConfig(batch_size=BATCH, report_every_s=1e-6),
        actor=ActorConfig(kinds={name: 1}),
        refiner=RefinerConfig(count=0),
    )
    config = resolve(config)
    learner = build_learner(config, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in learner.policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    (actor,) = build_local_actors(config, learner, [seed])
    return learner, actor


def batches(learner: Learner, actor: Actor) -> list[TensorDict]:
    """One batch while there is nothing to replay, at progress 0, and some after it, up to progress 1."""
    made = [actor.generate(0.0)]
    learner.learn_fresh(made[0], 0.0, actor.kind)
    return made + [actor.generate(progress) for progress in (0.0, 0.3, 1.0)]


class Spy(Target):
    """Counts the points at which it is evaluated, log rewards and scores each."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.name, self.dim = target.name, target.dim
        self.points = 0

    def log_reward(self, x: Tensor) -> Tensor:
        self.points += math.prod(x.shape[:-1])
        return self.target.log_reward(x)

    def score(self, x: Tensor) -> Tensor:
        self.points += math.prod(x.shape[:-1])
        return self.target.score(x)

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.points += 2 * math.prod(x.shape[:-1])
        return self.target.log_reward_and_score(x)


@every_policy
@every_target
@every_actor
def test_batches_are_trajectories_that_the_target_agrees_with(name: str, target: str, langevin: bool) -> None:
    learner, actor = build(name, target, langevin)
    density = make_target(target)
    for batch in batches(learner, actor):
        assert 0 < len(batch) <= BATCH
        validate_trajectories(batch, density.dim, STEPS)
        states = batch["states"]
        assert (states[:, 0] == 0).all()
        torch.testing.assert_close(batch["log_reward"], density.log_reward(states[:, -1]))
        assert ("scores" in batch) == langevin
        if langevin:
            torch.testing.assert_close(batch["scores"], density.score(states[:, :-1]))
        assert not any(value.requires_grad for value in batch.values())


@every_policy
@every_target
@every_actor
def test_batches_are_determined_by_the_seed(name: str, target: str, langevin: bool) -> None:
    first, again, other = (batches(*build(name, target, langevin, seed)) for seed in (2, 2, 3))
    for batch, same in zip(first, again, strict=True):
        assert batch.keys() == same.keys()
        assert all(torch.equal(batch[key], same[key]) for key in batch.keys())  # noqa: SIM118
    assert not torch.equal(first[-1]["states"][0, 1:-1], other[-1]["states"][0, 1:-1])


@every_policy
@every_target
@every_actor
def test_every_evaluation_of_the_target_is_counted(name: str, target: str, langevin: bool) -> None:
    learner, actor = build(name, target, langevin)
    spy = Spy(unwrap(actor.target))
    actor.context.target = CountedTarget(spy)
    batches(learner, actor)
    assert actor.target.calls == spy.points > 0


@every_policy
@every_target
@every_actor
def test_a_learner_trains_on_it(name: str, target: str, langevin: bool, tmp_path: Path) -> None:
    learner, actor = build(name, target, langevin, grid="uniform")
    losses: list[float] = []

    def report(metrics: dict[str, float], step: int, wall_s: float, energy_evaluations: int, progress: float) -> None:
        losses.extend(metrics[name] for name in ("train/loss",) if name in metrics)

    loop = TrainingLoop(
        learner,
        LocalSource([actor], []),
        Budget(LimitsConfig(steps=20)),
        Checkpointer(tmp_path, CheckpointConfig()),
        report,
        lambda: False,
        refine_every=100,
    )
    assert loop.run() == "steps"
    assert (learner.step, learner.skipped, actor.rejected) == (20, 0, 0)
    assert len(losses) == 20
    assert all(math.isfinite(loss) for loss in losses)
    assert all(bool(value.isfinite().all()) for value in learner.policy_tensors().values())
