"""The configuration of a run: one frozen dataclass per component, TOML in and out, and what "auto" means."""

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomli_w

from driftstream.actors.actor import ActorConfig
from driftstream.actors.context import ExplorationConfig
from driftstream.actors.exploration import ExplorationActor
from driftstream.actors.kinds import Option, settle_kinds, short_name
from driftstream.actors.policy import PolicyConfig
from driftstream.actors.refiner import Refiner, RefinerConfig
from driftstream.actors.registry import load_actor, load_refiner, make_options, plain_options
from driftstream.buffers.channels import StreamConfig
from driftstream.buffers.replay import ReplayConfig
from driftstream.envs.convert import convert
from driftstream.envs.errors import ConfigError, require
from driftstream.envs.grids import GridConfig
from driftstream.envs.processes import SCHEDULE_RATIO, ProcessConfig
from driftstream.envs.registry import suggest
from driftstream.envs.targets import make_target
from driftstream.eval.evaluation import EvalConfig
from driftstream.eval.monitor import MonitorConfig
from driftstream.launch.plan import SupervisorConfig
from driftstream.learner.checkpoint import CheckpointConfig
from driftstream.learner.learner import LearnerConfig
from driftstream.learner.limits import LimitsConfig
from driftstream.learner.objective_plugins import load_objective
from driftstream.learner.objectives import ObjectiveConfig
from driftstream.learner.on_policy import RolloutConfig
from driftstream.learner.optim import OptimConfig
from driftstream.learner.teacher import TeacherConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run depends on. Fields that are None are filled in by `resolve`."""

    target: str = "gmm25"
    target_options: dict[str, Option] = field(default_factory=dict)
    method: str = "default"
    data: Literal["stream", "on_policy"] = "stream"
    seed: int = 0
    device: str = "auto"
    sync: bool = False
    limits: LimitsConfig = LimitsConfig()
    process: ProcessConfig = ProcessConfig()
    grid: GridConfig = GridConfig()
    policy: PolicyConfig = PolicyConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    exploration: ExplorationConfig = ExplorationConfig()
    actor: ActorConfig = ActorConfig()
    refiner: RefinerConfig = RefinerConfig()
    replay: ReplayConfig = ReplayConfig()
    stream: StreamConfig = StreamConfig()
    learner: LearnerConfig = LearnerConfig()
    optim: OptimConfig = OptimConfig()
    teacher: TeacherConfig = TeacherConfig()
    rollout: RolloutConfig = RolloutConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    monitor: MonitorConfig = MonitorConfig()
    supervisor: SupervisorConfig = SupervisorConfig()

    def __post_init__(self) -> None:
        require(self.data in ("stream", "on_policy"), "data", self.data, "'stream' or 'on_policy'")
        require(0 <= self.seed < 2**63, "seed", self.seed, "an integer in [0, 2^63)")


T = TypeVar("T")

COARSE_STEPS, FINE_STEPS = 10, 40
LOW_DIMENSION, LOW_DIMENSIONAL_STEPS = 10, 20
"""Up to this dimension the rules of `resolve` take a learned variance and this many steps."""
STEEP = 500.0
"""A noise that falls by more than this factor takes the fine grid all the same."""


def resolve(config: RunConfig) -> RunConfig:
    """Fill in what derives from the target and check the components against each other.

    Rules: the diffusion variance is the target's own suggestion; exploration has the rate of a constant diffusion;
    targets of at most ten dimensions take 20 steps with learned variance, others 40 with fixed variance (a learned one
    spreads mass between the modes before the drift has found them). Where the noise falls and the target has a range
    for it, that is taken, with 40 steps where it is steep. Where the kind of grid is left open too, a learned variance,
    which fits the grid that it was trained on, keeps to a uniform one; without it a sampler trains on random grids of
    10 steps, and is evaluated on 40 (on as many as it trains on where those are more).

    Raises:
        ConfigError: an unknown target, or components that contradict each other.
    """
    target = make_target(config.target, **config.target_options)
    low = target.dim <= LOW_DIMENSION
    constant = config.process.diffusion_variance or target.diffusion_variance
    policy = replace(config.policy, learned_variance=_either(config.policy.learned_variance, low))
    falls = config.process.kind == "brownian" and config.process.schedule != "constant"
    noise_range = target.noise_range if falls else None
    process = _resolve_process(config.process, target.diffusion_variance, noise_range)
    config = replace(config, process=process, policy=policy)
    steep = noise_range is not None and noise_range[0] > STEEP * noise_range[1]
    config = _resolve_grid(config, LOW_DIMENSIONAL_STEPS if low and not steep else FINE_STEPS)
    if config.policy.state_flow == "auto":
        balances = config.objective.balances_flows
        config = replace(config, policy=replace(config.policy, state_flow="plain" if balances else "none"))
    _check_objective(config, config.grid, config.policy)
    config = _resolve_replay(_resolve_exploration(config, constant**0.5))
    _check_roles(config)
    return _check_teacher(_settle_kinds(config))


def _either(given: T | None, derived: T) -> T:
    return derived if given is None else given


def _resolve_process(process: ProcessConfig, variance: float, noise_range: tuple[float, float] | None) -> ProcessConfig:
    """The noise and how much it falls, of the range where there is one, and the prior's spread."""
    ratio = SCHEDULE_RATIO
    if noise_range is not None:
        variance, ratio = noise_range[0], noise_range[0] / noise_range[1]
    variance = _either(process.diffusion_variance, variance)
    return replace(
        process,
        diffusion_variance=variance,
        prior_std=_either(process.prior_std, variance**0.5),
        schedule_ratio=_either(process.schedule_ratio, ratio),
    )


