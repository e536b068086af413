"""The contract of actors and refiners, as checks that `driftstream check` and the test-suite run alike.

A check sees a component as a run does, on `gmm9` with a policy of random weights; `contract_targets` has the contract
of targets, `contract_methods` that of objectives and presets.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from driftstream.actors.actor import Actor
from driftstream.actors.context import ActorContext, ExplorationConfig, no_replay
from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.mala import Refinement
from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.refiner import MalaRefiner, Refiner
from driftstream.actors.registry import make_options, option_types
from driftstream.envs.errors import PluginError
from driftstream.envs.grids import GridConfig
from driftstream.envs.processes import BrownianProcess
from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.envs.targets_gmm import gmm9
from driftstream.envs.trajectory import validate_trajectories
from driftstream.launch.findings import Check, ContractError, DoubtError, Finding, run_checks

ROWS, STEPS, SEEDS = 64, 10, 64
SPEED_S = 0.2
"""How long a speed is measured for."""
VARIANCE = 5.0
NO_OPTIONS: Mapping[str, Any] = {}


class Tally(Target):
    """A target that counts the points it is really asked for, past all wrappers."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.name, self.dim = target.name, target.dim
        self.diffusion_variance = target.diffusion_variance
        self.points = 0

    def log_reward(self, x: Tensor) -> Tensor:
        self.points += x.numel() // self.dim
        return self._target.log_reward(x)

    def score(self, x: Tensor) -> Tensor:
        self.points += x.numel() // self.dim
        return self._target.score(x)

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.points += 2 * (x.numel() // self.dim)
        return self._target.log_reward_and_score(x)


class Walled(Target):
    """gmm9 left of a wall; NaN from there on."""

    name, dim, diffusion_variance = "walled gmm9", 2, VARIANCE

    def __init__(self, wall: float) -> None:
        self._wall = wall
        self._inside = make_target("gmm9")

    def log_reward(self, x: Tensor) -> Tensor:
        return torch.where(x[..., 0] < self._wall, self._inside.log_reward(x), torch.nan)


def check_actor(actor: type[ExplorationActor], options: Mapping[str, Any] = NO_OPTIONS) -> list[Finding]:
    """Whether an actor does what a run expects: schema, rewards, seeds, replay, Langevin policies, calls, speed."""
    trial = _ActorTrial(actor, options)
    return run_checks(
        [
            Check("options", trial.options, essential=True),
            Check("schema", trial.schema, essential=True),
            Check("log reward", trial.log_reward),
            Check("finite", trial.finite),
            Check("determinism", trial.determinism),
            Check("replay", trial.replay),
            Check("Langevin policy", trial.langevin),
            Check("teacher in the run", trial.teacher),
            Check("progress", trial.progress),
            Check("weights", trial.weights),
            Check("energy calls", trial.calls),
            Check("speed", trial.speed, "info"),
        ]
    )


class _ActorTrial:
    """An actor in contexts like those of a run."""

    def __init__(self, actor: type[ExplorationActor], options: Mapping[str, Any]) -> None:
        self._class = actor
        self._values = dict(options)
        self._name = actor.__name__
        self._needs_teacher = False

    def make(
        self,
        seed: int = 0,
        langevin: bool = False,
        teacher: bool = False,
        replay: bool = False,
        actor: type[ExplorationActor] | None = None,
    ) -> Actor:
        """The actor, new, with a new context."""
        actor, values = (self._class, self._values) if actor is None else (actor, {})
        target, generator = CountedTarget(Tally(make_target("gmm9"))), torch.Generator().manual_seed(seed)
        policy = random_policy(target.dim, 1, langevin)
        guide = random_policy(target.dim, 2, langevin) if teacher or self._needs_teacher else None
        context = ActorContext(
            policy,
            BrownianProcess(VARIANCE),
            target,
            GridConfig(sampling_steps=STEPS),
            ExplorationConfig(std=1.0),
            ROWS,
            generator,
            guide,
            ask_replayed=_exact_replay() if replay else no_replay,
        )
        return Actor(self._name, actor(make_options(actor.Options, values, "options")), context)

    def options(self) -> str:
        seen = describe_options(self._class.Options, self._values)
        self.make()
        return seen

    def schema(self) -> str:
        try:
            batch = self.make().generate(0.0)
        except PluginError as error:
            # An actor that says so itself may rely on a teacher.
            if error.__cause__ is not None or "teacher" not in str(error):
                raise
            self._needs_teacher = True
            batch = self.make().generate(0.0)
        return _described(batch)

    def log_reward(self) -> str:
        batch = self.make().generate(0.0)
        return _agreement(batch["log_reward"], make_target("gmm9").log_reward(batch["states"][:, -1]), "log_reward")

    def finite(self) -> str:
        actor = self.make()
        with torch.no_grad():
            validate_trajectories(actor.explorer.generate(actor.context), actor.policy.dim)
        return "states and log rewards"

    def determinism(self) -> str:
        first, again, other = (self._batches(seed) for seed in (0, 0, 1))
        if not all(map(_equal, first, again)):
            raise ContractError("two runs from one seed differ: every random number is to come from context.generator")
        if all(map(_equal, first, other)):
            raise ContractError(
                "another seed gives the same trajectories: random numbers are to come from context.generator"
            )
        return "two runs from one seed are equal, from two seeds they differ"

    def replay(self) -> str:
        before, after = self.make(), self.make(replay=True)
        return f"without: {_described(before.generate(0.5))}; with: {_described(after.generate(0.5))}"

    def langevin(self) -> str:
        batch = self.make(langevin=True, replay=True).generate(0.0)
        return _agreement(batch["scores"], make_target("gmm9").score(batch["states"][:, :-1]), "scores")

    def teacher(self) -> str:
        seen = _described(self.make(teacher=True).generate(0.0))
        return f"{seen}; does not work without" if self._needs_teacher else seen

    def progress(self) -> str:
        for progress in (0.0, 0.5, 1.0):
            _described(self.make().generate(progress))
        return "at 0, 0.5 and 1"

    def weights(self) -> str:
        actor = self.make(teacher=True, replay=True)
        networks = [policy for policy in (actor.policy, actor.context.teacher) if policy is not None]
        before = [tensor.clone() for policy in networks for tensor in policy.state_dict().values()]
        actor.generate(0.0)
        after = [tensor for policy in networks for tensor in policy.state_dict().values()]
        if not all(map(torch.equal, before, after)):
            raise ContractError("the policy's weights were changed, which are the learner's")
        return "left as they are"

    def calls(self) -> str:
        actor = self.make(replay=True)
        batch = actor.generate(0.0)
        return _counted(actor.target, len(batch), "trajectory")

    def speed(self) -> str:
        own, explore = (self.make(replay=True, actor=actor) for actor in (None, ExplorationActor))
        rates = [rate(partial(actor.generate, 0.0)) for actor in (own, explore)]
        return f"{rates[0]:.0f} batches/s of {ROWS} rows and {STEPS} steps (explore: {rates[1]:.0f})"

    def _batches(self, seed: int) -> list[TensorDict]:
        with torch.random.fork_rng(devices=[]):
            # A seed that nobody can guess, for what is drawn from the global stream by mistake.
            torch.seed()
            actor = self.make(seed, replay=True)
            return [actor.generate(0.1 * step) for step in range(3)]


def check_refiner(refiner: type[Refiner], options: Mapping[str, Any] = NO_OPTIONS) -> list[Finding]:
    """Whether a refiner does what a run expects: shapes, rewards, seeds, resuming, odd seeds, balance, calls, speed."""
    trial = _RefinerTrial(refiner, options)
    return run_checks(
        [
            Check("options", trial.options, essential=True),
            Check("shapes", trial.shapes, essential=True),
            Check("log reward", trial.log_reward),
            Check("determinism", trial.determinism),
            Check("resumed run", trial.resumed),
            Check("no seeds", trial.no_seeds),
            Check("undefined seeds", trial.undefined_seeds),
            Check("energy calls", trial.calls),
            Check("balance", trial.balance),
            Check("speed", trial.speed, "info"),
        ]
    )


class _RefinerTrial:
    """A refiner with seeds like those of a run."""

    def __init__(self, refiner: type[Refiner], options: Mapping[str, Any]) -> None:
        self._class = refiner
        self._values = dict(options)
        self._seeds = VARIANCE**0.5 * torch.randn(SEEDS, 2, generator=torch.Generator().manual_seed(3))

    def make(self, seed: int = 0, target: Target | None = None, refiner: type[Refiner] | None = None) -> Refiner:
        """The refiner, new."""
        refiner, values = (self._class, self._values) if refiner is None else (refiner, {})
        counted = CountedTarget(Tally(make_target("gmm9") if target is None else target))
        return refiner(counted, make_options(refiner.Options, values, "options"), torch.Generator().manual_seed(seed))

    def cycle(self, refiner: Refiner, seeds: Tensor | None = None) -> Refinement:
        return refiner.run_cycle(self._seeds.clone() if seeds is None else seeds)

    def options(self) -> str:
        seen = describe_options(self._class.Options, self._values)
        refiner = self.make()
        if refiner.chains < 1:
            raise ContractError(f"chains = {refiner.chains}: expected at least 1")
        return f"{seen}; {refiner.chains} chains"

    def shapes(self) -> str:
        self._refiner = self.make()
        self._first = self.cycle(self._refiner)
        if not len(self._first.terminal):
            raise ContractError(f"refine keeps no state of {SEEDS} seeds")
        return f"{len(self._first.terminal)} states of {SEEDS} seeds"

    def log_reward(self) -> str:
        refinement = self._first
        return _agreement(refinement.log_reward, make_target("gmm9").log_reward(refinement.terminal), "log_reward")

    def determinism(self) -> str:
        first, again, other = (self._cycles(seed) for seed in (0, 0, 1))
        if not _equal_states(first, again):
            raise ContractError("two runs from one seed differ: every random number is to come from self.generator")
        if _equal_states(first, other):
            raise ContractError("another seed gives the same states: random numbers are to come from self.generator")
        return "two runs from one seed are equal, from two seeds they differ"

    def resumed(self) -> str:
        refiner, resumed = self.make(), self.make(1)
        self.cycle(refiner)
        resumed.generator.set_state(refiner.generator.get_state())
        resumed.step_size = refiner.step_size
        if not _equal_states([self.cycle(refiner)], [self.cycle(resumed)]):
            raise DoubtError("the second cycle differs in a resumed run, which goes on with `step_size` alone")
        return "goes on with generator and step size"

    def no_seeds(self) -> str:
        return f"{len(self.cycle(self.make(), self._seeds[:0]).terminal)} states"

    def undefined_seeds(self) -> str:
        counts = []
        for wall in (0.0, -1e6):
            target = Walled(wall)
            refinement = self.cycle(self.make(target=target))
            _agreement(refinement.log_reward, target.log_reward(refinement.terminal), "log_reward")
            counts.append(len(refinement.terminal))
        return f"half of them: {counts[0]} states; all of them: {counts[1]}"

    def calls(self) -> str:
        return _counted(self._refiner.target, len(self._first.terminal), "state")

    def balance(self) -> str:
        target, count = gmm9(), 400
        seeds = target.sample(count, torch.Generator().manual_seed(4))
        kept = self.cycle(self.make(), seeds).terminal
        modes = torch.cdist(kept.double(), target.means).argmin(1).bincount(minlength=9) / max(1, len(kept))
        # States of one chain are no independent draws: there are as many as seeds.
        error = (1 / 9 * 8 / 9 / count) ** 0.5
        worst = float((modes - 1 / 9).abs().max()) / error
        seen = f"shares of the 9 modes {float(modes.min()):.3f} to {float(modes.max()):.3f} (true: 0.111 ± {error:.3f})"
        if not worst < 4.5:
            raise DoubtError(f"{seen} after a cycle from exact samples: it may not leave the target invariant")
        return seen

    def speed(self) -> str:
        own, mala = (self.make(refiner=refiner) for refiner in (None, MalaRefiner))
        rates = [rate(partial(self._count, refiner)) for refiner in (own, mala)]
        return f"{rates[0]:,.0f} states/s from {SEEDS} chains (mala: {rates[1]:,.0f})"

    def _count(self, refiner: Refiner) -> int:
        return len(self.cycle(refiner).terminal)

    def _cycles(self, seed: int) -> list[Refinement]:
        with torch.random.fork_rng(devices=[]):
            torch.seed()
            refiner = self.make(seed)
            return [self.cycle(refiner) for _ in range(2)]


def describe_options(options: type | None, values: Mapping[str, Any]) -> str:
    """Options with the values that they take; ContractError or ConfigError where a run could not set them."""
    if options is None:
        make_options(None, dict(values), "options")
        return "none"
    option_types(options, "options")
    if not options.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise ContractError("Options can be changed: expected @dataclass(frozen=True)")
    made = make_options(options, dict(values), "options")
    return ", ".join(f"{field.name} = {getattr(made, field.name)}" for field in dataclasses.fields(options))


def random_policy(dim: int, seed: int, langevin: bool = False) -> DiffusionPolicy:
    """A policy of random weights, so that its drift is not zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        policy = DiffusionPolicy(dim, PolicyConfig(learned_variance=True, langevin=langevin, precondition=True))
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy.requires_grad_(False)


def rate(run: Callable[[], object]) -> float:
    """How often a second it runs; where it returns an integer, how much that comes to a second."""
    start, done = time.perf_counter(), 0
    while True:
        made = run()
        done += made if isinstance(made, int) else 1
        spent = time.perf_counter() - start
        if spent >= SPEED_S:
            return done / spent


def _exact_replay() -> Callable[[int], tuple[Tensor, Tensor] | None]:
    target, generator = gmm9(), torch.Generator().manual_seed(5)

    def ask(n: int) -> tuple[Tensor, Tensor]:
        terminal = target.sample(n, generator)
        return terminal, target.log_reward(terminal)

    return ask


def _described(batch: TensorDict) -> str:
    """The batch's shape; ContractError where it has too many rows or none."""
    if not 1 <= len(batch) <= ROWS:
        raise ContractError(f"{len(batch)} trajectories with a finite log reward: expected 1 to batch_size = {ROWS}")
    return f"states {list(batch['states'].shape)}"


def _agreement(values: Tensor, expected: Tensor, name: str) -> str:
    worst = float(((values - expected).abs() / (1.0 + expected.abs())).max()) if len(values) else 0.0
    if not worst < 1e-3:
        raise ContractError(f"{name} is not the target's (largest relative error {worst:.1e})")
    return f"equal to the target's (largest relative error {worst:.0e})"


def _counted(target: CountedTarget, rows: int, what: str) -> str:
    points = target.target.points if isinstance(target.target, Tally) else 0
    if points != target.calls:
        raise ContractError(
            f"{points} points were evaluated and {target.calls} counted: ask the target that is handed over"
        )
    return f"{target.calls / max(1, rows):.1f} a {what}, all counted"


def _equal(one: TensorDict, other: TensorDict) -> bool:
    return len(one) == len(other) and all(torch.equal(one[key], other[key]) for key in ("states", "log_reward"))


def _equal_states(one: list[Refinement], other: list[Refinement]) -> bool:
    return all(torch.equal(a.terminal, b.terminal) for a, b in zip(one, other, strict=True))
