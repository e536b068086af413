"""From a resolved configuration to the components of each role, and from a role's name to its function.

The components are the same whether every role has a process of its own or all of them share one (`--sync`).
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from driftstream.actors import native
from driftstream.actors.actor import Actor, run_actor
from driftstream.actors.context import ActorContext, AskReplayed, no_replay
from driftstream.actors.kinds import blaming, expand_kinds, is_built_in, short_name
from driftstream.actors.policy import DiffusionPolicy
from driftstream.actors.refiner import Refiner, run_refiner
from driftstream.actors.registry import load_actor, load_refiner, make_options
from driftstream.buffers.control import RoleContext
from driftstream.envs.errors import ConfigError
from driftstream.envs.processes import make_process
from driftstream.envs.targets import CountedTarget, make_target
from driftstream.eval.evaluator import Evaluator, run_evaluator
from driftstream.launch.config import RunConfig, has_teacher
from driftstream.launch.hosts import RoleKinds
from driftstream.launch.seeding import derive_seed
from driftstream.launch.worker import role_name
from driftstream.learner.learner import Learner
from driftstream.learner.role import run_learner
from driftstream.learner.teacher import teacher_policy

# It announces the allocation of every replay memory.
logging.getLogger("torchrl").setLevel(logging.WARNING)


def resolve_device(device: str) -> torch.device:
    """`auto` is the first GPU, or the CPU where there is none.

    Raises:
        ConfigError: a device that torch does not know or that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Some devices (meta) hold tensors and cannot draw random numbers.
        torch.zeros(1, device=torch.Generator(device).device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError("device", device, "auto, cpu, or a device that is there, such as cuda:0") from error


def build_target(config: RunConfig, device: torch.device) -> CountedTarget:
    """The run's target, counting its evaluations."""
    return CountedTarget(make_target(config.target, **config.target_options).to(device))


def build_learner(config: RunConfig, seed: int) -> Learner:
    """The learner; its seed decides the initial parameters and every random draw of its own."""
    device = resolve_device(config.device)
    return Learner(
        build_target(config, device),
        make_process(config.process),
        config.grid,
        config.policy,
        config.replay,
        config.objective,
        config.optim,
        config.learner,
        config.rollout,
        seed,
        device,
        config.teacher if has_teacher(config) else None,
    )


def build_on_policy_actors(config: RunConfig, learner: Learner, seed: int) -> list[Actor]:
    """Who rolls out in the learner's process: nobody where the learner differentiates through its own simulation."""
    return [] if config.objective.pathwise else [_make_actor(config, "explore", seed, *_shared(learner))]


def build_local_actors(config: RunConfig, learner: Learner, seeds: Sequence[int]) -> list[Actor]:
    """Every actor of the run as a component of the learner's process, in the order of their indices."""
    kinds = expand_kinds(config.actor.kinds)
    return [_make_actor(config, kind, seed, *_shared(learner)) for kind, seed in zip(kinds, seeds, strict=True)]


def build_actor(config: RunConfig, seed: int, index: int = 0) -> Actor:
    """The actor of an index, with policies of its own."""
    target = build_target(config, torch.device("cpu"))
    policy = DiffusionPolicy(target.dim, config.policy).requires_grad_(False)
    teacher = None
    if has_teacher(config):
        teacher = DiffusionPolicy(target.dim, teacher_policy(config.policy)).requires_grad_(False)
    return _make_actor(config, expand_kinds(config.actor.kinds)[index], seed, policy, teacher, no_replay)


def _shared(learner: Learner) -> tuple[DiffusionPolicy, DiffusionPolicy | None, AskReplayed]:
    return learner.policy, None if learner.teacher is None else learner.teacher.policy, learner.draw_replayed


def _make_actor(
    config: RunConfig,
    kind: str,
    seed: int,
    policy: DiffusionPolicy,
    teacher: DiffusionPolicy | None,
    ask_replayed: AskReplayed,
) -> Actor:
    device, name, actor_class = policy_device(policy), short_name(kind), load_actor(kind)
    values = config.actor.options.get(name, {})
    context = ActorContext(
        policy,
        make_process(config.process),
        build_target(config, device),
        config.grid,
        replace(config.exploration, std=0.0) if config.data == "on_policy" else config.exploration,
        config.learner.batch_size,
        torch.Generator(device).manual_seed(seed),
        teacher,
        config.teacher.until,
        ask_replayed=ask_replayed,
    )
    options = make_options(actor_class.Options, values, f"actor.options.{name}")
    with blaming(f"actor {name}", is_built_in(actor_class)):
        explorer = actor_class(options)
    return Actor(name, explorer, context)


def policy_device(policy: DiffusionPolicy) -> torch.device:
    """The device that a policy's parameters are on."""
    return next(policy.parameters()).device


def build_refiner(config: RunConfig, seed: int, index: int = 0) -> Refiner:
    """The refiner of an index; like actors it works on the CPU, whatever the learner's device."""
    device = torch.device("cpu")
    generator = torch.Generator(device).manual_seed(seed)
    kind = expand_kinds(config.refiner.kinds)[index]
    name, refiner_class = short_name(kind), load_refiner(kind)
    options: object = config.refiner.mala
    if kind != "mala":
        values = config.refiner.options.get(name, {})
        options = make_options(refiner_class.Options, values, f"refiner.options.{name}")
    with blaming(f"refiner {name}", is_built_in(refiner_class)):
        return refiner_class(build_target(config, device), options, generator)


def build_evaluator(config: RunConfig, seed: int | None = None) -> Evaluator:
    """The evaluator; by default its draws depend on the run's seed alone, so that evaluations compare."""
    device = torch.device("cpu")
    if seed is None:
        seed = derive_seed(config.seed, "evaluator")
    return Evaluator(
        build_target(config, device),
        make_process(config.process),
        config.grid,
        config.policy,
        config.eval,
        seed,
        device,
    )


def run_role(role: str, config: RunConfig, context: RoleContext) -> None:
    """Run one role in this process until it is done or the run stops."""
    threads = {
        "learner": config.learner.threads,
        "actor": config.actor.threads,
        "refiner": config.refiner.threads,
    }
    torch.set_num_threads(threads.get(role, 1))
    logging.getLogger("driftstream").info("policies: %s", native.describe())
    if role == "learner":
        learner = build_learner(config, context.seed)
        on_policy_actors = None
        if config.data == "on_policy":
            on_policy_actors = build_on_policy_actors(config, learner, derive_seed(context.seed, "actor"))
        run_learner(
            context,
            learner,
            config.limits,
            config.checkpoint,
            config.stream,
            config.refiner.every,
            RoleKinds({role_name("actor", i): short_name(k) for i, k in enumerate(expand_kinds(config.actor.kinds))}),
            on_policy_actors,
        )
    elif role == "actor":
        context.turn()  # from here on a plug-in's code may hang
        run_actor(context, build_actor(config, context.seed, context.index), config.stream)
    elif role == "refiner":
        context.turn()
        run_refiner(context, build_refiner(config, context.seed, context.index), config.stream)
    elif role == "evaluator":
        run_evaluator(context, build_evaluator(config))
    else:
        raise ValueError(f"unknown role {role!r}")