def _resolve_grid(config: RunConfig, fine: int) -> RunConfig:
    """The kind of grid and the numbers of steps, for training and for evaluation."""
    grid, evaluation = config.grid, config.eval
    if grid.kind == "auto" and not config.policy.learned_variance:
        steps = grid.sampling_steps or COARSE_STEPS
        grid = replace(grid, kind="random", sampling_steps=steps)
        evaluation = replace(evaluation, sampling_steps=evaluation.sampling_steps or max(FINE_STEPS, steps))
    elif grid.kind == "auto":
        grid = replace(grid, kind="uniform")
    if grid.kind == "given":
        grid = replace(grid, sampling_steps=len(grid.times) - 1)
    elif grid.sampling_steps is None:
        grid = replace(grid, sampling_steps=fine)
    return replace(config, grid=grid, eval=evaluation)


def _resolve_exploration(config: RunConfig, diffusion_std: float) -> RunConfig:
    """The rate of the exploratory noise: a constant diffusion's, and none on-policy."""
    given = config.exploration.std
    if config.data == "on_policy":
        require(not given, "exploration.std", given, "0 or nothing, as data = 'on_policy' does not explore")
        diffusion_std = 0.0
    return replace(config, exploration=replace(config.exploration, std=_either(given, diffusion_std)))


def _resolve_replay(config: RunConfig) -> RunConfig:
    """Where replayed states come from: of the refiners, where there are some."""
    replay, refiners, streamed = config.replay, config.refiner.count, config.data == "stream"
    if replay.source == "auto":
        replay = replace(replay, source="refined" if streamed and refiners else "terminals")
    if replay.source == "refined":
        require(streamed, "replay.source", "refined", "'terminals' or 'auto', as data = 'on_policy' has no refiners")
        enough = refiners > 0 or replay.ratio == 0
        require(enough, "refiner.count", 0, "at least 1, as replay.source = 'refined'")
    idle = streamed and refiners > 0 and replay.source == "terminals" and replay.ratio > 0
    require(not idle, "replay.source", "terminals", "'refined' or 'auto', as there are refiners (--refiners 0: none)")
    return replace(config, replay=replay)


def _check_roles(config: RunConfig) -> None:
    """Refuse a stream without actors, and actors or refiners without a stream: ConfigError naming the field."""
    if config.data == "stream":
        require(config.actor.count > 0, "actor.count", 0, "at least 1, as data = 'stream'")
        return
    allowed = "none, as data = 'on_policy' starts no actors and no refiners"
    require(set(config.actor.kinds) <= {"explore"}, "actor.kinds", dict(config.actor.kinds), allowed)
    kinds = set(config.refiner.kinds) if config.refiner.count else set()
    require(kinds <= {"mala"}, "refiner.kinds", dict(config.refiner.kinds), allowed)


