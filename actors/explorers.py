"""Exploration actors in the box: tempered, local search, Langevin-driven, replayed, and mixtures of any.

With a Langevin policy each of them also evaluates the score at the start of every step, which costs T gradient calls
a trajectory and is left out of the costs that the classes state, unless they differ. B is the batch's size.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.context import ActorContext
from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.kinds import expand_kinds, parse_kinds
from driftstream.actors.mala import adapt_step_size, mala_init, mala_proposal, mala_step
from driftstream.actors.registry import load_actor, make_options
from driftstream.actors.rollout import rollout_backward, score_trajectories
from driftstream.envs.errors import require
from driftstream.envs.trajectory import make_trajectories


@dataclass(frozen=True)
class TemperedOptions:
    """Factors on the student's drift and on the variance of its noise; with `anneal` they go to 1 with progress."""

    drift_scale: float = 1.0
    noise_scale: float = 2.0
    anneal: bool = False

    def __post_init__(self) -> None:
        for name in ("drift_scale", "noise_scale"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"actor.options.tempered.{name}", value, "a finite number, at least 0")

    def scales_at(self, progress: float) -> tuple[float, float]:
        """The factors on drift and variance when the learner has done the fraction `progress` of its training."""
        left = 1.0 - progress if self.anneal else 1.0
        return 1.0 + left * (self.drift_scale - 1.0), 1.0 + left * (self.noise_scale - 1.0)


class TemperedActor(ExplorationActor):
    """Rolls the student out hotter or colder: with its drift and the variance of its noise scaled.

    Exploration's own noise is not added. Costs B energy calls a batch.
    """

    Options = TemperedOptions
    options: TemperedOptions

    def generate(self, context: ActorContext) -> TensorDict:
        drift_scale, noise_scale = self.options.scales_at(context.progress)
        times = context.draw_times()
        states, scores = context.roll_forward(context.sample_prior(), times, 0.0, drift_scale, noise_scale)
        return make_trajectories(states, times, context.target.log_reward(states[:, -1]), scores)


@dataclass(frozen=True)
class LocalSearchOptions:
    """How far local search goes back, and which ends it keeps.

    `depth` is the share of the steps that is drawn anew. If `adaptive`, it grows by a tenth after a batch of which more
    than `target_acceptance` was accepted, and shrinks by a tenth otherwise, between one step and all. `accept` is
    Metropolis-Hastings, or greedy: whatever has the higher reward.
    """

    depth: float = 0.25
    adaptive: bool = True
    target_acceptance: float = 0.25
    accept: Literal["metropolis", "greedy"] = "metropolis"

    def __post_init__(self) -> None:
        prefix, rate, kinds = "actor.options.local_search", self.target_acceptance, ("metropolis", "greedy")
        require(0 < self.depth <= 1, f"{prefix}.depth", self.depth, "a fraction in (0, 1]")
        require(0 < rate < 1, f"{prefix}.target_acceptance", rate, "a fraction in (0, 1)")
        require(self.accept in kinds, f"{prefix}.accept", self.accept, "'metropolis' or 'greedy'")


