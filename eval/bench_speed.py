"""What computing costs beside its floor: the rollout, the update, and a cycle of MALA."""

import copy
from collections.abc import Callable, Mapping

import torch

from driftstream.actors.mala import MalaConfig, run_mala
from driftstream.actors.rollout import rollout
from driftstream.envs.grids import make_grid
from driftstream.envs.targets import unwrap
from driftstream.eval.bench_floors import RolloutFloor, RolloutNetwork, UpdateFloor, UpdateNetwork
from driftstream.eval.bench_gradients import sampling_steps
from driftstream.eval.bench_naive import NaiveTrajectoryBalance, diffusion_variance_of
from driftstream.eval.bench_published import PublishedTrajectoryBalance, published_policy
from driftstream.eval.bench_rounds import Comparison, compare, median_ratio, quartiles, time_rounds
from driftstream.learner.learner import Learner
from driftstream.learner.losses import Paths, path_loss

Calls = Mapping[str, Callable[[], object]]


class Steps:
    """The parts of one training step by trajectory balance, at the learner's shapes, ready to be timed.

    `learner` is trained in place; each yardstick has a policy of its own.
    """

    def __init__(self, learner: Learner, exploration_std: float = 0.0) -> None:
        self.learner = learner
        self.exploration_std = exploration_std
        self.rows = learner.config.batch_size
        self.times = make_grid(learner.grid, generator=learner.generator, device=learner.device)
        shared = (
            learner.log_z,
            unwrap(learner.target),
            diffusion_variance_of(learner.process),
            self.times,
            self.rows,
            exploration_std,
            learner.generator,
        )
        self.naive = NaiveTrajectoryBalance(copy.deepcopy(learner.policy), *shared)
        self.published = PublishedTrajectoryBalance(published_policy(learner.policy), *shared)
        self.rollout()
        with torch.no_grad():
            learner.start_log_z(learner.log_weight(self._paths()))

    def rollout(self) -> None:
        """A new batch of trajectories."""
        learner = self.learner
        self.batch = rollout(
            learner.policy,
            learner.process,
            learner.target,
            self.times,
            self.rows,
            self.exploration_std,
            learner.generator,
        )

    def update(self) -> None:
        """Loss, backward and Adam's step from the last batch."""
        learner = self.learner
        paths = self._paths()
        loss, _ = path_loss(learner.objective, learner.policy, learner.process, learner.target, paths, learner.log_z)
        learner.optimizer.step(loss, 0.0)

    def learn(self) -> None:
        """All that the learner does with a fresh batch: the update, replay, statistics and the weights' average."""
        self.learner.learn_fresh(self.batch, 0.0)

    def both(self) -> None:
        """A rollout, and the update from it."""
        self.rollout()
        self.update()

    @property
    def yardsticks(self) -> Calls:
        """What is not ours."""
        return {
            "naive rollout": self.naive.loss,
            "naive step": self.naive,
            "published step": self.published,
        }

    def _paths(self) -> Paths:
        return Paths(self.batch["states"], self.times, self.batch["log_reward"], self.batch.get("scores", None))


def bench_rollout(
    learner: Learner, repeats: int, exploration_std: float = 0.0, yardsticks: Calls | None = None
) -> Comparison:
    """A rollout against its floor, and against the naive one, which keeps a graph.

    `yardsticks` are those of `Steps`, in this process by default.
    """
    steps = Steps(learner, exploration_std)
    others = yardsticks or steps.yardsticks
    score_of = unwrap(learner.target) if learner.policy.langevin else None
    floor = RolloutFloor(learner.policy, steps.rows, sampling_steps(learner), learner.generator, score_of)
    contenders: Calls = {
        "rollout": steps.rollout,
        "floor": floor,
        "network alone": RolloutNetwork(learner.policy, steps.rows, steps.times, learner.generator, score_of),
        "naive rollout": others["naive rollout"],
    }
    seconds = time_rounds(contenders, repeats)
    figures = {"floor_flops": float(floor.flops), "floor_gflops_per_s": _gigaflops(floor.flops, seconds["floor"])}
    return compare("rollout", "rollout", "floor", seconds, figures)


def bench_update(
    learner: Learner, repeats: int, exploration_std: float = 0.0, yardsticks: Calls | None = None
) -> Comparison:
    """An update against its floor, and rollout with update against the yardsticks' whole steps.

    `yardsticks` are those of `Steps`, in this process by default.
    """
    steps = Steps(learner, exploration_std)
    others = yardsticks or steps.yardsticks
    floor = UpdateFloor(learner.policy, steps.rows, sampling_steps(learner), learner.generator)
    contenders: Calls = {
        "update": steps.update,
        "floor": floor,
        "network alone": UpdateNetwork(learner.policy, steps.rows, steps.times, learner.generator),
        "learner step": steps.learn,
        "rollout + update": steps.both,
        "naive step": others["naive step"],
        "published step": others["published step"],
    }
    seconds = time_rounds(contenders, repeats)
    figures = {
        "floor_flops": float(floor.flops),
        "floor_gflops_per_s": _gigaflops(floor.flops, seconds["floor"]),
        "speed_up": median_ratio(seconds["naive step"], seconds["rollout + update"]),
        "published_speed_up": median_ratio(seconds["published step"], seconds["rollout + update"]),
    }
    return compare("update", "update", "floor", seconds, figures)


def bench_mala(learner: Learner, config: MalaConfig, repeats: int) -> Comparison:
    """A cycle of MALA against the bare calls for energy and gradient, per step of all chains."""
    target = unwrap(learner.target)
    seeds = torch.randn(config.chains, target.dim, generator=learner.generator)

    def cycle() -> None:
        run_mala(seeds, learner.target, config, generator=learner.generator)

    @torch.no_grad()
    def calls() -> None:
        for _ in range(config.mcmc_steps):
            target.log_reward_and_score(seeds)

    seconds = time_rounds({"mala": cycle, "floor": calls}, repeats, units=config.mcmc_steps)
    return compare("mala", "MCMC step", "floor", seconds)


def _gigaflops(flops: int, seconds: torch.Tensor) -> float:
    return 1e-9 * flops / quartiles(seconds).median