def settled_kinds(config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    """Counts by kind of the actors and of the refiners that agree with their totals; ConfigError if they cannot."""
    actor, refiner = config.actor, config.refiner
    return (
        settle_kinds(actor.kinds, actor.count, "explore", "actor"),
        settle_kinds(refiner.kinds, refiner.count, "mala", "refiner"),
    )


def option_classes(kinds: Mapping[str, int], role: str) -> dict[str, type | None]:
    """The `Options` of every kind of a role ("actor" or "refiner"), by short name.

    `mala` is left out: it has a table of its own. Raises ConfigError for a kind whose class is not found.
    """
    load: Callable[[str], type[ExplorationActor] | type[Refiner]] = load_actor if role == "actor" else load_refiner
    return {short_name(kind): load(kind).Options for kind in kinds if (role, kind) != ("refiner", "mala")}


def _settle_kinds(config: RunConfig) -> RunConfig:
    """Counts by kind for every actor and refiner, and all options of every kind that has some, all checked."""
    actors, refiners = settled_kinds(config)
    actor = replace(config.actor, kinds=actors, options=_all_options(actors, config.actor.options, "actor"))
    refiner = replace(config.refiner, kinds=refiners, options=_all_options(refiners, config.refiner.options, "refiner"))
    return replace(config, actor=actor, refiner=refiner)


def _all_options(
    kinds: Mapping[str, int], given: Mapping[str, dict[str, Option]], role: str
) -> dict[str, dict[str, Option]]:
    """The options given with the defaults of the others, for every kind that has any."""
    classes = option_classes(kinds, role)
    for name, values in given.items():
        allowed = f"options of a kind that runs ({', '.join(classes) or 'none has any'}){suggest(name, classes)}"
        require(name in classes, f"{role}.options.{name}", values, allowed)
    options: dict[str, dict[str, Option]] = {}
    for name, options_class in classes.items():
        field_name = f"{role}.options.{name}"
        made = make_options(options_class, given.get(name, {}), field_name)
        if made is not None:
            options[name] = plain_options(made, field_name)
    return options


def _check_teacher(config: RunConfig) -> RunConfig:
    """Refuse what a teacher cannot learn from: ConfigError naming the field."""
    if not has_teacher(config):
        return config
    name, allowed = config.objective.name, "'trajectory_balance' or 'vargrad', as the run has a teacher"
    require(name in ("trajectory_balance", "vargrad"), "objective.name", name, allowed)
    length = config.objective.segment_length
    require(length is None, "objective.segment_length", length, "nothing, as the run has a teacher")
    lesson, replays = config.teacher.student_learns, config.replay.ratio > 0
    require(lesson == "paths" or replays, "teacher.student_learns", lesson, "'paths', as replay.ratio = 0")
    return config


def has_teacher(config: RunConfig) -> bool:
    """Whether a teacher is trained beside the student: for the actors that roll it out."""
    return config.data == "stream" and "teacher" in config.actor.kinds


def _check_objective(config: RunConfig, grid: GridConfig, policy: PolicyConfig) -> None:
    """Refuse what an objective cannot train on: ConfigError naming the field."""
    objective, flow = config.objective, policy.state_flow
    if objective.plugin:
        load_objective(objective.name)
    if objective.balances_flows:
        require(flow != "none", "policy.state_flow", flow, f"a flow, as objective.name = '{objective.name}'")
    else:
        allowed = f"'none' or 'auto', as objective.name = '{objective.name}' balances no flow"
        require(flow == "none", "policy.state_flow", flow, allowed)
    length, steps = objective.segment_length, grid.sampling_steps or 1
    require(length is None or length <= steps, "objective.segment_length", length, f"at most the {steps} steps")
    by_loss = length is not None and config.replay.prioritization == "loss"
    require(not by_loss, "replay.prioritization", "loss", "'rank' or 'uniform', as segments have no residual")
    if objective.pathwise:
        require(config.data == "on_policy", "data", config.data, f"'on_policy', as objective.name = '{objective.name}'")
        require(config.replay.ratio == 0, "replay.ratio", config.replay.ratio, "0, as nothing of it is trained on")
    else:
        for entry in fields(config.rollout):
            value, allowed = getattr(config.rollout, entry.name), "the default, as nothing is differentiated through it"
            require(value == entry.default, f"rollout.{entry.name}", value, allowed)
    detached = config.rollout.detach_score
    require(policy.langevin or not detached, "rollout.detach_score", detached, "false without policy.langevin")
    if objective.replay_only:
        replay, allowed = config.replay, "'refined' or 'auto': a policy's own samples would teach it nothing"
        require(config.data == "stream", "data", config.data, "'stream', where refiners make what is learned")
        require(replay.ratio > 0, "replay.ratio", replay.ratio, "a positive number, as only replay is trained on")
        require(replay.source != "terminals", "replay.source", replay.source, allowed)
        require(config.refiner.count > 0, "refiner.count", 0, "at least 1, as only what refiners send is trained on")


def as_dict(config: Any) -> dict[str, Any]:
    """Nested plain dictionary of a configuration; fields that are None are left out."""
    plain = dataclasses.asdict(config)

    def prune(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: prune(entry) for key, entry in value.items() if entry is not None}
        return list(value) if isinstance(value, tuple) else value

    return prune(plain)


def to_toml(config: RunConfig) -> str:
    """The configuration as TOML; `from_toml` reads it back equal."""
    return tomli_w.dumps(as_dict(config))


def from_toml(path: Path) -> RunConfig:
    """Read a configuration written by `to_toml`.

    Raises:
        ConfigError: an unreadable file, an unknown field, or a value that is not allowed.
    """
    return from_dict(RunConfig(), read_toml(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; ConfigError with the place of the mistake if it is none."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(str(path), "unreadable", f"a TOML file ({error})") from error


def from_dict(base: Any, data: dict[str, Any], prefix: str = "") -> Any:
    """`base` with the fields named in `data` replaced, recursively; types and names are checked."""
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in data.items():
        name = prefix + key
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            known = f"did you mean {prefix}{close[0]}?" if close else "one of " + ", ".join(hints)
            raise ConfigError(name, value, f"a known field ({known})")
        current = getattr(base, key)
        if dataclasses.is_dataclass(current):
            require(isinstance(value, dict), name, value, "a table")
            changes[key] = from_dict(current, value, f"{name}.")
        else:
            changes[key] = convert(hints[key], value, name)
    return replace(base, **changes)