class LocalSearchActor(ExplorationActor):
    """Back-and-forth local search: replayed states are noised back through P_B, then rolled forward again by P_F.

    Where the new end is accepted, its trajectory is the one that led to it: P_B's path up to the point of return and
    P_F's from there. Otherwise it is P_B's whole path to the replayed state. Both are at hand from the search, while
    new paths of P_B would cost Langevin policies their scores once more. Before there is anything to replay, the
    search starts from the ends of a rollout.

    Costs B energy calls a batch, and B more for such a rollout. Langevin policies take T + L gradient calls a
    trajectory, of which L steps are drawn anew, and T more for a rollout. The adapted depth is lost when the process
    is replaced.

    Source: Kim et al. 2023 (arXiv 2310.02710), section 4; the acceptance is that of Zhang et al. 2022 (arXiv
    2202.01361).
    """

    Options = LocalSearchOptions
    options: LocalSearchOptions

    def __init__(self, options: LocalSearchOptions) -> None:
        super().__init__(options)
        self.depth = options.depth

    def state(self) -> dict[str, float]:
        return {"depth": self.depth}

    def load_state(self, state: dict[str, float]) -> None:
        self.depth = state["depth"]

    @torch.no_grad()
    def generate(self, context: ActorContext) -> TensorDict:
        terminal, log_reward = context.replayed(context.batch_size) or _rolled_out(context)
        times = context.draw_times()
        steps = len(times) - 1
        turn = steps - max(1, round(self.depth * steps))
        states = rollout_backward(context.policy, context.process, terminal, times, context.generator)
        scores = context.target.score(states[:, :-1]) if context.policy.langevin else None
        tail, tail_scores = context.roll_forward(states[:, turn], times[turn:])
        tail_log_reward = context.target.log_reward(tail[:, -1])
        if self.options.accept == "greedy":
            accepted = tail_log_reward > _defined(log_reward)
        else:
            old_scores = None if scores is None else scores[:, turn:]
            old = _log_weight(context, states[:, turn:], times[turn:], _defined(log_reward), old_scores)
            new = _log_weight(context, tail, times[turn:], tail_log_reward, tail_scores)
            uniform = torch.rand(new.shape, generator=context.generator, device=new.device)
            # False for NaN: no move to where the reward is undefined.
            accepted = uniform.log_() < new - old
        states[accepted, turn:] = tail[accepted]
        if scores is not None and tail_scores is not None:
            scores[accepted, turn:] = tail_scores[accepted]
        if self.options.adaptive:
            depth = adapt_step_size(self.depth, float(accepted.float().mean()), self.options.target_acceptance)
            self.depth = min(1.0, max(1.0 / steps, depth))
        return make_trajectories(states, times, torch.where(accepted, tail_log_reward, log_reward), scores)


def _rolled_out(context: ActorContext) -> tuple[Tensor, Tensor]:
    batch = context.rollout()
    return batch["states"][:, -1], batch["log_reward"]


def _defined(log_reward: Tensor) -> Tensor:
    """Log rewards with -inf for NaN, so that a chain leaves where the target is undefined."""
    return log_reward.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _log_weight(
    context: ActorContext, states: Tensor, times: Tensor, log_reward: Tensor, scores: Tensor | None
) -> Tensor:
    """log R P_B / P_F [B] of the last parts of paths: two that start alike are balanced by its difference."""
    log_pf, log_pb = score_trajectories(context.policy, context.process, states, times, scores)
    return log_reward + (log_pb - log_pf).sum(-1)


@dataclass(frozen=True)
class LangevinOptions:
    """Steps from the ends of rollouts: of MALA if `adjusted`, with a step size that adapts, else of plain Langevin."""

    mcmc_steps: int = 5
    step_size: float = 0.01
    adjusted: bool = True
    target_acceptance: float = 0.574

    def __post_init__(self) -> None:
        prefix, rate = "actor.options.langevin", self.target_acceptance
        require(self.mcmc_steps >= 1, f"{prefix}.mcmc_steps", self.mcmc_steps, "at least 1")
        require(0 < self.step_size < math.inf, f"{prefix}.step_size", self.step_size, "a positive number")
        require(0 < rate < 1, f"{prefix}.target_acceptance", rate, "a fraction in (0, 1)")


class LangevinActor(ExplorationActor):
    """Moves the ends of exploratory rollouts by a few Langevin steps, and returns paths of P_B to where they got.

    Plain Langevin steps clip the score as the policy does (`policy.score_clip`), for without rejections a steep
    target would throw states out of all bounds.

    Costs K + 1 energy and K + 1 gradient calls a trajectory for K steps of MALA, 1 and K for plain ones; for a
    Langevin policy 2 T gradient calls more. The adapted step size is lost when the process is replaced.
    """

    Options = LangevinOptions
    options: LangevinOptions

    def __init__(self, options: LangevinOptions) -> None:
        super().__init__(options)
        self.step_size = options.step_size

    def state(self) -> dict[str, float]:
        return {"step_size": self.step_size}

    def load_state(self, state: dict[str, float]) -> None:
        self.step_size = state["step_size"]

    @torch.no_grad()
    def generate(self, context: ActorContext) -> TensorDict:
        times = context.draw_times()
        states, _ = context.roll_forward(context.sample_prior(), times, self.exploration_std(context))
        moved = (self._adjusted if self.options.adjusted else self._plain)(states[:, -1], context)
        return context.paths_to(*moved, times)

    def _adjusted(self, x: Tensor, context: ActorContext) -> tuple[Tensor, Tensor]:
        state = mala_init(x, context.target)
        for _ in range(self.options.mcmc_steps):
            state, info = mala_step(state, context.target, self.step_size, generator=context.generator)
            self.step_size = adapt_step_size(self.step_size, info.acceptance_rate, self.options.target_acceptance)
        return state.x, state.log_reward

    def _plain(self, x: Tensor, context: ActorContext) -> tuple[Tensor, Tensor]:
        clip = context.policy.config.score_clip
        for _ in range(self.options.mcmc_steps):
            score = context.target.score(x).clamp(-clip, clip)
            x = mala_proposal(x, score, self.step_size, context.noise(*x.shape))
        return x, context.target.log_reward(x)


@dataclass(frozen=True)
class ReplayedOptions:
    """Standard deviation of the Gaussian noise that is added to replayed states."""

    std: float = 0.1

    def __post_init__(self) -> None:
        require(0 <= self.std < math.inf, "actor.options.replayed.std", self.std, "a finite number, at least 0")


class ReplayedActor(ExplorationActor):
    """Paths of P_B to replayed states with a little noise; before there are any, rollouts as of `explore`.

    Costs B energy calls a batch, none without noise (which only gives the learner another copy of what it has).
    """

    Options = ReplayedOptions
    options: ReplayedOptions

    def generate(self, context: ActorContext) -> TensorDict:
        replayed = context.replayed(context.batch_size)
        if replayed is None:
            return super().generate(context)
        terminal, log_reward = replayed
        if not self.options.std:
            return context.paths_to(terminal, log_reward)
        return context.paths_to(terminal + self.options.std * context.noise(*terminal.shape))


@dataclass(frozen=True)
class MixtureOptions:
    """The kinds that are mixed, as "explore,tempered"; a count such as "explore:2,tempered" is a weight."""

    of: str = "explore,tempered"

    def __post_init__(self) -> None:
        field = "actor.options.mixture.of"
        kinds = parse_kinds(self.of, field)
        # A run trains a teacher for actors of that kind, not for what a mixture holds.
        require(not kinds.keys() & {"mixture", "teacher"}, field, self.of, "kinds other than mixture and teacher")
        for kind in kinds:
            load_actor(kind)


class MixtureActor(ExplorationActor):
    """Makes every batch by one of several kinds, drawn at random; each has the defaults of its options.

    Costs what the kind drawn costs.
    """

    Options = MixtureOptions
    options: MixtureOptions

    def __init__(self, options: MixtureOptions) -> None:
        super().__init__(options)
        counts = parse_kinds(options.of, "actor.options.mixture.of")
        parts = {kind: _with_defaults(load_actor(kind)) for kind in counts}
        self._distinct = parts
        self.parts = [parts[kind] for kind in expand_kinds(counts)]

    def state(self) -> dict[str, float]:
        return {f"{kind}.{k}": v for kind, part in self._distinct.items() for k, v in part.state().items()}

    def load_state(self, state: dict[str, float]) -> None:
        for kind, part in self._distinct.items():
            own = {k.removeprefix(f"{kind}."): v for k, v in state.items() if k.startswith(f"{kind}.")}
            if own:
                part.load_state(own)

    def generate(self, context: ActorContext) -> TensorDict:
        generator = context.generator
        drawn = torch.randint(len(self.parts), (), generator=generator, device=generator.device)
        return self.parts[int(drawn)].generate(context)


def _with_defaults(actor_class: type[ExplorationActor]) -> ExplorationActor:
    return actor_class(make_options(actor_class.Options, {}, "actor.options.mixture.of"))
